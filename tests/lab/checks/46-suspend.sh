#!/bin/bash
# Debian is suspended to disk in the middle of its work and goes on after a restart of the server: memory, processes, a write that was
# under way, the network, both consoles, its clock. On virtio by BIOS; 64 is the same on other devices.
# limit: 1500
# server: none
. "$(dirname "$0")/../lib.sh"
. "$(dirname "$0")/../suspend.sh"

guest sleepy --firmware bios --memory 512M --network nat --disk "$MATERIAL/debian12-tools.raw"
log_in sleepy 1
sleeps_and_goes_on sleepy
ik guest shutdown sleepy
ends sleepy 180
