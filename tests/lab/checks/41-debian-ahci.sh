#!/bin/bash
# The same Debian disk on AHCI, and on a bridge of the host's own: boots to login, an address from there, its data and their checksum.
# limit: 1200
. "$(dirname "$0")/../lib.sh"

# As a LAN: a bridge with somebody else's DHCP server on it.
ip link add lan0 type bridge
ip address add 192.168.99.1/24 dev lan0
ip link set lan0 up
dnsmasq --conf-file=/dev/null --pid-file=/run/lan0.pid --interface=lan0 --bind-interfaces --port=0 --dhcp-range=192.168.99.50,192.168.99.60 --dhcp-leasefile=/run/lan0.leases
trap 'remove_guests; kill "$(cat /run/lan0.pid)"' EXIT

guest debian-ahci --cpus 2 --memory 1G --network bridge:lan0 --disk-bus ahci --disk "$MATERIAL/debian12.raw"
log_in debian-ahci 1
run_in debian-ahci 30 'lsblk -dno NAME,TRAN | grep -q "sda *sata"'
run_in debian-ahci 60 'dd if=/dev/urandom of=/root/data bs=1M count=16 status=none; sha256sum </root/data >/root/sum; sync; echo 3 >/proc/sys/vm/drop_caches'
run_in debian-ahci 60 'sha256sum </root/data | cmp - /root/sum'
run_in debian-ahci 30 'dmesg | grep -E "ata[0-9].*(exception|error|reset)" && false || true'
run_in debian-ahci 60 'for i in $(seq 40); do ip -4 -br address | grep -q 192.168.99 && break; sleep 1; done; ping -c 1 -W 20 192.168.99.1'
[[ $(field debian-ahci addresses) == *192.168.99.* ]] || broken "the guest's address is not known to the server: $(field debian-ahci addresses)"
ik guest shutdown debian-ahci
ends debian-ahci 180
