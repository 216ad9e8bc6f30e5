#!/usr/bin/env python3
"""The contract's example cases by themselves, for machines without pytest: python3 example_cases.py FOLDER CASE...

SPURIOND names the daemon; SPURION_ENGINE_DEVICE the device. Dictionaries that are pickles are converted first, which needs PyTorch, unless
their converted twin (ae.safetensors) lies beside them. Prints the worst difference of every field; 0 all equal, 1 not.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import compare, read_verdicts  # noqa: E402


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for pickle in target.rglob("ae.pt"):
        if not pickle.with_suffix(".safetensors").exists():
            env = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "client" / "python")}
            subprocess.run([sys.executable, "-m", "spurion.convert", str(pickle)], env=env, check=True)
    return target


def check(source: Path) -> bool:
    with tempfile.TemporaryDirectory() as place:
        folder = copied(source, Path(place) / "case")
        command = [os.environ["SPURIOND"], "judge", "--config", str(folder / "config.yaml")]
        done = subprocess.run(command, input=(folder / "rollouts.jsonl").read_bytes(), capture_output=True, timeout=300)
        want = read_verdicts(folder / "expected.jsonl")
        status = 3 if any("error" in row for row in want) else 0
        if done.returncode != status:
            print(f"status: expected {status}, found {done.returncode}\n{done.stderr[-3000:].decode('utf-8', 'replace')}")
            return False
        report = compare(want, [json.loads(line) for line in done.stdout.splitlines()])
        print(report.text())
        return report.equal


def main() -> int:
    results = {}
    for name in sys.argv[2:]:
        print(f"{name} on {os.environ.get('SPURION_ENGINE_DEVICE', 'the configured device')}")
        results[name] = check(Path(sys.argv[1]) / name)
    print(", ".join(f"{name}: {'equal' if ok else 'DIFFERENT'}" for name, ok in results.items()))
    return 0 if results and all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
