#!/bin/bash
# A Linux kernel booted directly, as the ELF with the PVH entry and as bzImage, reaches its own userland, hears what is typed and turns itself off.
# limit: 600
. "$(dirname "$0")/../lib.sh"

# direct NAME KERNEL CPUS
direct() {
  guest "$1" --cpus "$3" --memory 256M --network none --kernel "$MATERIAL/$2" --initrd "$MATERIAL/userland-stay.cpio" --cmdline "console=ttyS0 panic=-1"
  await_serial "$1" INNKEEPER-USERLAND 90
  await_serial "$1" "userland: .* $3 CPUs" 60
  ! serial "$1" | grep -a -i -E 'ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace' || broken "the kernel complains"
  type_serial "$1" 'echo heard-$((6 * 7))\r'
  await_serial "$1" '^heard-42' 30
  type_serial "$1" 'poweroff -f\r'
  ends "$1" 30
}

direct direct-elf cloud-vmlinux 1
direct direct-bzimage cloud-bzimage 1
direct direct-two cloud-vmlinux 2

# Two sockets of three cores: the ids of the processors have a gap, and the kernel finds all six.
guest groups --cpus 6 --sockets 2 --memory 256M --network none --kernel "$MATERIAL/cloud-vmlinux" --initrd "$MATERIAL/userland-stay.cpio" --cmdline "console=ttyS0 panic=-1"
await_serial groups 'userland: .* 6 CPUs' 120
type_serial groups 'echo ids-$(grep ^apicid /proc/cpuinfo | cut -d: -f2 | xargs)\r'
await_serial groups '^ids-0 1 2 4 5 6' 30
type_serial groups 'echo groups-$(grep "^physical id" /proc/cpuinfo | sort -u | wc -l)-$(grep -m 1 "^cpu cores" /proc/cpuinfo | cut -d: -f2 | xargs)\r'
await_serial groups '^groups-2-3' 30
type_serial groups 'poweroff -f\r'
ends groups 30

guest direct-off --memory 256M --network none --kernel "$MATERIAL/cloud-vmlinux" --initrd "$MATERIAL/userland.cpio" --cmdline "console=ttyS0 quiet"
ends direct-off 120
