#!/usr/bin/env python3
"""The parity matrix: `matrix.py [--write docs/compatibility.md] [--rows N ...]`.

Families x heads x SAE kinds x hooks x templates x methods, every pair of values at least once: a covering array of small seeded
cases. Models are written by transformers, SAEs by sae_lens and dictionary_learning (sparsify's and Gemma Scope's files by hand); each
case is judged by the daemon (SPURIOND) and by the outside judge (ref/), in float32, one rollout at a time. --write renews the table
between the markers. Exit status: 0 all within tolerance, 1 not.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

TOLERANCE = 1e-4  # of the rewards' standard deviation, and of a value's own size where it has one
SAMPLE_BEGIN, SAMPLE_END = "<!-- matrix:begin -->", "<!-- matrix:end -->"

FACTORS = {
    "family": ["gpt2", "gptj", "neox-parallel", "neox-serial", "llama", "mistral", "qwen2", "qwen3", "gemma2"],
    "head": ["score", "score_outputs", "openrlhf", "trlx", "trl", "grm", "two_layer", "ultrarm", "openassistant", "beaver"],
    "sae": ["saelens standard", "saelens gated", "saelens topk", "saelens jumprelu", "saelens batchtopk", "saelens matryoshka_batchtopk",
            "dictionary_learning AutoEncoder", "dictionary_learning GatedAutoEncoder", "dictionary_learning AutoEncoderTopK",
            "dictionary_learning BatchTopKSAE", "dictionary_learning JumpReluAutoEncoder", "dictionary_learning MatryoshkaBatchTopKSAE",
            "sparsify topk", "gemma_scope jumprelu"],
    "hook": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"],
    "template": ["none", "hh", "chatml", "llama3", "llama3.1", "gemma", "mistral", "tulu", "zephyr", "openassistant"],
    "method": ["grad", "ig", "none"],
}
NAMES = list(FACTORS)


def allowed(pair: dict) -> bool:
    """A parallel block has no point between attention and MLP."""
    return not (pair.get("hook") == "resid_mid" and pair.get("family") in ("gptj", "neox-parallel"))


def pairs() -> set[tuple]:
    """Every pair of values of two factors that can stand together: ((factor, value), (factor, value))."""
    return {((a, x), (b, y)) for a, b in itertools.combinations(NAMES, 2) for x in FACTORS[a] for y in FACTORS[b] if allowed({a: x, b: y})}


def pairs_of(row: dict) -> set[tuple]:
    return set(itertools.combinations([(n, row[n]) for n in NAMES], 2))


def covering_rows() -> list[dict]:
    """Greedy: each row begins with a pair that is still open and takes, factor by factor, the value that closes most others. Seeded."""
    rng, open_pairs, rows = random.Random(4), pairs(), []
    while open_pairs:
        best, closed = None, -1
        for _ in range(12):
            row = dict(rng.choice(sorted(open_pairs)))
            for name in rng.sample(NAMES, len(NAMES)):
                if name in row:
                    continue
                values = [v for v in FACTORS[name] if allowed({**row, name: v})]
                gain = {v: sum(tuple(sorted(((name, v), item), key=lambda p: NAMES.index(p[0]))) in open_pairs for item in row.items())
                        for v in values}
                top = max(gain.values())
                row[name] = rng.choice([v for v in values if gain[v] == top])
            count = len(pairs_of(row) & open_pairs)
            if count > closed:
                best, closed = row, count
        rows.append({n: best[n] for n in NAMES})
        open_pairs -= pairs_of(best)
    return rows


def sample(rows: list[dict], count: int) -> list[int]:
    """Numbers of `count` rows in which every value of every factor stands at least once."""
    missing, chosen = {(n, v) for n in NAMES for v in FACTORS[n]}, []
    while missing or len(chosen) < count:
        left = [i for i in range(len(rows)) if i not in chosen]
        best = max(left, key=lambda i: (len(missing & set(rows[i].items())), -i))
        chosen.append(best)
        missing -= set(rows[best].items())
    return sorted(chosen)


def spec_of(row: dict, number: int) -> dict:
    """A case as make_cases.py makes them, as small as it can be."""
    from make_cases import RULES, gemma2, gpt2, gptj, llama, neox

    windows = {"sliding_window": 7}
    models = {
        "gpt2": ("gpt2", gpt2(40, 3, 4)), "gptj": ("gptj", gptj(40, 3, 5, 4)), "llama": ("llama", llama(40, 3, 4, 2, 12, 72)),
        "neox-parallel": ("neox", neox(40, 3, 4, 96, 0.4)), "neox-serial": ("neox", neox(40, 3, 4, 96, 0.4, use_parallel_residual=False)),
        "mistral": ("mistral", llama(40, 3, 4, 2, 12, 72, **windows)), "qwen3": ("qwen3", llama(40, 3, 4, 2, 12, 72)),
        "qwen2": ("qwen2", llama(40, 3, 4, 2, 12, 72, use_sliding_window=True, max_window_layers=1, **windows)),
        "gemma2": ("gemma2", gemma2(40, 3, 4, 2, 12, 72)),
    }
    family, model = models[row["family"]]
    if row["template"] == "llama3.1":  # its system block alone is a hundred tokens of these small vocabularies
        model["n_positions" if "n_positions" in model else "max_position_embeddings"] = 640
    layer = 1 + number % 2
    kind, arch = row["sae"].split(" ")
    hook = f"blocks.{layer}.hook_{row['hook']}"
    sae = {"id": "sae", "arch": arch, "hook": hook, "m": 120, "l0": 14,
           "kind": {"saelens": "lens", "dictionary_learning": "dict"}.get(kind, kind), "cfg": {"k": 14} if arch == "topk" else {}, "pickle": False}
    heads = {"score_outputs": {"head_weights": [0.5, -0.25, 1.5]}, "beaver": {"head_index": 1},
             "trlx": {"pooling": "first_eos", "append_eos": True}}
    return {"family": family, "model": model, "head": row["head"], "saes": [sae], "template": row["template"], "rules": RULES[:2],
            "sizes": [4, 3, 3], "longest": 9, "awkward": False, "catalogued": 5, "vocab": 330, "messages": number % 3 == 0 and row["template"] not in ("none", "hh"),
            "v4": number % 2 == 0, "each": number % 4 == 0,
            "attribution": {"method": row["method"], "ig_steps": 2, "completeness": row["method"] != "none", "top": 8},
            **heads.get(row["head"], {})}


def group_errors(worst: dict) -> dict[str, float | None]:
    """The report's worst errors, gathered: in units of the rewards' sd (attributions, activations: and of their own size)."""
    groups = {"reward": ("reward",), "effect": ("effect", "counterfactual_reward", "families.effect", "flags.effect", "features.ablation_effect"),
              "attribution": ("features.attribution", "saes.attribution_sum", "saes.error_attribution", "saes.bias_attribution", "saes.residual"),
              "activation": ("features.activation_max", "features.activation_sum")}
    return {g: max((worst[n][0] for n in names if n in worst), default=None) for g, names in groups.items()}


def judge_row(row: dict, number: int, place: Path) -> tuple[dict, list[str]]:
    """(worst errors by group, what differs) of one row of the matrix."""
    from compare import compare
    from make_cases import make_case
    from ref.config import read_config
    from ref.judge import Judge, read_lines
    from reference import shortest

    folder = make_case(place, f"matrix-{number:03d}", spec_of(row, number))
    rollouts = (folder / "rollouts.jsonl").read_bytes()
    want = [shortest(v) for v in Judge(read_config(folder / "config.yaml"), explain=True).run(read_lines(rollouts))]
    done = subprocess.run([os.environ["SPURIOND"], "judge", "--config", str(folder / "config.yaml")], input=rollouts, capture_output=True,
                          timeout=300, check=False)
    if done.returncode not in (0, 3):
        return {}, [done.stderr.decode("utf-8", "replace")[-600:]]
    report = compare(want, [json.loads(line) for line in done.stdout.split(b"\n") if line], TOLERANCE)
    judged = [w for w in want if "error" not in w]
    if len(judged) < 6:
        return {}, [f"expected at least 6 rollouts judged, found {len(judged)}: {want[0]}"]
    if not any(w["families"] for w in judged):
        return {}, ["expected a rollout with an active family, found none"]
    return group_errors(report.worst), report.problems


def table(rows: list[dict], found: dict[int, dict]) -> str:
    """Markdown: one line for each row of the covering array."""
    lines = ["| # | " + " | ".join(NAMES) + " | reward | effect | attribution | activation |", "|---" * (len(NAMES) + 5) + "|"]
    for number, row in enumerate(rows):
        errors = found[number]
        cells = ["–" if errors[g] is None else f"{errors[g]:.0e}" for g in ("reward", "effect", "attribution", "activation")]
        lines.append(f"| {number} | " + " | ".join(row[n] for n in NAMES) + " | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_value(rows: list[dict], found: dict[int, dict]) -> str:
    """Markdown: for every value, in how many rows it stands and the worst error there."""
    lines = ["| | value | rows | reward | effect | attribution |", "|---|---|---|---|---|---|"]
    for name in NAMES:
        for value in FACTORS[name]:
            here = [found[i] for i, r in enumerate(rows) if r[name] == value]
            worst = [max((e[g] for e in here if e[g] is not None), default=None) for g in ("reward", "effect", "attribution")]
            lines.append(f"| {name} | {value} | {len(here)} | " + " | ".join("–" if w is None else f"{w:.1e}" for w in worst) + " |")
    return "\n".join(lines)


def renew(file: Path, rows: list[dict], found: dict[int, dict]) -> None:
    text = file.read_text(encoding="utf-8")
    head, rest = text.split(SAMPLE_BEGIN)
    tail = rest.split(SAMPLE_END)[1]
    body = f"{by_value(rows, found)}\n\n{table(rows, found)}"
    file.write_text(f"{head}{SAMPLE_BEGIN}\n{body}\n{SAMPLE_END}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file whose table is renewed")
    parser.add_argument("--rows", type=int, nargs="*", help="these rows only")
    parser.add_argument("--keep", type=Path, help="file of finished rows, to go on after a stop")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    args = parser.parse_args()
    rows = covering_rows()
    if args.list:
        print("\n".join(f"{i} {json.dumps(r)}" for i, r in enumerate(rows)))
        return 0
    import torch

    torch.set_num_threads(1)
    found: dict[int, dict] = {int(k): v for k, v in json.loads(args.keep.read_text()).items()} if args.keep and args.keep.exists() else {}
    failed = 0
    for number in args.rows if args.rows is not None else range(len(rows)):
        if number in found:
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                errors, problems = judge_row(rows[number], number, Path(place))
            except Exception as error:  # a row that cannot be made must not end the run unseen
                errors, problems = {}, [repr(error)]
            if problems and args.keep:
                shutil.copytree(place, args.keep.parent / "failed", dirs_exist_ok=True)
        print(number, rows[number], errors, problems[:4], flush=True)
        failed += bool(problems)
        if not problems:
            found[number] = errors
            if args.keep:
                args.keep.write_text(json.dumps(found))
    if args.write and not failed and len(found) == len(rows):
        renew(args.write, rows, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
