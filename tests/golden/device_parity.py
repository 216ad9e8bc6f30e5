#!/usr/bin/env python3
"""Whole models of every family on a device: the daemon against transformers on the same device, and against itself in other company.

    device_parity.py [--device cuda:0] [--work DIR] [--families gptj llama ...] [--tiny]

Models with random weights (real head dimensions; --tiny: small ones) and a TopK dictionary at half depth are made here; rollouts of many lengths, some
with common prompts. Compared with PyTorch on --device, in float32: rewards, x and dR/dx at the hook, attribution sums; in bfloat16: rewards, within
1.5 times what PyTorch itself loses. Then, in both types: verdicts are equal bit by bit alone, in their group, in smaller passes, and sent again.
Needs torch, transformers, safetensors, tokenizers. SPURIOND and SPURION_PROBE name the programs. Prints a table; 1 when anything is off.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]

import torch  # noqa: E402
from cases.weights import make_model  # noqa: E402
from cases.words import train_tokenizer  # noqa: E402
from make_cases import gemma2, gpt2, gptj, llama, neox  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from shapes import make_sae  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

VOCAB = 600
LONG = {"n_positions": 512}, {"max_position_embeddings": 512}
FULL = {  # head dimensions 256, 128, 64, 80
    "gptj": gptj(1024, 6, 4, 64, **LONG[0]), "llama": llama(1024, 6, 8, 2, 128, 2816, **LONG[1]), "gpt2": gpt2(768, 4, 12, **LONG[0]),
    "neox": neox(960, 4, 12, 3840, 0.25, **LONG[1]), "mistral": llama(1024, 4, 8, 2, 128, 2816, sliding_window=37, **LONG[1]),
    "qwen2": llama(896, 4, 14, 2, 64, 2432, **LONG[1]), "qwen3": llama(1024, 4, 8, 2, 128, 3072, **LONG[1]),
    "gemma2": gemma2(1024, 4, 4, 2, 256, 2816, **LONG[1])}
TINY = {"gptj": gptj(72, 3, 3, 16), "llama": llama(96, 3, 4, 2, 24, 136), "gpt2": gpt2(76, 3, 4), "neox": neox(96, 3, 4, 250, 0.25),
        "mistral": llama(80, 3, 4, 2, 24, 150, sliding_window=11), "qwen2": llama(96, 3, 4, 2, 24, 136), "qwen3": llama(96, 3, 4, 2, 24, 136),
        "gemma2": gemma2(96, 3, 4, 2, 24, 140)}
K = 16
REWARD_TOLERANCE, SUM_TOLERANCE, NMSE = 1e-4, 2e-3, 1e-7  # sd; sd + |sum|; of x and dR/dx


def layers_of(net) -> list:
    base = getattr(net, net.base_model_prefix)
    return list(base.h if hasattr(base, "h") else base.layers)


def make_rows(rng: random.Random, longest: int) -> list[dict]:
    rows = []
    for g, size in enumerate((1, 4, 3, 8, 2)):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(2, longest))]
        rows += [{"run": "device", "step": 0, "group": f"g{g}", "id": str(i), "prompt_ids": prompt,
                  "completion_ids": [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, longest))]} for i in range(size)]
    return rows


def make_case(folder: Path, family: str, options: dict, longest: int) -> list[dict]:
    rng = random.Random(family)
    options = {**options, "vocab_size": VOCAB}
    probes = [[rng.randrange(3, VOCAB) for _ in range(20)] for _ in range(8)]
    make_model(folder / "model", family, options, 3, 2.0, probes, torch.float32, None)
    train_tokenizer("llama3", 590, 1).save(str(folder / "model/tokenizer.json"))
    d, layers = options.get("hidden_size") or options["n_embd"], options.get("num_hidden_layers") or options["n_layer"]
    hook = f"blocks.{layers // 2 - 1}.hook_resid_post"
    make_sae(folder / "sae", {"hidden_size": d, "k": K}, 2048, hook, "cpu")
    (folder / "catalogue.jsonl").write_text("")
    for dtype in ("f32", "bf16"):
        (folder / f"{dtype}.yaml").write_text(f"model: {{path: model, dtype: {dtype}}}\nsaes: [{{id: mid, path: sae, hook: {hook}}}]\n"
                                              "attribution: {method: grad, top: 16}\ncatalogue: catalogue.jsonl\n")
    rows = make_rows(rng, longest)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


def judge(config: Path, rows: list[dict], device: str, *options: str) -> list[str]:
    """Verdict lines as they are printed."""
    done = subprocess.run([os.environ["SPURIOND"], "judge", "--config", str(config), "--set", f"engine.device={device}", *options],
                          input="".join(json.dumps(r) + "\n" for r in rows).encode(), capture_output=True, timeout=300)
    if done.returncode != 0:
        raise SystemExit(f"spuriond judge: expected status 0, found {done.returncode}: {done.stderr[-2000:].decode(errors='replace')}")
    return done.stdout.decode().splitlines()


def own_part(line: str) -> str:
    """A verdict without what names its group, and what speaks of it; numbers as printed."""
    row = json.loads(line, parse_float=str, parse_int=str)
    for field in ("group", "action", "advantage", "counterfactual_advantage", "advantage_flip", "warnings"):
        row.pop(field, None)
    return json.dumps(row, sort_keys=True)


def company(folder: Path, rows: list[dict], dtype: str, device: str) -> list[str]:
    """What differs between the full batch and other company; empty: nothing, bit by bit."""
    config, wrong = folder / f"{dtype}.yaml", []
    full = judge(config, rows, device)
    if judge(config, rows, device) != full:
        wrong.append("sent again")
    alone = judge(config, [{**r, "group": f"{r['group']} {r['id']}"} for r in rows], device)
    longest = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    small = judge(config, rows, device, "--set", f"engine.tokens_max={longest + 16}")
    backwards = judge(config, rows[::-1], device)[::-1]
    for name, other in (("alone", alone), ("in smaller passes", small), ("in another order", backwards)):
        if [own_part(line) for line in other] != [own_part(line) for line in full]:
            wrong.append(name)
    return wrong


class Torch:
    """transformers on the device, one rollout at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str):
        self.net = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype, attn_implementation="eager").to(device).eval()
        self.net.requires_grad_(False)
        self.device, self.sae = device, {k: v.to(device) for k, v in load_file(folder / "sae/sae_weights.safetensors").items()}
        self.layer = layers_of(self.net)[len(layers_of(self.net)) // 2 - 1]

    def run(self, row: dict) -> dict:
        kept = {}

        def hook(_module, _args, out):
            kept["x"] = (out[0] if isinstance(out, tuple) else out).detach().requires_grad_(True)
            return (kept["x"], *out[1:]) if isinstance(out, tuple) else kept["x"]

        handle = self.layer.register_forward_hook(hook)
        try:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]], device=self.device)
            reward = self.net(input_ids=ids, use_cache=False).logits[0, 0].float()
        finally:
            handle.remove()
        (g,) = torch.autograd.grad(reward, kept["x"])
        own = slice(len(row["prompt_ids"]), None)
        x, g = kept["x"].detach()[0, own].float(), g[0, own].float()
        top = (x.double() @ self.sae["W_enc"].double()).topk(K, dim=-1)
        f = top.values.relu()
        attribution = f * torch.einsum("tkd,td->tk", self.sae["W_dec"][top.indices].double(), g.double())
        return {"reward": float(reward.detach()), "x": x.cpu(), "g": g.cpu(), "attribution_sum": float(attribution.sum())}


