"""The client: calls, the tap and alerts of one daemon. Threads may share it. After fork, and where it was unpickled, it connects anew.

    with Client("ipc:///var/run/spurion.sock") as c:
        verdicts = c.score([Rollout("How do I …?", "Like this.", run="try", id="1")])
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import _call, _messages as m, results as r
from ._rollout import Rollout, ids_of, pack_all
from ._sp import REQ, Address, Sp, frame_header
from .errors import InvalidArgument, SpurionError, Unavailable, code_name
from .tap import Tap, TapStats

DEFAULT_RPC = "ipc://var/spurion.sock"
DEFAULT_ROLLOUTS = "tcp://127.0.0.1:7801"
DEFAULT_ALERTS = "tcp://127.0.0.1:7802"
TIMEOUT = 30.0
BATCH_ROLLOUTS = 1024
BATCH_BYTES = 4 << 20
REPLY_MAX = 1 << 20
ORDERS = ("step", "time", "effect")
Item = Rollout | Mapping[str, Any]
RolloutLike = Item


def address(given: str | None, variable: str, otherwise: str) -> str:
    """Argument, environment, default: in this order."""
    return given or os.environ.get(variable) or otherwise


def batches_of(rollouts: Iterable[Item]) -> Iterator[list[Item]]:
    """Messages of a bounded size; members of a group that stand together stay together."""
    batch: list[Item] = []
    size, last = 0, None
    for x in rollouts:
        get = x.get if isinstance(x, Mapping) else lambda k, x=x: getattr(x, k, None)
        group = (get("run"), get("step"), get("group"))
        if batch and group != last and (len(batch) >= BATCH_ROLLOUTS or size >= BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(x)
        size += sum(len(get(k) or ()) for k in ("prompt", "completion")) + 2 * len(str(get("messages") or ""))
        size += sum(5 * len(ids_of(get(k), k)) for k in ("prompt_ids", "completion_ids") if get(k) is not None)
        last = group
    if batch:
        yield batch


class Requests:
    """What every method sends and what its answer becomes; shared with AsyncClient."""

    def __init__(self, addr: str | None, rollouts: str | None, alerts: str | None, run: str | None, producer: str | None, timeout: float):
        self.rpc = address(addr, "SPURION_RPC", DEFAULT_RPC)
        self.rollouts = address(rollouts, "SPURION_ROLLOUTS", DEFAULT_ROLLOUTS)
        self.alerts_address = address(alerts, "SPURION_ALERTS", DEFAULT_ALERTS)
        self.run, self.producer, self.timeout = run, producer, timeout
        Address(self.rpc)

    def score(self, rollouts: Iterable[Item], run: str | None, tokens: bool) -> Iterator[tuple[str, bytes, Any, bool]]:
        for batch in batches_of(rollouts):
            q = m.ScoreRequest(want_tokens=tokens)
            if self.producer:
                q.producer = self.producer.encode()
            pack_all(batch, run or self.run, q.rollouts.add)
            yield "Score", q.SerializeToString(), m.ScoreReply, True

    def submit(self, rollouts: Iterable[Item], run: str | None) -> Iterator[tuple[str, bytes, Any, bool]]:
        for batch in batches_of(rollouts):
            q = m.SubmitRequest()
            if self.producer:
                q.producer = self.producer.encode()
            pack_all(batch, run or self.run, q.rollouts.add)
            yield "Submit", q.SerializeToString(), m.SubmitReply, True

    def query(self, run: str, where: Mapping[str, Any]) -> Any:
        """A QueryRequest. where: step, steps (first, last), rule, feature (sae, index), effect_min, effect_max, time_min_ms, time_max_ms,
        group, flagged, order, descending."""
        known = {"step", "steps", "rule", "feature", "effect_min", "effect_max", "time_min_ms", "time_max_ms", "group", "flagged", "order",
                 "descending"}
        if not where.keys() <= known:
            raise InvalidArgument(f"query: expected {', '.join(sorted(known))}, found {', '.join(sorted(set(where) - known))}")
        q = m.QueryRequest(run=run.encode())
        steps = where.get("steps") or ((where["step"], where["step"]) if where.get("step") is not None else (None, None))
        for name, value in (("step_min", steps[0]), ("step_max", steps[1]), *((n, where.get(n)) for n in (
                "effect_min", "effect_max", "time_min_ms", "time_max_ms", "flagged", "descending"))):
            if value is not None:
                setattr(q, name, value)
        for name in ("rule", "group"):
            if where.get(name) is not None:
                setattr(q, name, where[name].encode())
        if where.get("feature") is not None:
            q.feature_sae, q.feature_index = where["feature"][0].encode(), where["feature"][1]
        if where.get("order", "step") not in ORDERS:
            raise InvalidArgument(f"query: expected order {' or '.join(ORDERS)}, found {where['order']!r}")
        q.order = ORDERS.index(where.get("order", "step"))
        return q

    @staticmethod
    def get(run: str, step: int, group: str, id: str, attempt: int) -> bytes:
        q = m.GetRequest(run=run.encode(), step=step, group=group.encode(), id=id.encode(), attempt=attempt)
        return bytes(q.SerializeToString())

    @staticmethod
    def submitted(replies: list[Any], sizes: list[int]) -> r.Submitted:
        out, base = r.Submitted(0, 0, []), 0
        for reply, size in zip(replies, sizes):
            out.accepted += reply.accepted
            out.duplicates += reply.duplicates
            out.refused += [(base + p, code_name(c), t.decode(errors="replace")) for p, c, t in
                            zip(reply.refused, reply.refused_code, reply.refused_message)]
            base += size
        return out

    @staticmethod
    def rules(reply: Any) -> list[r.Rule]:
        names, out, at = [f.decode() for f in reply.family], [], 0
        for i, rule in enumerate(reply.id):
            count = reply.family_count[i]
            out.append(r.Rule(rule.decode(), names[at:at + count], ("either", "raised", "lowered")[reply.direction[i]],
                              r._null(reply.effect_min[i]), r._null(reply.effect_sd_min[i]), reply.advantage_flip[i],
                              ("rate", "each", "none")[reply.alert[i]], reply.rate_max[i], reply.alpha[i],
                              r.ACTIONS[reply.action[i]] if reply.action else "alert", r._null(reply.weight[i]) if reply.weight else None))
            at += count
        return out

    @staticmethod
    def catalogue(reply: Any) -> list[r.CatalogueEntry]:
        saes, names, out, at = [s.decode() for s in reply.sae], [f.decode() for f in reply.family_name], [], 0
        for i, index in enumerate(reply.feature_index):
            count = reply.family_count[i]
            out.append(r.CatalogueEntry(saes[reply.feature_sae[i]], index, reply.label[i].decode(), [names[k] for k in reply.family[at:at + count]],
                                        r.VERDICTS[reply.verdict[i]], ("none", "detect", "debias", "both")[reply.role[i]],
                                        reply.activation_min[i]))
            at += count
        return out

    @staticmethod
    def counts(run: str, kind: str, rule: str | None, feature: tuple[str, int] | None, totals: bool) -> Any:
        q = m.CountsRequest(run=run.encode(), kind=("rollouts", "rule", "feature").index(kind), totals=totals)
        if rule is not None:
            q.rule = rule.encode()
        if feature is not None:
            q.feature_sae, q.feature_index = feature[0].encode(), feature[1]
        return q


class Client:
    """Calls, tap and alerts of one daemon.

    addr: of the calls, ipc:///path or tcp://host:port (SPURION_RPC, else ipc://var/spurion.sock); rollouts: of the tap (SPURION_ROLLOUTS,
    else tcp://127.0.0.1:7801); alerts: SPURION_ALERTS, else tcp://127.0.0.1:7802. run: of rollouts that name none. producer: name of this
    process in the run, the same after a restart (host name and process id). timeout: seconds after which a call that got no answer raises.
    ring_bytes: memory for unconfirmed batches of the tap. Connects at first use. Every call raises a SpurionError that says why.
    """

    def __init__(self, addr: str | None = None, *, rollouts: str | None = None, alerts: str | None = None, run: str | None = None,
                 producer: str | None = None, timeout: float = TIMEOUT, ring_bytes: int = 64 << 20):
        self._options = dict(addr=addr, rollouts=rollouts, alerts=alerts, run=run, producer=producer, timeout=timeout, ring_bytes=ring_bytes)
        self._requests = Requests(addr, rollouts, alerts, run, producer, timeout)
        self._ring_bytes = ring_bytes
        self._forked = False
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._free: list[Sp] = []
        self._tap: Tap | None = None
        self._alerts: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self._options, "addr": self._requests.rpc, "rollouts": self._requests.rollouts, "alerts": self._requests.alerts_address}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("addr"), **state)  # type: ignore[misc]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._requests.rpc!r})"

    @property
    def run(self) -> str | None:
        """Run of rollouts that name none."""
        return self._requests.run

    def close(self) -> None:
        """Ends connections. What the daemon has not confirmed of the tap may be lost: flush() first."""
        with self._lock:
            free, self._free = self._free, []
            tap, self._tap = self._tap, None
            alerts, self._alerts = self._alerts, None
        for sp in free:
            sp.close()
        if tap is not None:
            tap.close()
        if alerts is not None:
            alerts.close()

    # ---- calls -----------------------------------------------------------------------------------------------------------------------

    def _take(self) -> Sp:
        if self._pid != os.getpid():
            self._in_child()
        with self._lock:
            return self._free.pop() if self._free else Sp(Address(self._requests.rpc), REQ, REPLY_MAX)

    def _in_child(self) -> None:
        """After fork: the parent's connections stay the parent's, and its tap too."""
        for sp in self._free:
            sp.close()
        self._forked = True
        self._reset()

    def _give(self, sp: Sp) -> None:
        with self._lock:
            self._free.append(sp)

    def _call(self, method: str, body: bytes, reply_class: Any, retry: bool = False, timeout: float | None = None) -> Any:
        deadline = _call.deadline_of(timeout, self._requests.timeout)
        talk = _call.conversation(method, body, reply_class, deadline, retry)
        sp = self._take()
        try:
            want = next(talk)
            while True:
                if isinstance(want, _call.Sleep):
                    time.sleep(want.seconds)
                    want = next(talk)
                else:
                    want = talk.send(_ask(sp, want, deadline))
        except StopIteration as done:
            return done.value
        except BaseException:
            sp.drop("the call was given up", at_once=True)  # one request on a connection: a late answer must not meet the next one
            raise
        finally:
            self._give(sp)

    def hello(self, timeout: float | None = None) -> dict[str, Any]:
        """Agrees on the version: {version, provenance, epoch}. Raises Unavailable, Timeout, ProtocolError."""
        from . import __version__

        q = m.HelloRequest(proto_min=1, proto_max=1, client_version=__version__.encode())
        h = self._call("Hello", q.SerializeToString(), m.HelloReply, timeout=timeout)
        return {"version": h.server_version.decode(), "provenance": h.provenance.decode(), "epoch": h.epoch}

    def score(self, rollouts: Iterable[Item], *, run: str | None = None, tokens: bool = False, timeout: float | None = None,
              on_error: str = "raise") -> r.Verdicts:
        """Judges rollouts now; verdicts in their order, each durable. Members of a group that stand together are judged together.

        tokens: with the per-token view (rollouts that were judged before come without it: see get). on_error: "raise" raises RolloutError,
        which names every refused rollout and why; "return" leaves them in the answer with .error, and NaN in .rewards. A refused
        rollout is never given a number. Waits for a daemon that is away or busy until the time-out, under one idempotency key.
        """
        if on_error not in ("raise", "return"):
            raise InvalidArgument(f"score: expected on_error raise or return, found {on_error!r}")
        out = r.Verdicts()
        deadline = _call.deadline_of(timeout, self._requests.timeout)
        for call in self._requests.score(rollouts, run, tokens):
            reply = self._call(*call, timeout=max(0.001, deadline - time.monotonic()))
            out.extend(r.verdict_of(v) for v in reply.verdicts)
        return out.check() if on_error == "raise" else out

    def submit(self, rollouts: Iterable[Item], *, run: str | None = None, timeout: float | None = None) -> r.Submitted:
        """Hands rollouts over: when it returns, all but the named refused ones are durable and will be judged, also after a crash."""
        items = list(rollouts)
        sizes = [len(b) for b in batches_of(items)]
        deadline = _call.deadline_of(timeout, self._requests.timeout)
        replies = [self._call(*call, timeout=max(0.001, deadline - time.monotonic())) for call in self._requests.submit(items, run)]
        return self._requests.submitted(replies, sizes)

    def query(self, run: str | None = None, *, limit: int | None = None, cursor: bytes = b"", timeout: float | None = None,
              **where: Any) -> r.Rows:
        """Stored rows of a run; conditions are joined by *and*.

        step, steps=(first, last), rule, feature=(sae, index), effect_min, effect_max, time_min_ms, time_max_ms, group, flagged=True,
        order="step" | "time" | "effect" (most negative first, effect 0 left out), descending. limit: rows (None: all); .cursor goes on.
        """
        q = self._requests.query(_need_run(run or self.run), where)
        out = r.Rows()
        while True:
            q.cursor = cursor
            if limit is not None:
                q.limit = limit - len(out)
            reply = self._call("Query", q.SerializeToString(), m.QueryReply, timeout=timeout)
            out.extend(r.row_of(x) for x in reply.rows)
            cursor = out.cursor = reply.cursor
            if not cursor or (limit is not None and len(out) >= limit):
                return out

    def get(self, run: str, step: int, group: str, id: str, attempt: int = 0, *, timeout: float | None = None) -> r.Record:
        """One rollout with its evidence. Raises NotFound."""
        return r.record_of(self._call("Get", self._requests.get(run, step, group, id, attempt), m.Record, timeout=timeout))

    def counts(self, run: str | None = None, kind: str = "rollouts", *, rule: str | None = None, feature: tuple[str, int] | None = None,
               totals: bool = False, timeout: float | None = None) -> list[r.Count]:
        """Counters of each step. kind: "rollouts"; "rule" (with rule=, or totals for every rule); "feature" (feature=, or totals)."""
        q = self._requests.counts(_need_run(run or self.run), kind, rule, feature, totals)
        replies = []
        while True:
            reply = self._call("Counts", q.SerializeToString(), m.CountsReply, timeout=timeout)
            replies.append(reply)
            q.cursor = reply.cursor
            if not reply.cursor:
                return r.counts_of(replies)

    def runs(self, timeout: float | None = None) -> list[r.Run]:
        """The runs that are stored, by name."""
        out: list[r.Run] = []
        while True:
            q = m.RunsRequest(**({"after": out[-1].run.encode()} if out else {}))
            a = self._call("Runs", q.SerializeToString(), m.RunsReply, timeout=timeout)
            out += [r.Run(x[0].decode(), *x[1:]) for x in zip(a.run, a.first_ms, a.last_ms, a.step_min, a.step_max, a.rollouts, a.flagged)]
            if not a.more:
                return out

    def status(self, timeout: float | None = None) -> r.Status:
        """State, counters, producers, and what is in flight, oldest first."""
        return r.status_of(self._call("Status", b"", m.StatusReply, timeout=timeout))

    def rules(self, timeout: float | None = None) -> list[r.Rule]:
        """The rules in force."""
        return self._requests.rules(self._call("Rules", b"", m.RulesReply, timeout=timeout))

    def catalogue(self, timeout: float | None = None) -> list[r.CatalogueEntry]:
        """The catalogue in force."""
        out: list[r.CatalogueEntry] = []
        while True:
            q = getattr(m, "CatalogueRequest")(**{"from": len(out)})
            a = self._call("Catalogue", q.SerializeToString(), m.CatalogueReply, timeout=timeout)
            out += self._requests.catalogue(a)
            if len(out) >= a.total or not a.feature_index:
                return out

    def end_step(self, step: int, run: str | None = None, *, producer: bool = False, timeout: float | None = None) -> bool:
        """Says that everything of this step has been scored or submitted, by everybody, or (producer=True) by this process, which gave its
        name with every call; whether the step is closed now."""
        q = m.StepEndRequest(run=_need_run(run or self.run).encode(), step=step)
        if producer and self._requests.producer:
            q.producer = self._requests.producer.encode()
        return bool(self._call("StepEnd", q.SerializeToString(), m.StepEndReply, timeout=timeout).closed)

    # ---- the tap ---------------------------------------------------------------------------------------------------------------------

    @property
    def tap(self) -> Tap:
        """The tap of this process; made at first use, and anew after fork."""
        if self._pid != os.getpid():
            self._in_child()
        if self._tap is None:
            q = self._requests
            name = f"{q.producer}-{os.getpid()}" if self._forked and q.producer else q.producer  # beside the parent, not in its place
            self._tap = Tap(q.rpc, q.rollouts, _need_run(q.run), name, ring_bytes=self._ring_bytes)
        return self._tap

    def publish(self, rollouts: Iterable[Item] = (), *, step_end: int | None = None) -> bool:
        """Publishes rollouts to be watched; returns at once, whatever the daemon does. False: the ring was full, they are dropped and counted.

        step_end: this process has published everything of this step and of those before.
        """
        return self.tap.publish(rollouts, step_end=step_end)

    def flush(self, timeout: float | None = None) -> TapStats:
        """Waits until everything published is durable at the daemon. Raises Timeout, or DataLoss with the exact number that was dropped."""
        return self.tap.flush(self._requests.timeout if timeout is None else timeout)

    def leave(self, timeout: float | None = None) -> TapStats:
        """flush, and goodbye: no step of the run waits for this producer any longer."""
        return self.tap.flush(self._requests.timeout if timeout is None else timeout, closing=True)

    # ---- alerts ----------------------------------------------------------------------------------------------------------------------

    def stored_alerts(self, run: str | None = None, from_seq: int = 1, timeout: float | None = None) -> r.Alerts:
        """Every stored alert from a number on."""
        out, seq = r.Alerts(), from_seq
        while True:
            q = m.AlertsRequest(from_seq=seq, **({"run": run.encode()} if run else {}))
            a = self._call("Alerts", q.SerializeToString(), m.AlertsReply, timeout=timeout)
            out.extend(r.alert_of(x) for x in a.alerts)
            if a.next_seq > a.last_seq or a.next_seq <= seq:
                return out
            seq = a.next_seq

    def alerts(self, from_seq: int | None = None, *, run: str | None = None, timeout: float | None = None) -> Iterator[r.Alert]:
        """Alerts as they come: in the order of their numbers, each once, also over restarts of the daemon.

        from_seq: begin with a stored one (1: the first); None: those raised from now on. timeout: the iteration ends after so many seconds
        without an alert; None: never; 0: what is there now.
        """
        from .alerts import AlertStream

        stream = AlertStream(self, self._requests.alerts_address, from_seq)
        return stream.follow(run, timeout)

    def on_alert(self, call: Callable[[r.Alert], None], from_seq: int | None = None, *, run: str | None = None) -> Callable[[], None]:
        """Calls back from a thread of its own for every alert; gives the function that stops it."""
        from .alerts import AlertStream

        stream = AlertStream(self, self._requests.alerts_address, from_seq)

        def loop() -> None:
            for alert in stream.follow(run, None):
                call(alert)

        threading.Thread(target=loop, name="spurion-alerts", daemon=True).start()
        return stream.close


def _need_run(run: str | None) -> str:
    if not run:
        raise InvalidArgument("expected the name of a run here or in Client(run=…), found none")
    return run


def _ask(sp: Sp, ask: _call.Ask, deadline: float) -> bytes:
    """One request over one connection, again over the next one when it breaks, until the deadline."""
    frame, at, sent_on = b"", 0, -1
    why: SpurionError | None = None
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _call.lost(sp.address.url, why)
        try:
            if sp.step():
                if sent_on != sp.opened:
                    frame, at, sent_on, why = frame_header(sp.address.ipc, len(ask.data)) + ask.data, 0, sp.opened, None
                if at < len(frame):
                    at += sp.send(memoryview(frame)[at:])
                while (data := sp.receive()) is not None:
                    if data[:4] == ask.id:
                        return data[4:]
        except Unavailable as e:
            why = e
        sp.wait(sp.sock is not None and (not sp.open or at < len(frame)) and (sp._sent < 8 or sp.open), min(left, 0.2))


__all__ = ["Client", "Rollout", "RolloutLike"]
