"""Alerts as they come: the live channel says that there is something new; numbers say what was missed, and that is fetched by a call.
Order and exactly-once rest on the numbers alone. Thread: one at a time; close may come from another."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _messages as m, results as r
from ._sp import SUB, Address, Sp
from .errors import SpurionError, Unavailable

if TYPE_CHECKING:
    from .client import Client

LOOK = 5.0  # seconds: an alert sent while the daemon was still making the connection is seen after this long at the latest
WAIT = 0.2
FETCH = 64


class AlertStream:
    """One subscriber. next() gives what is there now; follow() waits."""

    def __init__(self, client: Client, address: str, from_seq: int | None):
        self._client, self._sp = client, Sp(Address(address), SUB, 1 << 16)
        self._from = from_seq
        self._epoch = 0
        self._seq = 0  # of the next one to be given; 0: not begun
        self._ready: deque[r.Alert] = deque()
        self._fetch = True
        self._look_at = 0.0
        self._opened = 0
        self._closed = False

    def close(self) -> None:
        """Ends the iteration."""
        self._closed = True
        self._sp.close()

    def begin(self) -> None:
        """Notes where the stream begins: with a daemon that is there, alerts raised from now on are not missed."""
        if self._seq:
            return
        first = self._ask(self._from if self._from is not None else (1 << 62))
        self._epoch = first.epoch
        self._seq = self._from if self._from is not None else first.last_seq + 1
        self._fetch = self._from is not None

    def _ask(self, seq: int) -> Any:
        q = m.AlertsRequest(epoch=self._epoch, from_seq=seq, limit=FETCH)
        return self._client._call("Alerts", q.SerializeToString(), m.AlertsReply)

    def _fetch_more(self) -> None:
        a = self._ask(self._seq)
        if a.epoch != self._epoch:  # another store: its numbers begin anew
            self._epoch, self._seq = a.epoch, 1
            return
        for x in a.alerts:
            if x.seq >= self._seq:
                self._ready.append(r.alert_of(x))
                self._seq = x.seq + 1
        self._fetch = a.last_seq >= self._seq
        self._look_at = time.monotonic() + LOOK

    def _live(self) -> None:
        try:
            if not self._sp.step():
                return
            if self._sp.opened != self._opened:
                self._opened, self._fetch = self._sp.opened, True  # a new connection: what came in between is in the store
            while (data := self._sp.receive()) is not None:
                a = m.Alert.FromString(data)
                if a.seq == 0:  # no space in the store: it cannot be stored, and has no number
                    self._ready.append(r.alert_of(a))
                elif a.epoch == self._epoch and a.seq == self._seq and not self._fetch:
                    self._ready.append(r.alert_of(a))
                    self._seq += 1
                elif a.epoch != self._epoch or a.seq > self._seq:
                    self._fetch = True
        except Unavailable:
            pass

    def next(self) -> r.Alert | None:
        """The next alert, or None when there is none now. Waits for a call to the daemon where something was missed."""
        self.begin()
        if not self._ready:
            self._live()
        if not self._ready and (self._fetch or time.monotonic() >= self._look_at):
            self._fetch_more()
        return self._ready.popleft() if self._ready else None

    def follow(self, run: str | None, timeout: float | None) -> Iterator[r.Alert]:
        """Alerts, of one run or of all, until close or a time without any."""
        quiet = time.monotonic()
        while not self._closed:
            try:
                alert = self.next()
            except SpurionError:
                if self._closed:
                    return
                if timeout is not None and time.monotonic() - quiet >= timeout:
                    raise
                time.sleep(WAIT)
                continue
            if alert is not None:
                quiet = time.monotonic()
                if run is None or alert.run == run or not alert.run:
                    yield alert
            elif timeout is not None and time.monotonic() - quiet >= timeout and not self._fetch:
                return
            elif not self._fetch:
                self._sp.wait(False, WAIT if timeout is None else max(0.0, min(WAIT, quiet + timeout - time.monotonic())))
