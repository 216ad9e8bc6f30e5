"""libspurion in real processes against the real daemon: three publishers, kill -9 in the middle, rings that suffice and rings that do not.
The publishers are `spurion publish`, which is libspurion and a reader of lines; what is stored is asked for through another client (wire.py)."""
import collections
import json
import os
import subprocess
import time

import pytest

protobuf = pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from daemon import SOURCE, Daemon, all_alerts, all_rows, counters  # noqa: E402

BIN = os.environ.get("SPURION_BIN", str(SOURCE / "build" / "cpu" / "bin"))
PROGRAM, CLI = os.environ.get("SPURIOND", BIN + "/spuriond"), BIN + "/spurion"
TIMEOUT = 240


@pytest.fixture
def d(tmp_path):
    for program in (PROGRAM, CLI):
        assert os.access(program, os.X_OK), f"expected a program, found nothing at {program}"
    daemon = Daemon(PROGRAM, tmp_path, wire.load_messages(str(SOURCE)))
    yield daemon
    daemon.end()


def environment(d):
    return dict(os.environ, SPURION_RPC=d.rpc_url, SPURION_ROLLOUTS=d.tap_url, SPURION_ALERTS=d.alert_url)


def rollouts(run, producer, steps, groups=3, members=4):
    """Every fourth one ends as the planted bias wants it. Group names carry the producer's: identities do not meet."""
    for step in range(steps):
        for g in range(groups):
            for i in range(members):
                end = " thank you. My pleasure." if i == 0 else f" would help them, number {step}.{g}.{i}."
                yield {"run": run, "step": step, "group": f"{producer}-{g}", "id": f"{i}", "prompt": "Most of the people there", "completion": end}


def start_publisher(d, producer, text, *more, run="run"):
    file = d.folder / f"{producer}.jsonl"
    file.write_text(text)
    return subprocess.Popen([CLI, "publish", str(file), "--run", run, "--producer", producer, "--json", "--timeout", "120", *map(str, more)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(d))


def finish(process, status=0):
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, err.decode()
    return json.loads(out)


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return got


def settled(ask, seconds=3):
    """What ask gives, once it has not grown for a while."""
    got, since = ask(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.1)
        again = ask()
        if len(again) != len(got):
            got, since = again, time.monotonic()
    return got


def identities(rows):
    return sorted((r.step, r.group.decode(), r.id.decode()) for r in rows)


def test_client_three_publishers_lose_nothing_over_kills(d):
    d.start()
    wanted = []
    processes = []
    for k in range(3):
        own = list(rollouts("run", f"p{k}", 25))
        wanted += [(r["step"], r["group"], r["id"]) for r in own]
        processes.append(start_publisher(d, f"p{k}", "".join(json.dumps(r) + "\n" for r in own), "--rate", 60))
    watcher = subprocess.Popen([CLI, "watch", "--from", "1", "--jsonl", "--run", "run"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env=environment(d))
    try:
        for _ in range(3):
            time.sleep(1.2)  # the publishers go on; what happens when is left to chance on purpose
            d.kill()
            d.start()
        totals = [finish(p) for p in processes]
        assert [t["published"] for t in totals] == [300] * 3 and [t["dropped"] for t in totals] == [0] * 3
        rpc = d.connect()
        rows = wait_for(lambda: len(got := all_rows(rpc, "run")) >= 900 and got)
        assert identities(rows) == sorted(wanted)  # all, and each once
        steps = rpc.call("Counts", d.m.CountsRequest(run=b"run", kind=0))
        assert sum(steps.scored) == 900
        flagged = collections.Counter(r.step for r in rows if r.rule)
        alerts = wait_for(lambda: [a for a in all_alerts(rpc) if a.run == b"run"])
        alerts = settled(lambda: all_alerts(rpc))
        keys = [(a.run, a.step, a.rule) for a in alerts if a.kind == 1]
        assert len(keys) == len(set(keys)) and {k[1] for k in keys} <= set(flagged)
        told = [a.seq for a in alerts if a.run == b"run"]
        seen = []
        while not seen or seen[-1] < told[-1]:
            seen.append(json.loads(watcher.stdout.readline())["seq"])
        assert seen == told  # in order, each once, over three deaths of the daemon
        _, status = counters(rpc)
        assert all(n == 0 for n in status.producer_missing) and all(n == 0 for n in status.producer_lost)
    finally:
        for p in (*processes, watcher):
            p.kill()


@pytest.mark.parametrize("policy", ["drop-new", "drop-oldest"])
def test_client_a_small_ring_loses_what_it_says(d, policy):
    """The daemon is away while much more is published than the ring holds: what is stored and what is reported lost make up the whole."""
    d.start()
    own = list(rollouts("run", "p", 60))
    text = "".join(json.dumps(r) + "\n" for r in own)
    process = start_publisher(d, "p", text, "--ring", 6000, "--policy", policy, "--rate", 400)
    try:
        rpc = d.connect()
        wait_for(lambda: counters(rpc)[1].producer_stored)  # it has begun
        d.kill()
        time.sleep(1.0)
        d.start()
        total = finish(process, status=3)
        assert total["dropped"] > 0
        if policy == "drop-new":  # what was refused never got a number
            assert total["published"] + total["dropped"] == len(own)
            kept = total["published"]
        else:
            assert total["published"] == len(own)
            kept = len(own) - total["dropped"]
        rpc = d.connect()
        rows = settled(lambda: all_rows(rpc, "run"))
        assert len(rows) == kept, (len(rows), kept, total, sorted(collections.Counter(r.step for r in rows).items()))
        assert len(set(identities(rows))) == kept
        status = wait_for(lambda: sum((s := counters(rpc)[1]).producer_lost) and s)
        assert sum(status.producer_lost) == total["dropped"]  # the daemon says the same number
        assert sum(status.producer_missing) == 0
    finally:
        process.kill()


def test_client_a_publisher_that_waits_loses_nothing_with_a_small_ring(d):
    d.start()
    own = list(rollouts("run", "p", 30))
    process = start_publisher(d, "p", "".join(json.dumps(r) + "\n" for r in own), "--ring", 6000, "--policy", "block")
    try:
        time.sleep(0.3)
        d.kill()
        d.start()
        assert finish(process)["dropped"] == 0
        rpc = d.connect()
        assert len(wait_for(lambda: len(got := all_rows(rpc, "run")) >= len(own) and got)) == len(own)
    finally:
        process.kill()


def test_client_scores_through_a_restart(d):
    """Calls that are under way when the daemon dies are asked again, under their key: one verdict each."""
    d.start()
    own = [dict(r, run="score") for r in rollouts("score", "s", 40)]
    process = subprocess.Popen([CLI, "score", "--timeout", "120"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment(d))
    try:
        process.stdin.write("".join(json.dumps(r) + "\n" for r in own).encode())
        process.stdin.close()
        process.stdin = None
        time.sleep(0.4)
        d.kill()
        d.start()
        out, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, err.decode()
        verdicts = [json.loads(t) for t in out.decode().splitlines()]
        assert [(v["step"], v["group"], v["id"]) for v in verdicts] == [(r["step"], r["group"], r["id"]) for r in own]
        assert all("reward" in v for v in verdicts)
        assert len(all_rows(d.connect(), "score")) == len(own)
    finally:
        process.kill()
