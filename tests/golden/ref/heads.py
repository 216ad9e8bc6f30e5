"""Score heads and pooling in plain PyTorch, for checkpoints that transformers' own classes do not load whole.

Reads config.json and the tensors; nothing is shared with the daemon but the files.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EMBEDDINGS = ("wte.weight", "embed_in.weight", "embed_tokens.weight")
STEMS = ("score", "v_head", "v_head.summary", "value_head", "regression_head", "out_proj", "score_head")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        out |= load_file(file)
    return out


def read_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def is_plain(path: Path) -> bool:
    """Whether transformers' *ForSequenceClassification is the whole model."""
    config = read_config(path)
    return config["architectures"][0].endswith("ForSequenceClassification") and "score.0.weight" not in read_tensors(path)


def load_base(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The base model, from under whatever prefix its tensors have."""
    raw = read_config(path)
    kind = {"gpt_neox_reward_model": "gpt_neox"}.get(raw["model_type"], raw["model_type"])
    config = CONFIG_MAPPING[kind].from_dict({**raw, "model_type": kind})
    net = AutoModel.from_config(config, attn_implementation="eager")
    tensors = read_tensors(path)
    prefix = next(name[: -len(e)] for name in tensors for e in EMBEDDINGS if name.endswith(e))
    state = {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}
    result = net.load_state_dict({k: v for k, v in state.items() if not k.startswith(("lm_head", "v_head"))}, strict=False)
    assert not result.missing_keys, result.missing_keys
    return net.to(dtype)


class Head:
    """reward = head(pooled final norm), with every normalisation the checkpoint switches on."""

    def __init__(self, path: Path, options: dict, dtype: torch.dtype):
        raw, tensors = read_config(path), read_tensors(path)
        names = [raw["value_head_prefix"]] if "value_head_prefix" in raw else STEMS
        stem = next(s for s in names if f"{s}.weight" in tensors or f"{s}.0.weight" in tensors)
        if f"{stem}.weight" in tensors:
            self.layers = [(tensors[f"{stem}.weight"], tensors.get(f"{stem}.bias"))]
        else:
            self.layers = []
            while f"{stem}.{2 * len(self.layers)}.weight" in tensors:
                n = 2 * len(self.layers)
                self.layers.append((tensors[f"{stem}.{n}.weight"], tensors.get(f"{stem}.{n}.bias")))
        self.layers = [(w.to(dtype), None if b is None else b.to(dtype)) for w, b in self.layers]
        self.dtype = dtype
        self.outputs = self.layers[-1][0].shape[0]
        self.mean, self.sd = torch.zeros(self.outputs), torch.ones(self.outputs)
        if raw.get("normalize_reward"):
            self.mean, self.sd = torch.full((self.outputs,), raw["mean"]), torch.full((self.outputs,), raw["std"])
        if raw.get("do_normalize"):
            self.mean, self.sd = tensors["normalizer.mean"].float(), tensors["normalizer.var"].float().sqrt()
        weights, index = options.get("head_weights"), options.get("head_index")
        if weights is None:
            if self.outputs > 1 and index is None:
                raise ValueError(f"model.head_index: expected an index below {self.outputs}, found none")
            weights = [float(n == (index or 0)) for n in range(self.outputs)]
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.pooling = options.get("pooling") or raw.get("pooling") or "last"

    def __call__(self, hidden: torch.Tensor, scored: int) -> torch.Tensor:
        """hidden (T, d), after the final norm; scored: the position that the head reads unless it takes the mean."""
        x = hidden.mean(dim=0) if self.pooling == "mean" else hidden[scored]
        for n, (weight, bias) in enumerate(self.layers):
            x = torch.nn.functional.linear(x if n == 0 else torch.relu(x), weight, bias)
        return (self.weights * (x.to(torch.promote_types(x.dtype, torch.float32)) - self.mean) / self.sd).sum()


def scored_position(ids: list[int], start: int, pooling: str, pad: int | None, eos: list[int]) -> int | None:
    """Position that the head reads; None when the completion holds nothing but padding."""
    if pooling == "last_non_pad" and pad is not None:
        kept = [t for t in range(start, len(ids)) if ids[t] != pad]
        return kept[-1] if kept else None
    if pooling == "first_eos":
        return next((t for t in range(start, len(ids)) if ids[t] in eos), len(ids) - 1)
    return len(ids) - 1


def spread(rewards: list[float]) -> float:
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
