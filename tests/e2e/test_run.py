"""spuriond run as a real process: score, submit, tap with Sync and Fill, alerts, questions, restarts, kill -9, SIGTERM."""
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest

protobuf = pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from daemon import SOURCE, Daemon, all_alerts, all_rows, counters, message, short  # noqa: E402

PROGRAM = os.environ.get("SPURIOND", str(SOURCE / "build" / "cpu" / "bin" / "spuriond"))
KILLS = int(os.environ.get("SPURION_KILLS", "20"))
INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED = 3, 5, 6, 8, 9, 12


@pytest.fixture(scope="module")
def m():
    assert os.access(PROGRAM, os.X_OK), f"SPURIOND: expected the daemon, found nothing at {PROGRAM}"
    return wire.load_messages(str(SOURCE))


@pytest.fixture
def d(tmp_path, m):
    daemon = Daemon(PROGRAM, tmp_path, m)
    yield daemon
    daemon.end()


@pytest.fixture
def up(d):
    return d.start()


def failing(call, *args, **kwargs):
    with pytest.raises(wire.Error) as e:
        call(*args, **kwargs)
    return e.value


# ---- score ----

def test_run_scores_what_judge_scores(up, m):
    rpc, pairs = up.connect(), up.rollouts()
    reply = rpc.call("Score", m.ScoreRequest(rollouts=[message(m, a) for a, _ in pairs]))
    assert len(reply.verdicts) == len(pairs) > 20
    for v, (_, e) in zip(reply.verdicts, pairs):
        assert v.code == 0 and v.id.decode() == e["id"]
        assert abs(v.reward - e["reward"]) < 1e-4 and abs(v.effect - e["effect"]) < 1e-4
        alone = {"url-lowers", "thanks-raises"}  # these rules look at one rollout; groups are put together differently in a file
        assert {r.decode() for r in v.flag_rule} & alone == {f["rule"] for f in e["flags"]} & alone
        assert v.provenance and len(v.feature_index) == len(e["features"])
    assert any(v.flag_rule for v in reply.verdicts)


def test_run_answers_again_with_the_same_bytes(up, m):
    rpc, pairs = up.connect(), up.rollouts()
    request = m.ScoreRequest(rollouts=[message(m, a) for a, _ in pairs]).SerializeToString()
    first = rpc.call_raw("Score", request)
    assert rpc.call_raw("Score", request) == first
    assert up.stop() == 0
    up.start()
    rpc = up.connect()
    assert rpc.call_raw("Score", request) == first
    assert counters(rpc)[0]["rollouts_judged"] == 0


def test_run_pages_long_replies(up, m):
    rpc, pairs = up.connect(), up.rollouts()
    reply = rpc.call("Score", m.ScoreRequest(rollouts=[message(m, a) for a, _ in pairs], want_tokens=True), key=b"tokens")
    assert all(v.tokens.position for v in reply.verdicts)
    assert max(rpc.replies) <= 32 << 10 and len(rpc.replies) > 2
    again = rpc.call("Score", m.ScoreRequest(rollouts=[message(m, a) for a, _ in pairs], want_tokens=True), key=b"tokens")
    assert again.SerializeToString(deterministic=True) == reply.SerializeToString(deterministic=True)  # NaN stands for null
    e = failing(rpc.call, "Score", m.ScoreRequest(rollouts=[message(m, pairs[0][0])]), key=b"tokens")
    assert e.code == INVALID_ARGUMENT and "idempotency_key" in e.text
    rpc.next += 1
    lost = rpc.raw(m.Request(call_id=7, method=b"/spurion.v1.Spurion/Score", page_token=b"0123456789abcdef.1").SerializeToString())
    assert lost.code == NOT_FOUND and lost.call_id == 7


