#!/bin/bash
# SeaBIOS with nothing to boot from, reset 20 times: each time it comes to the same end.
# limit: 1200
. "$(dirname "$0")/../lib.sh"

guest seabios --firmware bios --memory 64M --network none
for time in $(seq 20); do
  await_screen seabios 'No bootable device' 90
  [ "$time" = 20 ] || ik guest reset seabios
  # Not the text of the time before.
  sleep 1
done
