"""SAEs of releases that no installed library reads, by the formulas of their published code (formats in docs/saes.md)."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from .sae import Reading


def _reading(f, rows, bias, scale) -> Reading:
    """x_hat = scale (f rows) + bias."""
    return Reading(f=f, scale=scale, bias=bias, x_hat=scale * (f @ rows) + bias)


def _ones(x):
    return torch.ones(x.shape[0], 1)


class LlamaScope2024:
    """OpenMOSS, 2024: standardised at load, the threshold in raw units: f = p 1[p > t], p = W x + b / s."""

    def __init__(self, path: Path, _factor: float | None):
        hyper = json.loads((path / "hyperparams.json").read_text())
        t = {k: v.float() for k, v in load_file(path / "checkpoints/final.safetensors").items()}
        s = {k: math.sqrt(hyper["d_model"]) / v for k, v in hyper["dataset_average_activation_norm"].items()}
        self.enc, self.enc_bias, self.threshold = t["encoder.weight"], t["encoder.bias"] / s["in"], hyper["jump_relu_threshold"]
        self.rows, self.b_dec, self.hook = t["decoder.weight"].T * s["in"] / s["out"], t["decoder.bias"] / s["out"], hyper["hook_point_in"]

    def read(self, x: torch.Tensor) -> Reading:
        p = x @ self.enc.T + self.enc_bias
        return _reading(p * (p > self.threshold), self.rows, self.b_dec.expand_as(x), _ones(x))


class LlamaScopeR1:
    """Llama-Scope-R1-Distill: JumpReLU of W (s x) + b with exp(log threshold); the factor s is the user's."""

    def __init__(self, path: Path, factor: float | None):
        t = {k: v.float() for k, v in load_file(path / "sae_weights.safetensors").items()}
        self.s, self.enc, self.enc_bias, self.threshold = factor, t["encoder.weight"], t["encoder.bias"], t["log_jumprelu_threshold"].exp()
        self.rows, self.b_dec, self.hook = t["decoder.weight"].T / factor, t["decoder.bias"] / factor, None

    def read(self, x: torch.Tensor) -> Reading:
        p = (x * self.s) @ self.enc.T + self.enc_bias
        return _reading(torch.relu(p) * (p > self.threshold), self.rows, self.b_dec.expand_as(x), _ones(x))


class Llamascopium:
    """llamascopium: q = (x s W_E + b_E) |D_i|, JumpReLU of q, divided by |D_i| again."""

    def __init__(self, path: Path, _factor: float | None):
        config = json.loads((path / "config.json").read_text())
        t = {k: v.float() for k, v in load_file(path / "sae_weights.safetensors").items()}
        assert config["act_fn"] == "jumprelu" and config["norm_activation"] == "dataset-wise" and config["sparsity_include_decoder_norm"]
        self.s = math.sqrt(config["d_model"]) / float(t[f"dataset_average_activation_norm.{config['hook_point_in']}"])
        self.enc, self.enc_bias, self.h = t["W_E"], t["b_E"], t["W_D"].norm(dim=1)
        self.threshold = t["activation_function.log_jumprelu_threshold"].exp()
        self.rows, self.b_dec, self.hook = t["W_D"] / self.s, t["b_D"] / self.s, config["hook_point_in"]

    def read(self, x: torch.Tensor) -> Reading:
        q = ((x * self.s) @ self.enc + self.enc_bias) * self.h
        return _reading(q * (q > self.threshold) / self.h, self.rows, self.b_dec.expand_as(x), _ones(x))


class OpenAi:
    """openai/sparse_autoencoder, TopK: layer norm in (ddof 1, 1e-5 on the deviation) and out."""

    def __init__(self, path: Path, _factor: float | None):
        state = torch.load(path, weights_only=True)
        assert state["activation"] == "TopK"
        self.k, self.state, self.hook = state["activation_state_dict"]["k"], state, None
        self.rows = state["decoder.weight"].T.contiguous()

    def read(self, x: torch.Tensor) -> Reading:
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        p = ((x - mean) / (std + 1e-5) - self.state["pre_bias"]) @ self.state["encoder.weight"].T + self.state["latent_bias"]
        top = p.topk(self.k, dim=-1)
        f = torch.zeros_like(p).scatter(-1, top.indices, torch.relu(top.values))
        return _reading(f, self.rows, self.state["pre_bias"] * std + mean, std)


class Goodfire:
    """Goodfire: relu(W x + b), decoder with bias."""

    def __init__(self, path: Path, _factor: float | None):
        state = torch.load(path, weights_only=True)
        self.enc, self.enc_bias = state["encoder_linear.weight"], state["encoder_linear.bias"]
        self.rows, self.b_dec, self.hook = state["decoder_linear.weight"].T.contiguous(), state["decoder_linear.bias"], None

    def read(self, x: torch.Tensor) -> Reading:
        return _reading(torch.relu(x @ self.enc.T + self.enc_bias), self.rows, self.b_dec.expand_as(x), _ones(x))


class GemmaScope2:
    """Gemma Scope 2: f = relu(p) 1[p > threshold], p = x w_enc + b_enc."""

    def __init__(self, path: Path, _factor: float | None):
        t = {k: v.float() for k, v in load_file(path / "params.safetensors").items()}
        self.enc, self.enc_bias, self.threshold = t["w_enc"], t["b_enc"], t["threshold"]
        self.rows, self.b_dec, self.hook = t["w_dec"], t["b_dec"], None

    def read(self, x: torch.Tensor) -> Reading:
        p = x @ self.enc + self.enc_bias
        return _reading(torch.relu(p) * (p > self.threshold), self.rows, self.b_dec.expand_as(x), _ones(x))


class SparsifyGroupMax:
    """sparsify, groupmax: of k groups of neighbours the largest of relu(W (x - b_dec) + b)."""

    def __init__(self, path: Path, _factor: float | None):
        self.k = json.loads((path / "cfg.json").read_text())["k"]
        t = load_file(path / "sae.safetensors")
        self.enc, self.enc_bias, self.rows, self.b_dec, self.hook = t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"], None

    def read(self, x: torch.Tensor) -> Reading:
        acts = torch.relu((x - self.b_dec) @ self.enc.T + self.enc_bias)
        width = acts.shape[1] // self.k
        top = acts.unflatten(-1, (self.k, width)).max(dim=-1)
        f = torch.zeros_like(acts).scatter_(-1, top.indices + torch.arange(self.k) * width, top.values)
        return _reading(f, self.rows, self.b_dec.expand_as(x), _ones(x))


def open_release(path: Path, factor: float | None):
    """The reader for what stands at path, or None when it is none of these."""
    if path.suffix in (".pt", ".pth"):
        return (OpenAi if path.suffix == ".pt" else Goodfire)(path, factor)
    if (path / "hyperparams.json").exists():
        return LlamaScope2024(path, factor)
    if (path / "sae_weights.safetensors").exists() and (path / "config.json").exists():
        return (LlamaScopeR1 if factor else Llamascopium)(path, factor)
    if (path / "params.safetensors").exists():
        return GemmaScope2(path, factor)
    cfg = path / "cfg.json"
    if (path / "sae.safetensors").exists() and json.loads(cfg.read_text()).get("activation") == "groupmax":
        return SparsifyGroupMax(path, factor)
    return None
