#!/bin/bash
# The same Debian disk on AHCI: boots to login, keeps what was written across a shut down, and its checksum.
# limit: 1200
. "$(dirname "$0")/../lib.sh"

guest debian-ahci --cpus 2 --memory 1G --network nat --disk-bus ahci --disk "$MATERIAL/debian12.raw"
log_in debian-ahci 1
run_in debian-ahci 30 'lsblk -dno NAME,TRAN | grep -q "sda *sata"'
run_in debian-ahci 60 'dd if=/dev/urandom of=/root/data bs=1M count=16 status=none; sha256sum </root/data >/root/sum; sync; echo 3 >/proc/sys/vm/drop_caches'
run_in debian-ahci 60 'sha256sum </root/data | cmp - /root/sum'
run_in debian-ahci 30 'dmesg | grep -E "ata[0-9].*(exception|error|reset)" && false || true'
ik guest shutdown debian-ahci
ends debian-ahci 180
