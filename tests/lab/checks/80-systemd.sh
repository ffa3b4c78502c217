#!/bin/bash
# Installed as a service of systemd: what is killed and what lives on, upgrade, a host that was off, and being taken away again.
# limit: 600
# lab: --systemd
# server: none
. "$(dirname "$0")/../lib.sh"

top=$(cd "$(dirname "$0")/../../.." && pwd)
# The installed one, with the places it has by itself.
ik() { /usr/local/bin/innkeeper "$@"; }
[ -d /run/systemd/system ] || skip "systemd does not run here"
program=$(mktemp -d)/innkeeper
mv "$INNKEEPER" "$program"

# What systemd and the service said goes along.
broken() {
  echo "FAILED: $*"
  systemctl --no-pager --full status innkeeper || true
  journalctl --no-pager -u innkeeper -n 40 || true
  exit 1
}
installing() { "$top/appliance/install" --binary "$program" 2>&1; }
# engine NAME: the process of a running guest; nothing when there is none.
engine() { sed -n 's/^{"pid":\([0-9]*\),.*/\1/p' "/run/innkeeper/guests/$(field "$1" id)/pid" 2>/dev/null; }
answers() { ik guest ls >/dev/null 2>&1; }
server() { systemctl show --value --property MainPID innkeeper; }
web() { pgrep -P "$(server)" -f '^innkeeper web' || true; }
another_server() { [ "$(server)" != "$1" ] && [ "$(server)" != 0 ] && answers; }
another_web() { [ -n "$(web)" ] && [ "$(web)" != "$1" ] && answers; }

# go_on WHAT: both guests have the engines they had, are running, and still speak.
go_on() {
  local name
  for name in one two; do
    await_state "$name" running 20 || broken "after $1: $name is '$(field "$name" state)'"
    [ "$(engine "$name")" = "${before[$name]}" ] || broken "after $1: $name has another engine"
  done
  local bytes
  bytes=$(serial one | wc -c)
  until_true 20 more_bytes "$bytes" || broken "after $1: the guest is silent"
  note "after $1: both guests run on"
}
more_bytes() { [ "$(serial one | wc -c)" -gt "$1" ]; }

said=$(installing) || broken "appliance/install: $said"
grep -q 'https://.*/setup?token=' <<<"$said" || broken "no set-up link: $said"
note "installed"
[ "$(stat -c '%U:%G %a' /var/lib/innkeeper)" = 'root:innkeeper 1770' ] || broken "the state directory is $(stat -c '%U:%G %a' /var/lib/innkeeper)"
[ "$(stat -c %U /var/lib/innkeeper/innkeeper.db)" = innkeeper ] || broken "the database belongs to $(stat -c %U /var/lib/innkeeper/innkeeper.db)"
[ "$(stat -c %U "/proc/$(web)")" = innkeeper ] || broken "the web role runs as $(stat -c %U "/proc/$(web)")"
echo 'correct horse battery' | ik admin create-user ada --role administrator --password-stdin || broken "create-user"
declare -A before=()
for name in one two; do
  guest "$name" --test-guest --network nat
  before[$name]=$(engine "$name")
  [[ "$(cat "/proc/${before[$name]}/cgroup")" == */innkeeper.service/guest-* ]] || broken "$name has no control group of its own: $(cat "/proc/${before[$name]}/cgroup")"
done
await_serial one . 20

old=$(web)
kill -9 "$old"
until_true 20 another_web "$old" || broken "the web role did not come back"
go_on "kill -9 of the web role"
old=$(server)
kill -9 "$old"
until_true 30 another_server "$old" || broken "hostd did not come back"
go_on "kill -9 of hostd"
old=$(server)
kill -9 "$old" $(web)
until_true 30 another_server "$old" || broken "the server did not come back"
go_on "kill -9 of both"
systemctl restart innkeeper
until_true 20 answers || broken "no answer after systemctl restart"
go_on "systemctl restart"
begun=$(date +%s%N)
systemctl stop innkeeper
took=$((($(date +%s%N) - begun) / 1000000))
[ -d "/proc/${before[one]}" ] && [ -d "/proc/${before[two]}" ] || broken "a stop of the service ended guests"
note "systemctl stop took $took ms"
systemctl start innkeeper
until_true 20 answers || broken "no answer after systemctl start"
go_on "systemctl stop and start"

said=$(installing) || broken "upgrade: $said"
go_on "an upgrade"

kill -9 "${before[two]}"
await_state two failed 10 || broken "two is '$(field two state)' after kill -9 of its engine"
[[ "$(field two reason)" == *"without a word"* ]] || broken "the reason is '$(field two reason)'"
[ "$(engine one)" = "${before[one]}" ] || broken "the other guest has another engine"
ik guest start two
before[two]=$(engine two)
go_on "kill -9 of an engine"

# A host that was off: no process of ours, nothing in /run. What was on starts again; what was off stays off.
ik guest create off --test-guest --network none
made+=(off)
systemctl stop innkeeper
kill -9 "${before[one]}" "${before[two]}"
until_true 10 test ! -d "/proc/${before[two]}" || broken "an engine does not end"
ik admin remove-networks
rm -rf /run/innkeeper
systemd-tmpfiles --create /etc/tmpfiles.d/innkeeper.conf
systemctl start innkeeper
until_true 20 answers || broken "no answer after the host was off"
for name in one two; do
  await_state "$name" running 30 || broken "$name did not start by itself: '$(field "$name" state)'"
  before[$name]=$(engine "$name")
done
in_state off stopped || broken "a guest that was off is '$(field off state)'"
go_on "a start of the host"

said=$("$top/appliance/install" --uninstall 2>&1) && broken "uninstalled while guests run: $said"
grep -q 'guests run' <<<"$said" || broken "$said"
for name in one two; do
  ik guest poweroff "$name"
  await_state "$name" stopped 20 || broken "$name does not stop"
done
made=()
said=$("$top/appliance/install" --uninstall 2>&1) || broken "uninstall: $said"
grep -q /var/lib/innkeeper <<<"$said" || broken "it does not say where the state is: $said"
[ -e /var/lib/innkeeper/innkeeper.db ] || broken "the state is gone"
for trace in /usr/local/bin/innkeeper /etc/systemd/system/innkeeper.service /etc/sysusers.d/innkeeper.conf /run/innkeeper; do
  [ ! -e "$trace" ] || broken "$trace is still there"
done
ip -brief link | grep innkeeper && broken "a bridge is still there"
pgrep -x innkeeper && broken "a process is still there"
note "uninstalled; the state is left"
