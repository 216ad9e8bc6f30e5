#!/usr/bin/env python3
"""Everything that is measured on a GPU, in one run: ceilings, GPT-J-6B and Llama-3-8B shapes against PyTorch on the same device, profile, curves.

    gpu.py --bin build/cuda/bin --work DIR [--out docs/benchmarks/gpu] [--device cuda:0] [--seconds 540] [--parts ceilings gptj llama cut]
           [--rounds 5] [--no-compile] [--tiny]

Parts and their share of --seconds: each is a process of its own, which leaves out what it has no time for and says so, and is ended when it overruns.
  ceilings  5 %   8192^3 bf16 product, large copy
  gptj     41 %   random weights at the real shape: reward only and reward + attribution at T = 1,024, groups of 8 with and without sharing,
                  flagging 5 %, each beside PyTorch's usual and expert ways; op classes against their floors; curves over T and group
  llama    39 %   the same
  cut      15 %   fewer blocks of the same widths: results in float32 against transformers, curves over SAE width and number of SAEs
OUT/report.md holds the tables, OUT/report.json every number (parts that are not run again are kept), OUT/*.png the pictures.
--device cpu --tiny runs every step in a minute on small shapes, and measures nothing.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import case  # noqa: E402
import contest  # noqa: E402
import curves  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import shapes  # noqa: E402
from judge import Judge, rows_of  # noqa: E402

SHARES = {"ceilings": 0.05, "gptj": 0.41, "llama": 0.39, "cut": 0.15}
GRACE = 8  # seconds between the deadline that a part knows and its end
TOKENS_MAX = 9216  # of a pass: 9 rollouts of 1,024 tokens, or 2 groups of 8 with 512 + 512
CUT_BLOCKS = 4
MARGIN = 0.05  # of the k-th largest value: by so much a watched feature is active, or is not


class Part:
    """One part under way: its context, its deadline, and what it has found so far, which is on disk after every step."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.found, self.begin = name, args, {"cut": []}, time.monotonic()
        self.deadline = self.begin + args.until - time.time()
        self.path = args.work / f"part-{name}.json"

    def context(self, folder: str, shape: dict) -> dict:
        engine = {"device": self.args.device, "tokens_max": 512 if self.args.tiny else TOKENS_MAX}
        if self.args.device != "cpu":
            engine |= {"memory_max": "64GiB", "threads": 4}
        return {"folder": self.args.work / folder, "shape": shape, "program": str(self.args.bin / "spuriond"), "tiny": self.args.tiny, "engine": engine,
                "deadline": self.deadline, "tune_seconds": 60, "margin": MARGIN, "batch_tokens": TOKENS_MAX}

    def worker(self, context: dict) -> contest.Worker:
        return contest.Worker(context["folder"], self.args.device, min(8, os.cpu_count() or 1) if self.args.device != "cpu" else 2)

    def step(self, name: str, seconds: float, run) -> None:
        """Runs a step that should take so long, unless there is no time for it. What goes wrong in it does not end the part."""
        left = self.deadline - time.monotonic()
        if left < seconds and not self.args.tiny:
            self.left_out(f"{name}: wants about {seconds:.0f} s, {max(0, left):.0f} s are left")
            return
        began = time.monotonic()
        try:
            self.found[name] = run()
        except Exception as e:  # noqa: BLE001  told, counted as a failure, and the next step still has its chance
            traceback.print_exc()
            self.found.setdefault("failed", []).append(f"{name}: {type(e).__name__}: {' '.join(str(e).split())[:400]}")
        print(f"  {self.name}: {name} took {time.monotonic() - began:.1f} s, {self.deadline - time.monotonic():.0f} s left", file=sys.stderr)
        self.save()

    def forget(self, context: dict) -> None:
        """16 GB that no later part reads."""
        if not self.args.tiny and not self.args.keep:
            shutil.rmtree(context["folder"], ignore_errors=True)

    def left_out(self, why: str) -> None:
        print(f"  {self.name}: CUT: {why}", file=sys.stderr)
        self.found["cut"].append(why)
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")


