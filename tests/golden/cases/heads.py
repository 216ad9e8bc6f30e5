"""Checkpoints with the heads of other trainers: a seeded base model whose files are rewritten as that trainer writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _normal(g: torch.Generator, *shape) -> torch.Tensor:
    return torch.randn(*shape, generator=g) * (1.2 / shape[-1] ** 0.5 if len(shape) > 1 else 0.3)


def _embedding(tensors: dict) -> str:
    return next(k for k in tensors if k.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")))


def _openrlhf(t, c, g, d):
    c.update(architectures=["RewardModel"], value_head_prefix="value_head", normalize_reward=True, mean=0.4, std=1.7)
    return t | {"value_head.weight": _normal(g, 1, d)}


def _score_outputs(t, c, g, d):
    c.pop("num_labels", None)
    c["id2label"] = {str(n): f"LABEL_{n}" for n in range(3)}
    return t | {"score.weight": _normal(g, 3, d), "score.bias": _normal(g, 3)}


def _score_plain(t, c, g, d):
    return t | {"score.weight": _normal(g, 1, d)}


def _trlx(t, c, g, d):
    c["architectures"] = ["GPTJForCausalLM"]
    return t | {"v_head.weight": _normal(g, 1, d)}


def _trl(t, c, g, d):
    c["architectures"] = ["LlamaForCausalLM"]
    lm_head = {"lm_head.weight": t[_embedding(t)].clone()}
    return t | lm_head | {"v_head.summary.weight": _normal(g, 1, d), "v_head.summary.bias": _normal(g, 1)}


def _grm(t, c, g, d):
    c.update(architectures=["GRewardModel"], vhead_layer_type="mlp", vhead_num_neurons=40, vhead_num_layers=2)
    out = {f"model.{k}": v for k, v in t.items()}
    for n, (rows, columns) in enumerate([(40, d), (40, 40), (1, 40)]):
        out |= {f"v_head.summary.{2 * n}.weight": _normal(g, rows, columns), f"v_head.summary.{2 * n}.bias": _normal(g, rows)}
    return out


def _two_layer(t, c, g, d):
    c["architectures"] = ["Qwen2ForRewardModel"]
    return t | {"score.0.weight": _normal(g, d, d), "score.0.bias": _normal(g, d), "score.2.weight": _normal(g, 1, d),
                "score.2.bias": _normal(g, 1)}


def _ultrarm(t, c, g, d):
    c["architectures"] = ["LlamaRewardModel"]
    return t | {"regression_head.weight": _normal(g, 1, d)}


def _openassistant(t, c, g, d):
    if c["model_type"] == "gpt_neox":
        c["model_type"] = "gpt_neox_reward_model"
    c.update(architectures=["GPTNeoXRewardModel"], pooling="mean")
    return t | {"out_proj.weight": _normal(g, 1, d), "out_proj.bias": _normal(g, 1)}


def _beaver(t, c, g, d):
    c.update(architectures=["LlamaForScore"], score_dim=2, score_bias=True, do_normalize=True)
    return t | {"score_head.weight": _normal(g, 2, d), "score_head.bias": _normal(g, 2), "normalizer.mean": torch.tensor([3.0, -2.0]),
                "normalizer.var": torch.tensor([4.0, 0.3]), "normalizer.count": torch.tensor([7])}


KINDS = {"openrlhf": _openrlhf, "score_outputs": _score_outputs, "score": _score_plain, "trlx": _trlx, "trl": _trl, "grm": _grm,
         "two_layer": _two_layer, "ultrarm": _ultrarm, "openassistant": _openassistant, "beaver": _beaver}
LAST = {"openrlhf": "value_head", "score_outputs": "score", "score": "score", "trlx": "v_head", "trl": "v_head.summary",
        "grm": "v_head.summary.4", "two_layer": "score.2", "ultrarm": "regression_head", "openassistant": "out_proj",
        "beaver": "score_head"}


def rewrite(path: Path, kind: str, seed: int, reward_sd: float, probes: list[list[int]], options: dict, apart: bool) -> None:
    """Gives the checkpoint at `path` another head; apart: into a file of its own, value_head.safetensors (LLaMA-Factory)."""
    from ref.heads import Head, load_base, spread

    file, g = path / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors, config = load_file(file), json.loads((path / "config.json").read_text())
    tensors.pop("score.weight", None)
    d = config.get("hidden_size") or config["n_embd"]
    dtype = next(iter(tensors.values())).dtype
    tensors = {k: v.to(dtype).contiguous() for k, v in KINDS[kind](tensors, config, g, d).items()}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, file)
    base, head = load_base(path, torch.float32).eval(), Head(path, options, torch.float32)
    with torch.no_grad():
        rewards = [float(head(base(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0], len(ids) - 1)) for ids in probes]
    tensors[f"{LAST[kind]}.weight"] = (tensors[f"{LAST[kind]}.weight"].float() * reward_sd / spread(rewards)).to(dtype)
    if apart:
        alone = {k: tensors.pop(k) for k in list(tensors) if k.startswith(LAST[kind])}
        save_file(alone, path / "value_head.safetensors")
    save_file(tensors, file)
