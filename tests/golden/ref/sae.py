"""Sparse autoencoders: SAELens and dictionary_learning encode by their own code; sparsify (not packaged) by its formula.

Every reader gives the same view: features (n, m), decoder rows D_i (m, d) and a scale per token, so that
x_hat(t) = scale(t) * (sum_i f_i D_i) + b(t).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass
class Reading:
    """One SAE on n activations. f (n, m), scale (n, 1), bias (n, d), x_hat (n, d); all float32."""

    f: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    x_hat: torch.Tensor


class LensSae:
    """SAELens, through SAE.load_from_disk."""

    def __init__(self, path: Path):
        from sae_lens.saes.sae import SAE

        self.sae = SAE.load_from_disk(str(path), device="cpu", dtype="float32").eval().requires_grad_(False)
        cfg = self.sae.cfg
        if cfg.normalize_activations not in ("none", "layer_norm", "constant_norm_rescale"):
            raise ValueError(f"normalize_activations: expected a run-time norm, found {cfg.normalize_activations}")
        self.hook = cfg.metadata.hook_name
        rows = self.sae.W_dec
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            rows = rows / rows.norm(dim=-1, keepdim=True)
        self.rows = rows.detach()

    def read(self, x: torch.Tensor) -> Reading:
        f = self.sae.encode(x)
        scale = torch.ones(x.shape[0], 1)
        if self.sae.cfg.normalize_activations == "layer_norm":
            scale = self.sae.ln_std.clone()
        elif self.sae.cfg.normalize_activations == "constant_norm_rescale":
            scale = 1 / self.sae.x_norm_coeff.clone()
        x_hat = self.sae.decode(f)
        self.sae.encode(x)  # decode forgets the token's norm; bias = decode(0) needs it again
        return Reading(f=f, scale=scale, bias=self.sae.decode(torch.zeros_like(f)), x_hat=x_hat)


class DictSae:
    """dictionary_learning, through its own classes and the state dict (a .pt, or the converted .safetensors)."""

    def __init__(self, path: Path):
        from dictionary_learning import dictionary as dl
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        trainer = json.loads((path / "config.json").read_text())["trainer"]
        weights = path / "ae.pt"
        state = torch.load(weights, weights_only=True) if weights.exists() else load_file(path / "ae.safetensors")
        d, m, name = trainer["activation_dim"], trainer["dict_size"], trainer["dict_class"]
        classes = {"AutoEncoder": dl.AutoEncoder, "AutoEncoderNew": dl.AutoEncoderNew,
                   "GatedAutoEncoder": dl.GatedAutoEncoder, "JumpReluAutoEncoder": dl.JumpReluAutoEncoder}
        topk = {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE}
        if name in classes:
            self.sae = classes[name](d, m)
        elif name in topk:
            self.sae = topk[name](d, m, int(state["k"]))
        elif name == "MatryoshkaBatchTopKSAE":
            self.sae = MatryoshkaBatchTopKSAE(d, m, int(state["k"]), state["group_sizes"].tolist())
        else:
            raise ValueError(f"dict_class: expected a known class, found {name}")
        self.sae.load_state_dict(state)
        self.sae.eval().requires_grad_(False)
        self.hook = f"blocks.{trainer['layer']}.hook_resid_post" if "layer" in trainer else None
        self.rows = (self.sae.W_dec if hasattr(self.sae, "W_dec") else self.sae.decoder.weight.T).detach().contiguous()

    def read(self, x: torch.Tensor) -> Reading:
        f = self.sae.encode(x)
        bias = self.sae.decode(torch.zeros_like(f))
        return Reading(f=f, scale=torch.ones(x.shape[0], 1), bias=bias, x_hat=self.sae.decode(f))


class SparsifySae:
    """EleutherAI sparsify: relu(W(x - b_dec) + b), then the k largest; no library installed, so the formula."""

    def __init__(self, path: Path):
        cfg = json.loads((path / "cfg.json").read_text())
        if cfg.get("activation", "topk") != "topk" or cfg.get("transcode") or cfg.get("skip_connection"):
            raise ValueError("sparsify: expected a plain topk autoencoder")
        state = load_file(path / "sae.safetensors")
        self.k = cfg["k"]
        self.enc, self.enc_bias = state["encoder.weight"].float(), state["encoder.bias"].float()
        self.rows, self.b_dec = state["W_dec"].float(), state["b_dec"].float()
        self.hook = None

    def read(self, x: torch.Tensor) -> Reading:
        acts = torch.relu((x - self.b_dec) @ self.enc.T + self.enc_bias)
        top = acts.topk(self.k, dim=-1, sorted=False)
        f = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
        bias = self.b_dec.expand_as(x)
        return Reading(f=f, scale=torch.ones(x.shape[0], 1), bias=bias, x_hat=f @ self.rows + self.b_dec)


class GemmaScopeSae:
    """Gemma Scope's params.npz, by its formula: f = relu(p) 1[p > threshold], p = x W_enc + b_enc."""

    def __init__(self, path: Path):
        import numpy as np

        state = {k: torch.from_numpy(v).float() for k, v in np.load(path / "params.npz").items()}
        self.enc, self.enc_bias, self.threshold = state["W_enc"], state["b_enc"], state["threshold"]
        self.rows, self.b_dec, self.hook = state["W_dec"], state["b_dec"], None

    def read(self, x: torch.Tensor) -> Reading:
        p = x @ self.enc + self.enc_bias
        f = torch.relu(p) * (p > self.threshold)
        return Reading(f=f, scale=torch.ones(x.shape[0], 1), bias=self.b_dec.expand_as(x), x_hat=f @ self.rows + self.b_dec)


def open_sae(path: Path, given_format: str | None, factor: float | None = None):
    """The reader for a directory, by the given format or by what stands in it. factor: the user's norm_factor."""
    from .releases import open_release

    found = open_release(path, factor) if given_format is None else None
    if found is not None:
        return found
    cfg = path / "cfg.json"
    if given_format == "sparsify" or (given_format is None and (path / "sae.safetensors").exists()):
        return SparsifySae(path)
    if given_format == "saelens" or (given_format is None and cfg.exists()):
        return LensSae(path)
    if given_format == "gemma_scope" or (given_format is None and (path / "params.npz").exists()):
        return GemmaScopeSae(path)
    if given_format in (None, "dictionary_learning"):
        return DictSae(path)
    raise ValueError(f"format: expected saelens, dictionary_learning or sparsify, found {given_format}")
