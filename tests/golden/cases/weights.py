"""Random reward models whose rewards spread, and random SAEs that fit their model: L0 in the tens, ablations that count."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (AutoModelForSequenceClassification, Gemma2Config, GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig,
                          MistralConfig, Qwen2Config, Qwen3Config)

FAMILIES = {"gpt2": GPT2Config, "gptj": GPTJConfig, "neox": GPTNeoXConfig, "llama": LlamaConfig, "mistral": MistralConfig,
            "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma2": Gemma2Config}


def make_model(path: Path, family: str, options: dict, seed: int, reward_sd: float, probes: list[list[int]],
               dtype: torch.dtype, shard: str | None) -> None:
    """Writes config.json and safetensors. probes: token ids, over which the rewards get the wanted spread."""
    torch.manual_seed(seed)
    config = FAMILIES[family](**options)
    config.architectures = [FAMILIES[family].__name__.replace("Config", "ForSequenceClassification")]
    net = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
    for name, p in net.named_parameters():
        _fill(name, p, family)
    with torch.no_grad():
        rewards = torch.cat([net(torch.tensor([ids])).logits for ids in probes])
        net.score.weight *= reward_sd / rewards.std(dim=0).clamp_min(1e-6)[:, None]
    kwargs = {"max_shard_size": shard} if shard else {}
    net.to(dtype).save_pretrained(path, safe_serialization=True, **kwargs)


def _fill(name: str, p: torch.nn.Parameter, family: str) -> None:
    conv1d = family == "gpt2" and (".c_" in name)  # stored [in, out]
    fan_in = p.shape[0] if conv1d or p.dim() == 1 else p.shape[1]
    with torch.no_grad():
        if "norm" in name or "ln_" in name:
            mean = 0.0 if name.endswith("bias") or family == "gemma2" else 1.0  # Gemma stores w - 1
            p.copy_(mean + (0.1 if name.endswith("bias") else 0.2) * torch.randn_like(p))
        elif name.endswith("bias"):
            p.copy_(0.2 * torch.randn_like(p))
        elif "wpe" in name:
            p.copy_(0.5 * torch.randn_like(p))
        elif "wte" in name or "embed" in name:
            p.copy_(torch.randn_like(p))
        elif any(part in name for part in ("q_proj", "k_proj", "c_attn", "query_key_value")):
            p.copy_(torch.randn_like(p) * 1.6 / fan_in**0.5)
        else:
            p.copy_(torch.randn_like(p) * 1.1 / fan_in**0.5)


def spelled_as_v4(path: Path) -> None:
    """config.json as transformers 4 wrote it: rope_theta, rope_scaling, rotary_pct, torch_dtype, no layer_types."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters", None)
    config.pop("layer_types", None)
    if rope and config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = rope.pop("rope_theta")
        config["rotary_pct"] = rope.pop("partial_rotary_factor")
    elif rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope:
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.46.3"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class Fit:
    """Directions, biases and thresholds that suit activations x (n, d)."""

    def __init__(self, x: torch.Tensor, m: int, l0: float, seed: int, subtract: bool):
        g = torch.Generator().manual_seed(seed)
        n, d = x.shape
        self.x, self.m, self.l0, self.g = x, m, l0, g
        self.b_dec = x.mean(0) + 0.05 * x.std() * torch.randn(d, generator=g)
        pick = torch.randint(n, (m,), generator=g)
        centred = x - x.mean(0)
        base = centred[pick] / centred[pick].norm(dim=1, keepdim=True)
        noise = torch.randn(m, d, generator=g) / d**0.5
        self.enc = _unit(base + noise)  # (m, d)
        self.dec = _unit(base + 0.7 * noise + 0.4 * torch.randn(m, d, generator=g) / d**0.5)
        self.dec = self.dec * (0.5 + torch.rand(m, 1, generator=g))
        self.pre = (x - self.b_dec if subtract else x) @ self.enc.T

    def quantile(self) -> torch.Tensor:
        """Per feature, a pre-activation passed by about the share of tokens that makes the wanted L0 on average.

        It stands in the middle of a wide gap between two tokens: at a token's own value, rounding would decide.
        """
        share = (self.l0 / self.m) * 2 * torch.rand(self.m, generator=self.g)
        rank = ((1 - share) * (self.x.shape[0] - 8)).long()
        near = self.pre.sort(dim=0).values.T.gather(1, rank[:, None] + torch.arange(8)[None])  # (m, 8)
        return _middle_of_widest_gap(near)

    def randn(self, *shape) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g)

    def scaled_dec(self, f: torch.Tensor) -> torch.Tensor:
        """Decoder rows scaled so that the reconstruction has the activations' size."""
        y, want = f @ self.dec, self.x - self.b_dec
        return self.dec * float((y * want).sum() / (y * y).sum().clamp_min(1e-9))