def probe(folder: Path, what: str, device: str) -> dict:
    out = folder / f"probe-{what}.safetensors"
    subprocess.run([os.environ["SPURION_PROBE"], "--config", str(folder / "f32.yaml"), "--what", what, "--out", str(out)], check=True, timeout=300,
                   input=(folder / "rollouts.jsonl").read_bytes(), env={**os.environ, "SPURION_ENGINE_DEVICE": device})
    return load_file(out)


def nmse(want: list, got: list) -> float:
    error = sum(float(((w.double() - g.double()) ** 2).sum()) for w, g in zip(want, got, strict=True))
    return error / sum(float((w.double() ** 2).sum()) for w in want)


def rms(a: list[float], b: list[float]) -> float:
    return math.sqrt(statistics.fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def check(folder: Path, family: str, options: dict, longest: int, device: str) -> bool:
    rows = make_case(folder, family, options, longest)
    reference = Torch(folder, torch.float32, device)
    truth = [reference.run(r) for r in rows]
    rewards = [t["reward"] for t in truth]
    sd = statistics.pstdev(rewards)
    found = [json.loads(line) for line in judge(folder / "f32.yaml", rows, device)]
    worst = {"reward": max(abs(t["reward"] - v["reward"]) for t, v in zip(truth, found)) / sd,
             "sum": max(abs(t["attribution_sum"] - v["saes"][0]["attribution_sum"]) / (sd + abs(t["attribution_sum"])) for t, v in zip(truth, found))}
    x, g = probe(folder, "hooks", device), probe(folder, "grads", device)
    worst["x"] = nmse([t["x"] for t in truth], [x[f"{n + 1}/x/mid"] for n in range(len(rows))])
    worst["g"] = nmse([t["g"] for t in truth], [g[f"{n + 1}/g/mid"] for n in range(len(rows))])
    theirs = Torch(folder, torch.bfloat16, device)
    lost = rms(rewards, [theirs.run(r)["reward"] for r in rows]) / sd
    ours = rms(rewards, [json.loads(line)["reward"] for line in judge(folder / "bf16.yaml", rows, device)]) / sd
    wrong = {dtype: company(folder, rows, dtype, device) for dtype in ("f32", "bf16")}
    good = {"rewards": worst["reward"] <= REWARD_TOLERANCE, "sums": worst["sum"] <= SUM_TOLERANCE, "x": worst["x"] <= NMSE, "dR/dx": worst["g"] <= NMSE,
            "bf16": lost > 0 and ours <= max(2e-2, 1.5 * lost), "company f32": not wrong["f32"], "company bf16": not wrong["bf16"]}
    bad = [name for name, ok in good.items() if not ok]
    print(f"| {family} | {len(rows)} | {worst['reward']:.1e} | {worst['sum']:.1e} | {worst['x']:.1e} | {worst['g']:.1e} | {ours:.1e} | {lost:.1e} | "
          f"{'equal' if not any(wrong.values()) else wrong} | {'yes' if not bad else 'NO: ' + ', '.join(bad)} |", flush=True)
    return not bad


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default=os.environ.get("SPURION_TEST_DEVICE", "cuda:0"))
    p.add_argument("--families", nargs="+", default=list(FULL), choices=list(FULL))
    p.add_argument("--work", type=Path)
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args()
    torch.manual_seed(1)
    print(f"PyTorch {torch.__version__} on {a.device}; errors in sd of the rewards, sums in sd + |sum|, x and dR/dx as normalised mean squares")
    print("| family | rollouts | rewards | sums | x | dR/dx | bf16 rewards, rms | PyTorch's own bf16 | alone, batched, sent again | good |\n" + "|---" * 10 + "|")
    good = True
    with tempfile.TemporaryDirectory() as place:
        for family in a.families:
            folder = (a.work or Path(place)) / family
            folder.mkdir(parents=True, exist_ok=True)
            good &= check(folder, family, (TINY if a.tiny else FULL)[family], 40 if a.tiny else 160, a.device)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
