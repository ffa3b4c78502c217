#!/bin/bash
# Debian's graphical installer: the pointer of the guest is where the viewer's is, by the virtio tablet and by the one on USB.
# limit: 1200
# slow: seven minutes of X under emulation; tests/lab/start 33
. "$(dirname "$0")/../lib.sh"

# shot NAME FILE X,Y: the screen after the pointer went there.
shot() {
  press "$1" "at=$3"
  sleep 3
  ik guest screenshot "$1" "$2" >/dev/null
}
# points NAME: the pointer follows.
points() {
  local folder
  folder=$(mktemp -d)
  points_once() {
    shot "$1" "$folder/first.png" 120,500
    shot "$1" "$folder/second.png" 600,520
    python3 "$tools/pointer-at" "$folder/first.png" 120,500 "$folder/second.png" 600,520 >"$folder/said"
  }
  until_true 500 points_once "$1" || { cp "$folder"/* "$RESULTS"; broken "$1: $(cat "$folder/said")"; }
  note "$1: $(cat "$folder/said")"
}

guest pointer --memory 1G --network none --kernel "$MATERIAL/installer-linux" --initrd "$MATERIAL/installer-gtk-initrd.gz" --cmdline "video=1024x768 ---"
points pointer
ik guest poweroff pointer
guest pointer-usb --memory 1G --network none --usb --kernel "$MATERIAL/installer-linux" --initrd "$MATERIAL/installer-gtk-initrd.gz" --cmdline "video=1024x768 modprobe.blacklist=virtio_input virtio_input.blacklist=yes ---"
points pointer-usb
