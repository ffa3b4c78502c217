"""What every comparison of Innkeeper's machine with QEMU's 'pc' needs, inside the lab: QEMU's options, KVM's counters, the engine's socket."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

CMDLINE = "console=ttyS0 quiet reboot=t panic=-1"
# Beside the display and the serial port what Innkeeper's machine has: random numbers, tablet, an AHCI drive without a disc.
QEMU = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-cpu", "host", "-smp", "1", "-m", "256", "-nodefaults", "-no-user-config",
        "-display", "none", "-vga", "std", "-serial", "stdio", "-monitor", "none", "-device", "virtio-rng-pci", "-device", "virtio-tablet-pci",
        "-device", "ich9-ahci,id=ahci"]
COUNTERS = ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "signal_exits", "insn_emulation", "pf_fixed", "pages_4k", "pages_2m")


class Hung(Exception):
    """A machine that did not get there in time."""


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def exits(pid):
    """KVM's counters of the machine that this process has."""
    for folder in Path("/sys/kernel/debug/kvm").glob(f"{pid}-*"):
        return {name: int((folder / name).read_text()) for name in COUNTERS if (folder / name).exists()}
    raise RuntimeError(f"KVM shows no counters of process {pid}")


def connect(path):
    """The engine listens as soon as its machine runs."""
    deadline = time.monotonic() + 90
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise RuntimeError("the engine does not listen") from None
            time.sleep(0.005)


def nearer(binary):
    """Programs and their libraries into memory: a shared folder would make the one with more of them slower."""
    for program in (binary, shutil.which(QEMU[0])):
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
        for path in [program, *re.findall(r"(/\S+) \(0x", listed)]:
            os.utime(os.path.realpath(path))
    for folder in ("/usr/share/qemu", "/usr/share/seabios"):
        for path in Path(folder).glob("*"):
            if path.is_file() and re.search(r"bios|pvh|kvmvapic|linuxboot", path.name):
                os.utime(path.resolve())


def prepare(binary):
    """Mounts KVM's counters, and takes the programs near. Returns where Innkeeper's is then."""
    if not Path("/sys/kernel/debug/kvm").exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    near = Path("/usr/local/bin/innkeeper")
    shutil.copy(binary, near)
    nearer(str(near))
    return near