def _middle_of_widest_gap(values: torch.Tensor) -> torch.Tensor:
    """values (m, n), each row ascending; (m)."""
    at = (values[:, 1:] - values[:, :-1]).argmax(dim=1, keepdim=True)
    return ((values.gather(1, at) + values.gather(1, at + 1)) / 2)[:, 0]


def _unit(w: torch.Tensor) -> torch.Tensor:
    return w / w.norm(dim=1, keepdim=True)


def make_lens(path: Path, arch: str, fit: Fit, hook: str, cfg: dict) -> None:
    """SAELens: standard, gated, topk or jumprelu, saved by SAE.save_model."""
    from sae_lens.saes.sae import SAE, SAEMetadata

    spread = fit.pre.std()
    config = {"architecture": arch, "d_in": fit.x.shape[1], "d_sae": fit.m, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", **cfg}
    config["metadata"] = SAEMetadata(hook_name=hook, model_name="zoo", prepend_bos=True, context_size=128).to_dict()
    q = fit.quantile()
    tensors = {"W_enc": fit.enc.T, "b_dec": fit.b_dec}
    if arch == "standard":
        tensors["b_enc"] = -q
        f = torch.relu(fit.pre - q)
    elif arch == "jumprelu":
        tensors["b_enc"] = 0.1 * spread * fit.randn(fit.m)
        p = fit.pre + tensors["b_enc"]
        tensors["threshold"] = (q + tensors["b_enc"]).clamp_min(0.05 * float(spread))
        f = torch.relu(p) * (p > tensors["threshold"])
    elif arch == "gated":
        tensors["b_gate"], tensors["r_mag"] = -q, 0.2 * fit.randn(fit.m)
        tensors["b_mag"] = 0.3 * spread * fit.randn(fit.m)
        f = (fit.pre > q) * torch.relu(fit.pre * tensors["r_mag"].exp() + tensors["b_mag"])
    elif arch in ("batchtopk", "matryoshka_batchtopk"):
        tensors["b_enc"] = 0.1 * spread * fit.randn(fit.m)
        tensors["topk_threshold"] = _threshold(torch.relu(fit.pre + tensors["b_enc"]), int(fit.l0)).double()
        p = fit.pre + tensors["b_enc"]
        f = torch.relu(p) * (p > tensors["topk_threshold"])
    else:
        tensors["b_enc"] = 0.1 * spread * fit.randn(fit.m)
        top = (fit.pre + tensors["b_enc"]).topk(config["k"], dim=-1)
        f = torch.zeros_like(fit.pre).scatter_(-1, top.indices, top.values.relu())
    tensors["W_dec"] = fit.scaled_dec(f)
    if arch in ("batchtopk", "matryoshka_batchtopk"):
        _save_batchtopk(path, arch, tensors, fit, config)
        return
    sae = SAE.from_dict(config)
    sae.load_state_dict({k: v.contiguous() for k, v in tensors.items()}, strict=True)
    if config["dtype"] != "float32":
        sae = sae.to(dtype=getattr(torch, config["dtype"]))
    sae.save_model(path)


def _save_batchtopk(path: Path, arch: str, tensors: dict, fit: Fit, config: dict) -> None:
    """Trained with a batch's top k, exported by the library for inference (a JumpReLU with one threshold)."""
    import sae_lens

    kind, more = ("BatchTopK", {}) if arch == "batchtopk" else ("MatryoshkaBatchTopK", {"matryoshka_widths": [fit.m // 3, fit.m]})
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=fit.x.shape[1], d_sae=fit.m, k=float(fit.l0), rescale_acts_by_decoder_norm=False,
                                                        **more)
    cfg.metadata.__dict__.update(config["metadata"])
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
    sae.topk_threshold = tensors.pop("topk_threshold")
    for name, value in tensors.items():
        getattr(sae, name).data = value.contiguous()
    sae.save_inference_model(path)


def _threshold(p: torch.Tensor, k: int) -> torch.Tensor:
    """A value in a wide gap that about k of a row's pre-activations p (n, m) pass on average."""
    wanted = p.shape[0] * (p.shape[1] - k)
    return _middle_of_widest_gap(p.flatten().sort().values[None, wanted - 50 : wanted + 50]).reshape(())


def _dict_state(name: str, fit: Fit, k: int) -> tuple[dict, torch.Tensor]:
    """A class's parameters but for its matrices, and the features they give."""
    spread = fit.pre.std()
    if name == "GatedAutoEncoder":
        q = fit.quantile()
        state = {"gate_bias": -q, "r_mag": 0.2 * fit.randn(fit.m), "mag_bias": 0.3 * spread * fit.randn(fit.m), "decoder_bias": fit.b_dec}
        return state, (fit.pre > q) * torch.relu(fit.pre * state["r_mag"].exp() + state["mag_bias"])
    if name == "AutoEncoder":
        q = fit.quantile()
        return {"bias": fit.b_dec, "encoder.bias": -q}, torch.relu(fit.pre - q)
    if name == "AutoEncoderNew":
        q = fit.quantile()
        return {"decoder.bias": fit.b_dec, "encoder.bias": -q}, torch.relu(fit.pre - q)
    bias = 0.1 * spread * fit.randn(fit.m)
    p = fit.pre + bias
    if name == "JumpReluAutoEncoder":
        threshold = (fit.quantile() + bias).clamp_min(0.05 * float(spread))
        return {"b_enc": bias, "b_dec": fit.b_dec, "threshold": threshold}, torch.relu(p) * (p > threshold)
    if name == "AutoEncoderTopK":
        top = torch.relu(p).topk(k, dim=-1)
        state = {"encoder.bias": bias, "b_dec": fit.b_dec, "threshold": torch.tensor(-1.0), "k": torch.tensor(k, dtype=torch.int)}
        return state, torch.zeros_like(p).scatter_(-1, top.indices, top.values)
    threshold = _threshold(torch.relu(p), k)
    state = {"b_dec": fit.b_dec, "threshold": threshold, "k": torch.tensor(k, dtype=torch.int)}
    state["b_enc" if name.startswith("Matryoshka") else "encoder.bias"] = bias
    return state, torch.relu(p) * (torch.relu(p) > threshold)


def _dict_class(name: str, d: int, m: int, k: int):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    if name == "MatryoshkaBatchTopKSAE":
        return matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(d, m, k, [m // 3, m - m // 3])
    if name in ("BatchTopKSAE", "AutoEncoderTopK"):
        return getattr(batch_top_k if name == "BatchTopKSAE" else top_k, name)(d, m, k)
    return getattr(dictionary, name)(d, m)


def make_dict(path: Path, name: str, fit: Fit, layer: int, k: int, keep_pickle: bool) -> None:
    """A class of dictionary_learning, as ae.pt (kept if asked for) and as ae.safetensors."""
    d = fit.x.shape[1]
    sae = _dict_class(name, d, fit.m, k)
    state, f = _dict_state(name, fit, k)
    if hasattr(sae, "W_enc"):
        state |= {"W_enc": fit.enc.T, "W_dec": fit.scaled_dec(f)}
    else:
        state |= {"encoder.weight": fit.enc, "decoder.weight": fit.scaled_dec(f).T}
    sae.load_state_dict({**sae.state_dict(), **state})
    path.mkdir(parents=True)
    if keep_pickle:
        torch.save(sae.state_dict(), path / "ae.pt")
    save_file({key: v.contiguous() for key, v in sae.state_dict().items()}, path / "ae.safetensors")
    trainer = {"dict_class": name, "trainer_class": name, "activation_dim": d, "dict_size": fit.m, "layer": layer,
               "lm_name": "zoo", "submodule_name": f"resid_post_layer_{layer}"}
    if "k" in state:
        trainer["k"] = k
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}, indent=4))


def make_sparsify(path: Path, fit: Fit, k: int) -> None:
    """EleutherAI sparsify has no package here: its files, by hand."""
    bias = 0.1 * fit.pre.std() * fit.randn(fit.m)
    top = torch.relu(fit.pre + bias).topk(k, dim=-1)
    f = torch.zeros_like(fit.pre).scatter_(-1, top.indices, top.values)
    path.mkdir(parents=True)
    save_file({"encoder.weight": fit.enc.contiguous(), "encoder.bias": bias, "W_dec": fit.scaled_dec(f).contiguous(), "b_dec": fit.b_dec},
              path / "sae.safetensors")
    (path / "cfg.json").write_text(json.dumps({"num_latents": fit.m, "expansion_factor": 0, "k": k, "d_in": fit.x.shape[1], "activation": "topk"}))


def make_gemma_scope(path: Path, fit: Fit) -> None:
    """Gemma Scope's params.npz: a JumpReLU without subtraction."""
    import numpy as np

    q, spread = fit.quantile(), fit.pre.std()
    bias = 0.1 * spread * fit.randn(fit.m)
    threshold = (q + bias).clamp_min(0.05 * float(spread))
    p = fit.pre + bias
    path.mkdir(parents=True)
    np.savez(path / "params.npz", W_enc=fit.enc.T.numpy(), b_enc=bias.numpy(), threshold=threshold.numpy(),
             W_dec=fit.scaled_dec(torch.relu(p) * (p > threshold)).numpy(), b_dec=fit.b_dec.numpy())
