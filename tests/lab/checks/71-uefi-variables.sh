#!/bin/bash
# UEFI keeps a guest's variables: through a reset, through power off, until the firmware is reset. With Secure Boot it
# starts nothing that is not signed.
# limit: 1500
# slow: three boots of Debian more; 42 has a variable through a reset; tests/lab/start 71
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# shell NAME TIMES: the UEFI shell's prompt has come TIMES times or more.
shell() { await_serial "$1" 'Shell>' 200 "$2"; }
# Not in the namespace of the specification, which takes no variables of ours.
variable='InnkeeperTest -guid 1a2b3c4d-0001-4002-8003-112233445566'
# has NAME TIMES: the variable's contents were shown.
has() { await_serial "$1" 'C0 FF EE 01' 60 "$2"; }

guest uefi --memory 256M --network none --firmware uefi
shell uefi 1
type_serial uefi "setvar $variable -bs -rt -nv =C0FFEE01\\r"
shell uefi 2
type_serial uefi 'reset\r'
shell uefi 3
type_serial uefi "setvar $variable\\r"
has uefi 1
ik guest poweroff uefi
await_state uefi stopped 30 || broken "uefi is '$(field uefi state)' after power off"

# A new engine, a new scrollback.
ik guest start uefi
shell uefi 1
type_serial uefi "setvar $variable\\r"
has uefi 1
# What ends without a word loses nothing either.
kill -9 "$(sed -n 's/^{"pid":\([0-9]*\),.*/\1/p' "$STATE/run/guests/$(field uefi id)/pid")"
await_state uefi failed 20 || broken "uefi is '$(field uefi state)' after its engine was killed"
ik guest start uefi
shell uefi 1
type_serial uefi "setvar $variable\\r"
has uefi 1

ik guest reset-firmware uefi && broken "the firmware of a running guest was reset"
ik guest poweroff uefi
await_state uefi stopped 30 || broken "uefi does not stop"
ik guest reset-firmware uefi
ik guest start uefi
shell uefi 1
type_serial uefi "setvar $variable\\r"
shell uefi 2
! said uefi 'C0 FF EE 01' 1 || broken "the variable outlived a reset of the firmware"
type_serial uefi 'dmpstore SecureBoot\r'
shell uefi 3
! said uefi '00000000: 01' 1 || broken "Secure Boot is on without being asked for"

# The firmware's own shell is signed by nobody, and is refused.
guest secure --memory 256M --network none --firmware uefi-secure
await_serial secure 'failed to start .*Security Violation' 200
