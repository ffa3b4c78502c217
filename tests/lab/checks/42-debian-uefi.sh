#!/bin/bash
# The Debian disk by UEFI: on virtio-blk without Secure Boot, on AHCI with it, by the chain that Microsoft and Debian signed,
# measured into a TPM.
# limit: 2400
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# no_complaint NAME: neither tables nor drivers are complained about.
no_complaint() { run_in "$1" 30 'dmesg | grep -i -E "ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace|firmware bug" && false || true'; }

guest debian-uefi --memory 1G --network none --firmware uefi --disk "$MATERIAL/debian12-tools.raw"
log_in debian-uefi 1
run_in debian-uefi 30 'test -d /sys/firmware/efi/efivars && efibootmgr -v'
run_in debian-uefi 30 'mokutil --sb-state | grep -i "disabled"'
no_complaint debian-uefi
# A variable that the system writes is on the disk at once; 71 finds such a one again.
run_in debian-uefi 30 'efibootmgr -q -c -d /dev/vda -p 1 -L "Debian by hand" -l "\\\\EFI\\\\BOOT\\\\grubx64.efi"'
grep -qaP 'D\0e\0b\0i\0a\0n\0 \0b\0y\0 \0h\0a\0n\0d' "$STATE/guests/$(field debian-uefi id)"/* || broken "the variable is not in the guest's folder"
type_serial debian-uefi 'poweroff\r'
ends debian-uefi 180

guest debian-secure --memory 1G --network none --firmware uefi-secure --disk-bus ahci --tpm --disk "$MATERIAL/debian12-tools.raw"
log_in debian-secure 1
run_in debian-secure 30 'mokutil --sb-state | grep -i "SecureBoot enabled"'
run_in debian-secure 30 'dmesg | grep -i "secure boot enabled\|Kernel is locked down"'
# Here GRUB starts the kernel by its EFI stub, which asks the firmware for the log of what it has measured.
run_in debian-secure 30 'grep -v -x "0*" /sys/class/tpm/tpm0/pcr-sha256/7 && [ $(head -c 64 /sys/kernel/security/tpm0/binary_bios_measurements | wc -c) = 64 ]'
no_complaint debian-secure
ik guest shutdown debian-secure
ends debian-secure 180
