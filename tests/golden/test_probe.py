"""What the daemon sees at its hooks: x, dR/dx and features, against PyTorch and against the SAE libraries.

`spurion-probe --config C --what hooks|grads|features --out FILE < rollouts.jsonl` writes safetensors named `<line>/x/<sae>`,
`<line>/g/<sae>` (|C|, d) f32 and `<line>/f/<sae>/{index,value,row}`; lines count from 1; row = place within C of every entry.
"""

import functools
import subprocess

import pytest
from harness import made_case, need_program, need_torch
from make_cases import CASES

LIMIT = {"f32": 1e-8, "bf16": 1e-3}
# By how much of its norm x is moved to find entries whose support may turn. Features are encoded in float32 whatever model.dtype is.
MARGIN = 6e-6


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


def _torch_bf16(name: str) -> dict[str, float]:
    """NMSE of the gradients that PyTorch itself computes in bfloat16."""
    from ref.measure import Instrument

    tool, found = _tool(name)
    half = Instrument(tool.config, "bf16")
    error, size = dict.fromkeys(tool.by_id, 0.0), dict.fromkeys(tool.by_id, 0.0)
    for seq, run in zip(found, _wanted(name)):
        other = half.clean(seq)
        half.attribute(other)
        for sae in error:
            error[sae] += float(((run.grads[sae] - other.grads[sae]).double() ** 2).sum())
            size[sae] += float((run.grads[sae].double() ** 2).sum())
    return {sae: error[sae] / size[sae] for sae in error}


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
    errors, dtype = _nmse(name, "g", "grads"), CASES[name].get("dtype", "f32")
    print(name, {k: f"{v:.2e}" for k, v in errors.items()})
    if dtype == "bf16" and CASES[name].get("head") in ("two_layer", "grm"):
        # a ReLU whose input stands near 0 turns with rounding, and the gradient jumps: no worse than PyTorch's own bfloat16
        own = _torch_bf16(name)
        assert all(errors[sae] <= max(LIMIT[dtype], own[sae]) for sae in errors), (errors, own)
        return
    assert max(errors.values()) <= LIMIT[dtype], errors


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
    """Entries whose support turns when x moves by MARGIN of its norm (8 seeded directions): the stated margin."""
    import torch

    g = torch.Generator().manual_seed(1)
    unsure = torch.zeros_like(f, dtype=torch.bool)
    for _ in range(8):
        noise = torch.randn(x.shape, generator=g) / x.shape[1] ** 0.5
        unsure |= (reader.read(x + MARGIN * x.norm(dim=1, keepdim=True) * noise).f != 0) != (f != 0)
    return unsure


@functools.cache
def _agreement(name: str, sae_id: str) -> dict:
    """The library encodes the daemon's own x. Counts of entries, of those within the margin, of wrong ones; worst error of a value."""
    import torch

    hooks, features, tool = _probe(name, "hooks"), _probe(name, "features"), _tool(name)[0]
    reader = tool.by_id[sae_id].reader
    out = {"entries": 0, "doubtful": 0, "wrong": 0, "worst": 0.0}
    for n in range(len(_wanted(name))):
        x = hooks[f"{n + 1}/x/{sae_id}"].float()
        with torch.no_grad():
            want = reader.read(x).f
            unsure = _unsure(reader, x, want)
        got = _dense(features, f"{n + 1}/f/{sae_id}", *want.shape)
        sure = ~unsure & (want != 0)
        error = (got - want)[sure]
        out["wrong"] += int((((got != 0) != (want != 0)) & ~unsure).sum())
        out["entries"] += int(sure.sum())
        out["doubtful"] += int((unsure & (want != 0)).sum())
        out["worst"] = max(out["worst"], float((error.abs() / (1 + want[sure].abs())).max()) if error.numel() else 0.0)
    print(name, sae_id, out)
    return out


@pytest.mark.parametrize("name", list(CASES))
def test_probe_features_as_the_library_encodes(name):
    """Same support outside the margin, values to 1e-4."""
    for sae in CASES[name]["saes"]:
        found = _agreement(name, sae["id"])
        assert found["wrong"] == 0 and found["worst"] <= 1e-4, found
        assert found["entries"] > 500 and found["doubtful"] <= 0.01 * found["entries"], found


def test_probe_keeps_cases_apart():
    """The program must read the configuration it is given: two cases have other SAEs, so other names."""
    a, b = (_probe(n, "hooks") for n in ("gptj-post", "llama-gqa"))
    assert set(a) != set(b)
