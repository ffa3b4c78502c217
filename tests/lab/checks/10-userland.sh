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

guest direct-off --memory 256M --network none --kernel "$MATERIAL/cloud-vmlinux" --initrd "$MATERIAL/userland.cpio" --cmdline "console=ttyS0 quiet"
ends direct-off 120
