"""Part `curves`: time of a completion token against T, SAE width, number of SAEs and group size. Reward + attribution, Spurion alone."""

import statistics
import sys

import case
from judge import Judge

BATCH_TOKENS = 2048  # a short shape is repeated until a run holds this many


def point(context: dict, name: str, x: int, prompt: int, completion: int, group: int, reps: int, **options) -> dict:
    """judge: one that is loaded already; else one of its own, by the options."""
    groups = 1 if context["tiny"] else max(1, context.get("batch_tokens", BATCH_TOKENS) // (prompt + group * completion))
    rows = case.rollouts(context["shape"], prompt, completion, group, groups)
    judge = options.pop("judge", None)
    own = judge is None
    if own:
        config = case.configure(context["folder"], f"curve-{name}-{x}", context["shape"], "attr", engine=context.get("engine"), **options)
        judge = Judge(context["program"], config)
    try:
        judge.run(rows)
        tokens = groups * group * completion
        times = [judge.run(rows)[0] / tokens for _ in range(reps)]
    finally:
        if own:
            judge.close()
    print(f"  {name} {x}: {statistics.median(times) * 1e6:.1f} us a completion token", file=sys.stderr)
    return {"x": x, "prompt": prompt, "completion": completion, "group": group, "groups": groups, "us": [t * 1e6 for t in times]}


def skipped(name: str, x: int, why: str) -> dict:
    print(f"  {name} {x}: left out: {why}", file=sys.stderr)
    return {"x": x, "skipped": why}


def widths(context: dict, sizes: list[int], fixed: tuple, reps: int) -> list[dict]:
    out = []
    for width in sizes:
        need = 6 * 8 * width * context["shape"]["hidden_size"]  # both matrices in float32, made, saved, loaded, prepacked
        if case.memory_available() < need + (2 << 30):
            out.append(skipped("width", width, f"{need >> 20} MiB wanted, {case.memory_available() >> 20} MiB available"))
            continue
        saes = [(case.make_width(context["folder"], context["shape"], width), case.hook_of(context["shape"]))]
        out.append(point(context, "width", width, *fixed, reps, saes=saes))
    return out


def run(context: dict, reps: int) -> dict:
    shape, tiny = context["shape"], context["tiny"]
    fixed = (16, 16, 4) if tiny else (256, 256, 4)
    middle = case.layer_of(shape)
    lengths = [32, 64] if tiny else [256, 512, 1024, 2048, 4096, 8192]
    groups = [1, 2] if tiny else [1, 2, 4, 8, 16, 32]
    counts = [1, 2] if tiny else [1, 2, 3, 4]
    return {
        "T": [point(context, "T", t, t // 2, t // 2, 1, reps) for t in lengths],
        "width": widths(context, [1024, 4096] if tiny else [4096, 8192, 16384, 32768, 65536, 131072], fixed, reps),
        "saes": [point(context, "saes", n, *fixed, reps, saes=[("saes/mid", case.hook_of(shape, middle + i)) for i in range(n)]) for n in counts],
        "group": [point(context, "group", g, fixed[0], fixed[1], g, reps) for g in groups],
    }