def test_run_refuses_one_and_judges_the_rest(up, m):
    rpc = up.connect()
    good = short(m, "r", 1, "a", 0)
    bad = {"completion": short(m, "r", 1, "a", 1), "run": short(m, "r", 1, "a", 2), "id": short(m, "r", 1, "a", 3),
           "tags": short(m, "r", 1, "a", 4), "prompt": short(m, "r", 1, "a", 5), "token ids or messages": short(m, "r", 1, "a", 6)}
    bad["completion"].completion = b""
    bad["run"].run = b"x" * 129
    bad["id"].id = b"a\nb"
    bad["tags"].tags = b"[1]"
    bad["prompt"].prompt = b"\xff\xfe"
    bad["token ids or messages"].completion_ids.append(3)
    long = short(m, "r", 1, "a", 7)
    long.completion = b" help" * 5000
    outside = m.Rollout(run=b"r", step=1, group=b"o", id=b"o", prompt_ids=[1, 2], completion_ids=[3, 1 << 30])
    reply = rpc.call("Score", m.ScoreRequest(rollouts=[good, *bad.values(), long, outside]))
    assert reply.verdicts[0].code == 0
    for name, v in zip(bad, reply.verdicts[1:]):
        assert v.code == INVALID_ARGUMENT and name in v.message.decode() and "expected" in v.message.decode() and "found" in v.message.decode()
    assert reply.verdicts[-2].code == 11 and "expected" in reply.verdicts[-2].message.decode()
    assert reply.verdicts[-1].code == INVALID_ARGUMENT
    assert len(all_rows(rpc, "r")) == 1  # a refused rollout does not occupy its identity
    bad["completion"].completion = b" better now"
    assert rpc.call("Score", m.ScoreRequest(rollouts=[bad["completion"]])).verdicts[0].code == 0


def test_run_refuses_other_content_under_an_identity(up, m):
    rpc = up.connect()
    r = short(m, "r", 1, "a", 0)
    assert rpc.call("Score", m.ScoreRequest(rollouts=[r])).verdicts[0].code == 0
    r.completion = b" something else"
    v = rpc.call("Score", m.ScoreRequest(rollouts=[r])).verdicts[0]
    assert v.code == ALREADY_EXISTS and "expected" in v.message.decode()
    s = rpc.call("Submit", m.SubmitRequest(rollouts=[r]))
    assert list(s.refused_code) == [ALREADY_EXISTS] and s.accepted == 0
    r.attempt = 1
    assert rpc.call("Score", m.ScoreRequest(rollouts=[r])).verdicts[0].code == 0


def test_run_judges_one_identity_once_when_many_ask_at_once(up, m):
    rollouts = [short(m, "r", 1, "same", i) for i in range(8)]
    request = m.ScoreRequest(rollouts=rollouts).SerializeToString()
    answers, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: answers.append(up.connect().call_raw("Score", request))))
        threads[-1].start()
    for t in threads:
        t.join()
    assert len(answers) == 8 and len(set(answers)) == 1
    c, _ = counters(up.connect())
    assert c["rollouts_judged"] == 8 and c["conflicts"] == 0


