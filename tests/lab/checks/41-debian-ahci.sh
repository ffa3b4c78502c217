#!/bin/bash
# The same Debian disk on AHCI, and on a bridge of the host's own: boots to login, an address from there, its
# data and their checksum, a TPM that SeaBIOS has measured into, a CD changed while it runs, a crash of its kernel.
# limit: 2000
. "$(dirname "$0")/../lib.sh"

# As a LAN: a bridge with somebody else's DHCP server on it.
ip link add lan0 type bridge
ip address add 192.168.99.1/24 dev lan0
ip link set lan0 up
dnsmasq --conf-file=/dev/null --pid-file=/run/lan0.pid --interface=lan0 --bind-interfaces --port=0 --dhcp-range=192.168.99.50,192.168.99.60 --dhcp-leasefile=/run/lan0.leases
trap 'remove_guests; kill "$(cat /run/lan0.pid)"' EXIT

guest debian-ahci --firmware bios --memory 1G --network bridge:lan0 --disk-bus ahci --tpm --disk "$MATERIAL/debian12-tools.raw"
log_in debian-ahci 1
run_in debian-ahci 30 'lsblk -dno NAME,TRAN | grep -q "sda *sata"'
run_in debian-ahci 60 'dd if=/dev/urandom of=/root/data bs=1M count=16 status=none; sha256sum </root/data >/root/sum; sync; echo 3 >/proc/sys/vm/drop_caches'
run_in debian-ahci 60 'sha256sum </root/data | cmp - /root/sum'
run_in debian-ahci 30 'dmesg | grep -E "ata[0-9].*(exception|error|reset)" && false || true'
run_in debian-ahci 60 'for i in $(seq 40); do ip -4 -br address | grep -q 192.168.99 && break; sleep 1; done; ping -c 1 -W 20 192.168.99.1'
[[ $(field debian-ahci addresses) == *192.168.99.* ]] || broken "the guest's address is not known to the server: $(field debian-ahci addresses)"

run_in debian-ahci 30 'grep -x 2 /sys/class/tpm/tpm0/tpm_version_major && grep -v -x "0*" /sys/class/tpm/tpm0/pcr-sha256/4'

# The CD is changed while it runs.
ik guest cd debian-ahci "$MATERIAL/memtest.iso"
run_in debian-ahci 60 'for i in $(seq 20); do mount -r /dev/sr0 /mnt && break; sleep 1; done; ls /mnt | grep -q . && umount /mnt'
ik guest cd debian-ahci --eject
run_in debian-ahci 30 '! mount -r /dev/sr0 /mnt'

# The kernel crashes, and says so.
run_in debian-ahci 30 'udevadm settle; lsmod | grep -q pvpanic || modprobe pvpanic-mmio'
type_serial debian-ahci 'sync; echo c >/proc/sysrq-trigger\r'
tells() { [[ $(field debian-ahci reason) == *"kernel has crashed"* ]]; }
until_true 60 tells || broken "the crash is not told: '$(field debian-ahci reason)'"
note "$(field debian-ahci reason)"
ik guest reset debian-ahci
await_serial debian-ahci 'INNKEEPER-DISK by pc' 60 2
[ -z "$(field debian-ahci reason)" ] || broken "after a reset it still says '$(field debian-ahci reason)'"
