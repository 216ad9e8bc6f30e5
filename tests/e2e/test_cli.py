"""The command line `spurion` against a running spuriond: what it prints, its exit statuses, what reaches a terminal, completion."""
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time

import pytest

protobuf = pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from daemon import SOURCE, Daemon  # noqa: E402

BIN = os.environ.get("SPURION_BIN", str(SOURCE / "build" / "cpu" / "bin"))
PROGRAM, CLI = os.environ.get("SPURIOND", BIN + "/spuriond"), BIN + "/spurion"
VERBS = ["status", "score", "publish", "watch", "query", "show", "export", "runs", "report", "labels", "completion"]
TIMEOUT = 120


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    for program in (PROGRAM, CLI):
        assert os.access(program, os.X_OK), f"expected a program, found nothing at {program}"
    daemon = Daemon(PROGRAM, tmp_path_factory.mktemp("cli"), wire.load_messages(str(SOURCE)))
    yield daemon.start()
    daemon.end()


def environment(d=None, **more):
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLORFGBG", "SPURION_RPC", "SPURION_ROLLOUTS", "SPURION_ALERTS")}
    if d is not None:
        env |= {"SPURION_RPC": d.rpc_url, "SPURION_ROLLOUTS": d.tap_url, "SPURION_ALERTS": d.alert_url}
    return env | {"TERM": "xterm-256color", "TZ": "UTC"} | more


def spurion(d, *args, stdin="", status=0, env=None):
    """Runs the command; gives stdout and stderr as text."""
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([CLI, *map(str, args)], input=data, capture_output=True, timeout=TIMEOUT, env=env or environment(d))
    assert done.returncode == status, (args, done.returncode, done.stdout.decode()[-500:], done.stderr.decode()[-1500:])
    return done.stdout.decode(), done.stderr.decode()


def lines(text):
    return [json.loads(t) for t in text.splitlines()]


def rollout(run, step, group, i, completion, **more):
    return {"run": run, "step": step, "group": group, "id": f"{group}-{i}", "prompt": "Most of the people there", "completion": completion, **more}


def jsonl(rollouts):
    return "".join(json.dumps(r) + "\n" for r in rollouts)


@pytest.fixture(scope="module")
def published(up):
    """Run "pub": what the stored case holds (some of it is flagged), published once."""
    rollouts = [a for a, _ in up.rollouts()]
    out, err = spurion(up, "publish", "--run", "pub", "--producer", "p1", "--json", stdin=jsonl(rollouts))
    told = json.loads(out)
    assert told == {"published": len(rollouts), "batches": told["batches"], "stored_through": told["batches"], "refilled": told["refilled"],
                    "dropped": 0, "unreadable": 0}, err
    assert 0 <= told["refilled"] <= told["batches"]  # what went out before the daemon's socket was there came again, and is stored all the same
    return rollouts


def wait_for(what, seconds=30):
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return got


def rows(d, run, *more, count=None):
    """Rows of a run as objects, once there are `count`: what is stored is judged a moment later."""
    def ask():
        done = subprocess.run([CLI, "query", run, "--jsonl", *map(str, more)], capture_output=True, env=environment(d), timeout=TIMEOUT)
        assert done.returncode in (0, 1), done.stderr
        got = lines(done.stdout.decode())
        return got if count is None or len(got) >= count else None
    return wait_for(ask) if count is not None else ask()


# ---- score: the same bytes as judge ----

@pytest.mark.parametrize("tokens", [False, True])
def test_cli_score_prints_what_judge_prints(up, tokens):
    rollouts = [dict(a, run=f"score-{tokens}") for a, _ in up.rollouts()]
    text = jsonl(rollouts)
    extra = ["--tokens"] if tokens else []
    judged = subprocess.run([PROGRAM, "judge", "--config", str(up.case / "config.yaml"), *extra], input=text.encode(), capture_output=True,
                            timeout=TIMEOUT, env=environment() | {"OMP_WAIT_POLICY": "passive"})
    assert judged.returncode == 0, judged.stderr.decode()
    out, _ = spurion(up, "score", *extra, stdin=text)
    ours, theirs = lines(out), lines(judged.stdout.decode())
    assert len(ours) == len(rollouts)
    groups = {}
    for r in rollouts:
        groups.setdefault((r["step"], r["group"]), []).append(r["id"])
    for a, b in zip(ours, theirs):  # the daemon's own part of the provenance aside, every field
        a.pop("provenance"), b.pop("provenance")
        assert a == b
    again, _ = spurion(up, "score", stdin=text)
    assert len(lines(again)) == len(rollouts)


