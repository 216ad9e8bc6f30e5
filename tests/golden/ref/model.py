"""The reward model: transformers' own classes, opened at the hooks with forward hooks.

A *site* is a point of the residual stream or of one sublayer: (layer, kind) with kind pre, attn, mid, mlp or post.
The post of layer L and the pre of L+1 are one point, written (L, "post").
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from .heads import Head, is_plain, load_base

KINDS = ("pre", "attn", "mid", "mlp", "post")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)$")


def site_of(hook: str) -> tuple[int, str]:
    """(layer, kind) of a hook name."""
    match = _HOOK.match(hook)
    if match is None:
        raise ValueError(f"hook: expected blocks.L.hook_resid_pre|resid_mid|resid_post|attn_out|mlp_out, found {hook!r}")
    layer = int(match[1])
    kind = match[2].replace("resid_", "").replace("_out", "")
    return (layer - 1, "post") if kind == "pre" and layer > 0 else (layer, kind)


def site_order(site: tuple[int, str]) -> tuple[int, int]:
    return site[0], KINDS.index(site[1])


class RewardModel:
    """One rollout at a time through a *ForSequenceClassification model, with a function at every site asked for."""

    def __init__(self, path: Path, dtype: str, options: dict):
        torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[dtype]
        if is_plain(path):
            self.config = AutoConfig.from_pretrained(path)
            self.net = AutoModelForSequenceClassification.from_pretrained(
                path, config=self.config, dtype=torch_dtype, attn_implementation="eager")
            self.base = getattr(self.net, self.net.base_model_prefix)
        else:
            self.net = self.base = load_base(path, torch_dtype)
            self.config = self.base.config
        self.net.eval().requires_grad_(False)
        self.dtype = torch_dtype
        self.layers = self.base.h if hasattr(self.base, "h") else self.base.layers
        self.vocab_rows = self.base.get_input_embeddings().weight.shape[0]
        self.head = Head(path, options, torch_dtype)

    def _attach(self, site: tuple[int, str], fn):
        layer = self.layers[site[0]]

        def on_output(_module, _args, out):
            if isinstance(out, tuple):
                return (fn(out[0]), *out[1:])
            return fn(out)

        def on_input(_module, args):
            return (fn(args[0]), *args[1:])

        def in_place(_module, args):
            # The block keeps its own name for this tensor (the residual), so the new value is written into it.
            args[0].copy_(fn(args[0]))

        kind = site[1]
        if kind == "post":
            return layer.register_forward_hook(on_output)
        if kind == "pre":
            return layer.register_forward_pre_hook(on_input)
        if kind == "attn":
            return self._attention(layer).register_forward_hook(on_output)
        if kind == "mlp":
            return getattr(layer, "post_feedforward_layernorm", layer.mlp).register_forward_hook(on_output)
        return self._second_norm(layer).register_forward_pre_hook(in_place)

    @staticmethod
    def _attention(layer) -> torch.nn.Module:
        """The module whose output is added to the stream; with Gemma 2 the norm after attention."""
        if hasattr(layer, "post_feedforward_layernorm"):
            return layer.post_attention_layernorm
        return next(getattr(layer, name) for name in ("attn", "attention", "self_attn") if hasattr(layer, name))

    def _second_norm(self, layer) -> torch.nn.Module:
        """The module that reads the stream between attention and MLP of a sequential block."""
        for name in ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2"):
            if hasattr(layer, name) and not getattr(layer, "use_parallel_residual", False):
                return getattr(layer, name)
        raise ValueError("hook_resid_mid: expected a sequential block, found a parallel one")

    @contextmanager
    def _hooked(self, sites: dict):
        handles = [self._attach(site, fn) for site, fn in sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reward(self, seq, sites: dict | None = None) -> torch.Tensor:
        """The head's output for a sequence (ids, scored), a scalar. sites: {site: function of (1, T, d) giving (1, T, d)}."""
        with self._hooked(sites or {}):
            hidden = self.base(input_ids=torch.tensor([seq.ids]), use_cache=False).last_hidden_state
            return self.head(hidden[0], seq.scored)

    def transformers_reward(self, ids: list[int]) -> float:
        """What the model's own forward returns (its own pooling)."""
        with torch.no_grad():
            return float(self.net(input_ids=torch.tensor([ids]), use_cache=False).logits[0] @ self.head.weights.to(self.dtype))