def ceilings(part: Part) -> None:
    side, copy = (256, 16 << 20) if part.args.tiny else (8192, 4 << 30)
    folder = part.args.work / "ceilings"
    folder.mkdir(exist_ok=True)
    worker = part.worker({"folder": folder})
    try:
        part.found["machine"] = worker.versions
        part.step("limits", 15, lambda: worker.ask("expert", do="ceilings", shapes=[(side, side, side, "bf16"), (side, side, side, "f32")],
                                                   copy_bytes=copy, seconds=0.05 if part.args.tiny else 2.0))
    finally:
        worker.close()


def agreement(context: dict, work: case.Work, ours: Judge, worker: contest.Worker) -> dict:
    """All contestants on the same rollouts; the differences in units of the rewards' own spread, and whether they are within the limits."""
    rows = case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups)
    results = {"spurion": rows_of(ours.run(rows)[1])}
    for peer in (p for p in work.peers if p != "chain"):
        results[peer] = worker.ask(peer, do="run", work=work.name, kind=work.kind, members=work.group)["rows"]
    sd = statistics.stdev(r["reward"] for r in results["expert"])
    found = contest.differences(results, worker.dtype, sd)
    found["rewards_sd"] = sd
    print(f"  {work.name}: {worker.dtype} against the expert: {found}", file=sys.stderr)
    return found


def open_all(context: dict, kinds: tuple, worker: contest.Worker | None) -> dict:
    """Spurion once for each kind, and the peers, all loading at the same time."""
    def one(kind):
        return Judge(context["program"], case.configure(context["folder"], f"gpu-{kind}", context["shape"], kind, engine=context["engine"]), kind)

    with ThreadPoolExecutor(len(kinds) + 1) as pool:
        loading = pool.submit(worker.ask, "expert", do="load") if worker else None
        judges = dict(zip(kinds, pool.map(one, kinds)))
        if loading:
            loading.result()
    return judges


def with_floors(context: dict, work: case.Work, result: dict, worker: contest.Worker) -> dict:
    """The op classes of the measured rounds against torch's own rates at the same shapes, on this device."""
    wanted = {(m, n, k, t) for _, _, m, n, k, t, _ in roofline.shapes(context["shape"], work)}
    side, copy, seconds = (256, 16 << 20, 0.01) if context["tiny"] else (8192, 2 << 30, 0.15)
    limits = worker.ask("expert", do="ceilings", shapes=sorted(wanted | {(side, side, side, "bf16"), (side, side, side, "f32")}), copy_bytes=copy, seconds=seconds)
    limits["gemm"] = {(g["m"], g["n"], g["k"], g["dtype"]): g for g in limits["gemm"]}
    limits["by"] = "torch.mm, same shapes"
    profile = {k: v for k, v in result["profile"].items()}
    mean = {"engine_s": profile["engine_s"] / result["runs"], "ops": {c: {k: v / result["runs"] for k, v in op.items()} for c, op in profile["ops"].items()}}
    return {"title": work.title(), "engine_s": mean["engine_s"], "wall_s": statistics.median(result["times"]["spurion"]),
            "classes": roofline.table_of(context, work, mean, limits), "gemm": list(limits["gemm"].values()), "copy_gbs": limits["copy_gbs"],
            "read_gbs": limits["read_gbs"]}


