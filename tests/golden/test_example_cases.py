"""The contract's own example cases: SPURION_SHARED/data/example_cases, each reproduced by the daemon and by the reference."""

import pytest
from compare import compare, read_verdicts
from harness import copy_case, judge_reference, need_program, need_shared, need_torch, parse, run_judge

FAMILIES = ("gptj", "llama", "refused")
LATER = ("qwen3",)


def _case(name, tmp_path):
    return copy_case(need_shared("data", "example_cases", name), tmp_path / name)


@pytest.mark.parametrize("name", FAMILIES)
def test_example_cases_daemon_reproduces(name, tmp_path):
    need_program("SPURIOND")
    need_torch()
    folder = _case(name, tmp_path)
    status, lines, _ = run_judge(folder / "config.yaml", (folder / "rollouts.jsonl").read_bytes())
    want = read_verdicts(folder / "expected.jsonl")
    report = compare(want, parse(lines))
    print(report.text())
    assert report.equal, report.text()
    assert status == (3 if any("error" in row for row in want) else 0)


@pytest.mark.parametrize("name", FAMILIES + LATER)
def test_example_cases_reference_reproduces(name, tmp_path):
    need_torch()
    folder = _case_without_convert(name, tmp_path)
    report = compare(read_verdicts(folder / "expected.jsonl"), judge_reference(folder, tokens=False), tol=2e-5)
    print(report.text())
    assert report.equal and not report.near, report.text()


def _case_without_convert(name, tmp_path):
    import shutil

    return shutil.copytree(need_shared("data", "example_cases", name), tmp_path / name)
