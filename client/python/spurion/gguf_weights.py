"""GGUF files as a checkpoint directory: ``spurion-convert model.gguf`` writes ``model/`` beside it with config.json, model.safetensors,
tokenizer.json and tokenizer_config.json, in the names, shapes and row orders of transformers.

F32, F16 and BF16 tensors keep their dtype; quantised ones (K_QUANTS below) become F32, exactly as the ``gguf`` package dequantises
them. What llama.cpp's writer did to the weights is undone: rows of q and k of Llama are permuted for interleaved rotation, Gemma's norm
weights are stored plus one, GPT-2's matrices transposed, NeoX's fused q, k, v unfused by kind. Needs torch, numpy and gguf.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .convert import ConvertError, write_safetensors
from .gguf_tokenizer import TokenizerError, tokenizer_json

KEPT = ("F32", "F16", "BF16")
K_QUANTS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "cls.output": "score", "layer": "model.layers.",
}
_NAMES = {
    "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "gemma2": {**_LLAMA, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"},
    "gpt2": {
        "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj", "cls.output": "score", "layer": "transformer.h."},
    "gptneox": {
        "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
        "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h", "cls.output": "score",
        "layer": "gpt_neox.layers."},
}
_CLASSES = {"llama": ("llama", "Llama"), "mistral": ("mistral", "Mistral"), "qwen2": ("qwen2", "Qwen2"), "qwen3": ("qwen3", "Qwen3"),
            "gemma2": ("gemma2", "Gemma2"), "gpt2": ("gpt2", "GPT2"), "gptneox": ("gpt_neox", "GPTNeoX")}


# ---- what the file says ----

def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConvertError(f"{path}: expected the Python package gguf, found none: pip install gguf") from error
    try:
        return gguf.GGUFReader(str(path))
    except Exception as error:  # the reader raises what it likes for a broken file
        raise ConvertError(f"{path}: expected a GGUF file of version 2 or 3, found: {error or type(error).__name__}") from error


def metadata(reader: Any) -> dict[str, Any]:
    """All metadata, key to number, text, bool or list of these."""
    return {key: field.contents() for key, field in reader.fields.items()}


class _Fields:
    """Keys of one architecture; a missing one is an error that names it."""

    def __init__(self, fields: dict[str, Any], where: str):
        self.fields, self.where = fields, where
        self.architecture = fields.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConvertError(f"{self.where}: expected the key {self.architecture}.{key}, found none")
        return value

    def positive(self, key: str, default: Any = None) -> int:
        """A whole number above 0, the same for all layers."""
        value = self.need(key) if default is None else self.get(key, default)
        values = set(value) if isinstance(value, list) else {value}
        number = next(iter(values)) if len(values) == 1 else None
        if not isinstance(number, int) or number <= 0:
            raise ConvertError(f"{self.where}: {self.architecture}.{key}: expected one whole number above 0, found {str(value)[:60]}")
        return number


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 rather than 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


# ---- config.json ----

def _llama3_factors(dim: int, theta: float, factor: float) -> Any:
    import numpy as np

    wave = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((8192 / wave - 1.0) / (4.0 - 1.0), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _rope(f: _Fields, tensors: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """rope_parameters. The llama3 kind stands in the tensor rope_freqs only: divisors of the frequencies, known again here."""
    import numpy as np

    theta = _short(f.get("rope.freq_base", 10000.0))
    kind = f.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        found = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64)
        factor = round(float(found.max()), 3)
        if len(found) == head_dim // 2 and np.allclose(found, _llama3_factors(head_dim, theta, factor), rtol=1e-4):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192}
        raise ConvertError(f"{f.where}: rope_freqs.weight: expected the divisors of llama3 scaling (low 1, high 4, original 8192), found others")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _short(f.need("rope.scaling.factor"))}
    if kind != "none":
        raise ConvertError(f"{f.where}: {f.architecture}.rope.scaling.type: expected none or linear, found {kind}")
    return {"rope_type": "default", "rope_theta": theta}


def _rms_config(f: _Fields, tensors: dict[str, Any]) -> dict[str, Any]:
    """Llama, Mistral, Qwen2, Qwen3, Gemma 2."""
    hidden, heads = f.positive("embedding_length"), f.positive("attention.head_count")
    head_dim = f.positive("attention.key_length", f.get("rope.dimension_count") or hidden // heads)
    if f.get("expert_count", 0):
        raise ConvertError(f"{f.where}: expected a dense model, found {f.get('expert_count')} experts")
    if f.get("rope.dimension_count", head_dim) != head_dim:
        raise ConvertError(f"{f.where}: {f.architecture}.rope.dimension_count: expected the head's {head_dim}, found {f.get('rope.dimension_count')}")
    return {
        "hidden_size": hidden, "num_hidden_layers": f.positive("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": f.positive("attention.head_count_kv", heads), "head_dim": head_dim,
        "intermediate_size": f.positive("feed_forward_length"), "max_position_embeddings": f.positive("context_length"),
        "rms_norm_eps": _short(f.need("attention.layer_norm_rms_epsilon")), "rope_parameters": _rope(f, tensors, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in tensors, "hidden_act": "silu",
    }


def _gemma2_config(f: _Fields, tensors: dict[str, Any]) -> dict[str, Any]:
    out = _rms_config(f, tensors)
    # the scale of scores is not stored; of the published sizes only 27B (46 layers) has hidden / heads, the others head_dim
    scalar = out["hidden_size"] // out["num_attention_heads"] if out["num_hidden_layers"] == 46 else out["head_dim"]
    del out["hidden_act"]
    return {**out, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": _short(f.get("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": _short(f.get("final_logit_softcapping", 30.0)),
            "sliding_window": f.positive("attention.sliding_window", 4096)}


def _gpt2_config(f: _Fields, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"n_embd": f.positive("embedding_length"), "n_layer": f.positive("block_count"), "n_head": f.positive("attention.head_count"),
            "n_inner": f.positive("feed_forward_length"), "n_positions": f.positive("context_length"), "activation_function": "gelu_new",
            "layer_norm_epsilon": _short(f.need("attention.layer_norm_epsilon"))}


def _gptneox_config(f: _Fields, tensors: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = f.positive("embedding_length"), f.positive("attention.head_count")
    theta = _short(f.get("rope.freq_base", 10000.0))
    return {"hidden_size": hidden, "num_hidden_layers": f.positive("block_count"), "num_attention_heads": heads,
            "intermediate_size": f.positive("feed_forward_length"), "max_position_embeddings": f.positive("context_length"),
            "layer_norm_eps": _short(f.need("attention.layer_norm_epsilon")), "hidden_act": "gelu",
            "use_parallel_residual": bool(f.get("use_parallel_residual", True)), "attention_bias": "blk.0.attn_qkv.bias" in tensors,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta,
                                "partial_rotary_factor": f.positive("rope.dimension_count") / (hidden // heads)}}


_CONFIGS = {"llama": _rms_config, "qwen2": _rms_config, "qwen3": _rms_config, "gemma2": _gemma2_config, "gpt2": _gpt2_config,
            "gptneox": _gptneox_config}


def config_json(fields: dict[str, Any], tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json as transformers reads it. tensors: name to the reader's tensor."""
    f = _Fields(fields, where)
    if f.architecture not in _CONFIGS:
        raise ConvertError(f"{where}: general.architecture: expected one of {', '.join(sorted(_CONFIGS))}, found {f.architecture}")
    out = _CONFIGS[f.architecture](f, tensors)
    family = f.architecture
    window = f.get("attention.sliding_window")
    if family == "llama" and window:
        family, out["sliding_window"] = "mistral", int(window)
    model_type, name = _CLASSES[family]
    head = tensors.get("cls.output.weight")
    out = {"architectures": [f"{name}For{'SequenceClassification' if head is not None else 'CausalLM'}"], "model_type": model_type, **out}
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ConvertError(f"{where}: expected the tensor token_embd.weight, found none")
    out["vocab_size"] = int(embedding.shape[1])
    out["tie_word_embeddings"] = "output.weight" not in tensors
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("pad_token_id", "padding_token_id")):
        number = fields.get(f"tokenizer.ggml.{theirs}")
        out[ours] = None if number is None else int(number)
    if head is not None:
        outputs = int(head.shape[1]) if len(head.shape) > 1 else 1
        out["id2label"] = {str(n): f"LABEL_{n}" for n in range(outputs)}
    return out


