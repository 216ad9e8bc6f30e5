"""The daemon with its CUDA backend on an emulated device: whole models against what is expected of them, budgets, a device that fails.

Nothing here is a result of a GPU. What is shown: the kernels' own source computes the verdicts, in either order of threads; nothing above
kernels/ touches device memory (the emulator lets nobody in but kernels, copies and the matrix library); errors take the way they should.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("SPURION_SOURCE", Path(__file__).resolve().parents[2]))
PROGRAM = os.environ.get("SPURIOND_EMULATED", "")
STORED = SOURCE / "tests" / "golden" / "stored"
sys.path[:0] = [str(SOURCE / "tests" / "golden"), str(SOURCE / "tests" / "e2e")]

from compare import compare, read_verdicts  # noqa: E402


def run(command, folder, device="cuda:0", stdin=b"", options=(), **env):
    values = {"SPURION_ENGINE_DEVICE": device, "OMP_WAIT_POLICY": "passive", **{f"SPURION_EMULATOR_{k}": str(v) for k, v in env.items()}}
    return subprocess.run([PROGRAM, command, "--config", str(folder / "config.yaml"), *options], input=stdin, capture_output=True, timeout=300,
                          env={**os.environ, **values})


def judged(folder, status=0, **more):
    done = run("judge", folder, stdin=(folder / "rollouts.jsonl").read_bytes(), **more)
    assert done.returncode == status, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name,order", [("small-gptj", 0), ("small-llama", 1), ("refused", 7)])
def test_emulated_stored_case_is_reproduced(name, order):
    folder = STORED / name
    want = read_verdicts(folder / "expected.jsonl")
    options = ("--tokens",) if json.loads((folder / "case.json").read_text())["tokens"] else ()
    status = 3 if any("error" in row for row in want) else 0
    report = compare(want, judged(folder, status, options=options, ORDER=order))
    assert report.equal, report.text()


@pytest.mark.parametrize("name", ["small-gptj", "small-llama"])
def test_emulated_bf16_is_as_near_to_f32_as_the_cpus(name):
    """Tensor-core attention forward and backward inside a whole model: rewards, effects and attributions of both devices in bf16."""
    folder, options = STORED / name, ("--set", "model.dtype=bf16")
    exact = judged(folder, device="cpu")
    rewards = [r["reward"] for r in exact]
    mean = sum(rewards) / len(rewards)
    sd = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    worst = {}
    for device in ("cpu", "cuda:0"):
        rows = judged(folder, device=device, options=options)
        assert [r["id"] for r in rows] == [r["id"] for r in exact]
        for key in ("reward", "effect"):
            worst[device, key] = max(abs(r[key] - e[key]) for r, e in zip(rows, exact)) / sd
    for key in ("reward", "effect"):
        assert worst["cuda:0", key] < max(0.05, 3 * worst["cpu", key]), worst


def test_emulated_check_states_the_budget_and_memory_bounds_it():
    folder, budgets = STORED / "small-llama", {}
    for mib in (300, 150):
        done = run("check", folder, options=("--set", "engine.tokens_max=1048576", "--set", "engine.memory_max=64GiB"), MIB=mib)
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(t for t in done.stdout.decode().splitlines() if "were left beside the weights: a budget of" in t)
        budgets[mib] = int(line.split("a budget of ")[1].split()[0])
        assert float(line.split("on the device ")[1].split()[0]) < mib
    assert 16 <= budgets[150] < budgets[300] / 2, budgets
    assert b"emulated on a CPU" in done.stdout


def test_emulated_too_little_memory_is_refused_at_start():
    done = run("check", STORED / "small-llama", options=("--set", "model.max_tokens=48"), MIB=66)
    assert done.returncode == 71, (done.returncode, done.stderr[-2000:])
    assert b"device cuda:0" in done.stderr


def test_emulated_small_device_gives_the_same_verdicts_in_more_passes():
    folder = STORED / "small-gptj"
    assert judged(folder) == judged(folder, options=("--set", "engine.tokens_max=200"))


def profile_of(done):
    return next(json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{") and "engine_s" in line)


def test_emulated_profile_times_every_op_by_the_stream_and_counts_the_cpus_work():
    """The emulator's events are a microsecond apart: seconds are exactly the timed ops. Loading does not count, on either device."""
    folder, found = STORED / "small-llama", {}
    for device in ("cpu", "cuda:0"):
        done = run("judge", folder, device, (folder / "rollouts.jsonl").read_bytes(), ("--profile",))
        assert done.returncode == 0, done.stderr[-2000:]
        found[device] = profile_of(done)["ops"]
    for name, op in found["cuda:0"].items():
        assert op["seconds"] == pytest.approx(1e-6 * op["calls"], abs=1e-9), name
        assert op["calls"] > 0, name
    for name in ("gemm", "attention", "norm", "rope", "activation"):
        assert found["cuda:0"][name]["flops"] == found["cpu"][name]["flops"] > 0
    assert found["cpu"]["move"]["bytes"] < 64 << 20  # a load moves more