def test_run_waits_for_the_members_of_a_group(up, m):
    """Two callers bring halves of a group: judged together, since they say how many they are; a late one is split off."""
    halves = [[short(m, "r", 1, "two", i, group_size=4) for i in part] for part in ((0, 1), (2, 3))]
    out = {}
    threads = [threading.Thread(target=lambda k=k: out.update({k: up.connect().call("Score", m.ScoreRequest(rollouts=halves[k]))})) for k in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    verdicts = [*out[0].verdicts, *out[1].verdicts]
    mean = sum(v.reward for v in verdicts) / 4
    assert all(abs(v.advantage - (v.reward - mean)) < 1e-5 and not v.warnings & 8 for v in verdicts)
    late = up.connect().call("Score", m.ScoreRequest(rollouts=[short(m, "r", 1, "two", 9, group_size=4)])).verdicts[0]
    assert late.warnings & 8 and not late.HasField("advantage")
    begin = time.monotonic()
    alone = up.connect().call("Score", m.ScoreRequest(rollouts=[short(m, "r", 1, "three", 0, group_size=4)])).verdicts[0]
    assert time.monotonic() - begin >= 0.35 and not alone.warnings & 8  # group_wait_ms


# ---- envelope ----

def test_run_refuses_what_it_does_not_speak(up, m):
    rpc = up.connect()
    assert "proto" in failing(rpc.call, "Hello", m.HelloRequest(proto_min=2, proto_max=3)).text
    assert failing(rpc.call, "Hello", m.HelloRequest(proto_min=2, proto_max=3)).code == FAILED_PRECONDITION
    assert failing(rpc.call, "Nonsense", m.HelloRequest(), "HelloReply").code == UNIMPLEMENTED
    other = rpc.raw(m.Request(call_id=9, method=b"/spurion.v2.Spurion/Score").SerializeToString())
    assert other.code == UNIMPLEMENTED and b"spurion.v1" in other.message and b"spurion.v2" in other.message and other.call_id == 9
    assert rpc.raw(b"\xff\xff\xff").code == INVALID_ARGUMENT
    assert rpc.raw(m.Request(method=b"/spurion.v1.Spurion/Score", body=b"\x0a\x05ab").SerializeToString()).code == INVALID_ARGUMENT
    many = m.ScoreRequest(rollouts=[m.Rollout(run=b"r")] * 5000).SerializeToString()
    assert failing(rpc.call_raw, "Score", many).code == RESOURCE_EXHAUSTED
    assert failing(rpc.call, "Query", m.QueryRequest(), "QueryReply").code == INVALID_ARGUMENT
    assert failing(rpc.call, "Get", m.GetRequest(run=b"r", step=1, group=b"g", id=b"nobody"), "Record").code == NOT_FOUND


@pytest.mark.parametrize("greets", [False, True])
def test_run_survives_peers_that_close_at_once(up, m, greets):
    """nng 1.5.2 takes the broken pipe of such a peer for its own listener's end (daemon/transport_posix.c)."""
    for url, protocol in ((up.rpc_url, wire.REQ), (up.tap_url, wire.PUB), (up.alert_url, wire.SUB)):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(url[6:])
                if greets:
                    s.send(bytes([0, ord("S"), ord("P"), 0, 0, protocol, 0, 0]))
        wire.Sp(url, protocol, 10).close()  # its greeting is answered
    assert up.connect(10).call("Status", m.StatusRequest()).ready


def test_run_drops_who_sends_more_than_a_frame(up, m):
    rpc = up.connect()
    with pytest.raises((OSError, ConnectionError)):
        rpc.sp.send(b"\x80\0\0\1" + b"x" * (17 << 20))
        rpc.sp.receive()
    assert up.connect().call("Status", m.StatusRequest()).ready


# ---- submit ----

def test_run_judges_what_was_submitted_after_kill(d, m):
    """OK from Submit is a promise that kill -9 does not break; and everything is counted once."""
    d.start()
    rpc, rng, acked, step = d.connect(), random.Random(4), set(), 0
    for _ in range(5):
        deadline = time.monotonic() + rng.uniform(0.05, 0.5)
        while time.monotonic() < deadline:
            rollouts = [short(m, "sub", step, f"g{step}", i) for i in range(4)]
            s = rpc.call("Submit", m.SubmitRequest(rollouts=rollouts))
            assert s.accepted == 4
            acked |= {(step, r.id) for r in rollouts}
            step += 1
        d.kill()
        d.start()
        rpc = d.connect()
    again = rpc.call("Submit", m.SubmitRequest(rollouts=[short(m, "sub", 0, "g0", i) for i in range(4)]))
    assert again.accepted == 4 and again.duplicates == 4
    wait_for(lambda: {(r.step, r.id) for r in all_rows(rpc, "sub")} >= acked)
    assert_once(rpc, "sub", acked)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def assert_once(rpc, run, identities):
    """Stored exactly these, counted once, and no (run, step, rule) alerted twice."""
    rows = all_rows(rpc, run)
    assert len(rows) == len(identities) and {(r.step, r.id) for r in rows} == identities
    total = rpc.call("Counts", rpc.m.CountsRequest(run=run.encode(), totals=True))
    assert list(total.scored) == [len(rows)]
    assert list(total.flagged) == [sum(bool(r.rule) for r in rows)]
    rules = rpc.call("Counts", rpc.m.CountsRequest(run=run.encode(), totals=True, kind=1))
    for rule, scored, flagged in zip(rules.rule, rules.scored, rules.flagged):
        assert scored == len(rows) and flagged == sum(rule in r.rule for r in rows)
    alerts = all_alerts(rpc)
    assert [a.seq for a in alerts] == list(range(1, len(alerts) + 1))
    rate = [(a.run, a.step, a.rule, a.kind) for a in alerts if a.kind in (1, 3)]
    each = [(a.run, a.step, a.rule, a.worst_group[0], a.worst_id[0]) for a in alerts if a.kind == 2]
    assert len(set(rate)) == len(rate) and len(set(each)) == len(each)
    return rows, alerts


# ---- the tap ----

def publish(d, run, count, steps=3, groups=3, members=4, ring=1 << 30, seed=0, stop=()):
    """Publisher processes; gives them."""
    return [subprocess.Popen([sys.executable, str(SOURCE / "tests" / "e2e" / "publisher.py"), str(SOURCE), d.rpc_url, d.tap_url, run, f"p{i}",
                              str(steps), str(groups), str(members), str(ring), str(seed + i), *map(str, stop)], stdout=subprocess.PIPE) for i in range(count)]


def results(publishers):
    out = []
    for p in publishers:
        text, _ = p.communicate(timeout=300)
        assert p.returncode == 0
        out.append(json.loads(text))
    return out


def everything(told, groups, members):
    return {(s, f"{t['name']}-s{s}-g{g}-{i}".encode()) for t in told for s in range(t["steps"]) for g in range(groups) for i in range(members)}


def test_run_loses_nothing_of_three_publishers(up, m):
    told = results(publish(up, "tap", 3))
    assert [t["lost"] for t in told] == [0, 0, 0] and sum(t["sent"] for t in told) == 108
    rpc = up.connect()
    rows, alerts = assert_once(rpc, "tap", everything(told, 3, 4))
    assert all(r.HasField("advantage") for r in rows)  # groups came whole, in two messages each
    for step in range(3):  # closed by the three StepEnds, each with one message for every rule that flagged
        flagged = {rule for r in rows if r.step == step for rule in r.rule}
        rated = {"url-lowers", "thanks-raises"}
        assert {a.rule.decode() for a in alerts if a.step == step and a.kind == 1} == {f.decode() for f in flagged} & rated
    assert any(a.kind == 1 for a in alerts)
    status = rpc.call("Status", m.StatusRequest())
    assert len(status.producer) == 3 and not any(status.producer_missing) and not any(status.producer_lost)


def test_run_tells_exactly_what_a_small_ring_lost(up, m):
    told = results(publish(up, "ring", 3, ring=4, seed=20))
    rpc = up.connect()
    assert all(0 < t["lost"] <= t["feared"] for t in told), told  # what was feared lost may have come late
    assert len(all_rows(rpc, "ring")) == sum(t["sent"] - t["lost"] for t in told)
    status = rpc.call("Status", m.StatusRequest())
    assert sorted(status.producer_lost) == sorted(t["lost"] for t in told) and not any(status.producer_missing)


def test_run_stores_once_through_kills(d, m, tmp_path):
    """kill -9 at random moments while three processes publish: nothing published is lost, stored, counted or alerted twice."""
    rng = random.Random(7)
    d.start()
    publishers = publish(d, "kill", 3, steps=100000, groups=1, members=2, seed=40, stop=[tmp_path / "stop"])
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.02, 0.4))  # the moment is the point
        assert all(p.poll() is None for p in publishers)
        d.kill()
        d.start()
    (tmp_path / "stop").touch()
    told = results(publishers)
    assert [t["lost"] for t in told] == [0, 0, 0] and min(t["steps"] for t in told) > 0
    rpc = d.connect()
    rows, alerts = assert_once(rpc, "kill", everything(told, 1, 2))
    for step in range(min(t["steps"] for t in told)):
        flagged = {rule for r in rows if r.step == step for rule in r.rule} & {b"url-lowers", b"thanks-raises"}
        assert {a.rule for a in alerts if a.step == step and a.kind == 1} == flagged


