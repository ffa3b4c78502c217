#!/bin/bash
# For the checks of suspensions, after lib.sh: a server of their own, and what a Debian guest has to live through.
# shellcheck disable=SC2154 # from tests/lab/run

server=""
serve() {
  setsid "$INNKEEPER" --state "$STATE" serve --listen 127.0.0.1:8443 >>"$RESULTS/serve.log" 2>&1 &
  server=$!
  until_true 60 ik guest ls >/dev/null || broken "the server does not answer"
}
end_server() {
  kill "$server"
  wait "$server" || true
}
trap 'remove_guests; end_server' EXIT
serve

# sleeps_and_goes_on GUEST
sleeps_and_goes_on() {
  run_in "$1" 60 'for i in $(seq 40); do ip -4 route | grep -q default && break; sleep 1; done; ping -c 1 -W 20 $(ip -4 route show default | cut -d" " -f3 | head -n 1)'
  run_in "$1" 60 'head -c 32M /dev/urandom >/dev/shm/data; sha256sum </dev/shm/data >/dev/shm/sum'
  type_serial "$1" '(i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 1; done) &\r'
  type_serial "$1" 'head -c 48M /dev/shm/data /dev/shm/data | tee /root/copy | sha256sum >/root/copied; sync; echo "written"-1\r'
  sleep 2
  ik guest suspend "$1"
  in_state "$1" suspended || broken "it is '$(field "$1" state)'"
  [ "$(field "$1" engine)" = None ] || [ -z "$(field "$1" engine)" ] || broken "its engine lives"
  note "$(ik guest log "$1" | grep 'engine: suspended')"
  end_server
  sleep 20
  serve
  in_state "$1" suspended || broken "after a restart of the server it is '$(field "$1" state)'"
  ik guest start "$1"
  await_serial "$1" '^written-1' 120
  run_in "$1" 60 'sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum </root/copy | cmp - /root/copied; sha256sum </dev/shm/data | cmp - /dev/shm/sum'
  run_in "$1" 30 'a=$(cat /run/count); sleep 4; b=$(cat /run/count); echo $a $b; [ $b -gt $a ]'
  run_in "$1" 60 'ping -c 2 -W 20 $(ip -4 route show default | cut -d" " -f3 | head -n 1)'
  # Its agent has set the clock.
  is_right() {
    type_serial "$1" 'echo "now"-$(date +%s)-now\r'
    sleep 3
    local guests
    guests=$(serial "$1" | sed -n 's/^now-\([0-9]*\)-now.*/\1/p' | tail -n 1)
    [ -n "$guests" ] && [ $(($(date +%s) - guests)) -lt 8 ] && [ $((guests - $(date +%s))) -lt 8 ]
  }
  until_true 60 is_right "$1" || broken "the guest's clock is wrong: $(serial "$1" | grep -a '^now-' | tail -n 1), here it is $(date +%s)"
  run_in "$1" 30 'dmesg | grep -i -E "I/O error|nvme.*(timeout|abort|reset)|e1000.*(hang|error)|soft lockup|stall|clocksource.*unstable|BUG:|Call Trace" && false || true'
}
