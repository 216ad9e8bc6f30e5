"""One seeded reward model in every container and dtype a checkpoint comes in: the daemon gives the rewards of the values that stand there."""

import json
import os
import subprocess
import sys

import pytest
from harness import ROOT, need_program, need_torch, parse, run_judge

DTYPES = ("float32", "float64", "float16", "bfloat16")
IDS = [[1, 5, 9, 200], [7] * 30, list(range(3, 60))]


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURIOND")
    need_torch()


def _model():
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(8)
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                         vocab_size=260, max_position_embeddings=128, num_labels=1, pad_token_id=None)
    net = LlamaForSequenceClassification(config).double().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * (1.0 if name.startswith(("score", "model.embed")) else 0.15) + (p.dim() < 2))
    return net


def _write(folder, net) -> None:
    """config.json and a tokenizer; the weights are the test's."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    net.config.architectures = ["LlamaForSequenceClassification"]
    net.config.save_pretrained(folder)
    Tokenizer(models.BPE(vocab={chr(0x4E00 + n): n for n in range(260)}, merges=[])).save(str(folder / "tokenizer.json"))
    (folder.parent / "config.yaml").write_text(f"model: {{path: {folder.name}, dtype: f32}}\nsaes: []\nattribution: {{method: none}}\n")


def _rewards(folder) -> list[float]:
    rows = [{"run": "r", "step": 0, "group": str(n), "id": "0", "prompt_ids": ids[:2], "completion_ids": ids[2:]} for n, ids in enumerate(IDS)]
    status, lines, error = run_judge(folder.parent / "config.yaml", "".join(json.dumps(r) + "\n" for r in rows).encode())
    assert status == 0, (lines, error)
    return [v["reward"] for v in parse(lines)]


def _wanted(tensors: dict) -> list[float]:
    """transformers' rewards in float64 of the values that stand in the file."""
    import torch

    net = _model()
    net.load_state_dict({k: v.double() for k, v in tensors.items()})
    with torch.no_grad():
        return [float(net(torch.tensor([ids])).logits[0, 0]) for ids in IDS]


def _same(folder, tensors: dict) -> None:
    for got, want in zip(_rewards(folder), _wanted(tensors), strict=True):
        assert abs(got - want) <= 2e-5 * (1 + abs(want))


def _cast(net, dtype: str) -> dict:
    import torch

    return {k: v.to(getattr(torch, dtype)).contiguous() for k, v in net.state_dict().items()}


def _shards(tensors: dict) -> list[dict]:
    names = list(tensors)
    return [{n: tensors[n] for n in names[k::3]} for k in range(3)]


def _index(folder, stem: str, suffix: str, shards: list[dict]) -> None:
    files = {name: f"{stem}-{k + 1:05}-of-00003.{suffix}" for k, shard in enumerate(shards) for name in shard}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def _convert(path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "client" / "python")}
    return subprocess.run([sys.executable, "-m", "spurion.convert", str(path)], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("container", ["single", "sharded", "pickled", "pickled-shards"])
def test_container_and_dtype(tmp_path, container, dtype):
    import torch
    from safetensors.torch import save_file

    net, folder = _model(), tmp_path / "model"
    _write(folder, net)
    tensors = _cast(net, dtype)
    if container == "single":
        save_file(tensors, folder / "model.safetensors")
    elif container == "sharded":
        shards = _shards(tensors)
        for k, shard in enumerate(shards):
            save_file(shard, folder / f"model-{k + 1:05}-of-00003.safetensors")
        _index(folder, "model", "safetensors", shards)
    elif container == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        assert _convert(folder).returncode == 0
    else:
        shards = _shards(tensors)
        for k, shard in enumerate(shards):
            torch.save(shard, folder / f"pytorch_model-{k + 1:05}-of-00003.bin")
        _index(folder, "pytorch_model", "bin", shards)
        done = _convert(folder)
        assert done.returncode == 0, done.stderr
    _same(folder, tensors)


def test_container_of_mixed_dtypes_and_strides(tmp_path):
    """Every tensor in a dtype of its own, pickled with transposed strides and a shared storage."""
    import torch

    net, folder = _model(), tmp_path / "model"
    _write(folder, net)
    tensors = {k: v.to(getattr(torch, DTYPES[n % 4])) for n, (k, v) in enumerate(net.state_dict().items())}
    tensors = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in tensors.items()}
    both = torch.cat([tensors["model.norm.weight"].float(), torch.zeros(3)])
    tensors["model.norm.weight"] = both[:64]
    torch.save({**tensors, "model.rotary_emb.inv_freq": torch.zeros(8)}, folder / "pytorch_model.bin")
    assert _convert(folder / "pytorch_model.bin").returncode == 0
    _same(folder, tensors)


@pytest.mark.parametrize("dtype, name", [("int64", "I64"), ("int8", "I8"), ("uint8", "U8"), ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2"),
                                         ("bool", "BOOL"), ("int32", "I32")])
def test_container_dtype_of_no_weight_is_refused_by_name(tmp_path, dtype, name):
    from safetensors.torch import save_file

    net, folder = _model(), tmp_path / "model"
    _write(folder, net)
    tensors = {**_cast(net, "float32"), "model.layers.1.mlp.up_proj.weight": _cast(net, dtype)["model.layers.1.mlp.up_proj.weight"]}
    save_file(tensors, folder / "model.safetensors")
    done = subprocess.run([need_program("SPURIOND"), "check", "--config", str(tmp_path / "config.yaml")], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "model.layers.1.mlp.up_proj.weight" in said and "F32, F16, BF16 or F64" in said and f"found {name}" in said, said


def test_container_of_pickles_names_the_converter(tmp_path):
    import torch

    net, folder = _model(), tmp_path / "model"
    _write(folder, net)
    torch.save(_cast(net, "float32"), folder / "pytorch_model.bin")
    done = subprocess.run([need_program("SPURIOND"), "check", "--config", str(tmp_path / "config.yaml")], capture_output=True, text=True)
    assert done.returncode != 0 and "spurion.convert" in done.stdout + done.stderr
