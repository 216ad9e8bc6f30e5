"""The client for asyncio: the same calls, on streams. One object may serve several loops; each has connections of its own."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterable
from typing import Any

from . import _call, _messages as m, results as r
from ._sp import BACKOFF_MAX, BACKOFF_MIN, REQ, Address, check_greeting, frame_header, frame_length, greeting
from .client import REPLY_MAX, TIMEOUT, Client, Item, Requests, _need_run, batches_of
from .errors import InvalidArgument, SpurionError, Unavailable
from .tap import Tap, TapStats


class _Connection:
    """One REQ connection; one request at a time."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.address, self.reader, self.writer = address, reader, writer

    @classmethod
    async def dial(cls, address: Address) -> _Connection:
        if address.ipc:
            reader, writer = await asyncio.open_unix_connection(address.path)
        else:
            reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(greeting(REQ))
        try:
            check_greeting(address.url, await reader.readexactly(8), REQ)
        except BaseException:
            writer.close()
            raise
        return cls(address, reader, writer)

    async def ask(self, ask: _call.Ask) -> bytes:
        self.writer.write(frame_header(self.address.ipc, len(ask.data)) + ask.data)
        await self.writer.drain()
        while True:
            header = await self.reader.readexactly(9 if self.address.ipc else 8)
            data = await self.reader.readexactly(frame_length(self.address.url, self.address.ipc, header, REPLY_MAX))
            if data[:4] == ask.id:
                return data[4:]

    def close(self) -> None:
        self.writer.close()


