"""The benchmark still works: every part on a tiny model. No figure is looked at, but the contestants' results must agree (run.py checks)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

for package in ("torch", "transformers", "sae_lens", "matplotlib"):
    pytest.importorskip(package, reason=f"the peers of the benchmark need {package}")

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
BIN = os.environ["SPURION_BIN"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def run(work, out, *more):
    return subprocess.run([sys.executable, HERE / "run.py", "--tiny", "--bin", BIN, "--work", work, "--out", out, "--rounds", "1", "--no-compile", *more],
                          capture_output=True, text=True, check=False)


def test_every_part_writes_its_tables_and_pictures(work, tmp_path):
    done = run(work, tmp_path, "--workloads", "attr_256_256_8", "ig_256_256_8", "flag_256_256_8")
    assert done.returncode == 0, done.stderr[-3000:]
    data, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert set(data["parts"]) == {"contest", "roofline", "curves", "load"}
    for part in data["parts"]:
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
        assert f"benchmarks/{part}.png" in text
    contest = data["parts"]["contest"]
    assert list(contest) == ["attr_256_256_8", "ig_256_256_8", "flag_256_256_8"]
    assert list(contest["attr_256_256_8"]["times"]) == ["spurion", "usual", "expert", "saelens", "shared", "chain"]
    assert contest["attr_256_256_8"]["agreement"]["f32"]["spurion"]["reward_sd"] < 1e-3
    assert contest["flag_256_256_8"]["active_share"] == pytest.approx(0.05) and contest["flag_256_256_8"]["flagged"] == 2
    classes = {c["class"]: c for c in data["parts"]["roofline"]["works"]["attr_256_256_8"]["classes"]}
    assert classes["gemm"]["flops"] == pytest.approx(classes["gemm"]["flops_listed"], rel=0.02)  # the shapes are the engine's
    assert classes["sae_encode"]["flops"] == classes["sae_encode"]["flops_listed"]


def test_parts_run_alone_and_keep_the_others(work, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"tiny": True, "machines": {}, "parts": {"from": "before"}}))
    done = run(work, tmp_path, "--parts", "roofline", "--workloads", "reward_256_256_8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads((tmp_path / "report.json").read_text())["parts"]) == {"from", "roofline"}


def test_workloads_run_alone_and_keep_the_others(work, tmp_path):
    for name in ("reward_256_256_8", "attr_256_256_8"):
        done = run(work, tmp_path, "--parts", "contest", "--workloads", name)
        assert done.returncode == 0, done.stderr[-3000:]
    contest = json.loads((tmp_path / "report.json").read_text())["parts"]["contest"]
    assert list(contest) == ["attr_256_256_8", "reward_256_256_8"]
    assert contest["reward_256_256_8"]["machine"]["when_s"] < contest["attr_256_256_8"]["machine"]["when_s"]
    assert "In runs of their own: reward only" in (tmp_path / "report.md").read_text()


def test_a_contestant_with_other_results_is_refused():
    import contest

    row = {"reward": 1.0, "attribution_sum": 0.5, "error_attribution": 0.1, "bias_attribution": 0.0, "features": [1, 2, 3, 4]}
    assert contest.compare({"expert": [row], "spurion": [row]}, "f32", 2.0)["spurion"]["reward_sd"] == 0
    for other in ({"reward": 1.1}, {"error_attribution": 0.2}, {"features": [5, 6, 7, 8]}):
        with pytest.raises(RuntimeError, match="another job"):
            contest.compare({"expert": [row], "spurion": [{**row, **other}]}, "f32", 2.0)
