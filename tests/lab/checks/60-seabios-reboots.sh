#!/bin/bash
# SeaBIOS with nothing to boot from, reset 10 times: each time it comes to the same end. 62 does it 50 times, with more devices.
# limit: 1200
. "$(dirname "$0")/../lib.sh"

guest seabios --firmware bios --memory 64M --network none
for time in $(seq 10); do
  await_screen seabios 'No bootable device' 90
  [ "$time" = 10 ] || ik guest reset seabios
  # Not the text of the time before.
  sleep 1
done
