#!/bin/bash
# Disks and network cards that come and go while Debian runs: on virtio, NVMe and e1000, with data on them, after a suspension, one in the
# middle of its writing.
# limit: 2400
. "$(dirname "$0")/../lib.sh"

guest plug --firmware bios --memory 1G --network none --disk "$MATERIAL/debian12-tools.raw"
log_in plug 1
# disk_at N: the id of the guest's disk at this place, counted from 1.
disk_at() { ik guest show plug --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["disks"][int(sys.argv[1]) - 1]["id"])' "$1"; }
count() { ik guest show plug --json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["disks"]))'; }
has() { [ "$(count)" = "$1" ]; }

ik guest set plug --add-disk 64M
run_in plug 30 'for i in $(seq 20); do [ -b /dev/vdb ] && break; sleep 1; done; lsblk -bdno SIZE /dev/vdb | grep 67108864'
ik guest set plug --add-disk 64M --disk-bus nvme
run_in plug 30 'for i in $(seq 20); do [ -b /dev/nvme0n1 ] && break; sleep 1; done; lsblk -bdno SIZE /dev/nvme0n1 | grep 67108864'
run_in plug 60 'for d in vdb nvme0n1; do mke2fs -q -F /dev/$d && mount /dev/$d /mnt && dd if=/dev/urandom of=/mnt/data bs=1M count=16 status=none && sha256sum </mnt/data >/root/sum-$d && umount /mnt; done; ls /root/sum-vdb /root/sum-nvme0n1'

# With them suspended, and on.
ik guest suspend plug
ik guest start plug
await_state plug running 120
run_in plug 60 'for d in vdb nvme0n1; do mount /dev/$d /mnt && sha256sum </mnt/data | cmp - /root/sum-$d && umount /mnt || exit 1; done'

# The one on virtio goes while nothing uses it, and another takes its place.
ik guest set plug --remove-disk "$(disk_at 2)"
until_true 30 has 2 || broken "the disk is still there: $(ik guest show plug)"
run_in plug 30 '[ ! -b /dev/vdb ] && [ -b /dev/nvme0n1 ]'
ik guest set plug --add-disk 32M
run_in plug 30 'for i in $(seq 20); do [ -b /dev/vdb ] && break; sleep 1; done; lsblk -bdno SIZE /dev/vdb | grep 33554432'

# Removed in the middle of its writing: errors for the guest that asked for it, and nothing worse.
type_serial plug 'dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=60 oflag=direct 2>/dev/null; dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=60 oflag=direct 2>/dev/null; echo over\r'
ik guest set plug --remove-disk "$(disk_at 2)"
until_true 60 has 2 || broken "the disk is still there: $(ik guest show plug)"
await_serial plug '^over' 120
run_in plug 30 '[ ! -b /dev/nvme0n1 ]'
run_in plug 30 'dmesg | grep -i -E "ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace|hung task" && false || true'

# A network card comes, is changed for another, and stays through a suspension.
reaches() { run_in plug 90 "for i in \$(seq 40); do ip -4 route | grep -q default && break; sleep 1; done; ping -c 2 -W 20 \$(ip -4 route show default | cut -d\" \" -f3 | head -n 1)"; }
ik guest set plug --network nat
reaches
ik guest set plug --network nat --network-card e1000
run_in plug 60 'for i in $(seq 30); do ls -d /sys/bus/pci/drivers/e1000/0000:* && break; sleep 1; done; ls -d /sys/bus/pci/drivers/e1000/0000:*'
reaches
ik guest suspend plug
ik guest start plug
await_state plug running 120
reaches
ik guest set plug --network none
run_in plug 30 'ls -d /sys/bus/pci/drivers/e1000/0000:* && false || true; ip -o link | grep -v "lo:" && false || true'

# After a reset the rest is where it was.
ik guest reset plug
log_in plug 2
run_in plug 30 'lsblk -bdno SIZE /dev/vdb | grep 33554432'