# ---- alerts ----

def test_run_alerts_are_stored_before_they_are_sent(up, m):
    sub, rpc = wire.Sp(up.alert_url, wire.SUB), up.connect()
    wait_for(lambda: counters(rpc)[0]["connections_alerts"] == 1)
    rpc.call("Score", m.ScoreRequest(rollouts=[message(m, a) for a, _ in up.rollouts()], producer=b"trainer"))
    for step in sorted({a["step"] for a, _ in up.rollouts()}):
        assert rpc.call("StepEnd", m.StepEndRequest(run=b"golden", producer=b"trainer", step=step)).closed
    stored = all_alerts(rpc)
    assert len(stored) > 4 and {a.kind for a in stored} == {1, 2, 3}
    got = []
    for _ in stored:
        data = sub.receive()
        assert len(data) <= 1024
        got.append(m.Alert.FromString(data))
    assert got == stored
    for a in stored:
        if a.kind == 1:
            assert 0 < a.flagged <= a.scored and a.rate_lower <= a.rate <= a.rate_upper and 1 <= len(a.worst_id) <= 3
    count = len(stored)
    rpc.call("StepEnd", m.StepEndRequest(run=b"golden", producer=b"trainer", step=90))
    assert len(all_alerts(rpc)) == count
    assert up.stop() == 0
    up.start()
    rpc = up.connect()
    rpc.call("StepEnd", m.StepEndRequest(run=b"golden", producer=b"trainer", step=90))
    assert all_alerts(rpc) == stored


# ---- questions ----

