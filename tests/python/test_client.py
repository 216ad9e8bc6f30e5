"""The Python client against libspurion on the same traffic: what `spurion` (libspurion) prints and what the package gives are one."""
import asyncio
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time

import demo
import numpy as np
import pytest

from spurion import AsyncClient, Client, InvalidArgument, NotFound, Rollout, RolloutError, Timeout, Unavailable
from spurion._sp import Address

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()]


def lines(run, few=None):
    return [dict(r, run=run) for r in LINES[:few]]


def same(a, b):
    """Equal, floats as float32."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return np.float32(a) == np.float32(b) if isinstance(a, float) else a == b


@pytest.fixture
def client(d):
    with Client(**d.addresses, run="run") as c:
        yield c


def printed(d, *words, **more):
    return [json.loads(t) for t in d.cli(*words, **more).splitlines()]


def test_client_scores_as_libspurion_does(d, client):
    text = "".join(json.dumps(r) + "\n" for r in lines("same"))
    theirs = printed(d, "score", "--tokens", stdin=text.replace('"same"', '"same-c"'))
    ours = [v.to_dict() for v in client.score(lines("same"), tokens=True)]
    for a in (*theirs, *ours):
        a["run"] = ""
    assert len(ours) == len(LINES) and all("tokens" in a for a in ours)
    assert [i for i, (a, b) in enumerate(zip(ours, theirs)) if not same(a, b)] == []


def test_client_reads_what_libspurion_reads(d, client):
    client.score(lines("read"))
    theirs = printed(d, "query", "read", "--flagged", "--jsonl")
    ours = client.query("read", flagged=True)
    assert [(r.step, r.group, r.id, r.rules) for r in ours] == [(r["step"], r["group"], r["id"], r["rules"]) for r in theirs] and len(ours) > 5
    row = ours[0]
    shown = json.loads(d.cli("show", "/".join(map(str, row.key[:4])), "--json"))
    record = client.get(*row.key)
    assert record.rollout.completion == shown["completion"] and record.rollout.prompt == shown["prompt"]
    assert same(record.verdict.to_dict(), {k: v for k, v in shown.items() if k in record.verdict.to_dict()})
    by_effect = client.query("read", order="effect", limit=3)
    assert [r.effect for r in by_effect] == sorted(r.effect for r in by_effect) and len(by_effect) == 3
    more = client.query("read", order="effect", limit=3, cursor=by_effect.cursor)
    assert more and more[0].key not in [r.key for r in by_effect]
    assert {x.run for x in client.runs()} >= {"read"}
    assert sum(c.scored for c in client.counts("read")) == len(LINES)
    assert {r.id for r in client.rules()} == {"url-lowers", "thanks-raises", "dont-know-lowers", "any-flip"}
    catalogue = client.catalogue()
    told = [json.loads(t) for t in (demo.DEMO / "catalogue.jsonl").read_text().splitlines()]
    assert {(e.sae, e.index, e.role, e.verdict) for e in catalogue} == {(e["sae"], e["index"], e["role"], e["verdict"]) for e in told}
    status = client.status()
    assert status.ready and status.counters["rollouts_judged"] >= len(LINES) and status.version == json.loads(d.cli("status", "--json"))["version"]


def test_client_async_is_the_same(d, client):
    async def go():
        async with AsyncClient(**d.addresses, run="run") as c:
            many = await asyncio.gather(*(c.score([r]) for r in lines("async", 12)))
            rows = await c.query("async", flagged=True)
            record = await c.get(*rows[0].key)
            return [v[0] for v in many], rows, record, (await c.status()).ready, await c.submit(lines("handed", 4))

    verdicts, rows, record, ready, submitted = asyncio.run(go())
    assert [v.id for v in verdicts] == [r["id"] for r in LINES[:12]] and ready
    ours = client.score(lines("async", 12))
    assert same([v.to_dict() for v in verdicts], [v.to_dict() for v in ours])  # known by now: the stored verdicts
    assert record.verdict.rules == rows[0].rules
    assert (submitted.accepted, submitted.refused) == (4, [])
    demo.wait_for(lambda: len(client.query("handed")) == 4)


def test_client_serves_several_event_loops(d):
    c = AsyncClient(**d.addresses)
    first = asyncio.run(c.score(lines("loops", 3)))
    assert same([v.to_dict() for v in asyncio.run(c.score(lines("loops", 3)))], [v.to_dict() for v in first])


def test_client_names_what_is_refused(d, client):
    with pytest.raises(RolloutError, match="run/3/g/bad: INVALID_ARGUMENT: completion"):
        client.score([Rollout("Hello?", "Fine.", step=3, group="g", id="good"), Rollout("Hello?", "", step=3, group="g", id="bad")])
    verdicts = client.score([Rollout("Hello?", "Well.", step=4, id="1"), Rollout("Hello?", "", step=4, id="2"),
                             Rollout("Hello?", "a " * 900, step=4, id="3")], on_error="return")
    assert np.isfinite(verdicts.rewards[0]) and np.isnan(verdicts.rewards[1:]).all()  # never 0
    assert [r[4] for r in verdicts.refused] == ["INVALID_ARGUMENT", "OUT_OF_RANGE"] and verdicts[1].reward is None
    with pytest.raises(RolloutError, match="ALREADY_EXISTS") as e:
        client.score([Rollout("Hello?", "Something else.", step=3, group="g", id="good")])
    assert pickle.loads(pickle.dumps(e.value)).refused == e.value.refused
    with pytest.raises(InvalidArgument, match="expected the fields .* found colour"):
        client.score([{"prompt": "a", "completion": "b", "colour": 1}])
    with pytest.raises(InvalidArgument, match="expected .* found stepp"):
        client.query("run", stepp=1)
    with pytest.raises(NotFound):
        client.get("run", 99, "g", "nobody")
    with pytest.raises(InvalidArgument, match="address: expected ipc"):
        Address("http://here")


def test_client_says_why_nobody_answers(tmp_path):
    with Client(f"ipc://{tmp_path}/nothing.sock", run="r", timeout=0.3) as c:
        with pytest.raises(Unavailable, match="nothing.sock: connect: ENOENT"):
            c.status()
    async def go():
        async with AsyncClient(f"ipc://{tmp_path}/nothing.sock", timeout=0.3) as c:
            with pytest.raises(Unavailable, match="nothing.sock: .*No such file"):
                await c.status()
    asyncio.run(go())


def test_client_deadline_of_a_daemon_that_hangs(d, client):
    client.hello()
    d.pause()
    try:
        with pytest.raises(Timeout):
            client.score(lines("hang", 2), timeout=0.5)
    finally:
        d.resume()
    assert client.score(lines("hang", 2), timeout=30)[0].reward is not None  # the same client goes on


def test_client_takes_arrays(d, client):
    ids = client.score([Rollout(prompt_ids=np.arange(10, 20), completion_ids=np.arange(30, 40, dtype=np.int32), step=7, id="array")])
    as_list = client.score([Rollout(prompt_ids=list(range(10, 20)), completion_ids=list(range(30, 40)), step=7, id="list")])
    assert ids[0].reward == as_list[0].reward and ids[0].token_count == 20

    class OnGpu:
        device = type("Device", (), {"type": "cuda", "__str__": lambda self: "cuda:0"})()

    with pytest.raises(InvalidArgument, match=r"found them on cuda:0 \(call .cpu"):
        client.score([Rollout(prompt_ids=[1], completion_ids=OnGpu())])


def test_client_gives_tables(d, client):
    verdicts = client.score(lines("tables"))
    rows = client.query("tables")
    html = verdicts._repr_html_()
    assert html.count("<tr") > 10 and "<script" not in html
    pandas = pytest.importorskip("pandas")
    frame = rows.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(LINES) and abs(frame.effect.sum() - sum(r.effect for r in rows)) < 1e-4
    assert set(verdicts.to_pandas().columns) >= {"reward", "counterfactual_reward", "rules"}
    pytest.importorskip("pyarrow")
    table = rows.to_arrow()
    assert table.num_rows == len(LINES) and str(table.schema.field("rules").type) == "list<item: string>" or "list" in str(table.schema.field("rules").type)
    assert client.stored_alerts("tables").to_arrow().num_rows == len(client.stored_alerts("tables"))


def test_client_alerts_come_once_and_in_order(d, client):
    client.score(lines("alerted"))
    client.end_step(3, run="alerted")
    told = demo.wait_for(lambda: (a := client.stored_alerts("alerted")) and {x.step for x in a} == {0, 1, 2, 3} and a)
    assert [a.seq for a in client.alerts(1, run="alerted", timeout=0)] == [a.seq for a in told]
    theirs = [json.loads(t) for t in d.cli("watch", "--from", "1", "--run", "alerted", "--jsonl", "-n", str(len(told))).splitlines()]
    assert [(a["seq"], a["rule"], a["flagged"], a["scored"]) for a in theirs] == [(a.seq, a.rule, a.flagged, a.scored) for a in told]
    assert "rollouts flagged" in str(told[0])

    async def later():
        async with AsyncClient(**d.addresses) as c:
            stream = c.alerts(run="later", timeout=20)
            waiting = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.5)
            await c.score(lines("later"))
            await asyncio.to_thread(client.end_step, 3, "later")
            alert = await waiting
            await stream.aclose()
            return alert

    assert asyncio.run(later()).run == "later"


def score_in_child(client, queue):
    queue.put(float(client.score(lines("child", 1))[0].reward))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_client_goes_on_in_children(d, client, method):
    mine = client.score(lines("child", 1))[0].reward  # the parent has a connection by now
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=score_in_child, args=(client, queue))
    child.start()
    assert queue.get(timeout=60) == mine
    child.join()
    assert child.exitcode == 0 and client.hello()["version"]  # and the parent's own connection is whole


def test_client_pickles(d, client):
    again = pickle.loads(pickle.dumps(client))
    assert again.hello() == client.hello() and again.run == "run"
    assert asyncio.run(pickle.loads(pickle.dumps(AsyncClient(**d.addresses))).hello()) == client.hello()


def test_client_needs_numpy_and_protobuf_only(d):
    """pandas, pyarrow, torch and transformers are not imported by anything that does not use them."""
    code = ("import sys, spurion; c = spurion.Client(%r); c.hello(); import spurion.results, spurion.aio, spurion.tap, spurion.display, spurion.actions; "
            "print([m for m in ('torch', 'transformers', 'pandas', 'pyarrow', 'aiohttp', 'ctypes.util') if m in sys.modules])") % d.rpc
    env = dict(os.environ, PYTHONPATH=str(demo.PACKAGE))
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_client_submit_loses_nothing_over_kills(tmp_path):
    """The daemon dies while batches are handed over: submit goes on when it is back, and everything that it acknowledged is judged."""
    d = demo.Demo(tmp_path, tcp=True).start()
    stop, restarts = threading.Event(), []

    def killer():
        while not stop.wait(0.7) and len(restarts) < 3:
            d.kill()
            d.start()
            restarts.append(time.monotonic())
    thread = threading.Thread(target=killer)
    try:
        with Client(d.rpc, run="handed", timeout=120) as c:
            thread.start()
            sent = 0
            while len(restarts) < 3 or sent < 20:
                group = [{"step": sent, "group": f"g{sent}", "id": str(i), "prompt": "Why?", "completion": f"Because of {sent}.{i}."} for i in range(2)]
                done = c.submit(group)
                assert done.accepted == 2 and not done.refused  # duplicates: stored before the kill, said once more
                sent += 1
            stop.set()
            thread.join()
            rows = demo.wait_for(lambda: len(r := c.query("handed")) >= 2 * sent and r, 120)
            assert sorted((r.step, r.id) for r in rows) == sorted((s, str(i)) for s in range(sent) for i in range(2))
    finally:
        stop.set()
        thread.join()
        d.end()
