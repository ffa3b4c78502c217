"""What the kernel says of processes (proc(5)): memory, processor time, writes, and when one began."""

import os
import re
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def cores_used(pids):
    """Seconds of processor time that these processes have used, threads that ended included."""
    # The id of a process's clock, as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def bytes_written(pids):
    """Bytes that these processes made the kernel write to disks."""
    return sum(int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)[1]) for pid in pids)


def began(pid):
    """When a process began: seconds on CLOCK_BOOTTIME, in steps of a tick (10 ms)."""
    # The command in parentheses may hold anything; field 22 is the 20th after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[19]) / TICKS


def boot_time():
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def switches(pid):
    """How often the threads of a process have been waited for and woken."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        total += int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.M).group(1))
    return total


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Mapping:
    """One entry of /proc/PID/smaps."""

    def __init__(self, head):
        self.name = " ".join(head.split()[5:])
        self.begin = int(head.split("-")[0], 16)
        self.permissions = head.split()[1]
        self.size_kib = self.rss_kib = self.dirty_kib = 0
        self.flags = []


def mappings(pid):
    found = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            found.append(Mapping(line))
            continue
        key, _, value = line.partition(":")
        if key == "Size":
            found[-1].size_kib = int(value.split()[0])
        elif key == "Rss":
            found[-1].rss_kib = int(value.split()[0])
        elif key == "Private_Dirty":
            found[-1].dirty_kib = int(value.split()[0])
        elif key == "VmFlags":
            found[-1].flags = value.split()
    return found


def rss_kib(pid):
    return sum(mapping.rss_kib for mapping in mappings(pid))


def huge_kib(pid):
    """How much of a process's memory is in huge pages."""
    return int(re.search(r"^AnonHugePages: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])


def largest(found, count=12):
    """The mappings with the most in memory, for whoever wants to know where it went."""
    shown = sorted(found, key=lambda mapping: -mapping.rss_kib)[:count]
    return [
        {"name": mapping.name or "anonymous", "permissions": mapping.permissions, "size_kib": mapping.size_kib, "rss_kib": mapping.rss_kib,
         "dirty_kib": mapping.dirty_kib}
        for mapping in shown
    ]