def test_run_answers_questions(up, m):
    rpc, pairs = up.connect(), up.rollouts()
    verdicts = rpc.call("Score", m.ScoreRequest(rollouts=[message(m, a) for a, _ in pairs])).verdicts
    rows = all_rows(rpc, "golden", flagged=True)
    assert {r.id for r in rows} == {v.id for v in verdicts if v.flag_rule} and all(r.whole for r in rows)
    effects = [r.effect for r in all_rows(rpc, "golden", order=2)]
    assert effects == sorted(effects) and len(effects) > 10
    worst = rows[0]
    record = rpc.call("Get", m.GetRequest(run=worst.run, step=worst.step, group=worst.group, id=worst.id), "Record")
    asked = next(message(m, a) for a, _ in pairs if a["id"].encode() == worst.id)
    assert record.rollout == asked
    assert record.verdict.tokens.position and record.verdict.reward == worst.reward
    text, at = record.verdict.tokens.text, 0
    for size in record.verdict.tokens.text_size:
        at += size
    assert at == len(text)
    catalogue = rpc.call("Catalogue", m.CatalogueRequest())
    assert catalogue.total == len(catalogue.label) > 10
    assert [i.decode() for i in rpc.call("Rules", m.RulesRequest()).id] == ["url-lowers", "thanks-raises", "any-flip", "both"]
    runs = rpc.call("Runs", m.RunsRequest())
    assert list(runs.run) == [b"golden"] and list(runs.rollouts) == [len({(v.step, v.group, v.id, v.attempt) for v in verdicts})]
    feature = rpc.call("Counts", m.CountsRequest(run=b"golden", kind=2, totals=True))
    assert feature.feature_sae and sum(feature.scored) > 0
    by = all_rows(rpc, "golden", feature_sae=feature.feature_sae[0], feature_index=feature.feature_index[0])
    assert len(by) == feature.scored[0]


# ---- leaving ----

def test_run_reads_and_tokenises_while_the_engine_judges(up, m):
    """Host work overlaps the device's: counted, not timed. Were rollouts prepared by the engine's thread, none would be while it judges."""
    rpc, n = up.connect(), 0
    end = time.monotonic() + 60
    while counters(rpc)[0]["rollouts_prepared_ahead"] == 0:
        assert time.monotonic() < end, "no rollout was prepared while others were judged"
        assert rpc.call("Submit", m.SubmitRequest(rollouts=[short(m, "ahead", n, f"g{n}", i) for i in range(16)])).accepted == 16
        n += 1
    assert n > 1  # the first group finds an engine that waits


def test_run_ends_on_sigterm_under_load(d, m):
    """Exit status 0 within five seconds; what was acknowledged is there after the next start."""
    d.start()
    acked, stop = set(), threading.Event()

    def load(k):
        try:
            rpc, n = d.connect(), 0
            while not stop.is_set():
                rollouts = [short(m, f"load{k}", n, "g", i) for i in range(4)]
                if k % 2:
                    if rpc.call("Submit", m.SubmitRequest(rollouts=rollouts)).accepted == 4:
                        acked.update((f"load{k}", n, r.id) for r in rollouts)
                else:
                    if all(v.code == 0 for v in rpc.call("Score", m.ScoreRequest(rollouts=rollouts)).verdicts):
                        acked.update((f"load{k}", n, r.id) for r in rollouts)
                n += 1
        except (wire.Error, OSError, ConnectionError):
            pass

    threads = [threading.Thread(target=load, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    wait_for(lambda: len(acked) > 60)
    begin = time.monotonic()
    assert d.stop() == 0, d.tail()
    assert time.monotonic() - begin < 5
    stop.set()
    for t in threads:
        t.join()
    d.start()
    rpc = d.connect()
    wait_for(lambda: {(r.run.decode(), r.step, r.id) for k in range(4) for r in all_rows(rpc, f"load{k}")} >= acked)


def test_run_names_what_is_in_flight(up, m):
    """A member of a group that never comes: Status names the one that waits, and its age."""
    rpc = up.connect()
    waiting = threading.Thread(target=lambda: up.connect().call("Score", m.ScoreRequest(rollouts=[short(m, "r", 5, "slow", 1, group_size=2)])))
    waiting.start()
    seen = []
    wait_for(lambda: seen.append(rpc.call("Status", m.StatusRequest())) or seen[-1].in_flight == 1)
    assert list(seen[-1].flight_id) == [b"slow-1"] and list(seen[-1].flight_step) == [5] and seen[-1].flight_stage[0] in (b"queued", b"grouping")
    waiting.join()
    wait_for(lambda: rpc.call("Status", m.StatusRequest()).in_flight == 0)


def test_run_refuses_to_start_where_it_cannot(d, tmp_path):
    def status(*sets):
        args = [a for s in sets for a in ("--set", s)]
        return subprocess.run([d.program, "run", "--config", str(d.case / "config.yaml"), *args], stderr=subprocess.PIPE, timeout=60)
    other = status("listen.rpc=[tcp://0.0.0.0:7999]")
    assert other.returncode == 78 and b"loopback" in other.stderr
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "something").write_text("else")
    assert status(f"store.path={blocked}").returncode == 78
