#!/usr/bin/env python3
"""The parity matrix: `matrix.py [--write docs/compatibility.md] [--rows N ...]`.

Families x heads x SAE kinds x hooks x templates x methods x containers, every pair of values at least once: a covering array of small
seeded cases. Models are written by transformers (and gguf), SAEs by sae_lens and dictionary_learning (other releases' files by hand); each
case is judged by the daemon (SPURIOND) and by the outside judge (ref/), one rollout at a time: in float32 field by field, and in
bfloat16 by its rms error against float32, beside PyTorch's own. --write renews the table between the markers. Exit status: 0 all
within tolerance, 1 not.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

TOLERANCE = 1e-4  # of the rewards' standard deviation, and of a value's own size where it has one
BF16_RMS, BF16_OWN = 2e-2, 1.5  # rms error in standard deviations, or so many times PyTorch's own in bfloat16
BF16_ROW = 2  # on a single row: the rms of ten errors scatters by a quarter, so does PyTorch's; over the rows of a value it does not
BF16_FIELDS = ("reward", "counterfactual_reward", "effect")
SAMPLE_BEGIN, SAMPLE_END = "<!-- matrix:begin -->", "<!-- matrix:end -->"

FACTORS = {
    "family": ["gpt2", "gptj", "neox-parallel", "neox-serial", "llama", "mistral", "qwen2", "qwen3", "gemma2"],
    "head": ["score", "score_outputs", "openrlhf", "trlx", "trl", "grm", "two_layer", "ultrarm", "openassistant", "beaver"],
    "sae": ["saelens standard", "saelens gated", "saelens topk", "saelens jumprelu", "saelens batchtopk", "saelens matryoshka_batchtopk",
            "dictionary_learning AutoEncoder", "dictionary_learning GatedAutoEncoder", "dictionary_learning AutoEncoderTopK",
            "dictionary_learning BatchTopKSAE", "dictionary_learning JumpReluAutoEncoder", "dictionary_learning MatryoshkaBatchTopKSAE",
            "dictionary_learning AutoEncoderNew", "sparsify topk", "sparsify groupmax", "gemma_scope jumprelu", "gemma_scope 2",
            "llama_scope 2024", "llama_scope r1-distill", "llama_scope llamascopium", "openai topk", "goodfire standard"],
    "hook": ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"],
    "template": ["none", "hh", "chatml", "llama3", "llama3.1", "gemma", "mistral", "tulu", "zephyr", "openassistant"],
    "method": ["grad", "ig", "none"],
    "container": ["safetensors", "F16", "BF16", "shards", "pickle", "gguf"],
}
NAMES = list(FACTORS)


def allowed(pair: dict) -> bool:
    """A parallel block has no point between attention and MLP; a GGUF holds one linear head, and its writers know no GPT-J."""
    if pair.get("hook") == "resid_mid" and pair.get("family") in ("gptj", "neox-parallel"):
        return False
    return pair.get("container") != "gguf" or (pair.get("head", "score") == "score" and pair.get("family") != "gptj")


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
    if row["container"] == "gguf":  # which says no window of Qwen2 and no scale of Gemma's queries but the published ones
        if row["family"] == "qwen2":
            model["use_sliding_window"] = False
        if row["family"] == "gemma2":
            model["query_pre_attn_scalar"] = model["head_dim"]
    layer = 1 + number % 2
    from cases.releases import WRITERS

    kind, arch = row["sae"].split(" ")
    hook = f"blocks.{layer}.hook_{row['hook']}"
    sae = {"id": "sae", "arch": arch, "hook": hook, "m": 120, "l0": 12 if arch == "groupmax" else 14,
           "kind": {"saelens": "lens", "dictionary_learning": "dict"}.get(kind, kind), "cfg": {"k": 14} if arch == "topk" else {}, "pickle": False}
    if row["sae"] in WRITERS:
        sae |= {"kind": "release", "arch": row["sae"]}
    heads = {"score_outputs": {"head_weights": [0.5, -0.25, 1.5]}, "beaver": {"head_index": 1},
             "trlx": {"pooling": "first_eos", "append_eos": True}}
    return {"family": family, "model": model, "head": row["head"], "saes": [sae], "template": row["template"], "rules": RULES[:2],
            "sizes": [4, 3, 3], "longest": 9, "awkward": False, "catalogued": 5, "vocab": 330, "messages": number % 3 == 0 and row["template"] not in ("none", "hh"),
            "v4": number % 2 == 0, "each": number % 4 == 0, "nfc": row["container"] == "gguf" and family == "neox",
            "container": row["container"] if row["container"] not in ("safetensors", "gguf") else None,
            "attribution": {"method": row["method"], "ig_steps": 2, "completeness": row["method"] != "none", "top": 8},
            **heads.get(row["head"], {})}


def group_errors(worst: dict) -> dict[str, float | None]:
    """The report's worst errors, gathered: in units of the rewards' sd (attributions, activations: and of their own size)."""
    groups = {"reward": ("reward",), "effect": ("effect", "counterfactual_reward", "families.effect", "flags.effect", "features.ablation_effect"),
              "attribution": ("features.attribution", "saes.attribution_sum", "saes.error_attribution", "saes.bias_attribution", "saes.residual"),
              "activation": ("features.activation_max", "features.activation_sum")}
    return {g: max((worst[n][0] for n in names if n in worst), default=None) for g, names in groups.items()}


def judge(config: Path, rollouts: bytes) -> tuple[list[dict], str]:
    """The daemon's lines, and what it said when it refused the whole."""
    done = subprocess.run([os.environ["SPURIOND"], "judge", "--config", str(config)], input=rollouts, capture_output=True, timeout=300,
                          check=False)
    if done.returncode not in (0, 3):
        return [], done.stderr.decode("utf-8", "replace")[-600:]
    return [json.loads(line) for line in done.stdout.split(b"\n") if line], ""


