"""10,000 malformed requests at the live port: method, head, JSON, chunks, sizes. No crash, no status that does not fit, no leak of file
descriptors; a good request in between gets the right reward. The seed is printed; SPURION_HTTP_REQUESTS changes the number.

A request is made from a good one by one or more mutations, and each mutation says which statuses may come of it. b"" stands for a connection that
is closed without an answer, which is right only for what is no HTTP.
"""
import json
import os
import random
import socket
import time

import pytest

pytest.importorskip("google.protobuf", reason="the daemon's tests need python3-protobuf")
from http_daemon import HttpDaemon  # noqa: E402

REQUESTS = int(os.environ.get("SPURION_HTTP_REQUESTS", "10000"))
SEED = int(os.environ.get("SPURION_SEED", "20261121"))
TEXT = "\n\nHuman: How are you?\n\nAssistant: Fine."
GOOD = {
    "/get_reward": {"query": [TEXT], "prompts": ["\n\nHuman: How are you?\n\nAssistant:"], "labels": [None]},
    "/remote_rm": {"prompt": "How are you?", "response": "Fine.", "label": "x"},
    "/remote_rm/verdict": {"prompt": "How are you?", "response": "Fine.", "label": "x"},
    "/classify": {"model": "m", "input": TEXT, "use_activation": False},
    "/v1/classify": {"model": "m", "input": [TEXT]},
    "/pooling": {"model": "m", "input": [[5, 6, 7]]},
    "/v1/embeddings": {"model": "m", "input": TEXT},
    "/predict": {"inputs": [[TEXT], ["a", "b"]]},
}


class Request:
    def __init__(self, r):
        self.path = r.choice(list(GOOD))
        self.method, self.version, self.prefix = b"POST", b"HTTP/1.1", b""
        self.headers = [(b"Host", b"localhost"), (b"Content-Type", b"application/json")]
        self.data = json.dumps(GOOD[self.path]).encode()
        self.length = None  # None: the true one
        self.chunked = False
        self.cut = None     # bytes of the whole that are sent
        self.patience = 60  # seconds until the client goes away; short where it owes the rest of its request
        self.allowed = {200}

    def bytes(self):
        head = self.prefix + self.method + b" " + (self.path if isinstance(self.path, bytes) else self.path.encode()) + b" " + self.version + b"\r\n"
        headers = list(self.headers)
        data = self.data
        if self.chunked:
            headers.append((b"Transfer-Encoding", b"chunked"))
            data = b"".join(b"%x\r\n%s\r\n" % (len(data[i:i + 7]), data[i:i + 7]) for i in range(0, len(data), 7)) + b"0\r\n\r\n"
        elif self.length != b"none":
            headers.append((b"Content-Length", self.length if self.length is not None else b"%d" % len(data)))
        whole = head + b"".join(k + b": " + v + b"\r\n" for k, v in headers) + b"\r\n" + data
        return whole if self.cut is None else whole[:self.cut]


def tree(r, depth=0):
    kind = r.randrange(9 if depth < 4 else 6)
    if kind < 6:
        return [None, True, r.uniform(-1e9, 1e9), r.randrange(-10, 1 << 40), "".join(chr(r.randrange(1, 0x2FF)) for _ in range(r.randrange(9))), ""][kind]
    if kind < 8:
        return [tree(r, depth + 1) for _ in range(r.randrange(4))]
    return {r.choice(["query", "input", "inputs", "text", "x", "messages", "role", "content"]): tree(r, depth + 1) for _ in range(r.randrange(4))}


# Each mutation changes the request and gives the statuses that fit; None: those that fitted before.
def bad_json(r, q):
    data = bytearray(q.data)
    for _ in range(r.randrange(1, 6)):
        at = r.randrange(len(data)) if data else 0
        r.choice([lambda: data.__setitem__(slice(at, at + 1), bytes([r.randrange(256)])), lambda: data.__delitem__(slice(at, at + r.randrange(1, 9))),
                  lambda: data.__setitem__(slice(at, at), bytes(r.randrange(256) for _ in range(r.randrange(1, 6))))])()
    q.data = bytes(data)
    return {200, 400}