# ---- tensors ----

def _interleaved_to_halves(x: Any, heads: int) -> Any:
    """Rows of q or k: llama.cpp stores pair (2i, 2i+1) of a head where transformers has (i, i + half)."""
    half = x.shape[0] // heads // 2
    return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _by_head(x: Any, heads: int) -> Any:
    """Rows all q, all k, all v as NeoX has them: for each head its q, k, v."""
    size = x.shape[0] // 3 // heads
    return x.reshape(3, heads, size, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _repair(x: Any, architecture: str, part: str, config: dict[str, Any]) -> Any:
    """x as transformers stores it. part: the name within its layer, as in attn_q.weight."""
    if architecture == "llama" and part.startswith(("attn_q.", "attn_k.")):
        x = _interleaved_to_halves(x, config["num_attention_heads" if part.startswith("attn_q.") else "num_key_value_heads"])
    if architecture == "gemma2" and part.endswith("norm.weight"):
        x = x.astype("float32") - 1
    if architecture == "gptneox" and part.startswith("attn_qkv."):
        x = _by_head(x, config["num_attention_heads"])
    if architecture == "gpt2" and part in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"):
        x = x.swapaxes(0, 1)
    return x


def _target_name(name: str, names: dict[str, Any]) -> str | None:
    """transformers' name of a tensor; None for one that its model does not have."""
    if name.startswith("blk."):
        _, layer, part = name.split(".", 2)
        stem, _, ending = part.rpartition(".")
        return f"{names['layer']}{layer}.{names[stem]}.{ending}" if stem in names else None
    stem, _, ending = name.rpartition(".")
    return f"{names[stem]}.{ending}" if stem in names else None


class _Lazy:
    """A tensor of the file that write_safetensors takes for torch's; its values exist only while they are written, so a file needs
    memory for its largest tensor and no more."""

    def __init__(self, tensor: Any, architecture: str, part: str, config: dict[str, Any]):
        import torch

        self.tensor, self.architecture, self.part, self.config = tensor, architecture, part, config
        kind = tensor.tensor_type.name
        changed = architecture == "gemma2" and part.endswith("norm.weight")
        self.dtype: Any = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32) if not changed else torch.float32
        shape = [int(n) for n in reversed(tensor.shape)]
        transposed = architecture == "gpt2" and part in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        shape = shape[::-1] if transposed else shape
        self.shape = [1, *shape] if part == "cls.output.weight" and len(shape) == 1 else shape

    def element_size(self) -> int:
        return int(self.dtype.itemsize)

    def numel(self) -> int:
        return math.prod(self.shape)

    def detach(self) -> Any:
        import gguf
        import numpy as np
        import torch

        kind, data = self.tensor.tensor_type, self.tensor.data
        bf16 = kind.name == "BF16" and self.dtype == torch.bfloat16
        if bf16:
            data = np.ascontiguousarray(data).view(np.int16)
        elif kind.name not in ("F32", "F16"):
            data = gguf.dequantize(data, kind)
        values = np.ascontiguousarray(_repair(np.asarray(data), self.architecture, self.part, self.config)).reshape(self.shape)
        x = torch.from_numpy(values.copy() if not values.flags.writeable else values)
        return x.view(torch.bfloat16) if bf16 else x.to(self.dtype)