def model(part: Part) -> None:
    family, args = part.name, part.args
    context = part.context(family, shapes.shape_of(family, args.tiny))
    works = shapes.workloads(family, args.tiny)
    part.found |= {"shape": context["shape"], "works": {}, "agreement": {}, "floors": {}, "tokens_max": context["engine"]["tokens_max"]}
    part.step("made_s", 25, lambda: shapes.make(context["folder"], context["shape"], args.device))
    for work in works:
        case.write_rollouts(context["folder"], work, case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups))
    worker, judges = part.worker(context), {}
    worker.dtype = "bf16"
    try:
        part.found["machine"] = worker.versions
        part.step("loaded", 60, lambda: judges.update(open_all(context, ("reward", "attr"), worker)))
        for work in (w for w in works if w.kind != "flag" and judges):
            run_work(part, context, work, judges, worker)
        for work in (w for w in works if w.kind == "attr" and w.name in part.found["works"]):
            part.step(f"floors {work.name}", 15, lambda work=work: part.found["floors"].update(
                {work.name: with_floors(context, work, part.found["works"][work.name], worker)}))
        if judges:
            part.step("curve T", 30, lambda: curve(part, context, judges["attr"], "T"))
            part.step("curve group", 25, lambda: curve(part, context, judges["attr"], "group"))
            judges.pop("attr").close()
            for work in (w for w in works if w.kind == "flag"):
                part.step(f"work {work.name}", 60, lambda work=work: part.found["works"].update(
                    {work.name: contest.flagging(context, work, worker, min(3, args.rounds), 20 if args.tiny else 100, judges["reward"])}))
    finally:
        for j in judges.values():
            j.close()
            part.found["load_s"] = (j.profile or {}).get("load_s")
        worker.close()
        part.save()
        part.forget(context)


def run_work(part: Part, context: dict, work: case.Work, judges: dict, worker: contest.Worker) -> None:
    ours = judges["reward" if work.kind == "reward" else "attr"]
    part.step(f"agreement {work.name}", 10, lambda: part.found["agreement"].update({work.name: agreement(context, work, ours, worker)}))
    part.step(f"work {work.name}", 40, lambda: part.found["works"].update(
        {work.name: contest.contest(context, work, worker, part.args.rounds, part.args.compile and work.group == 1, ours)}))


def curve(part: Part, context: dict, judge: Judge, name: str) -> None:
    tiny, reps, points = part.args.tiny, 3, part.found.setdefault("curves", {}).setdefault(name, [])
    for x in {"T": [32, 64] if tiny else [256, 512, 1024, 2048, 4096, 8192], "group": [1, 2] if tiny else [1, 2, 4, 8, 16, 32]}[name]:
        if time.monotonic() > part.deadline - 3 and not tiny:
            points.append(curves.skipped(name, x, "the time for this part is over"))
            continue
        half = x // 2 if name == "T" else 16 if tiny else 512
        points.append(curves.point(context, name, x, half, half, x if name == "group" else 1, reps, judge=judge))


def cut(part: Part) -> None:
    """Fewer blocks: what is float32, and what only the dictionaries change."""
    args, tiny = part.args, part.args.tiny
    sizes = (512, 2048) if tiny else (16384, 32768, 131072)
    part.found |= {"blocks": CUT_BLOCKS, "agreement": {}, "curves": {}}
    for family in ("gptj", "llama"):
        context = part.context(f"cut-{family}", shapes.shape_of(family, tiny, CUT_BLOCKS))
        widths = sizes if family == "gptj" else ()
        part.step(f"made {family}", 12, lambda c=context, w=widths: shapes.make(c["folder"], c["shape"], args.device, w))
        part.step(f"agreement {family}", 15, lambda c=context, f=family: part.found["agreement"].update({f: cut_agreement(part, c, f)}))
        if family == "gptj":
            part.step("curve width", 20, lambda c=context: cut_curve(part, c, "width", sorted((*sizes, c["shape"]["features"]))))
            part.step("curve saes", 15, lambda c=context: cut_curve(part, c, "saes", [1, 2] if tiny else [1, 2, 3, 4]))
        part.forget(context)


def cut_agreement(part: Part, context: dict, family: str) -> dict:
    found, worker = {}, part.worker(context)
    works = [w for w in shapes.workloads(family, part.args.tiny) if w.kind == "attr"]
    try:
        for worker.dtype in ("f32", "bf16"):
            for work in works:
                case.write_rollouts(context["folder"], work, case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups))
                config = case.configure(context["folder"], f"cut-{worker.dtype}", context["shape"], "attr", worker.dtype, engine=context["engine"])
                ours = Judge(context["program"], config)
                try:
                    found[f"{work.name} {worker.dtype}"] = agreement(context, work, ours, worker)
                finally:
                    ours.close()
    finally:
        worker.close()
    return found


