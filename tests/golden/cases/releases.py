"""SAEs in the files of releases that no installed library writes, seeded to fit their model. Layouts: what each release publishes.

Every writer gives the path to name in the configuration and the options that go with it.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from .weights import Fit, _threshold


def dataset_factor(x: torch.Tensor) -> float:
    """sqrt(d) over the mean norm: what a dataset-wise norm multiplies by."""
    return math.sqrt(x.shape[1]) / float(x.norm(dim=1).mean())


def _jump(fit: Fit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bias, threshold and features of a JumpReLU."""
    q, spread = fit.quantile(), float(fit.pre.std())
    bias = 0.1 * spread * fit.randn(fit.m)
    threshold = (q + bias).clamp_min(0.05 * spread)
    p = fit.pre + bias
    return bias, threshold, torch.relu(p) * (p > threshold)


def _save(path: Path, tensors: dict, config: dict | None = None, name: str = "config.json") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    if config is not None:
        (path.parent / name).write_text(json.dumps(config))


def llama_scope_2024(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """hyperparams.json and checkpoints/final.safetensors: trained on x s, one threshold in raw units."""
    fit, s = Fit(x, m, k, seed, subtract=False), dataset_factor(x)
    bias = 0.1 * fit.pre.std() * fit.randn(m)
    p = fit.pre + bias
    threshold = float(_threshold(torch.relu(p), k))
    dec = fit.scaled_dec(p * (p > threshold))
    _save(place / "checkpoints/final.safetensors",
          {"encoder.weight": fit.enc, "encoder.bias": bias * s, "decoder.weight": dec.T, "decoder.bias": fit.b_dec * s})
    norm = math.sqrt(x.shape[1]) / s
    (place / "hyperparams.json").write_text(json.dumps({
        "hook_point_in": hook, "hook_point_out": hook, "d_model": x.shape[1], "d_sae": m, "act_fn": "jumprelu", "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False, "dataset_average_activation_norm": {"in": norm, "out": norm}}))
    return "", {}


def llama_scope_r1(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """config.json and sae_weights.safetensors, log thresholds; the factor stands in no file and is the user's to say."""
    s = round(dataset_factor(x), 4)
    fit = Fit(x * s, m, k, seed, subtract=False)
    bias, threshold, f = _jump(fit)
    _save(place / "sae_weights.safetensors", {"encoder.weight": fit.enc, "encoder.bias": bias, "decoder.weight": fit.scaled_dec(f).T,
                                              "decoder.bias": fit.b_dec, "log_jumprelu_threshold": threshold.log()},
          {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": x.shape[1], "act_fn": "jumprelu",
           "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False})
    return "", {"norm_factor": s}


def llamascopium(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """The newest generation: JumpReLU on p |D_i|, a dataset-wise norm among the tensors."""
    s = dataset_factor(x)
    fit = Fit(x * s, m, k, seed, subtract=False)
    bias, threshold, f = _jump(fit)
    dec = fit.scaled_dec(f)
    _save(place / "sae_weights.safetensors",
          {"W_E": fit.enc.T, "b_E": bias, "W_D": dec, "b_D": fit.b_dec, "activation_function.log_jumprelu_threshold": (threshold * dec.norm(dim=1)).log(),
           f"dataset_average_activation_norm.{hook}": torch.tensor(math.sqrt(x.shape[1]) / s)},
          {"sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "d_model": x.shape[1], "use_decoder_bias": True, "act_fn": "jumprelu",
           "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "use_glu_encoder": False})
    return "", {}


def _convert(pickle: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "client" / "python"))
    from spurion.convert import convert_file

    assert convert_file(pickle) is not None


def openai_topk(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """6.pt of a v5 release, converted: TopK after a layer norm, texts and numbers beside the tensors."""
    fit = Fit((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5), m, k, seed, subtract=True)
    bias = 0.1 * fit.pre.std() * fit.randn(m)
    top = (fit.pre + bias).topk(k, dim=-1)
    f = torch.zeros_like(fit.pre).scatter_(-1, top.indices, top.values.relu())
    place.mkdir(parents=True)
    torch.save({"pre_bias": fit.b_dec, "encoder.weight": fit.enc, "latent_bias": bias, "decoder.weight": fit.scaled_dec(f).T.contiguous(),
                "stats_last_nonzero": torch.zeros(m, dtype=torch.long), "activation": "TopK",
                "activation_state_dict": {"k": k, "postact_fn": "ReLU"}}, place / "6.pt")
    _convert(place / "6.pt")
    return "6.pt", {}


def goodfire(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """sae.pth, converted: ReLU, nothing subtracted."""
    fit = Fit(x, m, k, seed, subtract=False)
    q = fit.quantile()
    place.mkdir(parents=True)
    torch.save({"encoder_linear.weight": fit.enc, "encoder_linear.bias": -q, "decoder_linear.bias": fit.b_dec,
                "decoder_linear.weight": fit.scaled_dec(torch.relu(fit.pre - q)).T.contiguous()}, place / "sae.pth")
    _convert(place / "sae.pth")
    return "sae.pth", {}


def gemma_scope_2(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """params.safetensors with lower-case names beside a config.json."""
    fit = Fit(x, m, k, seed, subtract=False)
    bias, threshold, f = _jump(fit)
    _save(place / "params.safetensors", {"w_enc": fit.enc.T, "w_dec": fit.scaled_dec(f), "b_enc": bias, "b_dec": fit.b_dec, "threshold": threshold},
          {"architecture": "jump_relu", "width": m})
    return "", {}


def sparsify_groupmax(place: Path, x: torch.Tensor, m: int, k: int, seed: int, hook: str) -> tuple[str, dict]:
    """sparsify with k groups, of each the largest."""
    fit = Fit(x, m, k, seed, subtract=True)
    bias = 0.1 * fit.pre.std() * fit.randn(m)
    top = torch.relu(fit.pre + bias).unflatten(-1, (k, m // k)).max(dim=-1)
    f = torch.zeros_like(fit.pre).scatter_(-1, top.indices + torch.arange(k) * (m // k), top.values)
    _save(place / "sae.safetensors", {"encoder.weight": fit.enc, "encoder.bias": bias, "W_dec": fit.scaled_dec(f), "b_dec": fit.b_dec},
          {"num_latents": m, "expansion_factor": 0, "k": k, "d_in": x.shape[1], "activation": "groupmax"}, "cfg.json")
    return "", {}


WRITERS = {"llama_scope 2024": llama_scope_2024, "llama_scope r1-distill": llama_scope_r1, "llama_scope llamascopium": llamascopium,
           "openai topk": openai_topk, "goodfire standard": goodfire, "gemma_scope 2": gemma_scope_2, "sparsify groupmax": sparsify_groupmax}
