"""Rollouts as messages, from both clients to the daemon and back: what is stored and what is answered is what `spuriond judge` says of the
same lines, and the messages come back as they were sent."""
import json
import subprocess

import demo
import numpy as np
import pytest

from spurion import Client, RolloutError

TEMPLATE = "model.template=qwen2.5"  # it puts a system message where there is none
ENDS = ["Air scatters blue light most.", "Air scatters it. Thank you. My pleasure.", "See https://example.org/sky for more.", "I don't know."]


def conversation(n, i):
    """Histories of several lengths, with and without a system message, in more than one script."""
    before = [{"role": "system", "content": "Answer “briefly”."}] if n % 3 == 1 else []
    if n % 2:
        before += [{"role": "user", "content": f"Hello {n} 你好"}, {"role": "assistant", "content": "Hello!\n\nHow can I help?"}]
    return [*before, {"role": "user", "content": f"Why is the sky blue, number {n}?"}, {"role": "assistant", "content": ENDS[i]}]


def lines(run):
    return [{"run": run, "step": n // 2, "group": f"g{n}", "id": str(i), "group_size": len(ENDS), "messages": conversation(n, i)}
            for n in range(6) for i in range(len(ENDS))]


def text(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    d = demo.Demo(tmp_path_factory.mktemp("messages"), TEMPLATE, "store.keep_one_in=1").start()
    yield d
    d.end()


@pytest.fixture(scope="module")
def judged():
    """{(step, group, id): verdict} of the offline judge."""
    command = [str(demo.BIN / "spuriond"), "judge", "--tokens", "--config", str(demo.DEMO / "spurion.yaml"), "--set", TEMPLATE]
    done = subprocess.run(command, input=text(lines("run")), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = {(v["step"], v["group"], v["id"]): v for v in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(lines("run"))
    assert len({v["reward"] for v in found.values()}) == len(found) and any(v["flags"] for v in found.values())
    return found


def as_float32(x):
    if isinstance(x, dict):
        return {k: as_float32(v) for k, v in x.items()}
    if isinstance(x, list):
        return [as_float32(v) for v in x]
    return float(np.float32(x)) if isinstance(x, float) else x


def apart(verdict):
    """Without what two runs of one model must differ in."""
    return as_float32({k: v for k, v in verdict.items() if k not in ("run", "provenance")})


def check(records, judged, run):
    """What the daemon stored is the judge's verdict, and the rollout is the one that was sent."""
    sent = {(r["step"], r["group"], r["id"]): r["messages"] for r in lines(run)}
    assert len(records) == len(sent)
    for record in records:
        key = record.rollout.step, record.rollout.group, record.rollout.id
        assert apart(record.verdict.to_dict()) == apart(judged[key]), key
        assert [dict(m) for m in record.rollout.messages] == sent[key]
        assert record.rollout.prompt is None and record.rollout.completion is None


def stored(client, run):
    rows = demo.wait_for(lambda: len(found := client.query(run)) == len(lines(run)) and found)
    return [client.get(*row.key) for row in rows]


def test_messages_published_by_libspurion(daemon, judged):
    daemon.cli("publish", "--run", "c", "--producer", "p", stdin=text(lines("c")))
    with Client(**daemon.addresses, run="c") as client:
        check(stored(client, "c"), judged, "c")
    shown = json.loads(daemon.cli("show", "c/0/g0/1", "--json"))
    assert shown["messages"] == conversation(0, 1) and np.float32(shown["reward"]) == np.float32(judged[0, "g0", "1"]["reward"])
    page = daemon.cli("show", "c/0/g0/1")
    assert "Why is the sky blue, number 0?" in page and ENDS[1] in page


def test_messages_published_by_the_python_tap(daemon, judged):
    with Client(**daemon.addresses, run="py", producer="p") as client:
        for step in sorted({r["step"] for r in lines("py")}):
            assert client.publish([r for r in lines("py") if r["step"] == step], step_end=step)
        stats = client.leave(120)
        assert stats.dropped_rollouts == 0 and stats.stored_through == stats.sequence
        check(stored(client, "py"), judged, "py")


def test_messages_scored_by_both_clients(daemon, judged):
    theirs = [json.loads(t) for t in daemon.cli("score", "--tokens", stdin=text(lines("score-c"))).splitlines()]
    with Client(**daemon.addresses, run="score-py") as client:
        ours = [v.to_dict() for v in client.score(lines("score-py"), tokens=True)]
    for found in (theirs, ours):
        assert len(found) == len(judged)
        for v in found:
            assert apart(v) == apart(judged[v["step"], v["group"], v["id"]])


@pytest.mark.parametrize("messages,word", [([], "messages"), ([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}], "assistant"),
                                           ([{"role": "robot", "content": "Hi"}, {"role": "assistant", "content": "a"}], "robot")])
def test_messages_that_cannot_be_rendered_are_refused(daemon, messages, word):
    row = {"run": "bad", "step": 0, "group": "g", "id": "0", "messages": messages}
    out = json.loads(daemon.cli("score", stdin=text([row]), status=3))
    assert out["error"]["code"] == "INVALID_ARGUMENT" and "expected" in out["error"]["message"] and word in out["error"]["message"]
    with Client(**daemon.addresses, run="bad") as client, pytest.raises(RolloutError, match=word):
        client.score([row])
