#!/bin/bash
# What a Linux guest makes of the rest of the machine: a portable processor with Hyper-V's enlightenments, USB keyboard and tablet, memory that
# goes back to the host, sockets to the host, the VM generation id, a TPM. By UEFI, so that OVMF meets all of it too.
# limit: 2000
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

guest all --firmware uefi --memory 768M --network none --cpu-model portable --hyperv --usb --vsock --tpm --disk "$MATERIAL/debian12-tools.raw"
log_in all 1
# Linux finds both hypervisors and takes KVM; Windows looks at the first place only.
run_in all 30 'dmesg | grep "Hypervisor detected: KVM"; modprobe cpuid; dd if=/dev/cpu/0/cpuid bs=16 count=1 iflag=skip_bytes skip=$((0x40000000)) status=none | tail -c 12 | grep "Microsoft Hv"'
run_in all 30 'grep "model name.*Innkeeper portable" /proc/cpuinfo; grep -w sse4_2 /proc/cpuinfo >/dev/null; grep -wE "avx|xsave" /proc/cpuinfo && false || true'
run_in all 30 'cat /sys/devices/system/clocksource/clocksource0/current_clocksource; cat /sys/devices/system/clocksource/clocksource0/available_clocksource'
run_in all 30 'for i in $(seq 20); do grep -q -i tablet /proc/bus/input/devices && break; sleep 1; done; cat /sys/bus/usb/devices/*/product; lspci -n 2>/dev/null | grep 0c03 || true'
run_in all 30 '[ $(cat /sys/bus/usb/devices/[0-9]*-[0-9]*/product | grep -c -i -E "keyboard|tablet") = 2 ]'
run_in all 30 'ls -d /sys/bus/acpi/devices/INKP0001:00'

# The firmware has measured itself; the guest adds to a register that it may clear.
run_in all 30 'grep -x 2 /sys/class/tpm/tpm0/tpm_version_major && grep -v -x "0*" /sys/class/tpm/tpm0/pcr-sha256/0'
run_in all 30 'exec 3<>/dev/tpm0; printf "\\200\\002\\0\\0\\0\\101\\0\\0\\001\\202\\0\\0\\0\\020\\0\\0\\0\\011\\100\\0\\0\\011\\0\\0\\0\\0\\0\\0\\0\\0\\001\\0\\013%32s" "" >&3; head -c 10 <&3 | od -An -tx1 | grep "00 00 00 00$" && exec 3>&- && cat /sys/class/tpm/tpm0/pcr-sha256/16 >/dev/shm/pcr && grep -v -x "0*" /dev/shm/pcr'

# A key of the viewer's comes from the USB keyboard.
type_serial all 'k=$(grep -l -i "usb.*keyboard\|keyboard" /sys/class/input/event*/device/name | while read n; do d=$(dirname $n); readlink -f $d | grep -q usb && basename $(dirname $d); done | head -n 1); timeout 60 head -c 24 /dev/input/$k | od -An -tx1 | head -n 1; echo "key"-1\r'
sleep 5
press all a
await_serial all '^key-1' 70
run_in all 10 'true'

# Memory goes back to the host, and comes again.
engine=$(python3 -c 'import json,sys; print(json.load(sys.stdin)["engine"]["pid"])' < <(ik guest show all --json))
resident() { awk '/^VmRSS/ {print int($2 / 1024)}' "/proc/$engine/status"; }
run_in all 60 'head -c 300M /dev/zero | tr "\0" x >/dev/shm/x'
before=$(resident)
# From here on it goes back by itself, too: the guest reports its free pages.
run_in all 30 'rm /dev/shm/x'
ik guest memory all 384M
gave() { [ "$(resident)" -lt $((before - 150)) ]; }
until_true 60 gave || broken "the host got nothing back: $before MiB resident, then $(resident)"
note "engine: $before MiB resident, then $(resident)"
[ "$(field all memory_now_bytes)" = $((384 << 20)) ] || broken "it says $(field all memory_now_bytes)"
ik guest memory all 768M
sleep 5
run_in all 60 'head -c 400M /dev/zero | tr "\0" x >/dev/shm/x; [ $(stat -c %s /dev/shm/x) = 419430400 ]; rm /dev/shm/x'

# A program of the host speaks to one of the guest.
type_serial all "modprobe vmw_vsock_virtio_transport; perl -e 'socket(S,40,1,0) or die; bind(S,pack(\"SSLLx4\",40,0,1234,0xffffffff)) or die; listen(S,1); accept(C,S) or die; sysread(C,\$l,99); syswrite(C,\"heard \$l\"); sleep 1' &\\r"
sleep 5
answer=$(timeout 60 python3 - "$STATE/run/guests/$(field all id)/vsock.sock" <<'PYTHON'
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b"CONNECT 1234\n")
f = s.makefile("rb")
assert f.readline().startswith(b"OK "), "no connection"
s.sendall(b"hello\n")
print(f.readline().decode().strip())
PYTHON
) || broken "no program of the guest answers on its socket"
[ "$answer" = "heard hello" ] || broken "the guest's program says '$answer'"

# And the other way; a port for which nobody waits is refused.
timeout 60 python3 - "$STATE/run/guests/$(field all id)/vsock.sock" >"$RESULTS/accepted" <<'PYTHON' &
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b"ACCEPT 2048\n")
f = s.makefile("rb")
assert f.readline().startswith(b"OK "), "no connection"
print(f.readline().decode().strip())
s.sendall(b"heard\n")
PYTHON
accepting=$!
sleep 2
run_in all 30 "perl -e 'socket(S,40,1,0) or die; connect(S,pack(\"SSLLx4\",40,0,2049,2)) and die; socket(S,40,1,0) or die; connect(S,pack(\"SSLLx4\",40,0,2048,2)) or die; syswrite(S,\"from the guest\\\\n\"); sysread(S,\$l,99); exit(\$l ne \"heard\\\\n\")'"
wait "$accepting" && [ "$(cat "$RESULTS/accepted")" = "from the guest" ] || broken "no program of the guest reaches the host's socket"

run_in all 30 'dmesg | grep -i -E "ACPI (BIOS )?(Error|Warning)|xhci.*(error|halt|died|not responding)|usb.*(error|unable)|tpm.*(error|fail|timeout)|BUG:|Call Trace" && false || true'
# Suspended with all of it.
ik guest suspend all
ik guest start all
await_state all running 120
run_in all 60 'ls -d /sys/bus/acpi/devices/INKP0001:00; grep -q -i tablet /proc/bus/input/devices'
run_in all 30 'cmp /sys/class/tpm/tpm0/pcr-sha256/16 /dev/shm/pcr'
run_in all 30 'dmesg | grep -i -E "xhci.*(error|halt|died|not responding)|BUG:|Call Trace" && false || true'
