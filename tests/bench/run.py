#!/usr/bin/env python3
"""Benchmark: the daemon against PyTorch + transformers + SAELens, in one run, in turns, on the same rollouts.

    run.py --daemon build/cpu/bin/spuriond --work DIR [--dtype f32 bf16] [--rounds 5] [--groups 2] [--tiny] [--out NAME]

Job: reward + `grad` attribution of groups of 8, prompt = completion = 256 tokens, a 135M Llama shape with random weights, one
24,576-feature TopK(64) SAE at half depth; 2 threads each. Loading is not counted. Results are checked against each other before
any time is taken. Writes NAME.md and NAME.json; medians, and the spread as (slowest - fastest) / median.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "golden"))

FULL = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": 49152, "features": 24576, "k": 64, "tokens": 256, "group": 8}
TINY = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 160, "vocab_size": 600, "features": 512, "k": 16, "tokens": 24, "group": 4}
PEERS = ("usual", "expert", "shared")


def make_case(folder: Path, shape: dict, groups: int) -> None:
    """Writes model, SAE, rollouts and one configuration for each dtype; kept when the folder already fits."""
    stamp, wanted = folder / "case.json", json.dumps({**shape, "groups": groups, "version": 2})
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    import torch
    from cases.weights import Fit, make_lens, make_model
    from cases.words import train_tokenizer
    from transformers import AutoModelForSequenceClassification

    rng = random.Random(5)
    ids = lambda n: [rng.randrange(3, shape["vocab_size"]) for _ in range(n)]  # noqa: E731
    config = {k: v for k, v in shape.items() if k not in ("features", "k", "tokens", "group")}
    config |= {"max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_labels": 1,
               "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
               "tie_word_embeddings": False}
    make_model(folder / "model", "llama", config, 1, 2.0, [ids(20) for _ in range(6)], torch.float32, None)
    train_tokenizer("llama3", 590, 1).save(str(folder / "model/tokenizer.json"))
    layer = shape["num_hidden_layers"] // 2 - 1
    net = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        x = net.model(torch.tensor([ids(64) for _ in range(8)]), output_hidden_states=True).hidden_states[layer + 1]
    hook = f"blocks.{layer}.hook_resid_post"
    fit = Fit(x.reshape(-1, x.shape[-1]), shape["features"], shape["k"], 2, subtract=True)
    make_lens(folder / "saes/mid", "topk", fit, hook, {"k": shape["k"]})
    write_texts(folder, shape, groups, ids, hook)
    stamp.write_text(wanted)


def write_texts(folder: Path, shape: dict, groups: int, ids, hook: str) -> None:
    rows = []
    for g in range(groups):
        prompt = ids(shape["tokens"])
        rows += [{"run": "bench", "step": g, "group": f"g{g}", "id": f"{i}", "prompt_ids": prompt,
                  "completion_ids": ids(shape["tokens"])} for i in range(shape["group"])]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "catalogue.jsonl").write_text("")
    for dtype in ("f32", "bf16"):
        (folder / f"config-{dtype}.yaml").write_text(
            f"model: {{path: model, dtype: {dtype}}}\nsaes:\n- {{id: mid, path: saes/mid, hook: {hook}}}\n"
            "attribution: {method: grad, top: 32}\ncatalogue: catalogue.jsonl\nengine: {threads: 2}\n")


class Peer:
    """One PyTorch worker, loaded once."""

    def __init__(self, name: str, folder: Path, dtype: str):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peers.py"), "--case", str(folder), "--peer", name, "--dtype", dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"peer {self.name}: expected an answer, found the end of its output")
        return json.loads(line)

    def run(self) -> tuple[float, list[dict]]:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        found = self.answer()
        return found["seconds"], found["rows"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Daemon:
    """`spuriond judge`: engine time by its own --profile, or wall time less the wall time of an empty run."""

    name = "spurion"

    def __init__(self, program: str, folder: Path, dtype: str):
        self.command = [program, "judge", "--config", str(folder / f"config-{dtype}.yaml")]
        self.rollouts = (folder / "rollouts.jsonl").read_bytes()
        self.profile = self._call(["--profile"], b"")[2] == 0
        self.loading = 0.0 if self.profile else statistics.median(self._call([], b"")[0] for _ in range(3))

    def _call(self, more: list[str], data: bytes):
        begin = time.perf_counter()
        done = subprocess.run(self.command + more, input=data, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"})
        return time.perf_counter() - begin, done, done.returncode

    def run(self) -> tuple[float, list[dict]]:
        wall, done, status = self._call(["--profile"] if self.profile else [], self.rollouts)
        if status != 0:
            raise RuntimeError(f"spuriond: expected status 0, found {status}: {done.stderr[-2000:].decode()}")
        seconds = wall - self.loading
        if self.profile:
            reports = [line for line in done.stderr.decode().splitlines() if line.startswith("{") and "engine_s" in line]
            seconds = json.loads(reports[-1])["engine_s"]
        rows = []
        for line in done.stdout.splitlines():
            verdict = json.loads(line)
            rows.append({"reward": verdict["reward"], **{k: verdict["saes"][0][k] for k in (
                "attribution_sum", "error_attribution", "bias_attribution")},
                "features": [f["index"] for f in verdict["features"]]})
        return seconds, rows

    def close(self) -> None:
        pass


def check_same(results: dict[str, list[dict]], dtype: str) -> dict:
    """Every contestant must have done the same job. Returns the worst disagreement with `expert`, in sd of the rewards."""
    want = results["expert"]
    sd = statistics.pstdev([r["reward"] for r in want]) or 1.0
    worst = {}
    for name, rows in results.items():
        if len(rows) != len(want):
            raise RuntimeError(f"{name}: expected {len(want)} results, found {len(rows)}")
        far = max(abs(a["reward"] - b["reward"]) for a, b in zip(want, rows)) / sd
        sums = max(abs(a["attribution_sum"] - b["attribution_sum"]) / (sd + abs(a["attribution_sum"])) for a, b in zip(want, rows))
        common = min(len(set(a["features"]) & set(b["features"])) for a, b in zip(want, rows)) / len(want[0]["features"])
        worst[name] = {"reward_sd": far, "attribution_sum": sums, "top_features_shared": common}
        limit = 1e-3 if dtype == "f32" else 0.5
        if not (far <= limit and sums <= limit and common >= (0.9 if dtype == "f32" else 0.3)):
            raise RuntimeError(f"{name} does another job than expert: {worst[name]}")
    return worst


def contest(contestants: list, rounds: int, dtype: str) -> dict:
    """One unmeasured run each, then `rounds` rounds in turns."""
    first = {c.name: c.run()[1] for c in contestants}
    agreement = check_same(first, dtype)
    times = {c.name: [] for c in contestants}
    for n in range(rounds):
        order = contestants[n % len(contestants) :] + contestants[: n % len(contestants)]
        for c in order:
            times[c.name].append(c.run()[0])
            print(f"  {dtype} round {n + 1} {c.name}: {times[c.name][-1]:.3f} s", file=sys.stderr)
    return {"times": times, "agreement": agreement}


def table(results: dict, shape: dict, groups: int) -> str:
    tokens = groups * shape["group"] * 2 * shape["tokens"]
    lines = ["| dtype | contestant | median s | spread | prompt+completion tokens/s | spurion is faster by |", "|---|---|---|---|---|---|"]
    for dtype, result in results.items():
        ours = statistics.median(result["times"]["spurion"]) if "spurion" in result["times"] else None
        for name, times in result["times"].items():
            middle = statistics.median(times)
            spread = (max(times) - min(times)) / middle
            factor = "" if ours is None or name == "spurion" else f"{middle / ours:.2f}x"
            lines.append(f"| {dtype} | {name} | {middle:.3f} | {spread:.0%} | {tokens / middle:,.0f} | {factor} |")
    return "\n".join(lines) + "\n"


def machine() -> dict:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemon", default=os.environ.get("SPURIOND"), help="path of spuriond; without it only the peers run")
    parser.add_argument("--work", type=Path, required=True, help="folder for the case (about 700 MB)")
    parser.add_argument("--dtype", nargs="+", default=["f32", "bf16"], choices=("f32", "bf16"))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that everything works")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="NAME of NAME.md and NAME.json")
    args = parser.parse_args()
    shape = TINY if args.tiny else FULL
    folder = args.work / ("tiny" if args.tiny else "full")
    make_case(folder, shape, args.groups)
    results, before = {}, machine()
    for dtype in args.dtype:
        contestants = [Peer(name, folder, dtype) for name in dict.fromkeys(["expert", *args.peers])]
        if args.daemon:
            contestants.insert(0, Daemon(args.daemon, folder, dtype))
        try:
            results[dtype] = contest(contestants, args.rounds, dtype)
        finally:
            for contestant in contestants:
                contestant.close()
    text = table(results, shape, args.groups)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.md").write_text(text)
    Path(f"{args.out}.json").write_text(json.dumps({"machine": before, "shape": shape, "groups": args.groups, "results": results}, indent=1))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