def cut_json(r, q):
    q.data = q.data[:r.randrange(len(q.data))]
    return {400}


def other_json(r, q):
    q.data = json.dumps(tree(r)).encode()
    return {200, 400}


def other_field(r, q):
    body = json.loads(q.data)
    body[r.choice(list(body))] = tree(r)
    q.data = json.dumps(body).encode()
    return {200, 400}


def unknown_field(r, q):
    body = json.loads(q.data)
    body["x" + str(r.randrange(100))] = tree(r)
    q.data = json.dumps(body).encode()
    return {400}


def deep_json(r, q):
    n = r.randrange(129, 20000)
    q.data = b'{"input":' + b"[" * n + b"]" * n + b"}"
    return {400}


def surrogates(r, q):
    q.data = q.data.replace(b"Fine", r.choice([b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xff\xfe", b"\\uD83D\\uDE00"]))
    return {200, 400}


def too_long(r, q):
    q.data = q.data.replace(b"Fine", b"word " * r.randrange(300, 2000))
    return {200, 400}


def no_length(r, q):
    q.length = b"none"
    return {411}


def wrong_length(r, q):
    q.length = r.choice([b"-1", b"abc", b"1e3", b"+5", b"99999999999999999999999", b"0x10", b"5, 5", b" "])
    return {400, 411, 413, b""}


def large(r, q):
    q.length = b"%d" % r.choice([(64 << 10) + 1, 1 << 20, 1 << 33, 1 << 62])
    q.patience = 0.05 if int(q.length) < 1 << 30 else 60  # the rest of what it announced does not come
    return {413} if q.patience == 60 else {413, b""}


def really_large(r, q):
    q.data = b'{"inputs":"' + b"a" * r.randrange(65 << 10, 400 << 10) + b'"}'
    return {413}


def short_length(r, q):
    q.length = b"%d" % r.randrange(len(q.data))
    return {400, 200}


def chunked(r, q):
    q.chunked = True
    return {411}


def bad_chunks(r, q):
    q.patience = 0.3
    q.headers.append((b"Transfer-Encoding", r.choice([b"chunked", b"gzip", b"chunked, chunked", b"identity"])))
    q.data = r.choice([b"zz\r\n\r\n", b"fffffffffffffffff\r\n", b"-1\r\n", b"5\r\nabc", b"\r\n", b"1;x=" + b"y" * 5000 + b"\r\na\r\n0\r\n\r\n"])
    return {400, 411, 413, 501, b""}


def other_method(r, q):
    q.method = r.choice([b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"post", b"BREW", b"X" * 200])
    return {405, 400, 501}


def bad_line(r, q):
    q.version = r.choice([b"HTTP/9.9", b"HTTP", b"", b"HTTP/1.1 x", b"\x00\x01", b"FTP/1.1"])
    return {200, 400, 404, 405, 411, 505, b""}


def other_path(r, q):
    q.path = r.choice([b"/", b"/nothing", b"/get_reward/", b"//get_reward", b"/run//get_reward", b"/run/x", b"/clean", b"/get_reward%00", b"/%zz", b"/%41",
                       b"/run/" + b"a" * 200 + b"/get_reward", b"/../../etc/passwd", b"/\xff\xfe", b"*", b"http://x/get_reward"])
    return {404, 400, b""}


def long_path(r, q):
    q.path = b"/" + b"a" * r.randrange(1024, 12000)
    return {414, 431, 400, b""}


def bad_header(r, q):
    q.headers.append(r.choice([(b"X" * 3000, b"y"), (b"X", b"y" * 9000), (b"", b"y"), (b"X Y", b"z"), (b"X", b"\x00"), (b"X\x01", b"y"),
                               (b"Expect", b"nonsense"), (b"Connection", b"upgrade"), (b"Content-Encoding", b"gzip")]))
    return {200, 400, 411, 417, 431, b""}


def many_headers(r, q):
    q.headers += [(b"X-%d" % i, b"v" * 20) for i in range(r.randrange(50, 900))]
    return {200, 400, 413, 431, b""}


def strange_host(r, q):
    q.headers[0] = (b"Host", r.choice([b"evil.example", b"localhost.evil.example", b"a" * 300, b""]))
    return {403, 400}


def origin(r, q):
    q.headers.append((b"Origin", b"http://evil.example"))
    return {403}


def cut_off(r, q):
    q.cut = r.randrange(len(q.bytes()))
    q.patience = 0.05
    return {b"", 400, 408}


def garbage(r, q):
    q.patience = 0.3
    q.prefix = bytes(r.randrange(256) for _ in range(r.randrange(1, 200)))
    return {b"", 400, 404, 405, 403, 501, 505, 431, 411}


MUTATIONS = [bad_json, bad_json, bad_json, cut_json, other_json, other_field, other_field, unknown_field, deep_json, surrogates, too_long, no_length,
             wrong_length, large, really_large, short_length, chunked, bad_chunks, other_method, bad_line, other_path, long_path, bad_header,
             many_headers, strange_host, origin, cut_off, garbage]


def answer(port, q):
    """The status, or b"" where the connection was closed without one."""
    s = socket.create_connection(("127.0.0.1", port), timeout=60)
    s.settimeout(q.patience)
    try:
        try:
            s.sendall(q.bytes())
        except OSError:
            pass  # refused before it was written
        data = b""
        while b"\r\n\r\n" not in data:
            try:
                piece = s.recv(65536)
            except (ConnectionResetError, TimeoutError):
                break
            if not piece:
                break
            data += piece
    finally:
        s.close()
    if not data:
        return b""
    line = data.split(b"\r\n", 1)[0].split(b" ")
    assert line[0].startswith(b"HTTP/1."), data[:200]
    if line[1] == b"100":  # Continue comes before the answer
        line = data.split(b"\r\n\r\n", 1)[1].split(b"\r\n", 1)[0].split(b" ")
    return int(line[1])


def test_http_10000_malformed_requests(tmp_path):
    print("seed", SEED)
    r = random.Random(SEED)
    d = HttpDaemon(tmp_path, http=", body_max: 64KiB").start()
    right = d.good("/remote_rm", GOOD["/remote_rm"])
    for _ in range(20):
        assert d.good("/remote_rm", GOOD["/remote_rm"]) == right
    fds = len(os.listdir(f"/proc/{d.process.pid}/fd"))
    seen = {}
    for n in range(REQUESTS):
        q = Request(r)
        mutation = r.choice(MUTATIONS)
        allowed = mutation(r, q)
        got = answer(d.port, q)
        assert got in allowed, (SEED, n, mutation.__name__, got, sorted(map(str, allowed)), q.bytes()[:400])
        seen.setdefault(mutation.__name__, set()).add(got)
        if n % 250 == 0:
            assert d.good("/remote_rm", GOOD["/remote_rm"]) == right
            assert d.process.poll() is None, d.tail()
    assert set(seen) >= {m.__name__ for m in MUTATIONS} or REQUESTS < 1000
    end = time.monotonic() + 100  # half requests end with their time
    while len(os.listdir(f"/proc/{d.process.pid}/fd")) > fds + 16:  # the store opens tables of its own
        assert time.monotonic() < end, "file descriptors leak"
        time.sleep(0.1)
    assert d.good("/remote_rm", GOOD["/remote_rm"]) == right
    assert d.stop() == 0, d.tail()
    assert "ERROR: AddressSanitizer" not in d.tail() and "WARNING: ThreadSanitizer" not in d.log.read_text(errors="replace")
    d.end()
    print({k: sorted(map(str, v)) for k, v in sorted(seen.items())})