def test_cli_score_refuses_single_lines(up):
    good = rollout("mixed", 1, "g", 1, " would help them.")
    text = jsonl([good]) + "no json\n" + jsonl([dict(good, id="g-2", completion="")]) + '{"run":"mixed","step":1,"group":"g"}\n' + jsonl(
        [dict(good, id="g-3", completon="x")])
    out, err = spurion(up, "score", stdin=text, status=3)
    got = lines(out)
    assert "reward" in got[0] and "4 of 5 rollouts were refused" in err
    assert got[1] == {"line": 2, "error": got[1]["error"]} and got[1]["error"]["code"] == "INVALID_ARGUMENT"
    assert got[2]["id"] == "g-2" and got[2]["error"]["code"] == "INVALID_ARGUMENT"
    assert got[3]["run"] == "mixed" and got[3]["id"] is None and "id" in got[3]["error"]["message"]
    assert "did you mean 'completion'" in got[4]["error"]["message"]
    out, _ = spurion(up, "score", "--table", stdin=jsonl([good]))
    assert "REWARD" in out.splitlines()[0] and "g-1" in out.splitlines()[1]


def test_cli_score_takes_a_group_of_many_and_an_empty_input(up):
    many = [rollout("many", 1, "g", i, f" number {i}.") for i in range(300)]
    out, _ = spurion(up, "score", stdin=jsonl(many))
    got = lines(out)
    assert [v["id"] for v in got] == [r["id"] for r in many]
    mean = sum(v["reward"] for v in got) / 300
    assert all(abs(v["advantage"] - (v["reward"] - mean)) < 1e-4 for v in got)  # one group, judged as one
    assert spurion(up, "score", stdin="") == ("", "")


# ---- publish, query, export, runs ----

def test_cli_publish_query_export_round_trip(up, published):
    got = rows(up, "pub", count=len(published))
    assert sorted((r["step"], r["group"], r["id"]) for r in got) == sorted((r["step"], r["group"], r["id"]) for r in published)
    flagged = [r for r in got if r["rules"]]
    assert 0 < len(flagged) < len(got)
    assert {r["id"] for r in rows(up, "pub", "--flagged")} == {r["id"] for r in flagged}
    rule = flagged[0]["rules"][0]
    assert {r["id"] for r in rows(up, "pub", "--rule", rule)} == {r["id"] for r in got if rule in r["rules"]}
    steps = sorted({r["step"] for r in got})
    assert {r["step"] for r in rows(up, "pub", "--step", steps[0])} == {steps[0]}
    assert {r["step"] for r in rows(up, "pub", "--step", f"{steps[-1]}..")} == {steps[-1]}
    effects = [r["effect"] for r in rows(up, "pub", "--order", "effect")]
    assert effects == sorted(effects) and 0 not in effects
    assert [r["effect"] for r in rows(up, "pub", "--order", "effect", "--desc", "--limit", 3)] == effects[::-1][:3]
    exported = lines(spurion(up, "export", "pub", "--flagged")[0])
    assert {r["id"] for r in exported} == {r["id"] for r in flagged}
    for r in exported:
        mine = next(p for p in published if p["id"] == r["id"] and p["group"] == r["group"] and p["step"] == r["step"])
        for field in ("prompt", "completion", "prompt_ids", "completion_ids", "tags"):
            assert r.get(field) == mine.get(field)
        assert r["flags"] and "tokens" not in r
    full = lines(spurion(up, "export", "pub", "--flagged", "--full")[0])
    assert all(len(r["tokens"]["text"]) == len(next(iter(r["tokens"]["attribution"].values()))) > 0 for r in full)
    feature = next(f for r in exported for f in r["flags"][0]["features"])
    named = f"{feature['sae']}/{feature['index']}"
    assert exported[0]["id"] in {r["id"] for r in rows(up, "pub", "--feature", named)} or len(exported) > 1
    assert len(lines(spurion(up, "export", "pub")[0])) == len(published)
    run = next(r for r in lines(spurion(up, "runs", "--jsonl")[0]) if r["run"] == "pub")
    assert run["rollouts"] == len(published) and run["flagged"] == len(flagged)


