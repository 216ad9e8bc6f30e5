#!/usr/bin/env python3
"""Parity of the daemon with PyTorch on one whole reward model, at full size, in float32 and bfloat16.

    parity_model.py --model DIR --texts ROLLOUTS.jsonl --out OUT [--tokens 512] [--rollouts 8] [--layers 9,20] [--only f32|bf16]

Sequences of --tokens ids are cut from the texts (half prompt, half completion), two SAEs (JumpReLU and TopK, 4,096 features, seeded) are
fitted to the model's activations after two of its blocks, and a catalogue is made of features that fire in some rollouts. Compared, as
in test_parity.py and test_probe.py: every field of the verdicts, x and dR/dx at the hooks. Prints a table; exit status 1 when float32
differs by more than 1e-4 or bfloat16 by more than 1.5 times what PyTorch's own bfloat16 loses. SPURIOND and SPURION_PROBE name the
programs.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from harness import judge_reference, parse, run_judge  # noqa: E402

FIELDS = ("reward", "counterfactual_reward", "effect")


def make_case(args, layers: list[int]) -> Path:
    import make_cases
    from tokenizers import Tokenizer

    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        (out / "model").symlink_to(args.model.resolve(), target_is_directory=True)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    ids, rows = [], []
    for line in args.texts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids += tokenizer.encode(row["prompt"] + " " + row["completion"]).ids
    if len(ids) < args.rollouts * args.tokens:
        raise SystemExit(f"parity_model: expected {args.rollouts * args.tokens} tokens of text, found {len(ids)}")
    half = args.tokens // 2
    for n in range(args.rollouts):  # groups of four share their prompt
        prompt = ids[(n // 4) * half : (n // 4 + 1) * half]
        at = (args.rollouts // 4 + 1 + n) * half
        rows.append({"run": "full", "step": 0, "group": f"g{n // 4}", "id": str(n), "prompt_ids": prompt,
                     "completion_ids": ids[at : at + args.tokens - half]})
    (out / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec = {"saes": [make_cases.lens("jump", "jumprelu", f"blocks.{layers[0]}.hook_resid_post", m=4096, l0=10),
                     make_cases.lens("top", "topk", f"blocks.{layers[1]}.hook_resid_post", m=4096, k=10)],
            "rules": make_cases.RULES}
    (out / "catalogue.jsonl").write_text("")
    make_cases.write_config(out, spec)
    make_cases.write_saes(out, spec, 135)
    for sae in spec["saes"]:
        strengthen(out / "saes" / sae["id"] / "sae_weights.safetensors", args.strength)
    make_cases.write_catalogue(out, spec, random.Random(135))
    return out


def strengthen(weights: Path, factor: float) -> None:
    """Longer decoder rows: what a few features of a seeded SAE hold of a residual stream is little, and its removal hard to see."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["W_dec"] = tensors["W_dec"] * factor
    save_file(tensors, weights)


def set_dtype(folder: Path, dtype: str) -> None:
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["dtype"] = dtype
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def probe_errors(folder: Path, tool, sequences) -> dict[str, float]:
    """Normalised mean square error of x and dR/dx over all rollouts, by hook; what the daemon has against tool's."""
    from safetensors.torch import load_file

    found = {}
    for what, kind in (("hooks", "x"), ("grads", "g")):
        out = folder / f"probe-{what}.safetensors"
        command = [os.environ["SPURION_PROBE"], "--config", str(folder / "config.yaml"), "--what", what, "--out", str(out)]
        subprocess.run(command, input=(folder / "rollouts.jsonl").read_bytes(), check=True, timeout=1800)
        tensors, error, size = load_file(out), {}, {}
        for n, seq in enumerate(sequences):
            run = tool.clean(seq)
            if kind == "g":
                tool.attribute(run)
            for sae in tool.saes:
                want = (run.x if kind == "x" else run.grads)[sae.id].double()
                got = tensors[f"{n + 1}/{kind}/{sae.id}"].double()
                error[sae.id] = error.get(sae.id, 0.0) + float(((want - got) ** 2).sum())
                size[sae.id] = size.get(sae.id, 0.0) + float((want**2).sum())
        found |= {f"{'x' if kind == 'x' else 'dR/dx'} at {tool.by_id[i].site}": error[i] / size[i] for i in error}
    return found


def rms(truth: list[dict], found: list[dict], field: str, sd: float) -> float:
    return math.sqrt(sum((t[field] - f[field]) ** 2 for t, f in zip(truth, found, strict=True)) / len(truth)) / sd


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--texts", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--rollouts", type=int, default=8)
    p.add_argument("--layers", default="9,20")
    p.add_argument("--strength", type=float, default=20.0, help="factor on the seeded decoders")
    p.add_argument("--only", choices=("f32", "bf16"))
    a = p.parse_args()

    import torch
    from compare import compare
    from make_cases import sequences
    from ref.measure import Instrument

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    folder = a.out if (a.out / "saes" / "top" / "cfg.json").exists() else make_case(a, [int(n) for n in a.layers.split(",")])
    rollouts, bad = (folder / "rollouts.jsonl").read_bytes(), False
    truth = judge_reference(folder, False, "f32")
    sd = statistics.pstdev([t["reward"] for t in truth])
    active = sum(t["effect"] != 0 for t in truth)
    print(f"{len(truth)} rollouts of {truth[0]['token_count']} tokens, reward sd {sd:.4f}, {active} with an effect, largest "
          f"{max(abs(t['effect']) for t in truth):.4f}", flush=True)
    for dtype in ("f32", "bf16") if a.only is None else (a.only,):
        set_dtype(folder, dtype)
        found = parse(run_judge(folder / "config.yaml", rollouts, timeout=1800)[1])
        config, chosen = sequences(folder)
        config.attribution = {**config.attribution, "method": "grad", "completeness": False}
        errors = probe_errors(folder, Instrument(config, "f32"), chosen)
        if dtype == "f32":
            report = compare(truth, found, tol=1e-4)
            bad |= not report.equal
            print(report.text(), flush=True)
            for field in FIELDS:
                worst = max(abs(t[field] - f[field]) for t, f in zip(truth, found, strict=True))
                print(f"f32 {field}: worst error {worst:.2e} = {worst / sd:.2e} sd", flush=True)
        else:
            theirs = judge_reference(folder, False, "bf16")
            for field in FIELDS:
                ours, other = rms(truth, found, field, sd), rms(truth, theirs, field, sd)
                bad |= ours > max(2e-2, 1.5 * other)
                print(f"bf16 {field}: rms error {ours:.2e} sd, PyTorch's own bfloat16 {other:.2e} sd", flush=True)
        for name, value in errors.items():
            print(f"{dtype} {name}: normalised mean square error {value:.2e}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
