"""The daemon against PyTorch on seeded cases: every field in float32, the rewards' error in bfloat16."""

import functools
import math
import statistics

import pytest
from compare import compare
from harness import judge_reference, made_case, need_program, need_torch, parse, run_judge
from make_cases import CASES

F32 = [name for name, spec in CASES.items() if spec.get("dtype", "f32") == "f32"]
BF16 = [name for name, spec in CASES.items() if spec.get("dtype") == "bf16"]


@functools.cache
def _wanted(name: str, dtype: str) -> list[dict]:
    return judge_reference(made_case(name), bool(CASES[name].get("tokens")), dtype)


@functools.cache
def _found(name: str) -> list[dict]:
    folder, tokens = made_case(name), bool(CASES[name].get("tokens"))
    _, lines, _ = run_judge(folder / "config.yaml", (folder / "rollouts.jsonl").read_bytes(), tokens)
    return parse(lines)


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURIOND")
    need_torch()


@pytest.mark.parametrize("name", F32)
def test_parity_f32_every_field(name):
    report = compare(_wanted(name, "f32"), _found(name), tol=1e-4)
    print(report.text())
    assert report.equal, report.text()


def _rms(truth: list[dict], found: list[dict], field: str) -> float:
    """Root mean square error of a field, in sd of the true rewards."""
    pairs = [(t[field], f[field]) for t, f in zip(truth, found) if "error" not in t]
    sd = statistics.pstdev([t["reward"] for t in truth if "error" not in t])
    assert sd > 0.1 and len(pairs) > 10
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs)) / sd


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize("field", ["reward", "counterfactual_reward", "effect"])
def test_parity_bf16_rms(name, field):
    """rms error against float32 <= 2e-2 sd, or <= 1.5 times what transformers itself loses in bfloat16."""
    truth, torch_bf16 = _wanted(name, "f32"), _wanted(name, "bf16")
    ours, theirs = _rms(truth, _found(name), field), _rms(truth, torch_bf16, field)
    print(f"{name} {field}: rms error {ours:.3g} sd, PyTorch's own bfloat16 {theirs:.3g} sd")
    assert theirs > 0, "the bfloat16 reference equals float32: it proves nothing"
    assert ours <= max(2e-2, 1.5 * theirs)


@pytest.mark.parametrize("name", BF16)
def test_parity_bf16_whole_numbers(name):
    """What does not hang on rounding is equal in bfloat16 too."""
    for want, got in zip(_wanted(name, "f32"), _found(name), strict=True):
        for field in ("run", "step", "group", "id", "scored_position", "token_count", "truncated"):
            assert want[field] == got[field]
        differs = {"trainer_reward_differs"}
        assert set(want["warnings"]) - differs == set(got["warnings"]) - differs


def test_parity_covers_the_contract():
    """The seeded cases hold what the example cases lack; a case that lost its point would pass unseen."""
    seen, flips, shapes = set(), 0, set()
    for name in F32:
        for row in _wanted(name, "f32"):
            seen |= set(row["warnings"])
            seen |= {"truncated"} if row["truncated"] else set()
            flips += bool(row["advantage_flip"])
            shapes.add(row["advantage"] is None)
    assert {"boundary", "bos_once", "pad_scored", "group_split", "trainer_reward_differs", "truncated"} <= seen
    assert flips > 5 and shapes == {True, False}
