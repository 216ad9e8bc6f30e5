"""The tap: batches go into a ring, over PUB to the daemon, and leave the ring when the daemon says that they are durable.

publish encodes, puts into the ring and returns: sockets belong to a thread of the tap. What the daemon missed is asked for by Sync and sent
again by Fill, as libspurion does; what the ring had to forget is counted and told. After fork the child begins as a producer of its own.
"""

from __future__ import annotations

import atexit
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import _call, _encode, _messages as m
from ._rollout import Rollout
from ._sp import PUB, REQ, Address, Sp, frame_header
from .errors import DataLoss, InvalidArgument, SpurionError, Timeout, Unavailable, error_of

SYNC_INTERVAL = 1.0
SYNC_TIMEOUT = 10.0
URGE = 0.02          # between two Syncs while somebody waits
UNDER_WAY = 1.0      # a batch that went over the tap this long ago has come, or will not
FILL_BYTES = 4 << 20
FILL_BATCHES = 256
BATCH_BYTES_MAX = (16 << 20) - 1024
BATCH_ROLLOUTS_MAX = 4096
RANGES_MAX = 1024
SLICE = 1 << 18
EXIT_WAIT = 2.0
ACTIVE = 0.02        # seconds between two looks while something is under way


@dataclass(slots=True)
class TapStats:
    """What became of what was published. stored_through: every batch up to this number is durable, or counted as lost."""

    producer: str
    epoch: int
    sequence: int
    stored_through: int
    published_rollouts: int
    dropped_rollouts: int
    refilled_batches: int
    ring_bytes: int
    connected: bool


class _Entry:
    __slots__ = ("sequence", "rollouts", "data", "sent_at")

    def __init__(self, sequence: int, rollouts: int, data: bytes):
        self.sequence, self.rollouts, self.data, self.sent_at = sequence, rollouts, data, 0.0