def cut_curve(part: Part, context: dict, name: str, values: list[int]) -> None:
    shape, points = context["shape"], part.found["curves"].setdefault(name, [])
    tokens = 16 if part.args.tiny else 512
    for x in values:
        if time.monotonic() > part.deadline - 8 and not part.args.tiny:
            points.append(curves.skipped(name, x, "the time for this part is over"))
        elif name == "width":
            place = "saes/mid" if x == shape["features"] else f"saes/w{x}"
            points.append(curves.point(context, name, x, tokens, tokens, 4, 3, saes=[(place, case.hook_of(shape))]))
        else:  # all at one hook, so that the model's part is the same
            points.append(curves.point(context, name, x, tokens, tokens, 4, 3, saes=[("saes/mid", case.hook_of(shape))] * x))


RUNS = {"ceilings": ceilings, "gptj": model, "llama": model, "cut": cut}


# --- parts as processes, and the report ---


def run_part(name: str, args: argparse.Namespace, seconds: float) -> tuple[dict, str]:
    """What it found, and "" or how it ended otherwise."""
    path = args.work / f"part-{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--until", str(time.time() + seconds - GRACE), *sys.argv[1:]]
    process = subprocess.Popen(command, start_new_session=True)
    ended = ""
    try:
        status = process.wait(seconds if not args.tiny else None)
        ended = "" if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"ended after {seconds:.0f} s, its time"
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it started and left
    except ProcessLookupError:
        pass
    process.wait()
    return json.loads(path.read_text()) if path.exists() else {"cut": []}, ended


def driver_of(device: str) -> str:
    if device == "cpu":
        return ""
    done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", device.removeprefix("cuda:")], capture_output=True,
                          text=True, check=False)
    return done.stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path("build/cuda/bin"), help="folder of spuriond")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and SAEs (20 GB at a time; memory is best)")
    parser.add_argument("--keep", action="store_true", help="leave them there for the next run")
    parser.add_argument("--out", type=Path, default=case.HERE.parents[1] / "docs/benchmarks/gpu", help="folder of the report")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--parts", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="the expert does not try torch.compile")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that everything works")
    parser.add_argument("--part", choices=list(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bin, args.work = args.bin.resolve(), args.work.resolve() / ("tiny" if args.tiny else "full")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> int:
    args = arguments()
    if not (args.bin / "spuriond").exists():
        print(f"gpu.py: expected {args.bin / 'spuriond'}, found none; build it, or say --bin", file=sys.stderr)
        return 66
    if args.part:
        part = Part(args.part, args)
        RUNS[args.part](part)
        part.save()
        return 1 if part.found.get("failed") else 0
    args.out.mkdir(parents=True, exist_ok=True)
    raw, data = args.out / "report.json", {"tiny": args.tiny, "device": args.device, "parts": {}}
    if raw.exists() and (old := json.loads(raw.read_text())).get("tiny") == args.tiny and old.get("device") == args.device:
        data["parts"] = old["parts"]
    commit = subprocess.run(["git", "-C", str(case.HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
    end, status = time.monotonic() + args.seconds, 0
    for at, name in enumerate(args.parts):
        left = end - time.monotonic()
        seconds = left * SHARES[name] / sum(SHARES[n] for n in args.parts[at:])
        print(f"{name}: {seconds:.0f} s of {left:.0f} s left", file=sys.stderr, flush=True)
        began = time.monotonic()
        found, ended = run_part(name, args, seconds)
        found |= {"took_s": time.monotonic() - began, "budget_s": seconds, "ended": ended, "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                  "commit": commit or "unknown", "driver": driver_of(args.device), "command": " ".join(["gpu.py", *sys.argv[1:]])}
        status |= bool(ended or found.get("failed") or report.disagreements(found))
        data["parts"][name] = found
        raw.write_text(json.dumps(data, indent=1) + "\n")
        written = report.write_device(args.out, data)
    print(written.read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