def _tensors(reader: Any, architecture: str, config: dict[str, Any], where: str) -> dict[str, Any]:
    names, out = _NAMES[architecture], {}
    for tensor in reader.tensors:
        target = _target_name(tensor.name, names)
        if tensor.name == "rope_freqs.weight":
            continue  # in config.json
        if target is None:
            raise ConvertError(f"{where}: expected the tensors of a {architecture} model, found {tensor.name}")
        if tensor.tensor_type.name not in KEPT + K_QUANTS:
            raise ConvertError(f"{where}: {tensor.name}: expected type {', '.join(KEPT + K_QUANTS)}, found {tensor.tensor_type.name}")
        part = tensor.name.split(".", 2)[2] if tensor.name.startswith("blk.") else tensor.name
        out[target] = _Lazy(tensor, architecture, part, config)
    return out


# ---- the directory ----

def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    out = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id"),
                         ("unk_token", "unknown_token_id")):
        number = fields.get(f"tokenizer.ggml.{theirs}")
        if number is not None and 0 <= number < len(tokens):
            out[ours] = tokens[number]
    if fields.get("tokenizer.chat_template"):
        out["chat_template"] = fields["tokenizer.chat_template"]
    return out


def _write_json(path: Path, value: dict[str, Any], indent: int | None) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
    path.chmod(0o644)


def convert_gguf(path: Path, force: bool = False, pre: str | None = None) -> Path | None:
    """Writes the directory PATH without its ending; gives it, or None when it is there already. pre: the pipeline of a byte-level
    vocabulary (gguf_tokenizer.PIPELINES), where the file does not say it. Raises ConvertError."""
    target, where = path.with_suffix(""), str(path)
    if target.exists() and not force:
        return None
    reader = _open(path)
    fields = metadata(reader)
    config = config_json(fields, {t.name: t for t in reader.tensors}, where)
    tensors = _tensors(reader, fields["general.architecture"], config, where)
    try:
        tokenizer = tokenizer_json(fields, pre)
    except TokenizerError as error:
        raise ConvertError(f"{where}: {error}") from error
    making = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{target.name}."))
    try:
        write_safetensors(making / "model.safetensors", tensors, {"format": "pt"})
        _write_json(making / "config.json", config, 2)
        _write_json(making / "tokenizer.json", tokenizer, None)
        _write_json(making / "tokenizer_config.json", _tokenizer_config(fields), 2)
        making.chmod(0o755)
        if target.exists():  # --force: only what we write is taken away
            for file in making.iterdir():
                file.replace(target / file.name)
        else:
            making.rename(target)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    if "score.weight" not in tensors:
        print(f"{path}: no reward head (cls.output) in the file: a language model until one is fitted", file=sys.stderr)
    return target
