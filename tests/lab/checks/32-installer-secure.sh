#!/bin/bash
# Debian's installer by UEFI with Secure Boot: shim, GRUB and kernel by the signatures of Microsoft and Debian; the kernel says that the firmware's
# variable says so.
# limit: 1200
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

guest installer-secure --firmware uefi-secure --memory 1G --network none --disk "$MATERIAL/installer-secure.raw"
await_serial installer-secure 'secureboot: Secure boot enabled' 250
await_serial installer-secure 'Kernel is locked down from EFI Secure Boot' 10
await_serial installer-secure 'Select a language' 300
type_serial installer-secure '\r'
await_serial installer-secure 'Select your location' 60
