#!/usr/bin/env python3
"""The benchmark: Spurion and its peers in one run, in turns; roofline, curves, the daemon under load. Writes tables, raw numbers and pictures.

    run.py --bin build/cpu/bin --work DIR [--out docs/benchmarks] [--parts contest roofline curves load] [--workloads NAME ...]
           [--rounds 5] [--no-compile] [--tiny]

Parts: contest   six workloads against PyTorch + transformers + sae_lens (peers.py), results compared before any time is taken
       roofline  `judge --profile` by op class against oneDNN's own rate at the same shapes and copy bandwidth
       curves    time of a completion token against sequence length, SAE width, number of SAEs, group size
       load      the daemon's throughput against the engine's own, and verdict latency under Poisson arrivals
OUT/report.md holds the tables, OUT/report.json the raw numbers (parts and workloads that are not run again are kept), OUT/*.png the pictures.
Two threads for everyone. Needs an idle machine, about 10 GB of memory and 3 GB in DIR; --tiny needs neither, and measures nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import case  # noqa: E402
import contest  # noqa: E402
import curves  # noqa: E402
import load  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402

PARTS = ("contest", "roofline", "curves", "load")


def machine() -> dict:
    names = [row.split(":", 1)[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    commit = subprocess.run(["git", "-C", str(case.HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "commit": commit or "unknown",
            "when": time.strftime("%Y-%m-%d"), "when_s": int(time.time()), "python": platform.python_version(),
            **{p: importlib.metadata.version(p.replace("_", "-")) for p in ("torch", "transformers", "sae_lens")}}


def arguments() -> argparse.Namespace:
    names = [w.name for w in case.workloads(False)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path(os.environ.get("SPURION_BIN", "build/cpu/bin")), help="folder of spuriond and the bench programs")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and SAEs; kept for the next run")
    parser.add_argument("--out", type=Path, default=case.HERE.parents[1] / "docs/benchmarks", help="folder of the report")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--workloads", nargs="+", default=names, choices=names, help="of contest and roofline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="the expert does not try torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a small shape in seconds, to see that everything works")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    return args


def main() -> int:
    args = arguments()
    folder = args.work.resolve() / ("tiny" if args.tiny else "full")
    program = args.bin.resolve() / "spuriond"
    if not program.exists():
        print(f"run.py: expected {program}, found none; build it, or say --bin", file=sys.stderr)
        return 66
    shape = case.make(folder, args.tiny)
    context = {"folder": folder, "shape": shape, "program": str(program), "bin": args.bin.resolve(), "tiny": args.tiny}
    works = [w for w in case.workloads(args.tiny) if w.name in args.workloads]
    args.out.mkdir(parents=True, exist_ok=True)
    raw, data = args.out / "report.json", {"tiny": args.tiny, "shape": shape, "machines": {}, "parts": {}}
    if raw.exists() and (old := json.loads(raw.read_text())).get("tiny") == args.tiny:
        data["machines"], data["parts"] = old["machines"], old["parts"]
    few = min(3, args.rounds)
    todo = {"contest": lambda: contest.run(context, works, args.rounds, args.compile, lambda results: keep("contest", results)),
            "roofline": lambda: roofline.run(context, works, args.rounds),
            "curves": lambda: curves.run(context, few),
            "load": lambda: load.run(context, args.rounds, lambda results: keep("load", results))}

    def keep(part: str, found: dict) -> Path:
        if part == "contest":  # what was not run again stays, with its own machine
            found = {name: {**result, "machine": before} for name, result in found.items()}
            both = {**data["parts"].get(part, {}), **found}
            found = {w.name: both[w.name] for w in case.workloads(args.tiny) if w.name in both}
        data["parts"][part], data["machines"][part] = found, before
        raw.write_text(json.dumps(data, indent=1) + "\n")
        return report.write(args.out, data)

    for part in args.parts:
        begin, before = time.monotonic(), machine()
        print(f"{part}, load {before['load']:.1f}", file=sys.stderr)
        written = keep(part, todo[part]())
        print(f"{part}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(written.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