class AsyncClient:
    """Client for asyncio: arguments, answers and errors are Client's. publish is the same tap, and never waits."""

    def __init__(self, addr: str | None = None, *, rollouts: str | None = None, alerts: str | None = None, run: str | None = None,
                 producer: str | None = None, timeout: float = TIMEOUT, ring_bytes: int = 64 << 20, connections: int = 32):
        self._options = dict(addr=addr, rollouts=rollouts, alerts=alerts, run=run, producer=producer, timeout=timeout, ring_bytes=ring_bytes,
                             connections=connections)
        self._requests = Requests(addr, rollouts, alerts, run, producer, timeout)
        self._connections = connections
        self._sync = Client(addr, rollouts=rollouts, alerts=alerts, run=run, producer=producer, timeout=timeout, ring_bytes=ring_bytes)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[list[_Connection], asyncio.Semaphore]] = \
            weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self._options, "addr": self._requests.rpc, "rollouts": self._requests.rollouts, "alerts": self._requests.alerts_address}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("addr"), **state)  # type: ignore[misc]

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def run(self) -> str | None:
        """Run of rollouts that name none."""
        return self._requests.run

    @property
    def tap(self) -> Tap:
        """The tap of this process."""
        return self._sync.tap

    async def aclose(self) -> None:
        """Ends the connections of this loop, and the tap (flush first)."""
        free, _ = self._pool()
        while free:
            free.pop().close()
        self._sync.close()

    def _pool(self) -> tuple[list[_Connection], asyncio.Semaphore]:
        if self._pid != os.getpid():
            self._reset()
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            self._pools[loop] = ([], asyncio.Semaphore(self._connections))
        return self._pools[loop]

    async def _ask(self, free: list[_Connection], ask: _call.Ask, deadline: float) -> bytes:
        """One request, again over a new connection when one breaks, until the deadline."""
        backoff, why, answered = BACKOFF_MIN, None, False
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _call.lost(self._requests.rpc, why)
            c = free.pop() if free else None
            try:
                if c is None:
                    c = await asyncio.wait_for(_Connection.dial(Address(self._requests.rpc)), left)
                data = await asyncio.wait_for(c.ask(ask), max(0.001, deadline - time.monotonic()))
                answered = True
                free.append(c)
                return data
            except (asyncio.TimeoutError, TimeoutError):
                raise _call.lost(self._requests.rpc, why) from None
            except (OSError, asyncio.IncompleteReadError) as e:
                text = "closed by the daemon" if isinstance(e, asyncio.IncompleteReadError) else str(e)
                why = Unavailable(f"{self._requests.rpc}: {text}")
            finally:
                if c is not None and not answered:
                    c.close()
            await asyncio.sleep(min(backoff, max(0.0, deadline - time.monotonic())))
            backoff = min(backoff * 2, BACKOFF_MAX)

    async def _call(self, method: str, body: bytes, reply_class: Any, retry: bool = False, timeout: float | None = None) -> Any:
        deadline = _call.deadline_of(timeout, self._requests.timeout)
        talk = _call.conversation(method, body, reply_class, deadline, retry)
        free, gate = self._pool()
        async with gate:
            try:
                want = next(talk)
                while True:
                    if isinstance(want, _call.Sleep):
                        await asyncio.sleep(want.seconds)
                        want = next(talk)
                    else:
                        want = talk.send(await self._ask(free, want, deadline))
            except StopIteration as done:
                return done.value

    async def hello(self, timeout: float | None = None) -> dict[str, Any]:
        """As Client.hello."""
        from . import __version__

        q = m.HelloRequest(proto_min=1, proto_max=1, client_version=__version__.encode())
        h = await self._call("Hello", q.SerializeToString(), m.HelloReply, timeout=timeout)
        return {"version": h.server_version.decode(), "provenance": h.provenance.decode(), "epoch": h.epoch}

    async def score(self, rollouts: Iterable[Item], *, run: str | None = None, tokens: bool = False, timeout: float | None = None,
                    on_error: str = "raise") -> r.Verdicts:
        """As Client.score."""
        if on_error not in ("raise", "return"):
            raise InvalidArgument(f"score: expected on_error raise or return, found {on_error!r}")
        calls = [self._call(*c, timeout=timeout) for c in self._requests.score(rollouts, run, tokens)]
        out = r.Verdicts(r.verdict_of(v) for reply in await asyncio.gather(*calls) for v in reply.verdicts)
        return out.check() if on_error == "raise" else out

    async def submit(self, rollouts: Iterable[Item], *, run: str | None = None, timeout: float | None = None) -> r.Submitted:
        """As Client.submit."""
        items = list(rollouts)
        replies = await asyncio.gather(*(self._call(*c, timeout=timeout) for c in self._requests.submit(items, run)))
        return self._requests.submitted(list(replies), [len(b) for b in batches_of(items)])

    async def query(self, run: str | None = None, *, limit: int | None = None, cursor: bytes = b"", timeout: float | None = None,
                    **where: Any) -> r.Rows:
        """As Client.query."""
        q = self._requests.query(_need_run(run or self.run), where)
        out = r.Rows()
        while True:
            q.cursor = cursor
            if limit is not None:
                q.limit = limit - len(out)
            reply = await self._call("Query", q.SerializeToString(), m.QueryReply, timeout=timeout)
            out.extend(r.row_of(x) for x in reply.rows)
            cursor = out.cursor = reply.cursor
            if not cursor or (limit is not None and len(out) >= limit):
                return out

    async def get(self, run: str, step: int, group: str, id: str, attempt: int = 0, *, timeout: float | None = None) -> r.Record:
        """As Client.get."""
        return r.record_of(await self._call("Get", self._requests.get(run, step, group, id, attempt), m.Record, timeout=timeout))

    async def status(self, timeout: float | None = None) -> r.Status:
        """As Client.status."""
        return r.status_of(await self._call("Status", b"", m.StatusReply, timeout=timeout))

    async def rules(self, timeout: float | None = None) -> list[r.Rule]:
        """As Client.rules."""
        return self._requests.rules(await self._call("Rules", b"", m.RulesReply, timeout=timeout))

    def publish(self, rollouts: Iterable[Item], *, step_end: int | None = None) -> bool:
        """As Client.publish: returns at once."""
        return self._sync.publish(rollouts, step_end=step_end)

    async def flush(self, timeout: float | None = None) -> TapStats:
        """As Client.flush, in a thread."""
        return await asyncio.to_thread(self._sync.flush, timeout)

    async def alerts(self, from_seq: int | None = None, *, run: str | None = None, timeout: float | None = None) -> AsyncIterator[r.Alert]:
        """As Client.alerts: `async for alert in client.alerts(): …`"""
        from .alerts import WAIT, AlertStream

        stream = AlertStream(self._sync, self._requests.alerts_address, from_seq)
        quiet = time.monotonic()
        try:
            while True:
                try:
                    alert = await asyncio.to_thread(stream.next)
                except SpurionError:
                    if timeout is not None and time.monotonic() - quiet >= timeout:
                        raise
                    alert = None
                if alert is not None:
                    quiet = time.monotonic()
                    if run is None or alert.run == run or not alert.run:
                        yield alert
                elif timeout is not None and time.monotonic() - quiet >= timeout:
                    return
                else:
                    await asyncio.sleep(WAIT / 4)
        finally:
            stream.close()
