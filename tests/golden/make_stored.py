#!/usr/bin/env python3
"""Writes tests/golden/stored anew: `make_stored.py [--shared ../../../shared]`.

The small seeded cases with verdicts from reference.py, and the `refused` example case with its own expected verdicts.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

SMALL = ("small-gptj", "small-llama")


def write_expected(folder: Path) -> None:
    from ref.config import read_config
    from ref.judge import Judge, read_lines
    from reference import shortest

    tokens = json.loads((folder / "case.json").read_text())["tokens"]
    judge = Judge(read_config(folder / "config.yaml"), tokens=tokens, explain=True)
    verdicts = judge.run(read_lines((folder / "rollouts.jsonl").read_bytes()))
    text = "".join(json.dumps(shortest(v), ensure_ascii=False) + "\n" for v in verdicts)
    (folder / "expected.jsonl").write_text(text)


def copy_example(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (target / "case.json").write_text(json.dumps({"tokens": False}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=HERE.parents[2].parent / "shared", help="folder of the example data")
    args = parser.parse_args()
    from make_cases import make_case

    for name in SMALL:
        write_expected(make_case(HERE / "stored", name))
    copy_example(args.shared / "data" / "example_cases" / "refused", HERE / "stored" / "refused")
    size = sum(f.stat().st_size for f in (HERE / "stored").rglob("*") if f.is_file())
    print(f"stored: {size / 1e6:.2f} MB", file=sys.stderr)
    return 0 if size < 5_000_000 else 1


if __name__ == "__main__":
    sys.exit(main())
