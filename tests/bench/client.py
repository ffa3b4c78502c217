"""A browser's side of Innkeeper for measurements: HTTPS with a login, event streams, WebSockets, and a viewer of the screen."""

import base64
import http.client
import json
import os
import re
import socket
import ssl
import struct
import threading
import urllib.parse


class Browser:
    """One login. Trusts the server's own certificate authority and nothing else."""

    def __init__(self, port, authority):
        self.port = port
        self.host = f"127.0.0.1:{port}"
        self.tls = ssl.create_default_context(cafile=str(authority))
        self.cookie = None
        self.connection = None

    def request(self, method, path, form=None):
        """One request on the kept connection. Returns status, headers and body."""
        headers = {"Cookie": self.cookie} if self.cookie else {}
        body = None
        if form is not None:
            body = urllib.parse.urlencode(form)
            headers |= {"Content-Type": "application/x-www-form-urlencoded", "Origin": f"https://{self.host}"}
        if self.connection is None:
            self.connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.tls, timeout=60)
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        data = answer.read()
        if answer.will_close:
            self.connection.close()
            self.connection = None
        return answer.status, answer.headers, data

    def get(self, path):
        status, _, body = self.request("GET", path)
        if status != 200:
            raise RuntimeError(f"{path} answers {status}")
        return body

    def log_in(self, name, password):
        page = self.get("/login").decode()
        csrf = re.search(r'name="csrf" value="([^"]*)"', page)
        form = {"name": name, "password": password, "next": "/guests", "csrf": csrf[1] if csrf else ""}
        status, headers, _ = self.request("POST", "/login", form)
        if status != 303:
            raise RuntimeError(f"the login answers {status}")
        self.cookie = headers["Set-Cookie"].split(";")[0]

    def tour(self, paths):
        """Loads each page with everything it names under /assets and its pictures, as a browser with an empty cache."""
        seen = set()
        for path in paths:
            page = self.get(path).decode(errors="replace")
            for asset in re.findall(r'(?:src|href|data-[a-z]+)="(/(?:assets/[^"]+|guests/[^"]+\.png[^"]*))"', page):
                if asset not in seen:
                    seen.add(asset)
                    self.request("GET", asset.replace("&amp;", "&").split("#")[0])
        return len(seen)

    def dial(self):
        plain = socket.socket()
        # What the kernel keeps for a viewer that does not read is not what is measured.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        plain.settimeout(60)
        plain.connect(("127.0.0.1", self.port))
        return self.tls.wrap_socket(plain, server_hostname="127.0.0.1")

    def open(self, path, extra=""):
        """Sends a GET on a connection of its own and reads the answer's head. Returns socket and buffered reader."""
        connection = self.dial()
        head = f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\nOrigin: https://{self.host}\r\nCookie: {self.cookie}\r\n{extra}\r\n"
        connection.sendall(head.encode())
        reader = connection.makefile("rb")
        status = reader.readline().split()[1]
        while reader.readline().strip():
            pass
        return connection, reader, status

    def events(self, scope):
        """An open event stream, read in the background until its connection ends."""
        connection, reader, status = self.open(f"/events?scope={scope}", "Accept: text/event-stream\r\n")
        if status != b"200":
            raise RuntimeError(f"the events of {scope} answer {status.decode()}")
        connection.settimeout(None)
        threading.Thread(target=drain, args=(reader,), daemon=True).start()
        return connection

    def websocket(self, path):
        key = base64.b64encode(os.urandom(16)).decode()
        extra = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        connection, reader, status = self.open(path, extra)
        if status != b"101":
            raise RuntimeError(f"{path} answers {status.decode()}")
        return WebSocket(connection, reader)


def drain(reader):
    try:
        while reader.read1(65536):
            pass
    except (OSError, ValueError):
        pass


class WebSocket:
    """The client's side of RFC 6455, without extensions and fragments, which the server does not use."""

    BINARY, TEXT, CLOSE, PING, PONG = 2, 1, 8, 9, 10

    def __init__(self, connection, reader):
        self.connection = connection
        self.reader = reader

    def send(self, data, kind=BINARY):
        mask = os.urandom(4)
        size = len(data)
        head = bytes([0x80 | kind]) + (bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size))
        self.connection.sendall(head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)))

    def receive(self):
        """The next message, as kind and bytes; pings are answered on the way. At the end None."""
        while True:
            head = self.reader.read(2)
            if len(head) < 2:
                return None
            kind, size = head[0] & 15, head[1] & 127
            if size == 126:
                size = struct.unpack(">H", self.reader.read(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", self.reader.read(8))[0]
            data = self.reader.read(size)
            if kind == self.PING:
                self.send(data, self.PONG)
            elif kind == self.CLOSE:
                return None
            elif kind != self.PONG:
                return kind, data

    def follow(self):
        """Reads until the end in the background."""
        def read():
            try:
                while self.receive():
                    pass
            except (OSError, ValueError):
                pass
        self.connection.settimeout(None)
        threading.Thread(target=read, daemon=True).start()

    def close(self):
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()


class Screen:
    """A viewer of a guest's screen over a WebSocket (RFC 6143, raw encoding): always one incremental request waiting."""

    RAW, DESKTOP_SIZE = 0, -223

    def __init__(self, websocket):
        self.websocket = websocket
        self.pending = b""
        self.updates = 0
        self.handshake()
        websocket.connection.settimeout(None)
        threading.Thread(target=self.watch, daemon=True).start()

    def read(self, count):
        while len(self.pending) < count:
            message = self.websocket.receive()
            if message is None:
                raise EOFError
            self.pending += message[1]
        data, self.pending = self.pending[:count], self.pending[count:]
        return data

    def handshake(self):
        self.websocket.send(self.read(12))
        self.read(self.read(1)[0])
        self.websocket.send(b"\x01")
        if self.read(4) != bytes(4):
            raise RuntimeError("the screen's handshake failed")
        self.websocket.send(b"\x01")
        head = self.read(24)
        self.size, self.pixel_bytes = struct.unpack(">HH", head[:4]), head[4] // 8
        self.read(struct.unpack(">I", head[20:])[0])
        self.websocket.send(struct.pack(">BxHii", 2, 2, self.RAW, self.DESKTOP_SIZE))
        self.ask(False)

    def ask(self, incremental):
        self.websocket.send(struct.pack(">BBHHHH", 3, incremental, 0, 0, *self.size))

    def watch(self):
        try:
            while True:
                kind = self.read(1)[0]
                if kind != 0:
                    raise RuntimeError(f"the screen sends message {kind}, which nobody asked for")
                for _ in range(struct.unpack(">xH", self.read(3))[0]):
                    _, _, width, height, encoding = struct.unpack(">HHHHi", self.read(12))
                    if encoding == self.DESKTOP_SIZE:
                        self.size = width, height
                    else:
                        self.read(width * height * self.pixel_bytes)
                self.updates += 1
                self.ask(True)
        except (EOFError, OSError, ValueError):
            pass


def note(data):
    """A text message of the serial console: offset and skipped, reset, or closed."""
    return json.loads(data)
