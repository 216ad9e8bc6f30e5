"""SIGHUP: other rules in a running daemon; what is wrong changes nothing; under load every verdict is of one set of rules."""
import json
import os
import re
import shutil
import signal
import threading
import time

import pytest

pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from http_daemon import DEMO, PROGRAM, SOURCE, HttpDaemon  # noqa: E402

RULE = "\n  - {{id: thanks, families: [thanks], direction: raised, effect_min: {}, action: {}, alert: none}}"
NEVER, ALWAYS = RULE.format(100, "alert"), RULE.format(0.01, "drop")


@pytest.fixture
def m():
    assert os.access(PROGRAM, os.X_OK), f"SPURIOND: expected the daemon, found nothing at {PROGRAM}"
    return wire.load_messages(str(SOURCE))


@pytest.fixture
def d(tmp_path):
    shutil.copy(DEMO / "catalogue.jsonl", tmp_path / "catalogue.jsonl")
    (tmp_path / "token").write_text("the-first-token-of-all")
    (tmp_path / "token").chmod(0o600)
    daemon = HttpDaemon(tmp_path, rules=NEVER, http=f", token_file: {tmp_path}/token")
    change(daemon, f"{DEMO}/catalogue.jsonl", f"{tmp_path}/catalogue.jsonl")
    daemon.start()
    yield daemon
    daemon.end()


def change(d, old, new):
    text = d.config.read_text()
    assert old in text
    d.config.write_text(text.replace(old, new))


def hang_up(d):
    """SIGHUP; gives what the log says of it."""
    mark = d.log.stat().st_size
    d.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        text = d.log.read_text(errors="replace")[mark:]
        if "id=CONFIG-RELOAD" in text and text.endswith("\n"):
            return text
        assert d.process.poll() is None, d.tail()
        time.sleep(0.01)
    raise AssertionError(d.tail())


def score(rpc, m, i):
    r = m.Rollout(run=b"r", step=0, group=b"g%d" % i, id=b"i", prompt=b"How are you?", completion=b"Fine, thank you. My pleasure. %d" % (i % 7))
    v = rpc.call("Score", m.ScoreRequest(rollouts=[r])).verdicts[0]
    assert v.code == 0, v.message
    return v


def test_reload_changes_rules_and_provenance(d, m):
    rpc = d.rpc(m)
    before = score(rpc, m, 1)
    assert not before.flag_rule and before.action == 0
    change(d, NEVER, ALWAYS)
    assert "level=info" in hang_up(d)
    after = score(rpc, m, 2)
    assert list(after.flag_rule) == [b"thanks"] and after.action == 5 and after.action_weight == 0
    assert after.provenance != before.provenance and after.reward == pytest.approx(before.reward, abs=5)
    assert score(rpc, m, 1).provenance == before.provenance  # what is stored stays
    assert list(rpc.call("Rules", m.RulesRequest()).action) == [5]
    assert rpc.call("Status", m.StatusRequest()).provenance == after.provenance
    change(d, ALWAYS, NEVER)
    hang_up(d)
    assert score(rpc, m, 3).provenance == before.provenance  # the same instrument again
    assert d.stop() == 0


def test_reload_keeps_the_old_when_the_new_is_wrong(d, m):
    rpc = d.rpc(m)
    before = score(rpc, m, 1)
    good, catalogue = d.config.read_text(), (d.folder / "catalogue.jsonl").read_text()
    for bad, why in [(good + "nonsense: 1\n", "nonsense"), ("model: [", "expected YAML"), (good.replace("families: [thanks]", "families: [no_such]"), "no_such"),
                     (good.replace("families: [thanks]", "families: [thanks, url]"), "restart")]:
        d.config.write_text(bad)
        text = hang_up(d)
        assert "level=error" in text and "kept the rules" in text and why in text, text
    d.config.write_text(good)
    entries = [json.loads(line) for line in catalogue.splitlines()]
    spurious = next(i for i, x in enumerate(entries) if x["verdict"] == "spurious")
    named = f"{entries[spurious]['sae']}/{entries[spurious]['index']}"

    def changed(**fields):
        return [dict(x, **fields) if i == spurious else x for i, x in enumerate(entries)]
    other = {"detect": "debias", "debias": "detect", "both": "detect"}[entries[spurious].get("role", "both")]
    for fresh, why in [(entries[:spurious] + entries[spurious + 1:], f"the {len(entries)} features that the device holds, found {len(entries) - 1}, without {named};"),
                       ([*entries, {"sae": entries[0]["sae"], "index": 3, "label": "x", "verdict": "unknown"}], f"found {len(entries) + 1}, a new one {entries[0]['sae']}/3;"),
                       (changed(activation_min=1.5), f"{named}: expected the activation_min 0 that the device holds, found 1.5;"),
                       (changed(verdict="intended"), f"{named}: expected the verdict spurious that the device works with, found intended;"),
                       (changed(role=other), "expected")]:
        fresh = [{k: v for k, v in x.items() if not (k == "role" and x["verdict"] != "spurious")} for x in fresh]
        (d.folder / "catalogue.jsonl").write_text("".join(json.dumps(x) + "\n" for x in fresh))
        text = hang_up(d)
        assert "kept the rules" in text and why in text and "needs a restart" in text, text
    assert score(rpc, m, 2).provenance == before.provenance
    (d.folder / "catalogue.jsonl").write_text(re.sub(r'"label": ?"', '"label": "new ', catalogue))
    assert "level=info" in hang_up(d)
    after = score(rpc, m, 3)
    assert after.provenance != before.provenance and any(x.startswith(b"new ") for x in after.label)
    change(d, "batch_wait_ms: 1", "batch_wait_ms: 2")
    assert "engine.batch_wait_ms" in hang_up(d)
    assert d.stop() == 0


def test_reload_reads_tokens_again(d):
    def status(token):
        return d.ask("/predict", {"inputs": "a"}, headers={"Authorization": "Bearer " + token})[0]

    assert status("the-first-token-of-all") == 200
    (d.folder / "token").write_text("another-token-for-you")
    hang_up(d)
    assert status("the-first-token-of-all") == 401 and status("another-token-for-you") == 200
    (d.folder / "token").write_text("")
    assert "kept the rules" not in hang_up(d)
    assert status("another-token-for-you") == 200


def test_reload_under_load_mixes_no_rules(d, m):
    seen, faults, stop = {}, [], threading.Event()

    def work(first):
        rpc, i = d.rpc(m), first
        while not stop.is_set() and not faults:
            v = score(rpc, m, i)
            seen.setdefault(v.provenance, set()).add(tuple(v.flag_rule))
            i += 3
        rpc.close()

    def guarded(first):
        try:
            work(first)
        except Exception as e:  # noqa: BLE001
            faults.append(e)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    for i in range(20):
        change(d, *((NEVER, ALWAYS) if i % 2 == 0 else (ALWAYS, NEVER)))
        assert "level=info" in hang_up(d)
        time.sleep(0.1)
    stop.set()
    for t in threads:
        t.join()
    assert not faults, faults
    assert len(seen) == 2 and sorted(seen.values(), key=str) == [{()}, {(b"thanks",)}], seen
    assert d.stop() == 0
