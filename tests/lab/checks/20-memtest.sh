#!/bin/bash
# memtest86+ boots from the CD by BIOS and by UEFI, shows its screen, and a key press reaches it.
# limit: 400
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

guest memtest --firmware bios --memory 256M --network none --cdrom "$MATERIAL/memtest.iso"
await_screen memtest 'Memtest86+' 90
press memtest F1
await_screen memtest 'Settings' 30
ik guest poweroff memtest

# There it draws by itself, 640×400 in the middle of 640×480, with a font of its own: some letters are not known.
reads() {
  ik guest screenshot memtest-uefi "$RESULTS/uefi.png" >/dev/null 2>&1 && python3 "$tools/screen-text" "$RESULTS/uefi.png" 40 | grep -q "$1"
}
guest memtest-uefi --firmware uefi --memory 256M --network none --cdrom "$MATERIAL/memtest.iso"
until_true 150 reads 'test86+' || broken "by UEFI there is no memtest86+ on the screen"
press memtest-uefi F1
until_true 60 reads 'ettings' || broken "a key does not reach memtest86+ by UEFI"
