"""The peak of memory that `spuriond check` states beforehand is what `spuriond judge`, and a flooded `spuriond run`, then take, within 10 %."""
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from ports import free_port

SOURCE = pathlib.Path(os.environ.get("SPURION_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
SPURIOND = os.environ["SPURIOND"]
DEMO = SOURCE / "deploy" / "demo"


def stated_mib(config, *more, line="memory"):
    out = subprocess.run([SPURIOND, "check", "--config", config, *more], capture_output=True, text=True, check=True).stdout
    return float(re.search(rf"{line} .*peak resident size (\d+) MiB", out).group(1))


def taken_mib(config, rollouts, *more):
    with open(rollouts, "rb") as lines:
        process = subprocess.Popen([SPURIOND, "judge", "--config", config, *more], stdin=lines, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss / 1024


@pytest.mark.parametrize("tokens_max", [512, 2048, 8192])
def test_memory_is_what_check_states(tokens_max):
    more = ("--set", f"engine.tokens_max={tokens_max}")
    stated = stated_mib(DEMO / "spurion.yaml", *more)
    taken = taken_mib(DEMO / "spurion.yaml", DEMO / "rollouts.jsonl", *more)
    print(f"stated {stated:.0f} MiB, taken {taken:.0f} MiB")
    assert 0.9 * taken <= stated <= 1.1 * taken


def test_memory_of_long_prompts_is_what_check_states(tmp_path):
    """Prompts of four passes and more go in pieces: same rewards, less memory, and a completion longer than a pass is refused with its number."""
    long = " ".join(["How do I make a good cup of green tea at home, and what should the water be like?"] * 16)
    rows = [{"run": "long", "step": s, "group": f"g{s}", "id": f"i{i}", "prompt": f"{s} {long}", "completion": f"Use water {i}. " + "Thank you. " * i}
            for s in range(8) for i in range(8)]
    rows.append({"run": "long", "step": 9, "group": "x", "id": "x", "prompt": "Tea?", "completion": long})
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = {}
    for tokens_max, status in (("64", 3), ("16384", 0)):
        more = ("--set", f"engine.tokens_max={tokens_max}")
        out = subprocess.run([SPURIOND, "judge", "--config", DEMO / "spurion.yaml", *more], stdin=open(tmp_path / "rollouts.jsonl"),
                             capture_output=True, text=True)
        assert out.returncode == status, out.stderr
        found[tokens_max] = [json.loads(row) for row in out.stdout.splitlines()]
    small, large = found["64"], found["16384"]
    assert all(v["token_count"] > 256 for v in large[:-1])
    assert [v["reward"] for v in small[:-1]] == [v["reward"] for v in large[:-1]]
    assert [v["features"] for v in small[:-1]] == [v["features"] for v in large[:-1]]
    assert "expected at most 64 tokens after the prompt" in small[-1]["error"]["message"]
    (tmp_path / "fit.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]))
    more = ("--set", "engine.tokens_max=64")
    stated, taken = stated_mib(DEMO / "spurion.yaml", *more), taken_mib(DEMO / "spurion.yaml", tmp_path / "fit.jsonl", *more)
    print(f"stated {stated:.0f} MiB, taken {taken:.0f} MiB")
    assert 0.9 * taken <= stated <= 1.1 * taken
    assert stated < stated_mib(DEMO / "spurion.yaml")


def most_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1)) / 1024


def test_memory_of_a_flooded_daemon_is_what_check_states(tmp_path):
    """A publisher far ahead of the engine: the queue is full, steps close, flagged rollouts are stored."""
    spurion = pathlib.Path(SPURIOND).with_name("spurion")
    places = {name: f"ipc://{tmp_path}/{name.lower()}.sock" for name in ("RPC", "ROLLOUTS", "ALERTS")}
    env = os.environ | {"SPURION_" + name: url for name, url in places.items()}
    command = [SPURIOND, "run", "--config", DEMO / "spurion.yaml", "--set", f"store.path={tmp_path}/store",
               "--set", f"listen.http=127.0.0.1:{free_port()}"]
    for name, url in places.items():
        command += ["--set", f"listen.{name.lower()}=[{url}]"]
    with open(tmp_path / "log", "wb") as log:
        daemon = subprocess.Popen(command, stderr=log)
    policy = subprocess.Popen([sys.executable, DEMO / "make_drift.py", "--steps", "40", "--groups", "48"], stdout=subprocess.PIPE)
    publisher = None
    try:
        publisher = subprocess.Popen([spurion, "publish", "--run", "flood", "--wait", "60", "--timeout", "600"], stdin=policy.stdout, env=env,
                                     stdout=subprocess.DEVNULL)
        full, stop = 0.0, time.monotonic() + 200
        while time.monotonic() < stop:
            done = subprocess.run([spurion, "status", "--json"], env=env, capture_output=True, text=True)
            if done.returncode == 0:
                status = json.loads(done.stdout)
                now = status["queue_bytes"] / status["queue_bytes_max"]
                stop = min(stop, time.monotonic() + 30) if full < 0.9 <= now else stop
                full = max(full, now)
            time.sleep(0.2)
        taken = most_mib(daemon.pid)
    finally:
        for process in (publisher, policy, daemon):
            if process:
                process.kill()
                process.wait()
    stated = stated_mib(DEMO / "spurion.yaml", line="running")
    print(f"queue {full:.0%} full, stated {stated:.0f} MiB, taken {taken:.0f} MiB")
    assert full > 0.9
    assert 0.9 * taken <= stated <= 1.1 * taken


def test_memory_too_small_is_refused_with_a_number():
    done = subprocess.run([SPURIOND, "check", "--config", DEMO / "spurion.yaml", "--set", "engine.memory_max=64MiB"], capture_output=True,
                          text=True)
    assert done.returncode not in (0, 3)
    assert "expected room" in done.stderr and "found" in done.stderr
