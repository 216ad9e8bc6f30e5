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


def watched(name: str, l0_mean: str) -> list[dict]:
    folder = HERE / "stored" / name
    command = [daemon(), "judge", "--config", str(folder / "config.yaml"), "--set", "attribution.when=flagged", "--set", f"attribution.l0_mean={l0_mean}"]
    done = subprocess.run(command, input=(folder / "rollouts.jsonl").read_bytes(), capture_output=True, timeout=300)
    assert done.returncode in (0, 3), done.stderr[-3000:]
    return [{**json.loads(line), "provenance": None} for line in done.stdout.splitlines()]


def test_watching_first_changes_nothing_but_l0_mean(stored_case):
    try:
        whole, first = watched(stored_case, "all"), watched(stored_case, "flagged")
    except Skipped as reason:
        import pytest

        pytest.skip(str(reason))
    silent = 0
    for a, b in zip(whole, first, strict=True):
        for sae in a.get("saes", []):
            if sae["attribution_sum"] is None:
                assert sae["l0_mean"] is not None
                sae["l0_mean"] = None
                silent += 1
        assert a == b
    assert silent, "every rollout was flagged: nothing is shown"


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
