"""What is run on a machine with a GPU, rehearsed on the CPU, so that a slip does not cost the run there: a pack of this build in a clean place, and from it
tests/gpu.sh and tests/bench/gpu.sh, every step of them that needs no GPU. No figure is looked at; results must agree with transformers.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(os.environ.get("SPURION_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
BUILD = os.environ["SPURION_BUILD"]
SHARED = pathlib.Path(os.environ.get("SPURION_SHARED", SOURCE / "../shared"))
SYSTEM = ("/lib/", "/lib64/", "/usr/lib/")
GLIBC = ("libc.so", "libm.so", "libdl.so", "librt.so", "libpthread.so", "libresolv.so", "ld-linux")


def run(*command, **more):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=SOURCE, **more)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Packed, then moved: nothing may depend on where it was made."""
    made = tmp_path_factory.mktemp("made") / "pack"
    data = ["--data", SHARED] if (SHARED / "data/example_cases").is_dir() else []
    done = run("deploy/pack.sh", "--build", BUILD, *data, made)
    assert done.returncode == 0, done.stderr
    return pathlib.Path(shutil.move(made, tmp_path_factory.mktemp("elsewhere") / "brought"))


def need_torch():
    for package in ("torch", "transformers", "tokenizers", "safetensors", "matplotlib"):
        pytest.importorskip(package, reason=f"the GPU's scripts compare with PyTorch: they need {package}")


def environment():
    return {**os.environ, "SPURION_PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}


def test_a_pack_holds_its_libraries_and_runs_with_an_empty_environment(pack):
    for program in sorted((pack / "bin").iterdir()):
        listed = run("ldd", program).stdout
        assert "not found" not in listed, listed
        for line in listed.splitlines():
            path = line.split("=>")[1].split()[0] if "=>" in line else line.split()[0]
            if path.startswith(SYSTEM):
                assert path.rsplit("/", 1)[1].startswith(GLIBC), f"{program.name} takes {path} from this machine"
    case = SOURCE / "tests/golden/stored/small-llama"
    done = subprocess.run([pack / "bin/spuriond", "judge", "--config", case / "config.yaml"], input=(case / "rollouts.jsonl").read_bytes(), env={},
                          capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 34, done.stderr


def test_a_pack_is_refused_where_something_is_missing(tmp_path):
    (tmp_path / "build/bin").mkdir(parents=True)
    done = run("deploy/pack.sh", "--build", tmp_path / "build", tmp_path / "out")
    assert done.returncode == 65 and "expected" in done.stderr and "spuriond" in done.stderr
    assert run("deploy/pack.sh").returncode == 64
    assert run("tests/gpu.sh", "--pack", tmp_path / "nothing", "--rehearse", tmp_path / "log").returncode == 66
    assert run("tests/bench/gpu.sh", "--tiny", "--pack", tmp_path / "nothing", tmp_path / "bench").returncode == 66
    assert run("tests/bench/gpu.sh", "--tinny").returncode == 64


def test_the_test_script_runs_every_step_and_passes(pack, tmp_path):
    need_torch()
    if not (pack / "shared").is_dir():
        pytest.skip("needs the example cases of the shared data")
    done = run("tests/gpu.sh", "--pack", pack, "--rehearse", tmp_path / "log.txt", env=environment())
    text = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, text[-4000:]
    assert "FAILED" not in text and "REHEARSAL" in text.splitlines()[0] and "0 failures; a REHEARSAL" in text
    for step in ("against doubles", "stored cases", "every family", "compute-sanitizer"):
        assert step in text
    assert text.count("| yes |") == 8 and "gptj: equal, llama: equal, refused: equal, qwen3: equal" in text


def test_the_test_script_fails_on_a_skip_and_on_a_failure(pack, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pack / "bin", broken / "bin", copy_function=os.link)
    (broken / "lib").symlink_to(pack / "lib")
    for name, text in (("rows", "echo 1 test skipped"), ("norm", "exit 3"), *((n, "true") for n in ("table", "rope", "activation", "matrix", "attention", "sae"))):
        (broken / "bin" / f"test_{name}").unlink()
        (broken / "bin" / f"test_{name}").write_text(f"#!/bin/sh\n{text}\n")
        (broken / "bin" / f"test_{name}").chmod(0o755)
    done = run("tests/gpu.sh", "--pack", broken, "--rehearse", tmp_path / "log.txt", env={**environment(), "SPURION_PYTHON": "true", "SPURION_SHARED": "none"})
    text = (tmp_path / "log.txt").read_text()
    assert done.returncode == 1
    assert "FAILED: something was skipped" in text and "FAILED: status 3" in text and "2 failures" in text


def test_the_benchmark_writes_every_table_and_picture(pack, tmp_path):
    need_torch()
    done = run("tests/bench/gpu.sh", "--tiny", "--pack", pack, "--work", tmp_path / "work", tmp_path / "out", "--", "--parts", "ceilings", "gptj", "cut",
               "--rounds", "2", "--no-compile", env=environment())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    data, text = json.loads((tmp_path / "out/report.json").read_text()), (tmp_path / "out/report.md").read_text()
    part = data["parts"]["gptj"]
    assert set(data["parts"]) == {"ceilings", "gptj", "cut"} and all(p["cut"] == [] and not p["ended"] for p in data["parts"].values())
    assert list(part["works"]) == ["reward_T1024", "attr_T1024", "attr_512_512_8", "flag_T1024"]
    assert list(part["works"]["attr_512_512_8"]["times"]) == ["spurion", "apart", "usual", "expert", "shared", "chain"]
    assert all(len(t) == 2 for t in part["works"]["attr_T1024"]["times"].values())
    assert part["works"]["flag_T1024"]["flagged"] > 0
    classes = {c["class"]: c for c in part["floors"]["attr_512_512_8"]["classes"]}
    assert classes["gemm"]["flops"] == pytest.approx(classes["gemm"]["flops_listed"], rel=0.05)  # the floors' shapes are the engine's
    assert {name for p in data["parts"].values() for name in p.get("curves", {})} == {"T", "group", "width", "saes"}
    agreement = data["parts"]["cut"]["agreement"]
    assert set(agreement) == {"gptj", "llama"}
    assert all(found[f"{work} f32"]["spurion"]["reward_sd"] < 1e-3 for found in agreement.values() for work in ("attr_T1024", "attr_512_512_8"))
    for name in ("contest", "roofline", "curves"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5000 and f"{name}.png" in text
    assert sum(1 for _ in (tmp_path / "out").iterdir()) <= 8


def test_a_part_that_overruns_is_ended_and_says_so(tmp_path):
    need_torch()
    done = run(sys.executable, "tests/bench/gpu.py", "--bin", f"{BUILD}/bin", "--work", tmp_path / "work", "--out", tmp_path / "out", "--device", "cpu",
               "--seconds", "2", "--parts", "ceilings", env=environment())
    assert done.returncode == 1, done.stderr[-2000:]
    assert "ended after 2 s" in (tmp_path / "out/report.md").read_text()


def test_the_scripts_are_clean_for_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = run("shellcheck", "-x", "tests/gpu.sh", "tests/gpu_setup.sh", "tests/bench/gpu.sh", "deploy/pack.sh")
    assert done.returncode == 0, done.stdout
