#!/bin/bash
# What a guest boots from, by both firmwares: the boot order, one start from another device, the firmware's own setup.
# limit: 1200
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# off NAME
off() {
  ik guest poweroff "$1"
  await_state "$1" stopped 30 || broken "$1 is '$(field "$1" state)' after power off"
}
two() { guest "$1" --memory 512M --network none --firmware "$2" --disk "$MATERIAL/debian12-tools.raw" --cdrom "$MATERIAL/rescue.iso" "${@:3}"; }

# The disk comes first, the CD once, and a reset goes back to the disk.
two uefi uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi
ik guest start uefi --boot cd
await_serial uefi 'INNKEEPER-CD by efi' 100
ik guest reset uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi
ik guest start uefi --boot setup
await_serial uefi 'Boot Manager' 100
ik guest reset uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi

two bios bios --boot-order cd
await_serial bios 'INNKEEPER-CD by pc' 60
off bios
ik guest set bios --boot-order disk1
ik guest start bios
await_serial bios 'INNKEEPER-DISK by pc' 60
off bios
ik guest start bios --boot cd
await_serial bios 'INNKEEPER-CD by pc' 60
ik guest reset bios
await_serial bios 'INNKEEPER-DISK by pc' 60
