#!/bin/bash
# The Debian disk on hardware that needs no virtio drivers: NVMe and an Intel e1000, by UEFI and by BIOS. Data and their checksums on disk and network, in
# both directions, discard, the link down and up, a reset while it writes.
# limit: 2400
# lab: --ovmf
. "$(dirname "$0")/../lib.sh"

# The guest's gateway is this machine: it serves a file and takes one.
folder=$(mktemp -d)
head -c 8M /dev/urandom >"$folder/data"
sum=$(sha256sum <"$folder/data" | cut -d' ' -f1)
python3 - "$folder" <<'PYTHON' >"$folder/log" 2>&1 &
import hashlib, http.server, os, sys
os.chdir(sys.argv[1])
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(hashlib.sha256(body).hexdigest().encode() + b"\n")
http.server.ThreadingHTTPServer(("", 8098), Handler).serve_forever()
PYTHON
web=$!
trap 'remove_guests; kill $web' EXIT

guest nvme --firmware uefi --memory 1G --network nat --network-card e1000 --disk-bus nvme --disk "$MATERIAL/debian12-tools.raw"
log_in nvme 1
run_in nvme 30 'lsblk -dno NAME,TRAN | grep "nvme0n1 *nvme"'
run_in nvme 30 'grep "^DRIVER=e1000" /sys/class/net/en*/device/uevent'
run_in nvme 60 'dd if=/dev/urandom of=/root/data bs=1M count=32 status=none; sha256sum </root/data >/root/sum; sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum </root/data | cmp - /root/sum'
run_in nvme 60 'fstrim -v /'
run_in nvme 60 'for i in $(seq 40); do ip -4 route | grep -q default && break; sleep 1; done; ip -4 route show default'
run_in nvme 60 "curl -s --max-time 40 http://\$(ip -4 route show default | cut -d' ' -f3 | head -n 1):8098/data | tee /root/got | sha256sum | grep $sum"
run_in nvme 60 "curl -s --max-time 40 -T /root/got http://\$(ip -4 route show default | cut -d' ' -f3 | head -n 1):8098/put | grep $sum"
iperf nvme
run_in nvme 90 'd=$(ls /sys/class/net | grep ^en); ip link set $d down; sleep 2; ip link set $d up; for i in $(seq 60); do ip -4 route | grep -q default && break; sleep 1; done; ping -c 2 -W 10 $(ip -4 route show default | cut -d" " -f3 | head -n 1)'
run_in nvme 30 'dmesg | grep -i -E "nvme.*(timeout|abort|error|reset)|e1000.*(hang|error)|I/O error|ACPI (BIOS )?(Error|Warning)|BUG:|Call Trace" && false || true'
# A reset in the middle of its writing: the file system heals, what was synced is there.
type_serial nvme 'dd if=/dev/zero of=/root/filler bs=1M count=200 oflag=direct status=none &\r'
sleep 2
ik guest reset nvme
log_in nvme 2
run_in nvme 60 'sha256sum </root/data | cmp - /root/sum'
ik guest poweroff nvme
ends nvme 30
# SeaBIOS boots from it, too, as far as the system has its root.
ik guest set nvme --firmware bios
ik guest start nvme
await_serial nvme 'INNKEEPER-DISK by pc' 60
await_serial nvme 'Running /scripts/init-bottom' 150
