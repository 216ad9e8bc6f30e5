"""The wheel, built as a user's pip builds it and installed into a clean environment, with the oldest and the newest protobuf that it says it
takes. Needs a package registry: skipped, visibly, where none can be reached."""
import json
import os
import subprocess
import sys
import zipfile

import demo
import pytest

PACKAGE = demo.SOURCE / "client" / "python"
CHECK = """
import importlib.metadata, json, pathlib, sys
import google.protobuf, numpy, spurion
assert "site-packages" in spurion.__file__ and spurion.__version__ == sys.argv[2]
lines = [json.loads(t) for t in open(sys.argv[3])][:6]
for r in lines: r["run"] = sys.argv[4]
with spurion.Client(sys.argv[1], rollouts=sys.argv[5], run=sys.argv[4]) as c:
    print(json.dumps([float(v.reward) for v in c.score(lines, tokens=True)]))
    c.publish([dict(r, group=r["group"] + "t") for r in lines], step_end=0)
    c.leave(60)
    assert len(c.query()) == 12
"""


def run(*command, **more):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "venv", folder / "builder")
    done = subprocess.run([str(folder / "builder" / "bin" / "pip"), "wheel", "-q", "--no-deps", "-w", str(folder), str(PACKAGE)],
                          capture_output=True, text=True, timeout=300)
    if done.returncode and ("No matching distribution" in done.stderr or "Could not find a version" in done.stderr):
        pytest.skip("no package registry can be reached (setuptools for the build)")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("spurion-*.whl"))


def test_wheel_is_pure_and_whole(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        metadata = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"spurion/py.typed", "spurion/_descriptor.py", "spurion/client.py", "spurion/trl.py"} <= set(names)
    needed = [t for t in metadata.splitlines() if t.startswith("Requires-Dist") and "extra ==" not in t]
    assert len(needed) == 2 and all("numpy" in t or "protobuf" in t for t in needed)


@pytest.mark.parametrize("pins", [("protobuf==3.20.3", "numpy==1.26.4"), ("protobuf==5.29.5",), ("protobuf",)], ids=["oldest", "middle", "newest"])
def test_wheel_works_in_a_clean_environment(d, wheel, tmp_path, pins):
    run(sys.executable, "-m", "venv", tmp_path / "clean")
    done = subprocess.run([str(tmp_path / "clean" / "bin" / "pip"), "install", "-q", "--only-binary", ":all:", str(wheel), *pins],
                          capture_output=True, text=True, timeout=300)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip(f"the package registry has no {' '.join(pins)} for this Python: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    version = (demo.SOURCE / "VERSION").read_text().strip()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = run(tmp_path / "clean" / "bin" / "python", "-c", CHECK, d.rpc, version, demo.DEMO / "rollouts.jsonl", f"wheel-{pins[0]}", d.rollouts, env=env,
              cwd=tmp_path)
    rewards = json.loads(out)
    assert len(rewards) == 6 and len(set(rewards)) == 6
    assert (tmp_path / "clean" / "bin" / "spurion-report").exists()
