"""The containers in which people keep a checkpoint: a seeded model's model.safetensors rewritten as each."""

import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[3]
GGUF_NAMES = {"gpt2": "gpt2", "neox": "gptneox", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2"}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def repack(path: Path, kind: str) -> None:
    """safetensors F16, BF16: rounded. shards: three files and an index. pickle: pytorch_model.bin and what spurion-convert makes of it."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    if kind in DTYPES:
        save_file({k: v.to(DTYPES[kind]) for k, v in tensors.items()}, file)
    elif kind == "shards":
        file.unlink()
        names, where = sorted(tensors), {}
        for n in range(3):
            shard = f"model-{n + 1:05d}-of-00003.safetensors"
            save_file({k: tensors[k] for k in names[n::3]}, path / shard, metadata={"format": "pt"})
            where |= dict.fromkeys(names[n::3], shard)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    elif kind == "pickle":
        sys.path.insert(0, str(ROOT / "client" / "python"))
        from spurion.convert import convert_file

        file.unlink()
        torch.save(tensors, path / "pytorch_model.bin")
        assert convert_file(path / "pytorch_model.bin") == path / "pytorch_model.safetensors"


def write_gguf(folder: Path, family: str, bos: str) -> Path:
    """folder/model as a GGUF, by the gguf library, and back through spurion-convert: the directory that the daemon gets."""
    sys.path.insert(0, str(ROOT / "client" / "python"))
    from gguf_files import add_tokenizer, write_model
    from spurion.convert import main
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    document = json.loads((folder / "model/tokenizer.json").read_text())
    ids = {a["content"]: a["id"] for a in document["added_tokens"]}
    pad = model.config.vocab_size - len(document["model"]["vocab"])
    pre, eos = ("gpt-2", bos) if len(ids) == 1 else ("llama-bpe", "<|eot_id|>")
    rows = {**document, "added_tokens": document["added_tokens"] + [
        {"id": model.config.vocab_size - pad + n, "content": f"<|unused{n}|>", "special": True} for n in range(pad)]}
    flags = {"bos_token_id": ids[bos], "eos_token_id": ids[eos], "add_bos_token": pre == "llama-bpe"}
    if model.config.pad_token_id is not None:
        flags["pad_token_id"] = model.config.pad_token_id
    write_model(folder / "gguf.gguf", model, GGUF_NAMES[family], "F32",
                lambda w: add_tokenizer(w, rows, "gpt2", pre, **flags))
    with contextlib.redirect_stdout(sys.stderr):  # it prints the directory
        assert main([str(folder / "gguf.gguf")]) == 0
    return folder / "gguf"
