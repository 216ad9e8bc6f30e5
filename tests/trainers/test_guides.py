"""The guides as a new user follows them: their code blocks, run from top to bottom, from an installed wheel; timed."""
import os
import subprocess
import sys
import time

import demo
import pytest

pytest.importorskip("trl", reason="needs TRL (tests/trainers/venvs.sh)")
import guide  # noqa: E402

from spurion import Client  # noqa: E402

FIVE_MINUTES = 300


def follow(d, name, python=sys.executable, path=None):
    code = "\n".join(guide.blocks(name, "python"))
    env = {**d.environment, "PYTHONPATH": str(path or demo.PACKAGE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), "-c", code], cwd=demo.SOURCE, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_guide_python(d):
    said = follow(d, "python")
    assert "thanks-raises" in said
    with Client(d.rpc) as c:
        assert len(c.query("try")) == 3 and len(c.query("tap")) == 1


def test_guide_trl_from_pip_install_to_the_first_alert(d, tmp_path):
    """The package is installed by pip as the guide says, into an environment that has TRL; then the guide's blocks, until an alert is there."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site"),
                           str(demo.SOURCE / "client" / "python")], capture_output=True, text=True, timeout=300)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package registry can be reached (setuptools for the build)")
    assert done.returncode == 0, done.stderr[-2000:]
    follow(d, "trl", path=tmp_path / "site")
    with Client(d.rpc) as c:
        demo.wait_for(lambda: c.stored_alerts("guide"))
        took = time.monotonic() - start
        assert len(c.query("guide-tap")) > 0 and len(c.query("guide")) > 0
    print(f"from pip install to the first alert: {took:.0f} s")
    # machines that do other work too are slower; on one that does not, the time is what the guide promises
    assert took < FIVE_MINUTES * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), took


def test_guide_slime_names_what_is_there():
    import importlib
    import re

    flags = dict(re.findall(r"(--[\w-]+) (spurion\.[\w.]+)", "\n".join(guide.blocks("slime", "sh"))))
    assert set(flags) == {"--custom-rm-path", "--rollout-sample-filter-path", "--rollout-all-samples-process-path"}
    for path in flags.values():
        module, name = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name)), path
