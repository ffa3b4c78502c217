#!/bin/bash
# A system that hangs with its watchdog running is reset, and knows why; while it is paused, nothing counts.
# limit: 1500
# slow: two boots of Debian more for one device; tests/lab/start 45
. "$(dirname "$0")/../lib.sh"

guest dog --firmware bios --memory 512M --network none --watchdog reset --disk "$MATERIAL/debian12-tools.raw"
log_in dog 1
run_in dog 60 'modprobe i6300esb heartbeat=20; cat /sys/class/watchdog/watchdog0/identity | grep 6300ESB; cat /sys/class/watchdog/watchdog0/bootstatus | grep "^0"'
# Opening starts it; nobody feeds it.
type_serial dog 'exec 9>/dev/watchdog; echo "armed"-1\r'
await_serial dog '^armed-1' 20
ik guest pause dog
sleep 30
ik guest resume dog
run_in dog 10 'true'
log_in dog 2
run_in dog 60 'modprobe i6300esb; cat /sys/class/watchdog/watchdog0/bootstatus | grep "^32"'
ik guest log dog | grep -q 'did not feed its watchdog' || broken "the log does not say why it was reset"
ik guest poweroff dog
await_state dog stopped 30 || broken "it does not stop"

ik guest set dog --watchdog pause
ik guest start dog
# A new engine, a new scrollback.
log_in dog 1
type_serial dog 'modprobe i6300esb heartbeat=20; exec 9>/dev/watchdog\r'
await_state dog paused 90 || broken "it is '$(field dog state)' and not paused"
[[ $(field dog reason) == *"watchdog"* ]] || broken "the reason is '$(field dog reason)'"
