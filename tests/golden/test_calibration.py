"""`spuriond check`: L0 and explained variance on a text, against transformers and sae_lens; wrong units are warned of."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("SPURION_SOURCE", Path(__file__).resolve().parents[2]))
SPURIOND = Path(os.environ.get("SPURIOND", SOURCE / "build/cpu/bin/spuriond"))
STORED = SOURCE / "tests/golden/stored/small-llama"
DEMO = SOURCE / "deploy/demo"
TEXT = "Thank you for asking! The answer is: see https://example.org/42 — I don't know more than that.\n\n" * 30

pytestmark = pytest.mark.skipif(not SPURIOND.exists(), reason=f"{SPURIOND} is not built")


def check(config, *more):
    return subprocess.run([SPURIOND, "check", "--config", config, *more], capture_output=True, text=True, timeout=300)


def figures(done):
    """{sae: (L0, explained variance or None, tokens)}"""
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^on a text  (\S+): L0 ([\d.]+), explained variance (\S+) \((\d+) tokens", done.stdout, re.M)
    return {sae: (float(l0), None if ev == "unknown" else float(ev), int(n)) for sae, l0, ev, n in rows}


def test_calibration_equals_transformers_and_sae_lens(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    sae_lens = pytest.importorskip("sae_lens")
    torch.set_num_threads(1)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    found = figures(check(STORED / "config.yaml", "--calibration", tmp_path / "text"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(STORED / "model", dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(STORED / "model/tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    windows = [ids[i:i + 255] for i in range(0, len(ids), 255)]  # BOS and 255 tokens fill the context of 256
    points = {0: [], 1: []}
    with torch.no_grad():
        for window in windows:
            hidden = model(torch.tensor([[0, *window]]), output_hidden_states=True).hidden_states
            for layer in points:
                points[layer].append(hidden[layer + 1][0, 1:])
        for name, layer in (("std", 0), ("top", 1), ("gated", 1)):
            sae = sae_lens.SAE.load_from_disk(STORED / "saes" / name)
            x = torch.cat(points[layer])
            f = sae.encode(x)
            e = (x - sae.decode(f)).double()
            x = x.double()
            explained = 1 - (e ** 2).sum(1).mean() / ((x ** 2).sum(1).mean() - (x.mean(0) ** 2).sum())
            l0, ev, tokens = found[name]
            assert tokens == len(ids) == len(x)
            assert abs(l0 - (f != 0).sum(1).double().mean().item()) <= 0.06  # printed with one place
            assert abs(ev - explained.item()) <= 6e-4 * max(1, abs(explained.item())), (name, ev, explained.item())


def test_calibration_of_trained_saes_is_good_and_wrong_units_are_warned_of(tmp_path):
    done = check(DEMO / "spurion.yaml")
    good = figures(done)
    assert set(good) == {"early", "late"} and all(0.8 < ev < 1 and 5 < l0 < 60 for l0, ev, _ in good.values())
    assert "warning" not in done.stdout and done.stderr == ""
    for part in ("saelens topk (top-k of 24), 2048 features of width 192 at blocks.1.hook_resid_post", "checksum"):
        assert part in done.stdout
    shutil.copytree(DEMO / "saes/late", tmp_path / "late")
    config = json.loads((tmp_path / "late/cfg.json").read_text())
    config["normalize_activations"] = "layer_norm"
    (tmp_path / "late/cfg.json").write_text(json.dumps(config))
    (tmp_path / "c.yaml").write_text(f"model: {{path: {DEMO}/model}}\nsaes:\n  - {{id: late, path: late}}\n")
    done = check(tmp_path / "c.yaml")
    l0, ev, _ = figures(done)["late"]
    assert ev is None or ev < 0.5
    assert "SAE late: " in done.stderr and "units" in done.stderr and "warning    late: " in done.stdout
    (tmp_path / "c.yaml").write_text(f"model: {{path: {DEMO}/model}}\nsaes:\n  - {{id: late, path: {DEMO}/saes/late, hook: blocks.4.hook_resid_post}}\n")
    assert "warning" in check(tmp_path / "c.yaml").stderr


def test_calibration_options(tmp_path):
    config = DEMO / "spurion.yaml"
    assert figures(check(config, "--no-calibration")) == {}
    done = check(config, "--calibration", tmp_path / "none")
    assert done.returncode == 78 and "expected a readable file" in done.stderr
    (tmp_path / "text").write_text("a")
    done = check(config, "--calibration", tmp_path / "text")
    assert done.returncode == 78 and "expected at least 2 tokens" in done.stderr
    (tmp_path / "text").write_bytes(b"a \xff b " * 100)
    done = check(config, "--calibration", tmp_path / "text")
    assert done.returncode == 78 and "expected UTF-8, found byte 0xff" in done.stderr
