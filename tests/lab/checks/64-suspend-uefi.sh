#!/bin/bash
# As 46, by UEFI on NVMe and e1000; and a reset afterwards: the firmware's flash and the devices are as after power on.
# limit: 1500
# slow: as long as 46 again, for devices that save their state on the same way; tests/lab/start 64
# lab: --ovmf
# server: none
. "$(dirname "$0")/../lib.sh"
. "$(dirname "$0")/../suspend.sh"

guest dozy --firmware uefi --memory 512M --network nat --network-card e1000 --disk-bus nvme --disk "$MATERIAL/debian12-tools.raw"
log_in dozy 1
sleeps_and_goes_on dozy
ik guest reset dozy
log_in dozy 2
