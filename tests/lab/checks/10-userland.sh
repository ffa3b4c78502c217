#!/bin/bash
# A Linux kernel booted directly, as the ELF with the PVH entry and as bzImage, reaches its own userland and turns itself off.
# limit: 240
. "$(dirname "$0")/../lib.sh"

for kernel in cloud-vmlinux cloud-bzimage; do
  guest "direct-$kernel" --cpus 1 --memory 256M --network none --kernel "$MATERIAL/$kernel" --initrd "$MATERIAL/userland.cpio" \
    --cmdline "console=ttyS0 panic=-1"
  await_serial "direct-$kernel" INNKEEPER-USERLAND 60
  await_serial "direct-$kernel" 'userland: .* 1 CPUs' 20
  ends "direct-$kernel" 20
done

guest direct-two --cpus 2 --memory 256M --network none --kernel "$MATERIAL/cloud-vmlinux" --initrd "$MATERIAL/userland.cpio" --cmdline "console=ttyS0"
await_serial direct-two 'userland: .* 2 CPUs' 60
! serial direct-two | grep -a -i -E 'ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace' || broken "the kernel complains"
ends direct-two 20
