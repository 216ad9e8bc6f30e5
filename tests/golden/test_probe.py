"""What the daemon sees at its hooks: x, dR/dx and features, against PyTorch and against the SAE libraries.

`spurion-probe --config C --what hooks|grads|features --out FILE < rollouts.jsonl` writes safetensors named `<line>/x/<sae>`,
`<line>/g/<sae>` (|C|, d) f32 and `<line>/f/<sae>/{index,value,row}`; lines count from 1; row = place within C of every entry.
"""

import functools
import os
import subprocess

import pytest
from harness import made_case, need_program, need_torch
from make_cases import CASES

GRAD = [n for n, spec in CASES.items() if spec.get("attribution", {}).get("scope") != "all"]
LIMIT = {"f32": 1e-8, "bf16": 1e-3}


@functools.cache
def _probe(name: str, what: str):
    from safetensors.torch import load_file

    folder = made_case(name)
    out = folder / f"probe-{what}.safetensors"
    command = [need_program("SPURION_PROBE"), "--config", str(folder / "config.yaml"), "--what", what, "--out", str(out)]
    done = subprocess.run(command, input=(folder / "rollouts.jsonl").read_bytes(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
    return load_file(out)


@functools.cache
def _tool(name: str):
    from make_cases import sequences
    from ref.measure import Instrument

    config, found = sequences(made_case(name))
    config.attribution = {**config.attribution, "method": "grad", "completeness": False}
    return Instrument(config, "f32"), found


@functools.cache
def _wanted(name: str) -> list:
    """Clean runs with gradients; no line of the seeded cases is refused, so line n is entry n - 1."""
    tool, found = _tool(name)
    runs = []
    for seq in found:
        runs.append(tool.clean(seq))
        tool.attribute(runs[-1])
    return runs


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURION_PROBE")
    need_torch()


def _nmse(name: str, kind: str, what: str) -> dict[str, float]:
    found, tool = _probe(name, what), _tool(name)[0]
    out = {}
    for sae in tool.saes:
        error = size = 0.0
        for n, run in enumerate(_wanted(name)):
            want = (run.x if kind == "x" else run.grads)[sae.id].double()
            got = found[f"{n + 1}/{kind}/{sae.id}"].double()
            assert got.shape == want.shape, f"line {n + 1}, {sae.id}: expected {tuple(want.shape)}, found {tuple(got.shape)}"
            error += float(((want - got) ** 2).sum())
            size += float((want**2).sum())
        assert size > 0
        out[sae.id] = error / size
    return out


@pytest.mark.parametrize("name", list(CASES))
def test_probe_x_at_every_hook(name):
    errors = _nmse(name, "x", "hooks")
    print(name, {k: f"{v:.2e}" for k, v in errors.items()})
    assert max(errors.values()) <= LIMIT[CASES[name].get("dtype", "f32")], errors


@pytest.mark.parametrize("name", list(CASES))
def test_probe_gradient_at_every_hook(name):
    errors = _nmse(name, "g", "grads")
    print(name, {k: f"{v:.2e}" for k, v in errors.items()})
    assert max(errors.values()) <= LIMIT[CASES[name].get("dtype", "f32")], errors


def _dense(found: dict, prefix: str, rows: int, width: int):
    import torch

    index, value, row = (found[f"{prefix}/{part}"] for part in ("index", "value", "row"))
    if row.numel() != index.numel() and row.numel() == rows + 1:
        counts = (row[1:] - row[:-1]).long()
        row = torch.repeat_interleave(torch.arange(rows), counts)
    assert index.numel() == value.numel() == row.numel(), f"{prefix}: expected one row and value for each index"
    f = torch.zeros(rows, width)
    f[row.long(), index.long()] = value.float()
    return f


def _unsure(reader, x, f):
    """Entries whose support turns when x moves by 2e-6 of its norm (8 seeded directions): the stated margin."""
    import torch

    g = torch.Generator().manual_seed(1)
    unsure = torch.zeros_like(f, dtype=torch.bool)
    for _ in range(8):
        noise = torch.randn(x.shape, generator=g) / x.shape[1] ** 0.5
        unsure |= (reader.read(x + 2e-6 * x.norm(dim=1, keepdim=True) * noise * 3).f != 0) != (f != 0)
    return unsure


@pytest.mark.parametrize("name", list(CASES))
def test_probe_features_as_the_library_encodes(name):
    """The library encodes the daemon's own x: same support outside the margin, values to 1e-4."""
    import torch

    hooks, features, tool = _probe(name, "hooks"), _probe(name, "features"), _tool(name)[0]
    for sae in tool.saes:
        entries = doubtful = 0
        worst = 0.0
        for n in range(len(_wanted(name))):
            x = hooks[f"{n + 1}/x/{sae.id}"].float()
            with torch.no_grad():
                want = sae.reader.read(x).f
                unsure = _unsure(sae.reader, x, want)
            got = _dense(features, f"{n + 1}/f/{sae.id}", *want.shape)
            wrong = ((got != 0) != (want != 0)) & ~unsure
            assert not wrong.any(), f"{name} {sae.id} line {n + 1}: support differs at {wrong.nonzero()[:5].tolist()}"
            sure = ~unsure & (want != 0)
            entries, doubtful = entries + int(sure.sum()), doubtful + int((unsure & (want != 0)).sum())
            worst = max(worst, float(((got - want).abs()[sure] / (1 + want.abs()[sure])).max()) if sure.any() else 0.0)
        print(f"{name} {sae.id}: {entries} entries, {doubtful} within the margin, worst error {worst:.2e}")
        assert entries > 500 and doubtful <= 0.01 * entries and worst <= 1e-4


def test_probe_keeps_cases_apart():
    """SPURION_PROBE must read the configuration it is given: two cases differ."""
    a, b = (_probe(n, "hooks") for n in ("gptj-post", "llama-gqa"))
    assert set(a) != set(b) or os.environ.get("SPURION_PROBE") is None
