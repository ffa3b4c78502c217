"""An Innkeeper of its own to measure: state folder, server, guests. Ends everything it started."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import client
import processes

PASSWORD = "measured-with-care"
USER = "bench"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Innkeeper:
    def __init__(self, binary, state):
        self.binary = str(binary)
        self.state = Path(state)
        self.port = free_port()
        self.process = None
        self.guests = []
        self.log = open(self.state / "serve.output", "ab")

    def command(self, *arguments, text=None):
        """Runs `innkeeper ARGUMENT…` on this state; its output. Fails with its own words."""
        done = subprocess.run([self.binary, "--state", str(self.state), *arguments], input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"innkeeper {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def start(self):
        """Starts the server; returns the moment before, for whoever measures."""
        before = time.monotonic()
        self.process = subprocess.Popen([self.binary, "--state", str(self.state), "serve", "--listen", f"127.0.0.1:{self.port}"],
                                        stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, start_new_session=True)
        return before

    def first_page(self):
        """Waits for the first answered page. A connection is taken as soon as the port is bound; until then it is tried again."""
        authority = self.state / "tls/ca.pem"
        deadline = time.monotonic() + 60
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {(self.state / 'serve.output').read_text()[-2000:]}")
            try:
                return client.Browser(self.port, authority).request("GET", "/login")[0]
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def log_in(self):
        browser = client.Browser(self.port, self.state / "tls/ca.pem")
        browser.log_in(USER, PASSWORD)
        return browser

    def make_user(self):
        self.command("admin", "create-user", USER, "--role", "administrator", "--password-stdin", text=PASSWORD + "\n")

    def create(self, name, *arguments, network="none"):
        """Makes a guest. Returns its id."""
        self.command("guest", "create", name, "--network", network, *arguments)
        self.guests.append(name)
        return json.loads(self.command("guest", "show", name, "--json"))["id"]

    def run_folder(self, guest):
        return self.state / "run/guests" / guest

    def engine(self, guest):
        """The pid of a guest's engine; None while there is none."""
        try:
            return json.loads((self.run_folder(guest) / "pid").read_text())["pid"]
        except (OSError, ValueError):
            return None

    def server_processes(self):
        """hostd and web role."""
        return [self.process.pid, *[pid for pid in processes.children(self.process.pid)
                                    if b"\0web\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]]

    def statistics(self, guest):
        """What the engine counts (wire.rs, EngineAction::Statistics)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self.run_folder(guest) / "control.sock"))
            connection.sendall(b'{"id":1,"action":"statistics"}\n')
            reader = connection.makefile("rb")
            while True:
                message = json.loads(reader.readline())
                if "reply" in message:
                    return json.loads(reader.read(message["reply"]["payload_bytes"]))

    def power_off(self, name, guest):
        pid = self.engine(guest)
        self.command("guest", "poweroff", name)
        deadline = time.monotonic() + 20
        while pid and processes.alive(pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not end")
            time.sleep(0.02)

    def end(self):
        """Ends guests and server, takes the networks and the state away."""
        engines = [pid for pid in (self.engine(folder.name) for folder in (self.state / "run/guests").glob("*")) if pid]
        self.stop()
        for pid in engines:
            if processes.alive(pid):
                os.kill(pid, signal.SIGKILL)
        if os.geteuid() == 0:
            subprocess.run([self.binary, "--state", str(self.state), "admin", "remove-networks"], capture_output=True, check=False)
        self.log.close()
        shutil.rmtree(self.state, ignore_errors=True)
