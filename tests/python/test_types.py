"""The package says that it is typed (py.typed): mypy --strict agrees, and a user's wrong call is seen."""
import subprocess
import sys

import demo
import pytest

pytest.importorskip("mypy", reason="needs mypy (tests/judges.txt)")
CONFIG = demo.SOURCE / "client" / "python" / "pyproject.toml"


def mypy(folder, *words, cwd=demo.PACKAGE):
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(CONFIG), "--cache-dir", str(folder / "cache"), *words], cwd=cwd,
                          capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_types_strict(folder):
    status, said = mypy(folder, "-p", "spurion")
    assert status == 0, said


def test_types_reach_the_user(folder, tmp_path):
    """Where the package is used: right code passes, wrong code does not."""
    (tmp_path / "right.py").write_text("from spurion import Client, Rollout\n\n\ndef f(c: Client) -> float | None:\n"
                                       "    return c.score([Rollout('p', 'c')])[0].reward\n")
    (tmp_path / "wrong.py").write_text("from spurion import Client, Rollout\n\n\ndef f(c: Client) -> int:\n"
                                       "    return c.score([Rollout('p', completions='c')])[0].reward\n")
    for name, want in (("right", 0), ("wrong", 1)):
        status, said = mypy(folder, str(tmp_path / f"{name}.py"))
        assert status == want, said
    assert 'Unexpected keyword argument "completions"' in said and "Incompatible return value type" in said


def test_types_names_are_all_there():
    import spurion

    assert set(spurion.__all__) == {*spurion._HOME, "__version__"} and all(getattr(spurion, n) is not None for n in spurion.__all__)
