"""How a call is spoken, without a socket: requests, replies, pages, trying again. Client and AsyncClient drive the same conversation."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Generator
from typing import Any

from . import _messages as m
from .errors import ProtocolError, ServerBusy, SpurionError, Timeout, Unavailable, error_of

PREFIX = b"/spurion.v1.Spurion/"
RETRY_MIN = 0.02
RESTARTS_MAX = 5
ANSWER_MAX = 64 << 20
_ids = itertools.count(int(time.monotonic() * 1000) & 0xFFFFFF)


def next_id() -> bytes:
    """What stands before a request, and before its reply: 32 bits, the top one set."""
    return struct.pack(">I", 0x80000000 | (next(_ids) & 0x7FFFFFFF))


def once(method: str, body: Any, timeout: float) -> bytes:
    """A packed Request of a message that is asked outside of a conversation."""
    request = m.Request(call_id=1, method=PREFIX + method.encode(), timeout_ms=int(timeout * 1000), body=body.SerializeToString())
    return bytes(request.SerializeToString())


class Ask:
    """To the driver: send this request, give its reply's bytes (without the id). Raises Unavailable where the connection broke."""

    __slots__ = ("data", "id")

    def __init__(self, request: Any):
        self.id = next_id()
        self.data = self.id + request.SerializeToString()


class Sleep:
    """To the driver: wait so many seconds."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float):
        self.seconds = seconds


def deadline_of(timeout: float | None, default: float) -> float:
    """The moment, in time.monotonic's seconds."""
    return time.monotonic() + (default if timeout is None else timeout)


def conversation(method: str, body: bytes, reply_class: Any, deadline: float, retry: bool,
                 key: bytes | None = None) -> Generator[Ask | Sleep, bytes, Any]:
    """Yields what to do, is sent the replies, returns the unpacked answer.

    retry: the call is sent under an idempotency key, and again while the daemon is busy and time is left. Every call is sent again on a new
    connection when one broke: all of them may be repeated.
    """
    key = (key or os.urandom(16)) if retry else b""
    token, out, restarts, last = b"", b"", 0, ""
    call_id = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Timeout(f"{method}: no answer in time" + (f"; last: {last}" if last else ""))
        call_id += 1
        request = m.Request(call_id=call_id, method=PREFIX + method.encode(), timeout_ms=min(max(1, int(left * 1000)), 0xFFFFFFFF),
                            idempotency_key=key, body=b"" if token else body, page_token=token)
        reply = m.Reply.FromString((yield Ask(request)))
        if reply.call_id != call_id:
            raise ProtocolError(f"{method}: expected the answer to call {call_id}, found {reply.call_id}")
        if reply.code == 5 and token and restarts < RESTARTS_MAX:  # another daemon by now, or it forgot the pages: from the start
            token, out, restarts = b"", b"", restarts + 1
            continue
        if reply.code:
            error = error_of(reply.code, f"{method}: {reply.message.decode(errors='replace')}", reply.retry_after_ms)
            wait = max(reply.retry_after_ms / 1000, RETRY_MIN)
            if not retry or not reply.retry_after_ms or not isinstance(error, (Unavailable, ServerBusy)) \
                    or time.monotonic() + wait >= deadline:
                raise error
            last = str(error)
            yield Sleep(wait)
            continue
        out += reply.body
        token = reply.next_page_token
        if len(out) > ANSWER_MAX:
            raise ServerBusy(f"{method}: expected an answer of at most {ANSWER_MAX} bytes, found more (ask for less)")
        if not token:
            return reply_class.FromString(out)


def lost(url: str, error: SpurionError | None) -> SpurionError:
    """What to raise when the time is up: why the daemon could not be reached, or that it did not answer."""
    return error if error is not None else Timeout(f"{url}: no answer in time")
