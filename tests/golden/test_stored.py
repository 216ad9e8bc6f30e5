#!/usr/bin/env python3
"""Stored golden cases (tests/golden/stored), for machines without PyTorch and without the shared data.

Standard library only: runs under pytest, or by itself (`python3 test_stored.py`: 0 passed, 1 failed, 77 skipped).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import compare, read_verdicts  # noqa: E402

CASES = sorted(p.name for p in (HERE / "stored").iterdir() if (p / "config.yaml").exists())


class Skipped(Exception):
    """The program under test is not there."""


def daemon() -> str:
    path = os.environ.get("SPURIOND")
    if not path:
        raise Skipped("needs SPURIOND to name the program")
    return path


def check(name: str) -> str:
    """Judges one stored case and compares; returns the report's text. Raises AssertionError when it differs."""
    folder = HERE / "stored" / name
    case = json.loads((folder / "case.json").read_text())
    command = [daemon(), "judge", "--config", str(folder / "config.yaml")] + (["--tokens"] if case["tokens"] else [])
    done = subprocess.run(command, input=(folder / "rollouts.jsonl").read_bytes(), capture_output=True, timeout=300)
    want = read_verdicts(folder / "expected.jsonl")
    status = 3 if any("error" in row for row in want) else 0
    assert done.returncode == status, f"status: expected {status}, found {done.returncode}\n{done.stderr[-3000:]!r}"
    report = compare(want, [json.loads(line) for line in done.stdout.splitlines()])
    assert report.equal, report.text()
    return report.text()


def pytest_generate_tests(metafunc):
    if "stored_case" in metafunc.fixturenames:
        metafunc.parametrize("stored_case", CASES)


def test_stored_case_is_reproduced(stored_case):
    try:
        print(check(stored_case))
    except Skipped as reason:
        import pytest

        if os.environ.get("SPURION_REQUIRE_ALL"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))


def test_stored_cases_are_there():
    assert len(CASES) >= 3


def main() -> int:
    failed = 0
    for name in CASES:
        try:
            print(f"{name}\n{check(name)}")
        except Skipped as reason:
            print(f"SKIPPED: {reason}")
            return 77
        except AssertionError as error:
            print(f"{name} FAILED\n{error}")
            failed += 1
    return 1 if failed or not CASES else 0


if __name__ == "__main__":
    sys.exit(main())
