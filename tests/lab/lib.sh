#!/bin/bash
# What the checks share (sourced by bash): the command under test, waiting for a guest's text, typing, keys. Every wait has a limit.
# tests/lab/run sets INNKEEPER (the binary), STATE (its state folder), MATERIAL, RESULTS, and starts the server.

set -euo pipefail
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ik ARGUMENT…: the command of the server under test.
ik() { "$INNKEEPER" --state "$STATE" "$@"; }

# broken TEXT…: the check failed, and why.
broken() {
  echo "FAILED: $*"
  exit 1
}

# skip TEXT…: the check cannot run here, and why.
skip() {
  echo "skip: $*"
  exit 77
}

note() { printf '%4ss %s\n' "$SECONDS" "$*"; }

# guest NAME ARGUMENT…: creates and starts a guest that is gone again when the check ends.
made=()
guest() {
  ik guest create "$@"
  made+=("$1")
  ik guest start "$1"
  note "$1 started"
}

remove_guests() {
  local code=$? name
  for name in ${made[@]+"${made[@]}"}; do
    [ $code = 0 ] || keep "$name"
    ik guest poweroff "$name" >/dev/null 2>&1 || true
    await_state "$name" stopped 20 || true
    ik guest rm --yes "$name" >/dev/null 2>&1 || true
  done
}
trap remove_guests EXIT

# keep NAME: what there is to see of a guest, into the results.
keep() {
  local base
  base=$RESULTS/$(basename "$0" .sh)-$1
  serial "$1" >"$base.serial" 2>&1 || true
  ik guest screenshot "$1" "$base.png" >/dev/null 2>&1 || true
  ik guest show "$1" --json >"$base.json" 2>&1 || true
  ik guest log "$1" >"$base.engine-log" 2>&1 || true
}

# field NAME KEY: one value of `guest show --json`.
field() {
  ik guest show "$1" --json | python3 -c 'import json, sys; v = json.load(sys.stdin).get(sys.argv[1]); print("" if v is None else v)' "$2"
}

# How many times longer than on a quiet machine everything may take: a machine that is busy elsewhere is three times slower.
PATIENCE=3

# until_true SECONDS COMMAND…: true as soon as the command is; false after the time that it may take on a quiet machine, with patience.
until_true() {
  local end=$((SECONDS + $1 * PATIENCE))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.5
  done
}

# serial NAME: all that is in the scrollback, without carriage returns and a terminal's escape sequences.
serial() { ik guest console "$1" --dump | tr -d '\r\0' | sed 's/\x1b\[[0-9;?]*[A-Za-z]//g'; }

# What the serial console has said N times or more.
said() { [ "$(serial "$1" | grep -a -c -e "$2")" -ge "$3" ]; }

# await_serial NAME PATTERN SECONDS [TIMES]: waits until the pattern is on TIMES lines of the serial console.
await_serial() {
  until_true "$3" said "$1" "$2" "${4:-1}" || broken "$1: no '$2' on the serial console within $3 s; its end: $(serial "$1" | tail -n 15)"
  note "$1 says '$2' on serial"
}

# type_serial NAME TEXT: as typed on the serial console; \r is Enter.
type_serial() { printf '%b' "$2" | timeout 30 "$INNKEEPER" --state "$STATE" guest console "$1" >/dev/null; }

# screen NAME: the text on the guest's screen.
screen() {
  local file
  file=$(mktemp --suffix=.png)
  ik guest screenshot "$1" "$file" >/dev/null 2>&1 && python3 "$tools/screen-text" "$file"
  rm -f "$file"
}

shows() { screen "$1" | grep -a -q -e "$2"; }

# await_screen NAME PATTERN SECONDS
await_screen() {
  until_true "$3" shows "$1" "$2" || broken "$1: no '$2' on the screen within $3 s; it shows: $(screen "$1" | grep -v '^ *$' | tail -n 20)"
  note "$1 shows '$2'"
}

# press NAME KEY…: keys on the guest's screen, over RFB as a viewer sends them (Return, F1, Escape, a…).
press() {
  local name=$1
  shift
  python3 "$tools/vnc-keys" "$STATE/run/guests/$(field "$name" id)/vnc.sock" "$@"
}

in_state() { [ "$(field "$1" state)" = "$2" ]; }

# await_state NAME STATE SECONDS
await_state() { until_true "$3" in_state "$1" "$2"; }

# ends NAME SECONDS: the guest stops by itself, without having failed.
ends() {
  await_state "$1" stopped "$2" || broken "$1 is '$(field "$1" state)' and not stopped after $2 s"
  note "$1 stopped"
}

# run_in NAME SECONDS COMMAND: types a command for a shell on the serial console and waits for its end. Prints nothing.
marks=0
run_in() {
  marks=$((marks + 1))
  # The echoed command line must not look like the answer.
  type_serial "$1" "$3; echo \"done\"-$marks-\$?\\r"
  until_true "$2" said "$1" "^done-$marks-[0-9]" 1 || broken "$1: '$3' did not end within $2 s; $(serial "$1" | tail -n 8)"
  said "$1" "^done-$marks-0" 1 || broken "$1: '$3' failed: $(serial "$1" | tail -n 8)"
}

# log_in NAME TIMES: as root on the serial console, at the login prompt that has come TIMES times.
log_in() {
  await_serial "$1" 'guest login:' 300 "$2"
  type_serial "$1" 'root\r'
  until_true 60 said "$1" 'Password:' "$2" || broken "$1 asks for no password"
  local prompts
  prompts=$(serial "$1" | grep -a -c 'root@guest:' || true)
  type_serial "$1" 'innkeeper\r'
  until_true 90 said "$1" 'root@guest:' $((prompts + 1)) || broken "$1: no shell after the password: $(serial "$1" | tail -n 5)"
  note "$1: root is logged in"
}

# iperf NAME: TCP in both directions between this machine and the guest, at its IPv4 address.
iperf() {
  local address direction
  address=$(ik guest show "$1" --json | python3 -c 'import json, sys; print(next(a for a in json.load(sys.stdin)["addresses"] if ":" not in a))')
  run_in "$1" 30 'iperf3 --server --daemon'
  for direction in "" --reverse; do
    timeout 60 iperf3 --client "$address" --format m --time 3 $direction >"$RESULTS/iperf-$1$direction" 2>&1 || broken "iperf3 $direction: $(tail -n 3 "$RESULTS/iperf-$1$direction")"
    note "$1: iperf3 ${direction:---forward}: $(awk '/receiver/ {print $7, $8}' "$RESULTS/iperf-$1$direction")"
  done
}
