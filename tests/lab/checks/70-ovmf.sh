#!/bin/bash
# OVMF to its shell: a probe of the same machine with other firmware.
# limit: 600
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

guest ovmf --cpus 2 --memory 512M --network none --firmware uefi
await_serial ovmf 'Shell>' 540