def test_cli_query_reads_all_pages(up):
    many = [rollout("pages", i // 60, f"g{i // 6}", i, f" would help them, number {i}.") for i in range(1200)]
    spurion(up, "publish", "--run", "pages", stdin=jsonl(many))
    got = rows(up, "pages", count=1200)
    assert len({(r["step"], r["group"], r["id"]) for r in got}) == 1200 == len(got)
    assert [r["step"] for r in got] == sorted(r["step"] for r in got)
    table, err = spurion(up, "query", "pages")
    assert len(table.splitlines()) == 51 and "there are more" in err
    assert len(lines(spurion(up, "export", "pages", "--limit", 700)[0])) == 700


def test_cli_publish_says_what_it_could_not_read(up):
    text = jsonl([rollout("part", 1, "g", 1, " yes.")]) + "[]\n" + jsonl([rollout("part", 2, "h", 1, " no.")])
    out, err = spurion(up, "publish", "--json", stdin=text, status=3)
    assert json.loads(out)["published"] == 2 and json.loads(out)["unreadable"] == 1
    assert "line 2: expected a JSON object, found an array" in err
    assert len(rows(up, "part", count=2)) == 2


def test_cli_publish_keeps_to_a_rate(up):
    text = jsonl([rollout("slow", i, "g", 1, f" yes {i}.") for i in range(10)])
    start = time.monotonic()
    spurion(up, "publish", "--rate", "10/s", stdin=text)
    assert time.monotonic() - start > 0.85


# ---- watch ----

def test_cli_watch_prints_alerts_with_bounds(up, published):
    rows(up, "pub", count=len(published))
    def ask():
        done = subprocess.run([CLI, "watch", "--from", "1", "--for", "1", "--jsonl", "--run", "pub"], capture_output=True, env=environment(up))
        return [a for a in lines(done.stdout.decode()) if a["kind"] in ("rate", "each")]
    alert = wait_for(ask)[0]
    assert alert["run"] == "pub" and alert["rule"]
    if alert["kind"] == "rate":
        assert 0 <= alert["rate_lower"] <= alert["rate"] <= alert["rate_upper"] <= 1 and alert["flagged"] <= alert["scored"]
    text, _ = spurion(up, "watch", "--from", alert["seq"], "--count", 1, "--for", 30, "--run", "pub", "--rule", alert["rule"])
    assert f"#{alert['seq']} " in text and alert["rule"] in text and "worst" in text and text.count("\n") == 1
    assert spurion(up, "watch", "--for", 1, "--run", "nothing-of-this-name", status=1)[0] == ""


def test_cli_watch_sees_alerts_as_they_come(up, published):
    def connections():
        return json.loads(spurion(up, "status", "--json")[0])["counters"]["connections_alerts"]
    wait_for(lambda: connections() == 0)  # those of other tests are gone
    process = subprocess.Popen([CLI, "watch", "--jsonl", "--run", "live", "--count", "1", "--for", "60"], stdout=subprocess.PIPE, env=environment(up))
    try:
        wait_for(lambda: process.poll() is not None or connections() == 1)  # it has noted where it begins before it connects
        assert process.poll() is None
        spurion(up, "publish", "--run", "live", stdin=jsonl(published))
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert lines(out.decode())[0]["run"] == "live"
    finally:
        process.kill()


# ---- show ----

def a_flagged_one(up, published):
    rows(up, "pub", count=len(published))
    return rows(up, "pub", "--flagged", "--limit", 1)[0]


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_cli_show_shades_tokens(up, published):
    r = a_flagged_one(up, published)
    key = f"pub/{r['step']}/{r['group']}/{r['id']}"
    record = json.loads(spurion(up, "show", key, "--json")[0])
    text, _ = spurion(up, "show", key)
    assert spurion(up, "show", "pub", r["step"], r["group"], r["id"])[0] == text
    assert "\x1b" not in text and ("⟦+" in text or "⟦−" in text)
    values = record["tokens"]["attribution"]
    largest = max(abs(v) for own in values.values() for v in own)
    assert f"scale -{largest:.4g} to +{largest:.4g}" in text
    assert f"{record['reward']:+.6g}" in text and f"{record['counterfactual_reward']:+.6g}" in text and record["provenance"] in text
    for f in record["features"]:
        assert f"{f['sae']}/{f['index']}" in text
    for flag in record["flags"]:
        assert flag["rule"] in text
    for name in values:
        one, _ = spurion(up, "show", key, "--sae", name)
        own = max(abs(v) for v in values[name])
        assert f"attribution of {name}: scale -{own:.4g} to" in one
    rule = record["flags"][0]["rule"]
    assert f"the features of {rule}" in spurion(up, "show", key, "--rule", rule)[0]
    assert "expected a rule that fired" in spurion(up, "show", key, "--rule", "no-such", status=1)[1]
    assert "expected an SAE" in spurion(up, "show", key, "--sae", "no-such", status=1)[1]


def test_cli_show_colours_by_sign_on_one_scale(up, published):
    r = a_flagged_one(up, published)
    key = f"pub/{r['step']}/{r['group']}/{r['id']}"
    record = json.loads(spurion(up, "show", key, "--json")[0])
    name = max(record["tokens"]["attribution"], key=lambda n: max(map(abs, record["tokens"]["attribution"][n])))
    values = record["tokens"]["attribution"][name]
    top = max(map(abs, values))
    text, _ = spurion(up, "show", key, "--color", "--theme", "light")
    painted = re.findall(r"\x1b\[38;2;17;17;17m\x1b\[48;2;(\d+);(\d+);(\d+)m\x1b\[(53|4)m", text)
    assert painted
    expected = []
    for v in values:
        if abs(v) >= 0.05 * top:
            end = (0x43, 0x93, 0xC3) if v > 0 else (0xE6, 0x61, 0x01)
            a = abs(v) / top
            expected.append((*[round(255 + a * (c - 255)) for c in end], "53" if v > 0 else "4"))
    got = [(*map(int, p[:3]), p[3]) for p in painted]
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        assert g[3] == e[3] and all(abs(a - b) <= 1 for a, b in zip(g[:3], e[:3]))
    assert plain(spurion(up, "show", key, "--color")[0]).split("\n\nshaded by")[0] == re.sub(
        r"⟦[+−]|⟧", "", spurion(up, "show", key)[0]).split("\n\nshaded by")[0]


def test_cli_colour_follows_terminal_and_no_color(up, published):
    r = a_flagged_one(up, published)
    key = f"pub/{r['step']}/{r['group']}/{r['id']}"

    def on_terminal(*more, **env):
        master, slave = pty.openpty()
        process = subprocess.Popen([CLI, "show", key, *more], stdout=slave, stderr=slave, env=environment(up, **env))
        os.close(slave)
        data = b""
        while select.select([master], [], [], 20)[0]:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            data += piece
        process.wait(20)
        os.close(master)
        return data

    assert b"\x1b[48;2;" in on_terminal()
    assert b"\x1b" not in on_terminal(NO_COLOR="1")
    assert b"\x1b" not in on_terminal("--no-color")
    assert b"\x1b" not in on_terminal(TERM="dumb")


def test_cli_never_lets_rollout_text_steer_the_terminal(up):
    nasty = " \x1b[31mred\x07 \u202eevil\u202c zero\u200bwidth \u2066x\u2069 \x9b31m \ufeff end https://a.example"
    name = "n\u202ea\u200bme"
    spurion(up, "publish", "--run", "nasty", stdin=jsonl([rollout("nasty", 1, name, i, nasty + str(i)) for i in range(2)]))
    got = rows(up, "nasty", count=2)
    outputs = [spurion(up, "query", "nasty")[0], spurion(up, "show", "nasty", 1, name, got[0]["id"])[0], spurion(up, "runs")[0],
               spurion(up, "score", "--table", "--run", "nasty2", stdin=jsonl([rollout("x", 1, name, 1, nasty)]))[0]]
    for text in outputs:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]", text), repr(text[:500])
    assert "<U+202E>" in outputs[0] and "<U+200B>" in outputs[0]
    if got[0]["whole"]:
        assert "<U+001B>[31mred<U+0007>" in outputs[1]


# ---- status, exit statuses, usage ----

def test_cli_status_lists_state_queue_and_producers(up, published):
    rows(up, "pub", count=len(published))
    s = json.loads(spurion(up, "status", "--json")[0])
    assert s["state"] == "serving" and s["ready"] and s["queue_bytes_max"] > 0 and len(s["provenance"]) == 16
    mine = [p for p in s["producers"] if p["run"] == "pub" and p["producer"] == "p1"]
    assert mine and mine[0]["missing"] == 0 and mine[0]["lost"] == 0 and mine[0]["stored"] == mine[0]["highest"]
    text, _ = spurion(up, "status")
    for word in ("serving", "queue", "counters", "producers", "p1", s["provenance"]):
        assert word in text


def test_cli_status_lists_what_is_in_flight(up):
    """A group that waits for a member that does not come is in flight until its time is up."""
    waiting = subprocess.Popen([CLI, "score"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(up))
    try:
        waiting.stdin.write(jsonl([rollout("wait", 5, "lonely", 1, " alone.", group_size=8)]).encode())
        waiting.stdin.close()
        seen = wait_for(lambda: [f for f in json.loads(spurion(up, "status", "--json")[0])["flights"] if f["run"] == "wait"], 5)
        assert seen[0]["group"] == "lonely" and seen[0]["id"] == "lonely-1" and seen[0]["step"] == 5 and seen[0]["age_ms"] >= 0 and seen[0]["stage"]
        assert json.loads(waiting.stdout.read())["reward"] is not None
        assert waiting.wait(30) == 0
    finally:
        waiting.kill()


def test_cli_exit_statuses(up, tmp_path):
    nowhere = environment() | {"SPURION_RPC": f"ipc://{tmp_path}/none"}
    for verb in (["status"], ["score", os.devnull], ["query", "r"], ["show", "r/1/g/i"], ["export", "r"], ["runs"], ["watch"]):
        _, err = spurion(None, *verb, status=69, env=nowhere)
        assert "expected a daemon at ipc://" in err and "No such file" in err and "SPURION_RPC" in err
    start = time.monotonic()
    spurion(None, "status", "--wait", 2, status=69, env=nowhere)
    assert 1.9 < time.monotonic() - start < 6
    assert spurion(up, "query", "no-such-run", status=1)[0] == ""
    assert spurion(up, "export", "no-such-run", status=1)[0] == ""
    assert "NOT_FOUND" in spurion(up, "show", "pub", 1, "no", "such", status=1)[1]
    spurion(up, "score", "/nonexistent", status=74)
    spurion(up, "publish", "/nonexistent", status=74)
    with open("/dev/full", "w") as full:
        done = subprocess.run([CLI, "status"], stdout=full, stderr=subprocess.PIPE, env=environment(up))
    assert done.returncode == 74 and b"No space left" in done.stderr


@pytest.mark.parametrize("args, hint", [
    ([], "expected a verb"), (["qurey"], "did you mean 'query'"), (["query"], "expected RUN"), (["query", "r", "x"], "too many"),
    (["query", "r", "--flaged"], "did you mean 'flagged'"), (["query", "r", "--limit", "none"], "a whole number"), (["query", "r", "--step", "3..x"], "A..B"),
    (["query", "r", "--feature", "517"], "SAE/INDEX"), (["query", "r", "--order", "size"], "step, time or effect"), (["show", "a/b"], "RUN/STEP/GROUP/ID"),
    (["publish", "--policy", "hope"], "block, drop-new or drop-oldest"), (["publish", "--rate", "-3"], "above 0"), (["watch", "--flagged"], "expected an option"),
    (["status", "--json=yes"], "expected no value"), (["status", "--rpc"], "expected URL"), (["completion", "csh"], "bash, zsh or fish"),
    (["status", "--rpc", "carrier://pigeon"], "expected ipc:///path or tcp://host:port"), (["publish", "--run", "a\nb"], "--run")])
def test_cli_usage_errors_say_what_was_expected(args, hint):
    out, err = spurion(None, *args, status=64)
    assert out == "" and hint in err


def test_cli_help_begins_with_examples():
    top, _ = spurion(None, "--help")
    assert top.startswith("examples:\n  spurion ") and all(v in top for v in VERBS) and "exit status: 0 " in top
    for verb in VERBS:
        text, err = spurion(None, verb, "--help")
        assert text.startswith("examples:\n") and f"usage: spurion {verb}" in text and err == ""
    version = (SOURCE / "VERSION").read_text().strip()
    assert spurion(None, "--version")[0] == f"spurion {version}\n"


def test_cli_completion_knows_verbs_and_options(tmp_path):
    script = tmp_path / "c.bash"
    script.write_text(spurion(None, "completion", "bash")[0])

    def complete(*words):
        line = " ".join(f"'{w}'" for w in words)
        done = subprocess.run(["bash", "-c", f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _spurion; echo ${{COMPREPLY[@]}}"],
                              capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("spurion", "sc") == ["score"]
    assert set(VERBS) <= set(complete("spurion", ""))
    assert complete("spurion", "query", "r", "--fl") == ["--flagged"]
    assert complete("spurion", "--rpc", "x", "query", "--or") == ["--order"]
    assert complete("spurion", "query", "r", "--order", "e") == ["effect"]
    for shell, mark in (("zsh", "#compdef spurion"), ("fish", "complete -c spurion")):
        text, _ = spurion(None, "completion", shell)
        assert mark in text and all(v in text for v in VERBS) and "flagged" in text
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_cli_dies_quietly_with_its_reader(up, published):
    rows(up, "pub", count=len(published))
    process = subprocess.Popen([CLI, "export", "pub", "--full"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(up))
    process.stdout.close()
    assert process.wait(60) in (-signal.SIGPIPE, 74)
    assert b"Traceback" not in process.stderr.read()
