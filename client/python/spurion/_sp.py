"""nng's SP protocol over plain sockets: one connection, never blocking. docs/protocol.md says what goes over it.

A greeting of eight bytes each way, then frames: a 64-bit length, big-endian, and the bytes; on unix sockets a byte 01 stands before.
Thread: one at a time. Nothing here is inherited over fork: who owns a connection compares process ids and makes a new one.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from typing import Any

from .errors import InvalidArgument, ProtocolError, Unavailable

REQ, REP, PUB, SUB = 0x30, 0x31, 0x20, 0x21
PEER = {REQ: REP, REP: REQ, PUB: SUB, SUB: PUB}
BACKOFF_MIN, BACKOFF_MAX = 0.01, 1.0
FRAME_MAX = 16 << 20
RECEIVE = 1 << 16
_jitter = random.Random()  # an own generator: a trainer's seeds stay as they are


class Address:
    """ipc:///path or tcp://host:port."""

    def __init__(self, url: str):
        self.url = url
        self.ipc = url.startswith("ipc://") and len(url) > 6
        if self.ipc:
            self.path = url[6:]
            if len(self.path.encode()) >= 108:
                raise InvalidArgument(f"{url}: expected a socket path below 108 bytes")
            return
        host, colon, port = url[6:].rpartition(":")
        if not url.startswith("tcp://") or not colon or not port.isdigit():
            raise InvalidArgument(f"address: expected ipc:///path or tcp://host:port, found {url!r}")
        self.host, self.port = host.strip("[]"), int(port)

    def resolve(self) -> list[tuple[Any, ...]]:
        """(family, address) of each place. Names are looked up by the system, which may wait; numbers are not."""
        if self.ipc:
            return [(socket.AF_UNIX, self.path)]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise Unavailable(f"{self.url}: {e}") from None
        return [(f[0], f[4]) for f in found]


def greeting(protocol: int) -> bytes:
    """What one side sends first."""
    return struct.pack(">BBBBHH", 0, 0x53, 0x50, 0, protocol, 0)


def check_greeting(url: str, data: bytes, protocol: int) -> None:
    """Raises ProtocolError unless data is the greeting of the peer's protocol."""
    if data != greeting(PEER[protocol]):
        raise ProtocolError(f"{url}: expected the greeting of SP protocol {PEER[protocol]:#04x}, found {data.hex()} (is this the right address?)")


def frame_header(ipc: bool, size: int) -> bytes:
    """What stands before a message of `size` bytes."""
    return (b"\x01" if ipc else b"") + struct.pack(">Q", size)


def frame_length(url: str, ipc: bool, header: bytes, size_max: int) -> int:
    """Length of the message behind a header, capped before any memory is taken for it."""
    size: int = struct.unpack(">Q", header[1 if ipc else 0:])[0]
    if (ipc and header[0] != 1) or size > size_max:
        raise ProtocolError(f"{url}: expected a message of at most {size_max} bytes, found {size}")
    return size


class Sp:
    """One connection that is made anew by itself. Every method returns at once; `wait` waits."""

    def __init__(self, address: Address, protocol: int, size_max: int = FRAME_MAX):
        self.address, self.protocol, self.size_max = address, protocol, size_max
        self.sock: socket.socket | None = None
        self.open = False
        self.opened = 0  # connections so far: who sends notices a new one
        self.why = "not connected"
        self._retry_at = 0.0
        self._backoff = 0.0
        self._dials = 0
        self._greeted = b""
        self._sent = 0
        self._connecting = False
        self._in = bytearray()

    def drop(self, why: str, at_once: bool = False) -> None:
        """Ends the connection; the next comes after a while, or at once."""
        if self.sock is not None:
            self.sock.close()
        self.sock, self.open, self.why = None, False, why
        self._in = bytearray()
        self._backoff = 0.0 if at_once else min(max(self._backoff * 2, BACKOFF_MIN), BACKOFF_MAX)
        self._retry_at = time.monotonic() + self._backoff * (0.5 + 0.5 * _jitter.random())

    def close(self) -> None:
        """Ends the connection for good."""
        self.drop("closed")

    def _gone(self, why: str) -> Unavailable:
        self.drop(why)
        return Unavailable(f"{self.address.url}: {why}")

    def _dial(self) -> None:
        places = self.address.resolve()
        family, place = places[self._dials % len(places)]
        self._dials += 1
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self._greeted, self._sent, self._connecting = b"", 0, True
        code = self.sock.connect_ex(place)
        if code == errno.EAGAIN:  # a unix listener whose queue is full
            raise self._gone("connect: the daemon takes no more connections now")
        if code not in (0, errno.EINPROGRESS):
            raise self._gone(f"connect: {errno.errorcode.get(code, code)}")
        if family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _greet(self) -> None:
        assert self.sock is not None
        if self._connecting:
            if not select_one(self.sock, True, 0):
                return
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise self._gone(f"connect: {errno.errorcode.get(code, code)}")
            self._connecting = False
        try:
            if self._sent < 8:
                self._sent += self.sock.send(greeting(self.protocol)[self._sent:])
            piece = self.sock.recv(8 - len(self._greeted))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            raise self._gone(f"greeting: {e}") from None
        if not piece:
            raise self._gone("greeting: closed by the daemon")
        self._greeted += piece
        if len(self._greeted) == 8:
            try:
                check_greeting(self.address.url, self._greeted, self.protocol)
            except ProtocolError as e:
                self.drop(e.text)
                raise
            self.open, self._backoff = True, 0.0
            self.opened += 1

    def step(self) -> bool:
        """Moves the connection along; whether it is open. Raises Unavailable (why) while it is not to be made yet, or failed."""
        if self.sock is None:
            if time.monotonic() < self._retry_at:
                raise Unavailable(f"{self.address.url}: {self.why}")
            self._dial()
        if not self.open:
            self._greet()
        return self.open

    def send(self, data: memoryview | bytes) -> int:
        """Sends what the socket takes; how much that was."""
        assert self.sock is not None
        try:
            return self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as e:
            raise self._gone(f"send: {e}") from None

    def receive(self) -> bytes | None:
        """The next whole message, or None when there is none yet."""
        assert self.sock is not None
        head = 9 if self.address.ipc else 8
        while True:
            if len(self._in) >= head:
                try:
                    size = frame_length(self.address.url, self.address.ipc, bytes(self._in[:head]), self.size_max)
                except ProtocolError as e:
                    self.drop(e.text)
                    raise
                if len(self._in) >= head + size:
                    data = bytes(self._in[head:head + size])
                    del self._in[:head + size]
                    return data
            try:
                piece = self.sock.recv(RECEIVE)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as e:
                raise self._gone(f"receive: {e}") from None
            if not piece:
                raise self._gone("closed by the daemon")
            self._in += piece

    def wait(self, write: bool, seconds: float) -> None:
        """Waits until the socket may be read (or written), the next connection is due, or the time is over."""
        if self.sock is None:
            time.sleep(max(0.0, min(seconds, self._retry_at - time.monotonic())))
        elif seconds > 0:
            select_one(self.sock, write or self._connecting, seconds)


def select_one(sock: socket.socket, write: bool, seconds: float) -> bool:
    """poll() of one socket: no limit on the number of its descriptor."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT if write else select.POLLIN)
    return bool(poll.poll(seconds * 1000))
