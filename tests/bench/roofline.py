"""Part `roofline`: what --profile says of each op class, against what bench_ceilings finds this machine can do."""

import json
import subprocess
import sys

import case
from judge import Judge, mean

SQUARE = 2048  # the products of the roof


def shapes(shape: dict, work: case.Work) -> list[tuple[str, str, int, int, int, str, int]]:
    """(class, what, M, N, K, dtype, how often) of the products of one run: out (M, N) = x (M, K) w^T. Prompts are shared."""
    d, hd, ff = shape["hidden_size"], shape["head_dim"], shape["intermediate_size"]
    q, kv, layers = shape["num_attention_heads"] * hd, 2 * shape["num_key_value_heads"] * hd, shape["num_hidden_layers"]
    own = work.rollouts * work.completion
    rows = own + work.groups * work.prompt
    gated = shape.get("family", "llama") != "gptj"
    linears = [("q", q, d), ("k, v", kv, d), ("o", d, q), ("gate, up" if gated else "up", (1 + gated) * ff, d), ("down", d, ff)]
    passes = [("", rows, layers, False)] + [(", backward", own, layers - case.layer_of(shape) - 1, True)] * (work.kind == "attr")
    out = []
    for name, m, blocks, back in passes:
        for what, n, k in linears:  # the last block runs for the scored token alone, but for its keys and values
            full = blocks if what == "k, v" else blocks - 1
            out.append(("gemm", what + name, m, *((k, n) if back else (n, k)), "bf16", full))
            if full < blocks:
                out.append(("gemm", what + name + ", scored", work.rollouts, *((k, n) if back else (n, k)), "bf16", 1))
    if work.kind != "reward":
        out.append(("sae_encode", "encode", own, shape["features"], d, "f32", 1))
    return out


def ceilings(program: str, wanted: set[tuple[int, int, int, str]], seconds: float, threads: int = 2) -> dict:
    command = [program, str(threads), str(seconds)] + [f"{m},{n},{k},{t}" for m, n, k, t in sorted(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=case.environment(threads))
    found = json.loads(done.stdout)
    found["gemm"] = {(g["m"], g["n"], g["k"], g["dtype"]): g for g in found["gemm"]}
    return found


def profiled(context: dict, work: case.Work, runs: int) -> dict:
    """What one run took, by op class: the mean of `runs`; loading is not in --profile."""
    rows = case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups)
    judge = Judge(context["program"], case.configure(context["folder"], f"roofline-{work.name}", context["shape"], work.kind))
    try:
        for _ in range(runs):
            judge.run(rows)
    finally:
        judge.close()
    return mean([judge.profile], runs)


def table_of(context: dict, work: case.Work, profile: dict, limits: dict) -> list[dict]:
    """A row for each op class: share of time, rates, and the share of the machine's ceiling: the larger of compute's and bandwidth's."""
    listed = shapes(context["shape"], work)
    roof = {t: max(g["gflops"] for k, g in limits["gemm"].items() if k[3] == t) for t in ("bf16", "f32")}
    out, total = [], profile["engine_s"]
    told = sum(op["seconds"] for name, op in profile["ops"].items() if name != "move")
    for name, op in profile["ops"].items():
        # what no class took (packing, evidence, launches) is one row with the copies
        seconds = op["seconds"] if name != "move" else total - told
        row = {"class": name if name != "move" else "move, other", "seconds": seconds, "share": seconds / total, "flops": op["flops"],
               "bytes": op["bytes"], "ceiling": None, "by": ""}
        mine = [s for s in listed if s[0] == name]
        if seconds > 0 and mine:  # a product: the library's own time at these shapes, for as many FLOPs as were done
            counted = sum(2.0 * m * n * k * times for _, _, m, n, k, _, times in mine)
            best = sum(2e-9 * m * n * k * times / limits["gemm"][m, n, k, t]["gflops"] for _, _, m, n, k, t, times in mine)
            row |= {"ceiling": best * op["flops"] / counted / seconds, "by": limits.get("by", "oneDNN, same shapes"), "flops_listed": counted}
        elif seconds > 0 and name != "move":
            compute, memory = op["flops"] * 1e-9 / roof["bf16"], op["bytes"] * 1e-9 / limits["copy_gbs"]
            row |= {"ceiling": max(compute, memory) / seconds, "by": "compute" if compute > memory else "copy"}
        out.append(row)
    return out


def run(context: dict, works: list[case.Work], runs: int) -> dict:
    works = [w for w in works if w.kind in ("attr", "reward")]
    square = 256 if context["tiny"] else SQUARE
    wanted = {(m, n, k, t) for w in works for _, _, m, n, k, t, _ in shapes(context["shape"], w)}
    wanted |= {(square, square, square, t) for t in ("bf16", "f32")}
    limits = ceilings(context["bin"] / "bench_ceilings", wanted, 0.01 if context["tiny"] else 0.3)
    out = {"copy_gbs": limits["copy_gbs"], "read_gbs": limits["read_gbs"], "gemm": list(limits["gemm"].values()), "works": {}}
    for work in works:
        profile = profiled(context, work, runs)
        out["works"][work.name] = {"title": work.title(), "engine_s": profile["engine_s"], "classes": table_of(context, work, profile, limits)}
        print(f"  {work.name}: {profile['engine_s']:.4f} s in the engine", file=sys.stderr)
    return out
