#!/bin/bash
# A Debian disk on virtio-blk: GRUB, login on serial and screen, addresses, a download, iperf3, the guest agent, frozen file
# systems, a full host, a pause, reset, shut down from outside.
# limit: 2400
. "$(dirname "$0")/../lib.sh"

# The guest's gateway is this machine, which serves a file it can know.
folder=$(mktemp -d)
echo "innkeeper-$$" >"$folder/hello"
python3 -m http.server --directory "$folder" 8099 >/dev/null 2>&1 &
web=$!
trap 'remove_guests; kill $web' EXIT

modprobe vhost_net || broken "this kernel has no vhost-net"
guest debian --firmware bios --memory 1G --network nat --disk "$MATERIAL/debian12-tools.raw"
await_serial debian 'GRUB' 60
log_in debian 1
await_screen debian 'guest login:' 60
run_in debian 60 'for i in $(seq 40); do ip -4 route | grep -q default && break; sleep 1; done; ip -4 -br address'
run_in debian 60 'curl -s --max-time 20 http://$(ip -4 route show default | cut -d" " -f3 | head -n 1):8099/hello'
await_serial debian "^innkeeper-$$" 5
[[ $(field debian addresses) == *[0-9]* ]] || broken "the guest's address is not known to the server"
run_in debian 60 'for i in $(seq 40); do ip -6 -br address show scope global | grep -q " fd" && break; sleep 1; done; ip -6 -br address show scope global | grep " fd"'
run_in debian 60 'ping -6 -c 1 -W 20 $(ip -6 route show default | cut -d" " -f3 | head -n 1)%$(ip -6 route show default | sed "s/.*dev //; s/ .*//" | head -n 1)'
iperf debian
# Streams, from 4 MiB a second on, are the kernel's: its thread for the card is called so.
rate=$(awk '/receiver/ {print int($7)}' "$RESULTS/iperf-debian")
if [ "$rate" -ge 50 ]; then
  grep -qs '^vhost-' /proc/[0-9]*/task/*/comm || broken "the kernel carried no stream by itself"
else
  note "vhost-net is not looked for: $rate Mbit/s are no stream"
fi
tells() { [[ $(field debian agent) == *"$1"* ]]; }
until_true 60 tells 'Debian GNU/Linux 12' || broken "the guest's agent is not heard: '$(field debian agent)'"
tells "'host_name': 'guest'" || broken "the agent says '$(field debian agent)'"
note "agent: $(field debian agent)"

# Its file systems are held still, and go on by themselves at the latest.
ik guest freeze debian --seconds 600
type_serial debian 'touch /root/frozen; echo "touched"-1\r'
sleep 5
said debian '^touched-1' 1 && broken "it writes to a frozen file system"
ik guest thaw debian
await_serial debian '^touched-1' 30
ik guest freeze debian --seconds 5
type_serial debian 'touch /root/frozen-2; echo "touched"-2\r'
await_serial debian '^touched-2' 60
run_in debian 30 'dmesg | grep -i -E "ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace" && false || true'
run_in debian 60 'dd if=/dev/urandom of=/root/data bs=1M count=16 status=none; sha256sum </root/data >/root/sum; sync'

# The host's disk is full: the guest is paused with the reason, and goes on when there is room again.
fallocate -l $(($(df --output=avail -B1 "$STATE" | tail -n 1) - (24 << 20))) "$STATE/filler"
type_serial debian 'dd if=/dev/urandom of=/root/big bs=1M count=64 conv=fsync status=none; echo "written"-$?\r'
await_state debian paused 120 || broken "the guest is '$(field debian state)' with a full disk; $(serial debian | tail -n 5)"
note "paused: $(field debian reason)"
[[ $(field debian reason) == *"no space"* ]] || broken "the reason is '$(field debian reason)'"
rm "$STATE/filler"
ik guest resume debian
await_serial debian '^written-0' 120
run_in debian 30 'dmesg | grep -E "I/O error|EXT4-fs error" && false || true'

# Its clock goes on from now, and not from when it was paused.
ik guest pause debian
sleep 20
ik guest resume debian
sleep 3
type_serial debian 'echo "clock-$(date +%s)"\r'
until_true 30 said debian '^clock-[0-9]' 1 || broken "no time after the pause"
late=$(($(date +%s) - $(serial debian | sed -n 's/^clock-//p' | tail -n 1)))
[ ${late#-} -le 15 ] || broken "its clock is $late s behind after a pause"

ik guest reset debian
log_in debian 2
run_in debian 60 'sha256sum </root/data | cmp - /root/sum'
ik guest shutdown debian
ends debian 180