class Tap:
    """A producer of one run. Threads may share it.

    policy: what to do when the ring is full: "drop-new" refuses the batch, "drop-oldest" forgets the oldest unconfirmed ones. Both count, and
    tell the daemon. Nothing ever waits for the daemon but ready and flush.
    """

    def __init__(self, rpc: str, rollouts: str, run: str, producer: str | None = None, *, ring_bytes: int = 64 << 20,
                 policy: str = "drop-new", sync_interval: float = SYNC_INTERVAL):
        if policy not in ("drop-new", "drop-oldest"):
            raise InvalidArgument(f"tap: expected policy drop-new or drop-oldest, found {policy!r}")
        self._addresses = (Address(rpc), Address(rollouts))
        self.run, self._named, self._ring_max, self._policy, self._interval = run, producer, ring_bytes, policy, sync_interval
        self._begin(producer or f"{socket.gethostname()[:100]}-{os.getpid()}")

    def _begin(self, producer: str) -> None:
        self._pid = os.getpid()
        self.producer = producer
        self.epoch = secrets.randbits(63) | 1
        self.sequence = self.stored_through = 0
        self.published_rollouts = self.dropped_rollouts = self.refilled = 0
        self._lock = threading.Condition(threading.Lock())
        self._ring: deque[_Entry] = deque()
        self._unsent: deque[_Entry] = deque()
        self._ring_bytes = 0
        self._part: tuple[_Entry, bytes, int] | None = None  # a frame of which a part went out
        self._unsure: dict[int, tuple[int, float]] = {}      # forgotten by the ring after it was sent: number -> (rollouts, when)
        self._lost: list[list[Any]] = []                     # gone for good, not settled yet: [first, last, rollouts, whether it was sent]
        self._pub = Sp(self._addresses[1], PUB)
        self._req = Sp(self._addresses[0], REQ, 1 << 20)
        self._call: Any = None
        self._sync_at = 0.0
        self._answers = 0
        self._urgent = 0
        self._closing = False
        self._closed_said = False
        self._stop = False
        self._error: SpurionError | None = None
        self._dirty = False  # something new for the thread
        self._thread: threading.Thread | None = None
        self._part_on = 0
        self._asked_closing = False
        self._fixed_ids = False  # whether the daemon said that it takes Rollout.prompt_ids_fixed; what the ring holds has them
        self._fixed_on = 0       # the connection that batches went over last; 0: none yet

    def _enter(self) -> None:
        """In a forked child: the parent's ring, numbers and sockets stay the parent's."""
        if self._pid != os.getpid():
            for sock in (self._pub.sock, self._req.sock):
                if sock is not None:
                    sock.close()
            self._begin(f"{self._named or socket.gethostname()[:100]}-{os.getpid()}")
        if self._thread is None or not self._thread.is_alive():
            self._stop = False
            self._thread = threading.Thread(target=self._loop, name="spurion-tap", daemon=True)
            self._thread.start()
            atexit.register(_last_words, weakref.ref(self))

    # ---- the trainer's side --------------------------------------------------------------------------------------------------------------

    def publish(self, rollouts: Iterable[Rollout | Mapping[str, Any]] = (), *, step_end: int | None = None) -> bool:
        """Puts a batch into the ring; False: no room, dropped and counted. Raises InvalidArgument where a rollout is malformed."""
        self._enter()
        run = self.run.encode()
        packed = _encode.rollouts(rollouts, run)
        count = len(packed)
        if count > BATCH_ROLLOUTS_MAX:
            raise InvalidArgument(f"publish: expected at most {BATCH_ROLLOUTS_MAX} rollouts, found {count}")
        with self._lock:
            data = _encode.tap(run, self.producer.encode(), self.epoch, self.sequence + 1, packed, step_end)
            if len(data) > BATCH_BYTES_MAX:
                raise InvalidArgument(f"publish: expected a batch of at most {BATCH_BYTES_MAX} bytes, found {len(data)} (publish fewer at once)")
            self.sequence += 1
            self._closed_said = False
            room = self._room(len(data))
            if room:
                entry = _Entry(self.sequence, count, data)
                self._ring.append(entry)
                self._unsent.append(entry)
                self._ring_bytes += len(data)
                self.published_rollouts += count
            else:  # it has a number all the same: the daemon is told the exact loss
                self._lose(self.sequence, count, False)
            # no system call here: one would hand the interpreter to the thread, and the trainer would wait for it
            self._dirty = True
            self._lock.notify_all()
        return room

    def step_end(self, step: int) -> bool:
        """Everything of this step and of those before has been published by this process."""
        return self.publish(step_end=step)

    def ready(self, timeout: float = 30.0) -> None:
        """Waits until the daemon answers and has taken note of this producer. Raises Unavailable or Timeout."""
        self._enter()
        with self._lock:
            answers = self._answers
        self._settle(lambda: self._answers > answers and self._pub.open, timeout, "ready: the daemon has not answered")

    def flush(self, timeout: float = 30.0, closing: bool = False) -> TapStats:
        """Waits until everything published is durable. closing: goodbye, no step waits for this producer any longer.

        Raises Timeout (with what is not confirmed), DataLoss (with the number that was dropped; all others are stored then).
        """
        self._enter()
        with self._lock:
            self._closing = closing
        try:
            self._settle(lambda: self._settled(closing), timeout, None)
        finally:
            with self._lock:
                self._closing = False
        if self.dropped_rollouts:
            raise DataLoss(f"{self.dropped_rollouts} rollouts were dropped because the ring was full; all others are stored")
        return self.stats()

    def stats(self) -> TapStats:
        """Counters, at once."""
        return TapStats(self.producer, self.epoch, self.sequence, self.stored_through, self.published_rollouts, self.dropped_rollouts,
                        self.refilled, self._ring_bytes, self._pub.open)

    def close(self) -> None:
        """Ends the thread and its connections, without waiting for the daemon."""
        if self._pid != os.getpid():
            return
        self._stop = True
        with self._lock:
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2)

    def _settled(self, closing: bool) -> bool:
        return not self._ring and not self._unsure and not self._lost and (not closing or self._closed_said)

    def _settle(self, done: Any, timeout: float, text: str | None) -> None:
        end = time.monotonic() + timeout
        with self._lock:
            self._urgent += 1
            self._sync_at = 0.0
            try:
                self._dirty = True
                self._lock.notify_all()
                while not done():
                    left = end - time.monotonic()
                    if left <= 0:
                        why = f": {self._error}" if self._error else ""
                        said = text or f"flush: batches {self.stored_through + 1} to {self.sequence} are not confirmed"
                        raise Timeout(said + why)
                    self._lock.wait(min(left, 0.05))
            finally:
                self._urgent -= 1

    def _room(self, size: int) -> bool:
        while self._ring_bytes + size > self._ring_max:
            if self._policy != "drop-oldest" or not self._ring or size > self._ring_max:
                return False
            self._forget()
        return True

    def _forget(self) -> None:
        e = self._ring.popleft()
        self._ring_bytes -= len(e.data)
        if self._unsent and self._unsent[0] is e and (self._part is None or self._part[0] is not e):
            self._unsent.popleft()
            self._lose(e.sequence, e.rollouts, False)
        else:
            self._unsure[e.sequence] = (e.rollouts, e.sent_at or time.monotonic())

    def _lose(self, sequence: int, rollouts: int, sent: bool) -> None:
        """Notes a batch that is gone. Neighbours that never went out become one range; others stand alone, since one may yet prove to have come."""
        self.dropped_rollouts += rollouts
        if self._lost and not sent and not self._lost[-1][3] and self._lost[-1][1] + 1 == sequence:
            self._lost[-1][1], self._lost[-1][2] = sequence, self._lost[-1][2] + rollouts
        else:
            self._lost.append([sequence, sequence, rollouts, sent])

    # ---- the thread's side ---------------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while not self._stop:
            try:
                busy = self._step()
            except SpurionError as e:  # a daemon that is away does not concern the trainer; flush and ready tell
                self._error, busy = e, False
            except Exception as e:  # noqa: BLE001: the trainer goes on, and flush says what happened
                self._error, busy = SpurionError(f"tap: {type(e).__name__}: {e}", 13), False
            self._sleep(busy)
        self._pub.close()
        self._req.close()

    def _sleep(self, busy: bool) -> None:
        """Waits for the sockets, a little, while something is under way; else until something is published."""
        if busy:
            return
        with self._lock:
            if not (self._ring or self._unsure or self._lost or self._urgent or self._call):
                while not (self._dirty or self._stop):
                    self._lock.wait(60)
            self._dirty = False
        now = time.monotonic()
        seconds = ACTIVE if self._call else max(0.0, min(ACTIVE, self._sync_at - now))
        poll = select.poll()
        for sp, write in ((self._pub, bool(self._unsent)), (self._req, self._call is not None and self._call.at < len(self._call.frame))):
            if sp.sock is None:
                seconds = min(seconds, max(0.001, sp._retry_at - now))
            else:
                poll.register(sp.sock, (select.POLLOUT if (sp._sent < 8 if not sp.open else write) else 0) | select.POLLIN)
        poll.poll(max(seconds, 0.001) * 1000)

    def _step(self) -> bool:
        """One round of everything under way; whether there is more to do at once."""
        error: SpurionError | None = None
        busy = False
        try:
            busy = self._send()
        except Unavailable as e:
            error = e
        now = time.monotonic()
        due = self._sync_at if not self._urgent else min(self._sync_at, now)
        if self._call is None and now >= due and (self._urgent or self._ring or self._lost or self._unsure or not self._answers):
            self._sync_at = now + (URGE if self._urgent else self._interval)
            self._call = _Exchange(self._sync_request(), False)
        if self._call is not None:
            try:
                answer = self._call.step(self._req)
                if answer is not None:
                    self._answered(answer)
                    busy = True
                elif now - self._call.started > SYNC_TIMEOUT:
                    self._call = None
                    self._req.drop("no answer to a Sync", at_once=True)
            except Unavailable as e:
                error = e
        self._error = error
        return busy

    def _send(self) -> bool:
        if not self._pub.step():
            return False
        self._pub.receive()  # a SUB says nothing; this sees the end of the connection
        while True:
            with self._lock:
                if self._part is not None and self._part_on != self._pub.opened:
                    self._part = None  # the connection it went over is gone: the daemon asks again
                if self._part is None:
                    if not self._unsent:
                        return False
                    e = self._unsent[0]
                    if self._fixed_on != self._pub.opened:
                        if self._fixed_on:  # connected anew: another daemon, perhaps an older one
                            self._fixed_ids = False
                        self._fixed_on = self._pub.opened
                    data = self._spoken(e)
                    self._part, self._part_on = (e, frame_header(self._pub.address.ipc, len(data)) + data, 0), self._pub.opened
                e, frame, at = self._part
            try:
                sent = self._pub.send(memoryview(frame)[at:at + SLICE])
            except Unavailable:
                self._part = None
                raise
            with self._lock:
                at += sent
                self._part = (e, frame, at)
                if at == len(frame):
                    self._part = None
                    e.sent_at = time.monotonic()
                    if self._unsent and self._unsent[0] is e:
                        self._unsent.popleft()
            if not sent:
                return False

    def _spoken(self, e: _Entry) -> bytes:
        """A batch in the form that this daemon reads; as long as it has not said which, in the oldest."""
        return e.data if self._fixed_ids else _encode.without_fixed_ids(e.data)

    def _sync_request(self) -> bytes:
        with self._lock:
            q = m.SyncRequest(run=self.run.encode(), producer=self.producer.encode(), epoch=self.epoch, last_sequence=self.sequence)
            self._lost.sort()
            asked = self._lost[:RANGES_MAX]
            q.lost_first.extend(x[0] for x in asked)
            q.lost_last.extend(x[1] for x in asked)
            q.lost_count.extend(x[2] for x in asked)
            q.closing = self._closing and len(asked) == len(self._lost)
            self._asked_closing = q.closing
        return _call.once("Sync", q, SYNC_TIMEOUT)

    def _fill_request(self, missing: list[tuple[int, int]]) -> bytes | None:
        q, size, count = m.FillRequest(), 0, 0
        first_unsent = self._unsent[0].sequence if self._unsent else self.sequence + 1
        for e in self._ring:
            if e.sequence >= first_unsent or count == FILL_BATCHES:
                break
            if any(a <= e.sequence <= b for a, b in missing):
                if count and size + len(e.data) > FILL_BYTES:
                    break
                q.taps.append(self._spoken(e))
                size, count = size + len(e.data), count + 1
        self.refilled += count
        if not count:
            return None
        return _call.once("Fill", q, SYNC_TIMEOUT)

    def _answered(self, data: bytes) -> None:
        call, self._call = self._call, None
        reply = m.Reply.FromString(data)
        now = time.monotonic()
        if reply.code:
            self._sync_at = now + max(reply.retry_after_ms / 1000, URGE if self._urgent else self._interval)
            raise error_of(reply.code, reply.message.decode(errors="replace"), reply.retry_after_ms)
        if call.fills:
            self._sync_at = now  # the next Sync says what became of it
            return
        a = m.SyncReply.FromString(reply.body)
        missing = list(zip(a.missing_first, a.missing_last))
        with self._lock:
            self._answers += 1
            self._closed_said = self._asked_closing
            self._fixed_ids = a.takes_fixed_ids
            self.stored_through = max(self.stored_through, a.stored_through)
            while self._ring and self._ring[0].sequence <= self.stored_through:
                self._ring_bytes -= len(self._ring.popleft().data)
            while self._unsent and self._unsent[0].sequence <= self.stored_through:
                self._unsent.popleft()
            self._lost = [x for x in self._lost if x[1] > self.stored_through]
            for s, (rollouts, sent_at) in list(self._unsure.items()):
                if s <= self.stored_through:
                    del self._unsure[s]
                elif any(x <= s <= y for x, y in missing) and call.started - sent_at >= UNDER_WAY:
                    del self._unsure[s]
                    self._lose(s, rollouts, True)
            again = self._fill_request(missing) if missing else None
            if again:
                self._call = _Exchange(again, True)
            self._lock.notify_all()


def _last_words(tap: weakref.ref[Tap]) -> None:
    """At the end of the process: what a connected daemon has not confirmed gets a moment."""
    t = tap()
    if t is not None and not t._stop and t._pid == os.getpid() and t._pub.open and t._ring:
        try:
            t.flush(EXIT_WAIT)
        except SpurionError:
            pass


class _Exchange:
    """One request on its way over REQ."""

    def __init__(self, request: bytes, fills: bool):
        self.fills = fills
        self.id = _call.next_id()
        self.data = self.id + request
        self.frame, self.at, self.sent_on = b"", 0, -1
        self.started = time.monotonic()

    def step(self, sp: Sp) -> bytes | None:
        """Moves it along; the answer when it is there."""
        if not sp.step():
            return None
        if self.sent_on != sp.opened:
            self.frame, self.at, self.sent_on = frame_header(sp.address.ipc, len(self.data)) + self.data, 0, sp.opened
        if self.at < len(self.frame):
            self.at += sp.send(memoryview(self.frame)[self.at:])
        while (data := sp.receive()) is not None:
            if data[:4] == self.id:
                return data[4:]
        return None
