#!/bin/bash
# Each firmware is reset 50 times, in a guest with all kinds of devices, and comes to the same end each time.
# limit: 3000
# slow: half an hour; tests/lab/start 62
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

with=(--cpus 2 --memory 512M --network nat --usb --gpu --vsock --tpm)

guest seabios --firmware bios "${with[@]}"
for time in $(seq 50); do
  await_screen seabios 'No bootable device' 120
  [ "$time" = 50 ] || ik guest reset seabios
  # Not the text of the time before.
  sleep 1
done
ik guest poweroff seabios

guest ovmf --firmware uefi "${with[@]}"
for time in $(seq 50); do
  await_serial ovmf 'Shell>' 240 "$time"
  [ "$time" = 50 ] || ik guest reset ovmf
done
