#!/bin/bash
# What the tools that people look at machines with say in a Linux guest that has everything: lspci, dmidecode, cpuid, iasl. And fio: what it
# wrote to a disk of each kind is there after a reset in the middle of more writing.
# limit: 1500
# slow: ten minutes under emulation; tests/lab/start 51
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

ik guest create tools --firmware uefi --cpus 1 --memory 1G --network none --usb --gpu --virtio-keyboard --vsock --tpm --watchdog reset --hyperv --disk "$MATERIAL/debian12-tools.raw"
made+=(tools)
for bus in virtio nvme ahci usb; do ik guest set tools --add-disk 64M --disk-bus $bus; done
ik guest start tools
log_in tools 1
run_in tools 10 "set +H"

# Each function is known, readable to its end, and without a capability that is cut off.
run_in tools 60 'lspci -vv >/root/lspci 2>&1 && [ $(grep -c "^00:" /root/lspci) -ge 12 ] && ! grep -i -E "<access denied>|!!!|unassigned|Unknown header|chain broken|<chain looped>|virtual.*ignored" /root/lspci'
run_in tools 60 'lspci -xxxx >/dev/null && lspci -vv -s $(lspci | grep -m 1 -i virtio | cut -d" " -f1) | grep "MSI-X: Enable+"'
run_in tools 60 'dmidecode >/root/dmi 2>&1 && grep "Manufacturer: Innkeeper" /root/dmi && ! grep -i -E "broken|wrong|bad (index|string)|out of spec|invalid|truncated" /root/dmi'
run_in tools 60 'cpuid -1 >/root/cpuid 2>&1 && grep -i "hypervisor_id" /root/cpuid'
# Our tables as the guest sees them are disassembled, and what comes out compiles again without an error.
run_in tools 120 'mkdir -p /root/acpi && cd /root/acpi && cp /sys/firmware/acpi/tables/[A-Z]* . 2>/dev/null; ls; for t in *; do iasl -d $t >$t.said 2>&1 || { cat $t.said; exit 1; }; grep -i -E "checksum.*(incorrect|invalid|should)|invalid (zero )?length|unknown (sub)?table|error" $t.said && exit 1; done; cd'
run_in tools 120 'cd /root/acpi && iasl -tc DSDT.dsl >compiled 2>&1; grep -E "^Compilation .* 0 Errors" compiled; cd'
run_in tools 30 'dmesg | grep -i -E "ACPI (BIOS )?(Error|Warning)|ACPI Exception|firmware bug|tpm.*(error|fail)|BUG:|Call Trace|can.t (claim|assign)|BAR .*: failed" && false || true'

# One disk of each kind, as the guest names them.
run_in tools 60 'for i in $(seq 30); do [ $(lsblk -bdno SIZE | grep -c -x " *67108864") = 4 ] && break; sleep 1; done; lsblk -bdnro NAME,SIZE,TRAN | grep 67108864 | tee /root/disks; [ $(grep -c . /root/disks) = 4 ]'
verify='--rw=randwrite --bsrange=512-64k --direct=1 --ioengine=libaio --iodepth=16 --size=8M --eta=never --verify=crc32c --verify_state_save=0 --randseed=7 --output=/root/fio'
run_in tools 240 "for d in \$(cut -d' ' -f1 /root/disks); do fio --name=\$d --filename=/dev/\$d --offset=0 $verify --do_verify=1 || { cat /root/fio; exit 1; }; done"
run_in tools 60 'cp /root/disks /boot/disks; sync'
type_serial tools 'for d in $(cut -d" " -f1 /root/disks); do dd if=/dev/zero of=/dev/$d bs=256K seek=128 count=120 oflag=direct status=none & done\r'
sleep 1
ik guest reset tools
log_in tools 2
run_in tools 60 'for i in $(seq 30); do [ $(lsblk -bdno SIZE | grep -c -x " *67108864") = 4 ] && break; sleep 1; done; lsblk -bdnro NAME,SIZE,TRAN | grep 67108864 | tee /root/disks; [ $(grep -c . /root/disks) = 4 ]'
run_in tools 240 "for d in \$(cut -d' ' -f1 /root/disks); do fio --name=\$d --filename=/dev/\$d --offset=0 $verify --verify_only || { cat /root/fio; exit 1; }; done"
run_in tools 30 'dmesg | grep -i -E "I/O error|timeout|ata[0-9].*exception|BUG:|Call Trace" && false || true'
ik guest shutdown tools
ends tools 180
