#!/bin/bash
# iPXE from its CD, as far as its banner.
# limit: 120
. "$(dirname "$0")/../lib.sh"

guest ipxe --firmware bios --memory 256M --network nat --cdrom "$MATERIAL/ipxe.iso"
await_screen ipxe 'iPXE 1\.' 60
