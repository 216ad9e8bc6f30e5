"""The demo's catalogue_wide.jsonl is what its script makes (deploy/demo/train/widen_catalogue.py), with PyTorch and sae_lens."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the judges (tests/judges.txt)")
pytest.importorskip("sae_lens", reason="needs the judges (tests/judges.txt)")
DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"


def test_demo_wide_catalogue_is_the_scripts(tmp_path):
    out = tmp_path / "wide.jsonl"
    env = dict(os.environ, OMP_WAIT_POLICY="passive", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, str(DEMO / "train" / "widen_catalogue.py"), "--out", str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made, kept = ([json.loads(line) for line in p.read_text().splitlines()] for p in (out, DEMO / "catalogue_wide.jsonl"))
    own = [json.loads(line) for line in (DEMO / "catalogue.jsonl").read_text().splitlines()]
    assert made[:len(own)] == own == kept[:len(own)] and len(made) == len(kept) == len(own) + 32
    names = [[(x["sae"], x["index"]) for x in lines[len(own):]] for lines in (made, kept)]
    assert names[0][:8] == names[1][:8]
    assert len(set(names[0]) & set(names[1])) >= 30  # at the end of the list two features may lie closer than rounding
    assert {x["role"] for x in kept[len(own):]} == {"debias"}
