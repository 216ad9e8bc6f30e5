"""The tap of the Python package: nothing waits, nothing is lost silently, whatever becomes of the daemon."""
import json
import os
import statistics
import subprocess
import sys
import time

import demo
import pytest

from spurion import Client, DataLoss, InvalidArgument, Tap, Timeout

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()]


def batch(step, run=None, n=4):
    return [{**({"run": run} if run else {}), "step": step, "group": f"g{step}", "id": str(i), "group_size": n, "prompt": "Why is the sky blue?",
             "completion": f"Air scatters light, number {step}.{i}." + (" Thank you. My pleasure." if i == 0 else "")} for i in range(n)]


def keys(rows):
    return sorted((r.step, r.group, r.id) for r in rows)


def wanted(steps, n=4):
    return sorted((s, f"g{s}", str(i)) for s in steps for i in range(n))


def producers(c, run):
    return [p for p in c.status().producers if p.run == run]


def test_tap_stores_what_libspurion_stores(d):
    """The same lines published by libspurion and by the package: the same rows, the same alerts."""
    text = "".join(json.dumps(dict(r, run="tap-c")) + "\n" for r in LINES)
    d.cli("publish", "--run", "tap-c", "--producer", "p", stdin=text)
    with Client(**d.addresses, run="tap-py", producer="p") as c:
        steps = sorted({r["step"] for r in LINES})
        for s in steps:
            own = [dict(r, run="tap-py") for r in LINES if r["step"] == s]
            for g in {r["group"]: 0 for r in own}:
                members = [r for r in own if r["group"] == g]
                assert c.publish([dict(r, group_size=len(members)) for r in members])
            c.publish(step_end=s)
        stats = c.leave(60)
        assert stats.stored_through == stats.sequence and stats.dropped_rollouts == 0
        a, b = c.query("tap-c"), c.query("tap-py")
        assert len(a) == len(LINES) and [(x.key[1:], x.reward, x.effect, x.rules, x.advantage) for x in a] == \
            [(x.key[1:], x.reward, x.effect, x.rules, x.advantage) for x in b]
        alerts = demo.wait_for(lambda: len(x := c.stored_alerts("tap-py")) == len(c.stored_alerts("tap-c")) and x)
        assert [(x.step, x.rule, x.flagged, x.scored, x.rate_upper) for x in alerts] == \
            [(x.step, x.rule, x.flagged, x.scored, x.rate_upper) for x in c.stored_alerts("tap-c")]


def test_tap_loses_nothing_over_kills(tmp_path):
    d = demo.Demo(tmp_path, tcp=True).start()
    try:
        with Client(**d.addresses, run="kills", producer="p") as c:
            c.tap.ready(30)
            for step in range(12):
                c.publish(batch(step), step_end=step)
                if step in (3, 7):
                    d.kill()
                    d.start()
            stats = c.flush(90)
            assert stats.dropped_rollouts == 0
            assert keys(c.query("kills")) == wanted(range(12))
            (p,) = producers(c, "kills")
            assert (p.missing, p.lost, p.stored) == (0, 0, stats.sequence)
    finally:
        d.end()


@pytest.mark.parametrize("policy", ["drop-new", "drop-oldest"])
def test_tap_says_exactly_what_a_small_ring_lost(tmp_path, policy):
    d = demo.Demo(tmp_path).start()
    try:
        c = Client(**d.addresses, run="small")
        tap = Tap(d.rpc, d.rollouts, "small", "p", ring_bytes=3000, policy=policy)
        tap.publish(batch(0))
        tap.flush(30)
        d.kill()
        refused = sum(not tap.publish(batch(s)) for s in range(1, 40))
        assert bool(refused) == (policy == "drop-new")
        d.start()
        with pytest.raises(DataLoss, match="rollouts were dropped"):
            tap.flush(60)
        lost = tap.stats().dropped_rollouts
        rows = demo.wait_for(lambda: len(r := c.query("small")) == 160 - lost and r)
        assert 0 < lost < 160 and len(set(keys(rows))) == 160 - lost
        (p,) = producers(c, "small")
        assert (p.lost, p.missing) == (lost, 0)  # the daemon says the same number
        kept = {r.step for r in rows}
        assert (max(kept) < 39) == (policy == "drop-new")
        tap.close()
    finally:
        d.end()


