"""A small client of its own for the end-to-end tests: SP over plain sockets, messages from spurion.proto itself.

It shares no code with the clients of the project, so that an error on both sides of the wire cannot hide. SP framing: a greeting of
8 bytes each way, then 64-bit big-endian length and message; on unix sockets a byte 0x01 stands before the length
(https://nng.nanomsg.org/man/tip/nng_ipc.7.html). A request begins with a 32-bit id with its top bit set.
"""
import os
import socket
import struct
import subprocess
import tempfile

REQ, REP, PUB, SUB = 0x30, 0x31, 0x20, 0x21
PREFIX = "/spurion.v1.Spurion/"


def load_messages(source):
    """Message classes of spurion.proto by name, from a descriptor set: independent of the version that protoc generates code for."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "set")
        subprocess.run(["protoc", "-I", os.path.join(source, "proto"), "--descriptor_set_out=" + out, "spurion.proto"], check=True)
        files = descriptor_pb2.FileDescriptorSet.FromString(open(out, "rb").read())
    pool = descriptor_pool.DescriptorPool()
    for f in files.file:
        pool.Add(f)
    get = getattr(message_factory, "GetMessageClass", None)
    if get is None:
        get = message_factory.MessageFactory(pool).GetPrototype
    names = [m.name for f in files.file for m in f.message_type]
    return type("Messages", (), {n: get(pool.FindMessageTypeByName("spurion.v1." + n)) for n in names})


class Sp:
    """One SP connection."""

    def __init__(self, url, protocol, timeout=30.0):
        if url.startswith("ipc://"):
            self.sock = socket.socket(socket.AF_UNIX)
            address, self.ipc = url[6:], True
        else:
            host, port = url[6:].rsplit(":", 1)
            self.sock = socket.socket(socket.AF_INET)
            address, self.ipc = (host, int(port)), False
        self.sock.settimeout(timeout)
        try:
            self.sock.connect(address)
            self.sock.sendall(struct.pack(">BBBBHH", 0, ord("S"), ord("P"), 0, protocol, 0))
            greeting = self._read(8)
        except BaseException:
            self.sock.close()
            raise
        zero, s, p, version, self.peer, _ = struct.unpack(">BBBBHH", greeting)
        assert (zero, s, p, version) == (0, ord("S"), ord("P"), 0), greeting

    def _read(self, n):
        data = b""
        while len(data) < n:
            piece = self.sock.recv(n - len(data))
            if not piece:
                raise ConnectionError("peer closed")
            data += piece
        return data

    def send(self, data):
        self.sock.sendall((b"\x01" if self.ipc else b"") + struct.pack(">Q", len(data)) + data)

    def receive(self):
        if self.ipc:
            assert self._read(1) == b"\x01"
        (size,) = struct.unpack(">Q", self._read(8))
        return self._read(size)

    def close(self):
        self.sock.close()


class Error(Exception):
    def __init__(self, code, text, retry_after_ms=0):
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.retry_after_ms = code, text, retry_after_ms


class Rpc:
    """Calls, one after another, on one connection."""

    def __init__(self, url, messages, timeout=60.0):
        self.m, self.url, self.timeout = messages, url, timeout
        self.sp = Sp(url, REQ, timeout)
        assert self.sp.peer == REP
        self.next = 1
        self.replies = []  # sizes, for the limit on replies

    def raw(self, data):
        head = struct.pack(">I", 0x80000000 | self.next)
        self.sp.send(head + data)
        answer = self.sp.receive()
        assert answer[:4] == head
        self.replies.append(len(answer) - 4)
        return self.m.Reply.FromString(answer[4:])

    def call_raw(self, method, body, key=b"", timeout_ms=0):
        token, out = b"", b""
        while True:
            self.next += 1
            q = self.m.Request(call_id=self.next, method=(PREFIX + method).encode(), body=b"" if token else body, page_token=token,
                               idempotency_key=key, timeout_ms=timeout_ms)
            r = self.raw(q.SerializeToString())
            assert r.call_id == self.next
            if r.code:
                raise Error(r.code, r.message.decode(), r.retry_after_ms)
            out += r.body
            token = r.next_page_token
            if not token:
                return out

    def call(self, method, request=None, reply=None, key=b"", timeout_ms=0):
        body = request.SerializeToString() if request is not None else b""
        out = self.call_raw(method, body, key, timeout_ms)
        return getattr(self.m, reply or method + "Reply").FromString(out)

    def close(self):
        self.sp.close()


class Publisher:
    """A trainer's tap: PUB that dials, with a ring of what was sent, Sync and Fill."""

    def __init__(self, url, rpc, run, name, epoch, ring=1 << 30):
        self.sp, self.rpc, self.m = Sp(url, PUB), rpc, rpc.m
        self.run, self.name, self.epoch = run.encode(), name.encode(), epoch
        self.sequence, self.ring = 0, ring
        self.kept = {}  # sequence -> (message, rollouts in it)
        self.gone = {}  # sequence -> rollouts: fell out of the ring
        self.lost = {}  # of these, those that the daemon did not have when it was asked

    def tap(self, rollouts=(), step_end=None, send=True):
        self.sequence += 1
        t = self.m.Tap(run=self.run, producer=self.name, epoch=self.epoch, sequence=self.sequence, rollouts=rollouts)
        if step_end is not None:
            t.step_end = step_end
        data = t.SerializeToString()
        self.kept[self.sequence] = (data, len(t.rollouts))
        while len(self.kept) > self.ring:
            oldest = min(self.kept)
            self.gone[oldest] = self.kept.pop(oldest)[1]
        if send:
            try:
                self.sp.send(data)
            except OSError:
                pass  # the daemon is gone: the ring keeps it

    def redial(self, url):
        self.sp.close()
        self.sp = Sp(url, PUB)

    def sync(self, closing=False):
        r = self.rpc.call("Sync", self.request(closing))
        while r.missing_first:
            wanted = [s for a, b in zip(r.missing_first, r.missing_last) for s in range(a, b + 1)]
            self.lost.update({s: self.gone[s] for s in wanted if s in self.gone})
            have = [self.kept[s][0] for s in wanted if s in self.kept]
            while have:
                try:
                    have = have[self.rpc.call("Fill", self.m.FillRequest(taps=have[:64])).taken:]
                except Error as e:
                    if e.code != 14:
                        raise
            r = self.rpc.call("Sync", self.request(closing))
        return r

    def request(self, closing):
        q = self.m.SyncRequest(run=self.run, producer=self.name, epoch=self.epoch, last_sequence=self.sequence, closing=closing)
        for s in sorted(self.lost):  # one range for each message: the daemon counts those that are really missing
            q.lost_first.append(s)
            q.lost_last.append(s)
            q.lost_count.append(self.lost[s])
        return q
