#!/bin/bash
# Debian's installer, kernel and initrd booted directly: its first dialog comes on the serial console and is answered by keys.
# limit: 900
# slow: the installer is shown on the screen by 31 and on the serial console by 32; tests/lab/start 30
. "$(dirname "$0")/../lib.sh"

guest installer --memory 1G --network nat --kernel "$MATERIAL/installer-linux" --initrd "$MATERIAL/installer-initrd.gz" --cmdline "console=ttyS0,115200 ---"
await_serial installer 'Select a language' 300
type_serial installer '\r'
await_serial installer 'Select your location' 60