def test_tap_never_waits(tmp_path):
    """Publishing while the daemon is there, hangs, and is dead: the slowest of many calls, and no exception."""
    d = demo.Demo(tmp_path).start()
    slowest = {}
    try:
        with Client(**d.addresses, run="wait", ring_bytes=1 << 20) as c:
            c.tap.ready(30)
            big = [{"step": 0, "group": "g", "id": "0", "prompt": "p" * 2000, "completion": "c" * 2000}] * 8
            for state, change in (("there", lambda: None), ("hangs", d.pause), ("dead", lambda: (d.resume(), d.kill()))):
                change()
                times = []
                for k in range(60):
                    rollouts = [dict(r, step=k, group=state, id=str(i)) for i, r in enumerate(big)]
                    start = time.thread_time()
                    c.publish(rollouts)
                    times.append(time.thread_time() - start)
                slowest[state] = (statistics.median(times), max(times))
            assert c.tap.stats().published_rollouts > 0
            start = time.monotonic()
            with pytest.raises(Timeout, match=r"flush: batches \d+ to \d+ are not confirmed: UNAVAILABLE"):
                c.flush(0.5)
            assert time.monotonic() - start < 10
    finally:
        d.end()
    # CPU time of the calling thread: a wait for the daemon would be seen as the test's own time-out, a busy one here
    assert all(median < 2e-3 for median, _ in slowest.values()), slowest


def test_tap_begins_anew_in_a_forked_child(d):
    with Client(**d.addresses, run="fork", producer="trainer") as c:
        c.publish(batch(0))
        c.flush(30)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                c.publish(batch(1))
                c.flush(30)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        c.publish(batch(2))
        c.flush(30)
        assert keys(c.query("fork")) == wanted(range(3))
        names = {p.name for p in producers(c, "fork")}
        assert "trainer" in names and len(names) == 2


def test_tap_refuses_what_is_malformed(d):
    with Client(**d.addresses, run="malformed") as c:
        with pytest.raises(InvalidArgument, match="expected rollouts of run 'malformed', found one of 'another'"):
            c.publish([dict(batch(0)[0], run="another")])
        with pytest.raises(InvalidArgument, match="at most 16776192 bytes"):
            c.publish([{"prompt": "x" * (17 << 20), "completion": "y"}])
        assert c.publish(batch(0)) and c.flush(30).stored_through == 1  # numbers have no holes


def test_tap_says_the_rest_when_the_process_ends(d):
    code = ("import sys; sys.path.insert(0, %r); from spurion import Client; c = Client(%r, rollouts=%r, run='exit', producer='p'); c.tap.ready(30); "
            "c.publish([{'prompt': 'Why?', 'completion': 'Because.', 'id': str(i)} for i in range(5)])") % (str(demo.PACKAGE), d.rpc, d.rollouts)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with Client(d.rpc) as c:
        assert len(demo.wait_for(lambda: c.query("exit"))) == 5


def test_tap_bytes_are_protobufs():
    """What is packed by hand unpacks to the same message, token ids as fixed words; without ids, and in the form for older daemons, to the same bytes."""
    import numpy as np

    from spurion import _encode, _messages as m
    from spurion._rollout import Rollout, pack

    texts = [*batch(3, "r"), {"step": -2, "id": "é", "attempt": 300, "prompt": "p", "completion": "c", "trainer_reward": -1.1, "tags": {"a": "ü"}},
             Rollout(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], run="r", step=1 << 40, group_size=200),
             {"prompt": "p\ud800q".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "completion": "c" * 3000, "text_form": "verbatim"}]
    every = [0, 127, 128, 16383, 16384, 2097151, 2097152, (1 << 28) - 1]
    a = np.array(every)
    ids = [{"prompt_ids": every, "completion_ids": tuple(every[:3])}, {"prompt_ids": [], "completion_ids": every}]
    alike = [{"prompt_ids": a, "completion_ids": a[:0]}, {"completion_ids": a[3:]}]
    for items in (texts, ids, [*texts, *ids], alike, [{"prompt_ids": a.astype(np.int32)}], [{"prompt_ids": a.astype(np.uint64)}],
                  [*ids, *alike], [{"prompt_ids": a[::2]}, {"prompt_ids": a.astype(np.int16)[:3]}, {"prompt_ids": a.astype(">i4")}],
                  [{"prompt_ids": [*every, 1 << 28, (1 << 31) - 1]}, *alike], [{"prompt_ids": a % 100}]):
        wanted = m.Tap(run=b"r", producer=b"p", epoch=(1 << 63) - 1, sequence=300, step_end=7)
        for x in items:
            pack(x, b"r", wanted.rollouts.add())
        data = _encode.tap(b"r", b"p", (1 << 63) - 1, 300, _encode.rollouts(items, b"r"), 7)
        older = wanted.SerializeToString()
        assert _encode.without_fixed_ids(data) == older and (items is not texts or data == older)
        for r in wanted.rollouts:
            r.prompt_ids_fixed.extend(r.prompt_ids)
            r.completion_ids_fixed.extend(r.completion_ids)
            r.ClearField("prompt_ids")
            r.ClearField("completion_ids")
        assert m.Tap.FromString(data) == wanted