def test_emulated_gelu_stands_behind_its_product_or_in_a_pass_of_its_own():
    """GPT-J in bf16 with every epilogue, with none, and with two that do not agree: the same verdicts but for rounding; where the library has none,
    the log says so."""
    folder, rows, passes = STORED / "small-gptj", {}, {}
    options = ("--set", "model.dtype=bf16", "--set", "attribution.method=grad", "--set", "ablation.each=false", "--profile", "--log-level", "info")
    work = b"".join((folder / "rollouts.jsonl").read_bytes().splitlines(True)[:8])
    for offer in (3, 0, 2):
        done = run("judge", folder, stdin=work, options=options, EPILOGUES=offer)
        assert done.returncode == 0, done.stderr[-2000:]
        rows[offer], passes[offer] = [json.loads(line) for line in done.stdout.splitlines()], profile_of(done)["ops"]["activation"]["calls"]
        assert b"id=DEVICE" in done.stderr and (b"GELU by a pass of its own" in done.stderr) == (offer == 0), done.stderr
    assert passes[0] > 0 and passes[2] == passes[3] == 0, passes
    assert rows[2] == rows[3]  # the epilogue that does not agree is never taken
    sd = statistics.pstdev(r["reward"] for r in rows[3])
    assert max(abs(a["reward"] - b["reward"]) for a, b in zip(rows[0], rows[3])) < 0.05 * sd