def configured(folder: Path, name: str, **model) -> Path:
    """config.yaml with other keys of model."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= model
    (folder / name).write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / name


def rms(truth: list[dict], found: list[dict], field: str) -> float:
    """Root mean square error of a field, in standard deviations of the true rewards."""
    pairs = [(t[field], f[field]) for t, f in zip(truth, found, strict=True) if "error" not in t]
    return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5 / statistics.pstdev(t["reward"] for t in truth if "error" not in t)


def bf16_limit(theirs: float) -> float:
    return max(BF16_RMS, BF16_OWN * theirs)


def judge_bf16(want: list[dict], folder: Path, path: str, rollouts: bytes) -> tuple[dict, list[str]]:
    """Errors of the daemon and of PyTorch in bfloat16, rms in sd: {field: (ours, theirs)}."""
    from ref.config import read_config
    from ref.judge import Judge, read_lines

    found, said = judge(configured(folder, "bf16.yaml", dtype="bf16", path=path), rollouts)
    if not found:
        return {}, [said]
    own = Judge(read_config(folder / "config.yaml"), dtype="bf16").run(read_lines(rollouts))
    errors = {f: (rms(want, found, f), rms(want, own, f)) for f in BF16_FIELDS}
    return errors, [f"bf16 {f}: expected at most {BF16_ROW} times {bf16_limit(theirs):.3g}, found {ours:.3g}"
                    for f, (ours, theirs) in errors.items() if ours > BF16_ROW * bf16_limit(theirs)]


def judge_row(row: dict, number: int, place: Path) -> tuple[dict, list[str]]:
    """(worst errors by group, what differs) of one row of the matrix."""
    from cases.containers import write_gguf
    from compare import compare
    from make_cases import make_case
    from ref.config import read_config
    from ref.judge import Judge, read_lines
    from reference import shortest

    spec = spec_of(row, number)
    folder = make_case(place, f"matrix-{number:03d}", spec)
    rollouts = (folder / "rollouts.jsonl").read_bytes()
    want = [shortest(v) for v in Judge(read_config(folder / "config.yaml"), explain=True).run(read_lines(rollouts))]
    path = "model"
    if row["container"] == "gguf":
        bos = json.loads((folder / "model/tokenizer_config.json").read_text())["bos_token"]
        path = write_gguf(folder, spec["family"], bos).name
    found, said = judge(configured(folder, "daemon.yaml", path=path), rollouts)
    if not found:
        return {}, [said]
    report = compare(want, found, TOLERANCE)
    judged = [w for w in want if "error" not in w]
    if len(judged) < 6:
        return {}, [f"expected at least 6 rollouts judged, found {len(judged)}: {want[0]}"]
    if not any(w["families"] for w in judged):
        return {}, ["expected a rollout with an active family, found none"]
    half, problems = judge_bf16(want, folder, path, rollouts)
    return {**group_errors(report.worst), "bf16": half}, report.problems + problems


def shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}e}"


def table(rows: list[dict], found: dict[int, dict]) -> str:
    """Markdown: one line for each row of the covering array. bf16: ours / PyTorch's own."""
    lines = ["| # | " + " | ".join(NAMES) + " | reward | effect | attribution | activation | bf16 reward | bf16 effect |",
             "|---" * (len(NAMES) + 7) + "|"]
    for number, row in enumerate(rows):
        errors = found[number]
        cells = [shown(errors[g], 0) for g in ("reward", "effect", "attribution", "activation")]
        cells += [" / ".join(shown(e, 0) for e in errors["bf16"][f]) for f in ("reward", "effect")]
        lines.append(f"| {number} | " + " | ".join(row[n] for n in NAMES) + " | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bf16_by_value(rows: list[dict], found: dict[int, dict]) -> dict[str, dict]:
    """{value: {field: (ours, PyTorch's)}}: rms over all rows in which a value stands."""
    out = {}
    for name, value in [(n, v) for n in NAMES for v in FACTORS[n]]:
        here = [found[i]["bf16"] for i, r in enumerate(rows) if r[name] == value]
        out[f"{name} {value}"] = {f: tuple(math.sqrt(sum(e[f][side] ** 2 for e in here) / len(here)) for side in (0, 1)) for f in BF16_FIELDS}
    return out


def by_value(rows: list[dict], found: dict[int, dict]) -> str:
    """Markdown: for every value, in how many rows it stands and the worst error there; in bf16 the rms over the rows, ours / PyTorch's."""
    lines = ["| | value | rows | reward | effect | attribution | bf16 reward | bf16 effect |", "|---|---|---|---|---|---|---|---|"]
    half = bf16_by_value(rows, found)
    for name in NAMES:
        for value in FACTORS[name]:
            here = [found[i] for i, r in enumerate(rows) if r[name] == value]
            cells = [shown(max((e[g] for e in here if e[g] is not None), default=None), 1) for g in ("reward", "effect", "attribution")]
            cells += [" / ".join(shown(e, 1) for e in half[f"{name} {value}"][f]) for f in ("reward", "effect")]
            lines.append(f"| {name} | {value} | {len(here)} | " + " | ".join(cells) + " |")
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
    for value, errors in bf16_by_value(rows, found).items() if len(found) == len(rows) else ():
        for field, (ours, theirs) in errors.items():
            if ours > bf16_limit(theirs):
                failed += 1
                print(f"{value}: bf16 {field}: expected at most {bf16_limit(theirs):.3g} sd over its rows, found {ours:.3g}")
    if args.write and not failed and len(found) == len(rows):
        renew(args.write, rows, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
