#!/bin/bash
# Debian's installer on the screen: the first dialog is answered by a key there.
# limit: 900
. "$(dirname "$0")/../lib.sh"

# fb=false: dialogs in the console's own font, which screen-text reads, instead of the installer's.
guest installer-screen --memory 1G --network nat --kernel "$MATERIAL/installer-linux" --initrd "$MATERIAL/installer-initrd.gz" --cmdline "quiet fb=false"
await_screen installer-screen 'Select a language' 300
press installer-screen Return
await_screen installer-screen 'Select your location' 90
