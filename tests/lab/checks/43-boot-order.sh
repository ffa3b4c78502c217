#!/bin/bash
# What a guest boots from, by both firmwares: the boot order, one start from another device, the firmware's own setup, the network.
# limit: 1200
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# off NAME
off() {
  ik guest poweroff "$1"
  await_state "$1" stopped 30 || broken "$1 is '$(field "$1" state)' after power off"
}
two() { guest "$1" --memory 512M --network none --firmware "$2" --disk "$MATERIAL/debian12-tools.raw" --cdrom "$MATERIAL/rescue.iso" "${@:3}"; }

# The disk comes first, the CD once, and a reset goes back to the disk.
two uefi uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi
ik guest start uefi --boot cd
await_serial uefi 'INNKEEPER-CD by efi' 100
ik guest reset uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi
ik guest start uefi --boot setup
await_serial uefi 'Boot Manager' 100
ik guest reset uefi
await_serial uefi 'INNKEEPER-DISK by efi' 100
off uefi

two bios bios --boot-order cd
await_serial bios 'INNKEEPER-CD by pc' 60
off bios
ik guest set bios --boot-order disk1
ik guest start bios
await_serial bios 'INNKEEPER-DISK by pc' 60
off bios
ik guest start bios --boot cd
await_serial bios 'INNKEEPER-CD by pc' 60
ik guest reset bios
await_serial bios 'INNKEEPER-DISK by pc' 60
off bios

# From the network by BIOS, with both cards: iPXE takes an address and a script from a bridge of this machine.
folder=$(mktemp -d)
printf '#!ipxe\necho INNKEEPER by network\nsleep 600\n' >"$folder/hello.ipxe"
chmod -R a+rX "$folder"
ip link add pxe0 type bridge
ip address add 10.9.7.1/24 dev pxe0
ip link set pxe0 up
dnsmasq --no-daemon --conf-file=/dev/null --port=0 --interface=pxe0 --bind-interfaces --dhcp-range=10.9.7.10,10.9.7.99 --dhcp-boot=hello.ipxe \
  --enable-tftp --tftp-root="$folder" --dhcp-leasefile="$folder/leases" >"$RESULTS/dnsmasq" 2>&1 &
server=$!
trap 'remove_guests; kill $server' EXIT
guest net-virtio --memory 256M --firmware bios --network bridge:pxe0 --boot-order network --disk "$MATERIAL/debian12-tools.raw"
await_screen net-virtio 'INNKEEPER by network' 120
off net-virtio
guest net-e1000 --memory 256M --firmware bios --network bridge:pxe0 --network-card e1000 --disk "$MATERIAL/debian12-tools.raw"
await_serial net-e1000 'INNKEEPER-DISK by pc' 60
off net-e1000
# One start only: the disk comes first again.
ik guest start net-e1000 --boot network
await_screen net-e1000 'INNKEEPER by network' 120
ik guest reset net-e1000
await_serial net-e1000 'INNKEEPER-DISK by pc' 60