def test_emulated_a_pass_without_variants_waits_once(tmp_path):
    """Rewards, sparse lists and attributions come together. Twice the passes: as many waits more as passes."""
    folder, waits = STORED / "small-llama", {}
    (tmp_path / "catalogue.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text(f"""model: {{path: {folder}/model, dtype: f32}}
saes:
- {{id: std, path: {folder}/saes/std, hook: blocks.0.hook_resid_post}}
- {{id: top, path: {folder}/saes/top, hook: blocks.1.hook_resid_post}}
catalogue: catalogue.jsonl
attribution: {{method: grad}}
""")
    rows = [{"run": "r", "step": 0, "group": f"g{i // 4}", "id": str(i), "prompt_ids": list(range(3, 11)), "completion_ids": list(range(4, 16))}
            for i in range(16)]
    for passes in (1, 4):  # a group has 56 rows
        done = run("judge", tmp_path, stdin="".join(json.dumps(r) + "\n" for r in rows[: 4 * passes]).encode(), WAITS=tmp_path / f"{passes}",
                   options=("--set", "engine.tokens_max=60"))
        assert done.returncode == 0, done.stderr[-2000:]
        waits[passes] = int((tmp_path / f"{passes}").read_text())
    assert waits[4] - waits[1] == 3, waits


def test_emulated_a_micro_batch_holds_passes_enough_to_work_beside(tmp_path):
    """Three passes of one group each are judged in one go, and as many on the CPU one by one; the verdicts are those of small micro-batches."""
    folder, found = STORED / "small-llama", {}
    (tmp_path / "config.yaml").write_text(f"model: {{path: {folder}/model, dtype: f32}}\n")
    rows = [{"run": "r", "step": 0, "group": f"g{i // 4}", "id": str(i), "prompt_ids": list(range(3, 11)), "completion_ids": list(range(4 + i, 16 + i))}
            for i in range(12)]
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    for device, tokens in (("cuda:0", 60), ("cuda:0", 1000), ("cpu", 60)):  # a group has 56 rows
        done = run("judge", tmp_path, stdin=data, device=device, options=("--set", f"engine.tokens_max={tokens}", "--profile=each"))
        assert done.returncode == 0, done.stderr[-2000:]
        goes = [line for line in done.stderr.decode().splitlines() if line.startswith('{"load_s"')]
        found[device, tokens] = len(set(json.loads(g)["engine_s"] for g in goes)), [json.loads(v)["reward"] for v in done.stdout.splitlines()]
    assert found["cuda:0", 60][0] == found["cuda:0", 1000][0] == 1 and found["cpu", 60][0] == 3, found
    assert found["cuda:0", 60][1] == found["cuda:0", 1000][1]


def test_emulated_all_variants_of_a_pass_are_waited_for_together(tmp_path):
    """Four sets to ablate take several passes of variants for each clean one. The host waits for the clean pass and for all of these: twice."""
    folder, waits, calls = STORED / "small-llama", {}, {}
    marked = [{"sae": "std", "index": i, "verdict": "spurious", "families": [f"f{i}"]} for i in range(4)]
    (tmp_path / "catalogue.jsonl").write_text("".join(json.dumps(e) + "\n" for e in marked))
    (tmp_path / "config.yaml").write_text(f"""model: {{path: {folder}/model, dtype: f32}}
saes: [{{id: std, path: {folder}/saes/std, hook: blocks.0.hook_resid_post}}]
catalogue: catalogue.jsonl
attribution: {{method: none}}
ablation: {{each: true}}
""")
    rows = [{"run": "r", "step": 0, "group": f"g{i // 4}", "id": str(i), "prompt_ids": list(range(3, 11)), "completion_ids": list(range(4, 16))}
            for i in range(16)]
    for passes in (1, 4):
        done = run("judge", tmp_path, stdin="".join(json.dumps(r) + "\n" for r in rows[: 4 * passes]).encode(), WAITS=tmp_path / f"{passes}",
                   options=("--set", "engine.tokens_max=60", "--profile"))
        assert done.returncode == 0, done.stderr[-2000:]
        waits[passes] = int((tmp_path / f"{passes}").read_text())
        calls[passes] = profile_of(done)["ops"]["sae_encode"]["calls"]
    assert calls[4] - calls[1] >= 3 * 4, calls  # a clean pass encodes once, each pass of variants once
    assert waits[4] - waits[1] == 3 * 2, waits


def test_emulated_there_is_one_device():
    done = run("check", STORED / "small-llama", device="cuda:1")
    assert done.returncode == 78 and b"cuda:1" in done.stderr, done.stderr


def test_emulated_failing_device_ends_judge(tmp_path):
    (tmp_path / "fail").touch()
    done = run("judge", STORED / "small-llama", stdin=(STORED / "small-llama" / "rollouts.jsonl").read_bytes(), FAIL=tmp_path / "fail")
    assert done.returncode == 70 and done.stdout == b"", done.stderr
    assert b"INTERNAL" in done.stderr and b"illegal" in done.stderr


def test_emulated_failing_device_ends_the_daemon_and_the_next_one_judges_what_was_accepted(tmp_path):
    """design.md 10: the jobs in hand fail, exit non-zero, the supervisor restarts, the inbox is judged again."""
    if shutil.which("protoc") is None:
        pytest.skip("needs protoc")
    import wire
    from daemon import Daemon, all_rows, short

    m = wire.load_messages(str(SOURCE))
    fail = tmp_path / "fail"
    place = tmp_path / "d"
    place.mkdir()
    d = Daemon(PROGRAM, place, m)
    env = {"SPURION_ENGINE_DEVICE": "cuda:0", "SPURION_EMULATOR_FAIL": str(fail)}
    try:
        rpc = d.start(env).connect()
        first = [short(m, "r", 0, "g", i) for i in range(4)]
        assert all(v.code == 0 for v in rpc.call("Score", m.ScoreRequest(rollouts=first)).verdicts)
        fail.touch()
        second = [short(m, "r", 1, "h", i) for i in range(4)]
        assert rpc.call("Submit", m.SubmitRequest(rollouts=second)).accepted == 4
        assert d.process.wait(60) == 70, d.tail()
        assert "ENGINE-FAILED" in d.tail() and "illegal" in d.tail()
        fail.unlink()
        rpc = d.start(env).connect()
        end = time.monotonic() + 60
        while len(all_rows(rpc, "r")) < 8:
            assert time.monotonic() < end, d.tail()
            time.sleep(0.05)
        assert sorted(r.id for r in all_rows(rpc, "r")) == sorted(r.id for r in first + second)
        assert d.stop() == 0
    finally:
        d.end()