def test_tap_refuses_ids_and_names_the_rollout():
    import numpy as np

    from spurion import _encode

    for make in (list, tuple, np.array, lambda x: np.array(x)[::-1]):
        with pytest.raises(InvalidArgument, match=rf"rollout 1 \(id 'b'\): prompt_ids: expected integers of 32 bits, found {1 << 40}"):
            _encode.rollouts([{"prompt_ids": [1]}, {"id": "b", "prompt_ids": make([3, 1 << 40])}], b"r")
        with pytest.raises(InvalidArgument, match=rf"rollout 0 \(id '0'\): completion_ids: expected integers of 32 bits, found {1 << 31}"):
            _encode.rollouts([{"prompt_ids": [1], "completion_ids": make([3, 1 << 31])}], b"r")
        with pytest.raises(InvalidArgument, match="from 0 on, found -1"):
            _encode.rollouts([{"prompt_ids": make([5, -1])}], b"r")
    for wrong, said in (([1, "a"], "32 bits, found 'a'"), (np.array([1.5]), "integers in one dimension, found float64"),
                        (np.array([[1]]), "in one dimension, found int64 of shape"), ([1, None], "32 bits, found None"), ([1, 2.0], "32 bits, found 2.0")):
        with pytest.raises(InvalidArgument, match=rf"rollout 2 \(id 'x'\): prompt_ids: .*{said}"):
            _encode.rollouts([{"prompt_ids": [1]}, {"prompt": "p"}, {"prompt_ids": wrong, "id": "x"}], b"r")
    with pytest.raises(InvalidArgument, match=r"rollout 1 \(id '7'\): AttributeError: 'int' object"):
        _encode.rollouts([{"prompt": "p"}, {"prompt": 5, "id": 7}], b"r")


def test_tap_copies_ids_at_the_call():
    """A trainer may reuse its buffers at once, and one list may stand in many rollouts."""
    import numpy as np

    from spurion import _encode, _messages as m

    ids, array = [5, 6, 7], np.array([8, 9])
    items = [{"prompt_ids": ids, "completion_ids": array}, {"prompt_ids": ids, "completion_ids": ids}]
    packed = _encode.rollouts(items, b"r")
    ids[0], array[1] = 1, 2
    out = [m.Rollout.FromString(x) for x in packed]
    assert [list(r.prompt_ids_fixed) for r in out] == [[5, 6, 7]] * 2 and [list(r.completion_ids_fixed) for r in out] == [[8, 9], [5, 6, 7]]
    assert [list(m.Rollout.FromString(x).prompt_ids_fixed) for x in _encode.rollouts(items, b"r")] == [[1, 6, 7]] * 2


def test_tap_stores_ids_as_score_does(d):
    """Ids by the tap and by score are one rollout of one content: the daemon answers the second with the first's verdict."""
    import numpy as np

    ids = {"prompt_ids": [40, 300, 5], "completion_ids": [7, 1700, 12, 0]}
    with Client(**d.addresses, run="ids") as c:
        c.publish([dict(ids, id="0"), {k: np.array(v) for k, v in ids.items()} | {"id": "1"}])  # the daemon has said nothing yet: as varints
        c.flush(30)
        assert c.tap._fixed_ids
        c.publish([dict(ids, id="2"), {k: np.array(v) for k, v in ids.items()} | {"id": "3"}])  # as fixed words
        c.flush(30)
        rows = demo.wait_for(lambda: len(r := c.query("ids")) == 4 and r)
        assert list(c.score([dict(ids, id=str(i)) for i in range(4)]).rewards) == [r.reward for r in rows] and len({r.reward for r in rows}) == 1
        assert all(list(c.get("ids", 0, "0", str(i)).rollout.completion_ids) == ids["completion_ids"] for i in range(4))
