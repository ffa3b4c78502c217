#!/bin/bash
# memtest86+ boots from the CD, shows its screen, and a key press reaches it.
# limit: 180
. "$(dirname "$0")/../lib.sh"

guest memtest --firmware bios --memory 256M --network none --cdrom "$MATERIAL/memtest.iso"
await_screen memtest 'Memtest86+' 90
press memtest F1
await_screen memtest 'Settings' 30
