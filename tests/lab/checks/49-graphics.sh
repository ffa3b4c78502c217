#!/bin/bash
# Debian by UEFI on the card that is VGA and virtio in one: the boot loader by VGA, then its driver, whose screen takes the size that a viewer
# wishes for; on a virtio keyboard, through a suspension and a reset. SeaBIOS meets the card in 62.
# limit: 2400
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# picture NAME: the size of the guest's picture.
picture() {
  local file
  file=$(mktemp --suffix=.png)
  ik guest screenshot "$1" "$file" >/dev/null
  python3 -c 'import struct, sys; print("%dx%d" % struct.unpack(">II", open(sys.argv[1], "rb").read(24)[16:]))' "$file"
  rm -f "$file"
}
pictured() { [ "$(picture "$1")" = "$2" ]; }
# has_mode NAME SIZE: the guest's driver says that the screen is best in this size.
has_mode() { run_in "$1" 30 "for i in \$(seq 15); do [ \$(head -n 1 /sys/class/drm/card*-Virtual-1/modes) = $2 ] && break; sleep 1; done; head -n 1 /sys/class/drm/card*-Virtual-1/modes | grep -x $2"; }

guest gpu --firmware uefi --memory 1G --network none --gpu --virtio-keyboard --disk "$MATERIAL/debian12-tools.raw"
log_in gpu 1
run_in gpu 30 'basename $(readlink /sys/bus/pci/devices/0000:00:02.0/driver) | grep -x virtio-pci'
run_in gpu 30 'ls -d /sys/class/drm/card*-Virtual-1 && ! ls -d /sys/class/drm/card1'
run_in gpu 30 'grep -i "innkeeper.*keyboard" /proc/bus/input/devices'
await_screen gpu 'guest login:' 60
has_mode gpu 1024x768
# The text console keeps its size, and shows modes that fit into it.
press gpu size=800x600
has_mode gpu 800x600
press gpu r o o t Return
# The reader of screens does not know the "w" of this console's font.
await_screen gpu 'Pass.ord:' 60
ik guest suspend gpu
ik guest start gpu
await_state gpu running 120
press gpu i n n k e e p e r Return
await_screen gpu 'root@guest:' 90
has_mode gpu 800x600
# VGA again after a reset, then the driver again, which begins with the size that is wished for by then.
press gpu size=1280x800
ik guest reset gpu
await_serial gpu 'guest login:' 400 2
until_true 60 pictured gpu 1280x800 || broken "gpu: the picture is $(picture gpu)"
await_screen gpu 'guest login:' 60
if said gpu 'drm.*ERROR' 1; then broken "gpu: its driver complains: $(serial gpu | grep -a 'drm.*ERROR' | tail -n 3)"; fi
ik guest poweroff gpu
ends gpu 60
