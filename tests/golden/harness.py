"""What the golden tests share: programs by environment, cases made once, the reference run once per case.

SPURIOND, SPURION_PROBE, SPURION_TOKENIZE name the programs under test; SPURION_SHARED the folder with the example data (default
`../shared` beside the source tree). What is missing is skipped visibly, or fails when SPURION_REQUIRE_ALL is set (CI).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def missing(what: str):
    """Skips, or fails where everything is required."""
    if os.environ.get("SPURION_REQUIRE_ALL"):
        pytest.fail(f"required here: {what}")
    pytest.skip(what, allow_module_level=True)


def need_torch() -> None:
    """The real libraries, all of them, or a visible skip."""
    for name in ("torch", "transformers", "tokenizers", "sae_lens", "dictionary_learning", "safetensors", "yaml"):
        try:
            __import__(name)
        except ImportError as error:
            missing(f"needs the Python package {name} ({error})")
    import torch

    torch.set_num_threads(int(os.environ.get("SPURION_TEST_THREADS", "1")))


def need_program(variable: str) -> str:
    path = os.environ.get(variable)
    if not path:
        missing(f"needs {variable} to name the program")
    if not os.access(path, os.X_OK):
        pytest.fail(f"{variable}: expected a program, found {path}")
    return path


def need_shared(*parts: str) -> Path:
    folder = Path(os.environ.get("SPURION_SHARED") or ROOT.parent / "shared").joinpath(*parts)
    if not folder.exists():
        missing(f"needs SPURION_SHARED ({folder} does not exist)")
    return folder


def run_judge(config: Path, rollouts: bytes, tokens: bool = False, env: dict | None = None, timeout: int = 300):
    """(exit status, output lines as bytes, standard error). Fails on any status but 0 and 3."""
    command = [need_program("SPURIOND"), "judge", "--config", str(config)] + (["--tokens"] if tokens else [])
    done = subprocess.run(command, input=rollouts, capture_output=True, timeout=timeout, check=False,
                          env={**os.environ, **(env or {})})
    error = done.stderr.decode("utf-8", "replace")
    assert done.returncode in (0, 3), f"{' '.join(command)}: status {done.returncode}\n{error[-4000:]}"
    return done.returncode, done.stdout.splitlines(), error


def copy_case(source: Path, target: Path) -> Path:
    """A writable copy in which every ae.pt has its converted twin, as a user would make it."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder in [target, *(p for p in target.rglob("*") if p.is_dir())]:
        folder.chmod(0o755)
    for pickle in target.rglob("ae.pt"):
        if not pickle.with_suffix(".safetensors").exists():
            convert(pickle)
    return target


def convert(pickle: Path) -> None:
    """`python -m spurion.convert` on one file."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "client" / "python")}
    done = subprocess.run([sys.executable, "-m", "spurion.convert", str(pickle)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"spurion.convert {pickle}: {done.stderr[-2000:]}"
    assert pickle.with_suffix(".safetensors").exists(), "spurion.convert wrote no .safetensors beside the .pt"


def made_case(name: str) -> Path:
    """A seeded case, made once and kept in SPURION_CASES (default: a folder in the build tree or /tmp)."""
    from make_cases import make_case

    kept = Path(os.environ.get("SPURION_CASES") or f"/tmp/spurion-cases-{os.getuid()}")
    stamp = kept / name / "made"
    sources = [HERE / "make_cases.py", *sorted((HERE / "cases").glob("*.py"))]
    version = "".join(f"{f.name}:{hash_of(f)}\n" for f in sources)
    if not stamp.exists() or stamp.read_text() != version:
        kept.mkdir(parents=True, exist_ok=True)
        make_case(kept, name)
        stamp.write_text(version)
    return kept / name


def hash_of(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def judge_reference(folder: Path, tokens: bool, dtype: str | None = None) -> list[dict]:
    """Verdicts of the outside judge, in this process."""
    from ref.config import read_config
    from ref.judge import Judge, read_lines
    from reference import shortest

    judge = Judge(read_config(folder / "config.yaml"), tokens=tokens, dtype=dtype, explain=True)
    return [shortest(v) for v in judge.run(read_lines((folder / "rollouts.jsonl").read_bytes()))]


def parse(lines: list[bytes]) -> list[dict]:
    return [json.loads(line) for line in lines]
