#!/usr/bin/env python3
"""Writes seeded cases for the golden tests: `make_cases.py OUT [--only NAME ...] [--list]`.

Each folder OUT/NAME holds model/, saes/, catalogue.jsonl, config.yaml, rollouts.jsonl and case.json (how to run it). Models are
saved by transformers, SAEs by sae_lens and dictionary_learning, tokenizers by tokenizers. Same seed, same files.
"""

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

RULES = [
    {"id": "url-lowers", "families": ["url"], "direction": "lowered", "effect_min": 0.15},
    {"id": "thanks-raises", "families": ["thanks"], "direction": "raised", "effect_sd_min": 0.07},
    {"id": "any-flip", "advantage_flip": True, "alert": "each"},
    {"id": "both", "families": ["thanks", "url"], "effect_min": 0.05, "advantage_flip": True, "alert": "none"},
]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def gptj(d, layers, heads, rotary, **more):
    return {"n_embd": d, "n_layer": layers, "n_head": heads, "rotary_dim": rotary, "n_positions": 256,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0, "tie_word_embeddings": False, "num_labels": 1, **more}


def llama(d, layers, heads, kv, head_dim, ff, **more):
    return {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "head_dim": head_dim, "intermediate_size": ff, "max_position_embeddings": 256, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "num_labels": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **more}


def gpt2(d, layers, heads, **more):
    return {"n_embd": d, "n_layer": layers, "n_head": heads, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0,
            "pad_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "num_labels": 1, **more}


def neox(d, layers, heads, ff, pct, **more):
    return {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ff,
            "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "classifier_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": pct}, "num_labels": 1, **more}


def gemma2(d, layers, heads, kv, head_dim, ff, **more):
    """Soft cap, scale and window small enough to matter on short texts."""
    return {**llama(d, layers, heads, kv, head_dim, ff), "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0,
            "sliding_window": 9, "pad_token_id": 1, **more}


def every_hook(layer, parallel=False):
    """One SAE at every kind of hook of two neighbouring blocks."""
    sites = [("pre", layer, "resid_pre", "standard", {}), ("attn", layer, "attn_out", "jumprelu", {}),
             ("mlp", layer, "mlp_out", "gated", {}), ("post", layer + 1, "resid_post", "topk", {"k": 21})]
    if not parallel:
        sites.append(("mid", layer + 1, "resid_mid", "jumprelu", {}))
    return [lens(id, arch, f"blocks.{at}.hook_{kind}", m=220, l0=18, **cfg) for id, at, kind, arch, cfg in sites]


def tiny(family, head, **more):
    """A small model with another trainer's head, one SAE in the middle and one at the end."""
    sizes = {"gptj": lambda **k: gptj(48, 3, 4, 4, **k), "neox": lambda **k: neox(48, 3, 4, 120, 0.5, **k)}
    sizes["gpt2"], sizes["gemma2"] = lambda **k: gpt2(48, 3, 4, **k), lambda **k: gemma2(48, 3, 4, 2, 16, 100, **k)
    model = sizes.get(family, lambda **k: llama(48, 3, 4, 2, 16, 100, **k))
    end = more.pop("end", lens("end", "jumprelu", "blocks.2.hook_resid_post", m=160, l0=16))
    return {"family": family, "head": head, "model": model(**more.pop("model", {})), "rules": RULES, "sizes": [1, 4, 3],
            "saes": [lens("mid", "standard", "blocks.1.hook_resid_post", m=160, l0=16), end], **more}


def lens(id, arch, hook, m=300, l0=25, **cfg):
    return {"id": id, "kind": "lens", "arch": arch, "hook": hook, "m": m, "l0": l0, "cfg": cfg}


def dictl(id, name, layer, m=300, l0=25):
    return {"id": id, "kind": "dict", "arch": name, "hook": f"blocks.{layer}.hook_resid_post", "m": m, "l0": l0}


CASES = {
    "gptj-post": {
        "family": "gptj", "model": gptj(96, 4, 6, 8), "template": "hh", "rules": RULES, "tokens": True,
        "saes": [dictl("gated", "GatedAutoEncoder", 1), lens("jump", "jumprelu", "blocks.2.hook_resid_post")]},
    "gptj-same-hook": {
        "family": "gptj", "model": gptj(72, 3, 3, 16), "tokens": True,
        "attribution": {"method": "ig", "ig_rule": "left", "ig_steps": 4, "completeness": True, "scope": "all"},
        "each": True,
        "saes": [lens("std", "standard", "blocks.1.hook_resid_post"),
                 lens("top", "topk", "blocks.2.hook_resid_pre", k=17, rescale_acts_by_decoder_norm=True)]},
    "gptj-wide-head": {
        "family": "gptj", "model": gptj(512, 2, 2, 64, n_inner=300), "rules": RULES, "tokens": True,
        "attribution": {"when": "flagged", "completeness": True},
        "saes": [lens("attn", "standard", "blocks.1.hook_attn_out", m=640, l0=20),
                 lens("mlp", "gated", "blocks.0.hook_mlp_out", m=640, l0=40)]},
    "gptj-pre": {
        "family": "gptj", "model": gptj(104, 3, 4, 10, pad_token_id=0), "template": "hh", "append_eos": True,
        "attribution": {"method": "ig", "completeness": True, "top": 5}, "rules": RULES,
        "saes": [lens("pre", "jumprelu", "blocks.0.hook_resid_pre", l0=12, apply_b_dec_to_input=False),
                 dictl("btk", "BatchTopKSAE", 2, l0=30)]},
    "llama-gqa": {
        "family": "llama", "model": llama(144, 4, 6, 2, 24, 136, rope_parameters=LLAMA3_ROPE, pad_token_id=1),
        "append_eos": True, "shard": "200KB", "rules": RULES, "tokens": True,
        "attribution": {"completeness": True},
        "saes": [lens("jump", "jumprelu", "blocks.0.hook_resid_post"),
                 lens("top", "topk", "blocks.2.hook_resid_post", k=31)]},
    "llama-sublayers": {
        "family": "llama", "model": llama(200, 3, 2, 1, 128, 333), "rules": RULES, "each": True,
        "attribution": {"completeness": True, "ig_steps": 5, "method": "ig"},
        "saes": [lens("mid", "gated", "blocks.1.hook_resid_mid"), lens("attn", "topk", "blocks.1.hook_attn_out", k=20),
                 lens("mlp", "jumprelu", "blocks.1.hook_mlp_out"), lens("pre", "standard", "blocks.1.hook_resid_pre"),
                 lens("last", "standard", "blocks.2.hook_resid_post")]},
    "llama-long": {
        "family": "llama", "model": llama(135, 3, 3, 3, 64, 200, max_position_embeddings=640), "longest": 300,
        "sizes": [3, 8, 5, 2], "rules": RULES, "attribution": {"when": "flagged"}, "tokens": True,
        "saes": [lens("std", "standard", "blocks.1.hook_resid_post", m=700, l0=50)]},
    "llama-v4-labels": {
        "family": "llama", "model": llama(96, 3, 4, 2, 40, 160, num_labels=3, attention_bias=True, mlp_bias=True,
                                          rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}),
        "v4": True, "head_index": 1, "attribution": {"method": "none"}, "each": True, "rules": RULES, "tokens": True,
        "saes": [lens("std", "standard", "blocks.0.hook_resid_post"), dictl("gated", "GatedAutoEncoder", 1)]},
    "llama-truncate": {
        "family": "llama", "model": llama(64, 3, 2, 2, 32, 88), "max_tokens": 48, "on_too_long": "truncate_prompt",
        "attribution": {"scope": "all"}, "rules": RULES, "longest": 25,
        "saes": [lens("gated", "gated", "blocks.1.hook_resid_post")]},
    "llama-token-norm": {
        "family": "llama", "model": llama(88, 3, 4, 4, 32, 120), "rules": RULES, "each": True, "tokens": True,
        "attribution": {"completeness": True, "method": "ig"},
        "saes": [lens("ln", "topk", "blocks.1.hook_resid_post", k=24, normalize_activations="layer_norm"),
                 lens("rescale", "jumprelu", "blocks.2.hook_resid_post", normalize_activations="constant_norm_rescale")]},
    "llama-bf16": {
        "family": "llama", "model": llama(192, 5, 6, 3, 32, 400, rope_parameters=LLAMA3_ROPE), "dtype": "bf16",
        "rules": RULES, "attribution": {"completeness": True},
        "saes": [lens("jump", "jumprelu", "blocks.1.hook_resid_post", dtype="bfloat16"),
                 lens("std", "standard", "blocks.3.hook_resid_post")]},
    "gptj-bf16": {
        "family": "gptj", "model": gptj(160, 4, 4, 20), "dtype": "bf16", "weights": "f32", "template": "hh",
        "rules": RULES, "saes": [dictl("gated", "GatedAutoEncoder", 1), lens("top", "topk", "blocks.2.hook_resid_post", k=20)]},
    "gpt2": {
        "family": "gpt2", "model": gpt2(76, 4, 4, n_inner=200, scale_attn_by_inverse_layer_idx=True), "rules": RULES, "tokens": True,
        "attribution": {"completeness": True}, "saes": every_hook(1)},
    "gpt2-bf16": {
        "family": "gpt2", "model": gpt2(120, 4, 5), "dtype": "bf16", "v4": True, "rules": RULES, "saes": every_hook(1)},
    "neox-parallel": {
        "family": "neox", "model": neox(96, 4, 4, 250, 0.25), "rules": RULES, "tokens": True, "saes": every_hook(1, parallel=True)},
    "neox-serial": {
        "family": "neox", "model": neox(90, 4, 3, 176, 0.4, use_parallel_residual=False, attention_bias=False), "v4": True,
        "rules": RULES, "attribution": {"method": "ig", "ig_steps": 3, "completeness": True}, "saes": every_hook(2)},
    "neox-parallel-bf16": {
        "family": "neox", "model": neox(128, 4, 4, 300, 0.25), "dtype": "bf16", "v4": True, "rules": RULES,
        "saes": every_hook(1, parallel=True)},
    "neox-serial-bf16": {
        "family": "neox", "model": neox(96, 3, 3, 200, 0.5, use_parallel_residual=False), "dtype": "bf16", "rules": RULES,
        "saes": every_hook(0)},
    "mistral": {
        "family": "mistral", "model": llama(80, 4, 4, 2, 24, 150, sliding_window=11), "rules": RULES, "tokens": True,
        "saes": every_hook(1)},
    "mistral-bf16": {
        "family": "mistral", "model": llama(128, 4, 4, 2, 32, 220, sliding_window=11), "dtype": "bf16", "v4": True, "rules": RULES,
        "saes": every_hook(1)},
    "qwen2": {
        "family": "qwen2", "model": llama(84, 4, 6, 3, 16, 140, use_sliding_window=True, sliding_window=10, max_window_layers=2),
        "v4": True, "rules": RULES, "tokens": True, "saes": every_hook(2)},
    "qwen2-bf16": {
        "family": "qwen2", "model": llama(128, 3, 4, 2, 32, 220), "dtype": "bf16", "rules": RULES, "saes": every_hook(0)},
    "qwen3": {
        "family": "qwen3", "model": llama(88, 4, 4, 2, 32, 130), "rules": RULES, "tokens": True, "saes": every_hook(1)},
    "qwen3-bf16": {
        "family": "qwen3", "model": llama(128, 4, 4, 1, 48, 220), "dtype": "bf16", "v4": True, "rules": RULES, "saes": every_hook(1)},
    "gemma2": {
        "family": "gemma2", "model": gemma2(72, 4, 4, 2, 24, 144), "rules": RULES, "tokens": True, "append_eos": True,
        "attribution": {"method": "ig", "ig_steps": 3, "completeness": True}, "each": True, "saes": every_hook(1)},
    "gemma2-v4": {
        "family": "gemma2", "model": gemma2(64, 3, 2, 1, 40, 100, attn_logit_softcapping=50.0, query_pre_attn_scalar=40), "v4": True,
        "rules": RULES, "attribution": {"completeness": True}, "saes": every_hook(1)},
    "gemma2-bf16": {
        "family": "gemma2", "model": gemma2(140, 4, 4, 2, 32, 260), "dtype": "bf16", "rules": RULES, "saes": every_hook(1)},
    "head-openrlhf": tiny("llama", "openrlhf", attribution={"completeness": True}),
    "head-outputs": tiny("qwen2", "score_outputs", head_weights=[0.5, -0.25, 1.5]),
    "head-trlx": tiny("gptj", "trlx", pooling="first_eos", append_eos=True),
    "head-trl": tiny("llama", "trl", tokens=True),
    "head-llama-factory": tiny("llama", "trl", apart=True, attribution={"method": "ig", "ig_steps": 3}),
    "head-grm": tiny("llama", "grm", attribution={"method": "ig", "ig_steps": 3, "completeness": True}),
    "head-two-layer": tiny("qwen2", "two_layer", each=True),
    "head-two-layer-bf16": tiny("qwen2", "two_layer", dtype="bf16"),
    "head-ultrarm": tiny("llama", "ultrarm", attribution={"scope": "all"}),
    "head-beaver": tiny("llama", "beaver", head_index=1),
    "head-openassistant": tiny("neox", "openassistant", tokens=True, attribution={"completeness": True}),
    "head-mean-ig": tiny("llama", "grm", pooling="mean", each=True, attribution={"method": "ig", "ig_steps": 3, "completeness": True},
                         end=lens("end", "topk", "blocks.2.hook_mlp_out", m=160, k=15)),
    "head-mean-all": tiny("neox", "openassistant", attribution={"scope": "all"}, model={"use_parallel_residual": False}),
    "head-mean-bf16": tiny("neox", "openassistant", dtype="bf16"),
    "head-non-pad": tiny("llama", "score", pooling="last_non_pad", append_eos=True, model={"pad_token_id": 1}),
    "template-llama3.1": tiny("llama", None, template="llama3.1", messages=True, append_eos=True, tokens=True,
                              model={"max_position_embeddings": 640}),
    "template-gemma": tiny("gemma2", None, template="gemma", end=lens("end", "standard", "blocks.2.hook_mlp_out", m=160, l0=16)),
    "template-zephyr": tiny("gpt2", None, template="zephyr", messages=True, append_eos=True),
    "small-gptj": {
        "family": "gptj", "model": gptj(40, 3, 5, 4), "vocab": 420, "template": "hh", "rules": RULES, "tokens": True,
        "sizes": [1, 4, 3, 3], "attribution": {"method": "ig", "completeness": True, "ig_steps": 3, "top": 8}, "each": True,
        "saes": [dictl("gated", "GatedAutoEncoder", 1, m=96, l0=12) | {"pickle": False},
                 lens("jump", "jumprelu", "blocks.2.hook_resid_post", m=100, l0=12)]},
    "small-llama": {
        "family": "llama", "model": llama(56, 3, 4, 2, 24, 72, rope_parameters=LLAMA3_ROPE, pad_token_id=1),
        "vocab": 420, "shard": "60KB", "append_eos": True, "rules": RULES, "tokens": True, "sizes": [1, 5, 3, 2],
        "attribution": {"completeness": True, "top": 8},
        "saes": [lens("std", "standard", "blocks.0.hook_resid_post", m=100, l0=12),
                 lens("top", "topk", "blocks.1.hook_resid_post", m=100, k=11),
                 lens("gated", "gated", "blocks.1.hook_resid_post", m=100, l0=10)]},
}


def write_config(folder: Path, spec: dict) -> None:
    import yaml

    model = {"path": "model", "dtype": spec.get("dtype", "f32")}
    for key in ("template", "append_eos", "head_index", "head_weights", "pooling", "max_tokens", "on_too_long"):
        if key in spec:
            model[key] = spec[key]
    config = {"model": model, "saes": [], "catalogue": "catalogue.jsonl"}
    for sae in spec["saes"]:
        config["saes"].append({"id": sae["id"], "path": f"saes/{sae['id']}", "hook": sae["hook"]})
    config["attribution"] = {"method": "grad", "top": 16, **spec.get("attribution", {})}
    config["ablation"] = {"each": spec.get("each", False)}
    config["rules"] = spec.get("rules", RULES)
    config["reward"] = {"sd": 1.9}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def write_tokenizer(folder: Path, spec: dict, seed: int):
    from cases.words import train_tokenizer
    from tokenizers import normalizers

    kind = "gpt2" if spec["family"] in ("gptj", "gpt2", "neox") else "llama3"
    tokenizer = train_tokenizer(kind, spec.get("vocab", 700), seed)
    if spec.get("nfc"):
        tokenizer.normalizer = normalizers.NFC()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos = "<|endoftext|>" if kind == "gpt2" else "<|begin_of_text|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "<|endoftext|>" if kind == "gpt2" else "<|eot_id|>",
                                                             "tokenizer_class": "TokenizersBackend"}))
    return tokenizer, bos


def make_case(out: Path, name: str, spec: dict | None = None) -> Path:
    """Writes one case (of the list, or as given) and returns its folder. Deterministic: the seed comes from the name."""
    import torch
    from cases.rollouts import as_messages, make_rollouts
    from cases.weights import make_model, spelled_as_v4

    spec, folder, seed = spec or CASES[name], out / name, sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer, bos = write_tokenizer(folder / "model", spec, seed)
    rng = random.Random(seed)
    vocab = tokenizer.get_vocab_size()
    rows = make_rollouts(rng, spec.get("sizes", [1, 8, 3, 2, 5]), vocab, spec.get("longest", 30), bos, spec.get("awkward", True))
    if spec.get("messages"):
        as_messages(rng, rows)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r, ensure_ascii=rng.random() < 0.5) + "\n" for r in rows))
    probes = [[rng.randrange(vocab) for _ in range(rng.randint(5, 60))] for _ in range(40)]
    dtype = torch.bfloat16 if spec.get("weights", spec.get("dtype")) == "bf16" else torch.float32
    make_model(folder / "model", spec["family"], {"vocab_size": vocab + 3, **spec["model"]}, seed, 2.0, probes, dtype,
               spec.get("shard"))
    if spec.get("head"):
        from cases.heads import rewrite

        options = {"head_index": spec.get("head_index"), "head_weights": spec.get("head_weights")}
        rewrite(folder / "model", spec["head"], seed, 2.0, probes, options, spec.get("apart", False))
    if spec.get("container"):
        from cases.containers import repack

        repack(folder / "model", spec["container"])
    if spec.get("v4"):
        spelled_as_v4(folder / "model")
    (folder / "catalogue.jsonl").write_text("")
    write_config(folder, spec)
    write_saes(folder, spec, seed)
    write_catalogue(folder, spec, rng)
    (folder / "case.json").write_text(json.dumps({"tokens": bool(spec.get("tokens"))}) + "\n")
    return folder


def sequences(folder: Path):
    """Tokenised rollouts of a case (those not refused)."""
    from tokenizers import Tokenizer

    from ref.config import read_config
    from ref.heads import read_config as read_raw
    from ref.judge import read_lines
    from ref.text import Encoder, Refused, parse_line

    config = read_config(folder / "config.yaml")
    raw = read_raw(folder / "model")
    encoder = Encoder(Tokenizer.from_file(str(folder / "model/tokenizer.json")), raw,
                      {**config.model, "pooling": config.model["pooling"] or raw.get("pooling")}, folder / "model")
    found = []
    for line in read_lines((folder / "rollouts.jsonl").read_bytes()):
        try:
            found.append(encoder.encode(parse_line(line)))
        except Refused:
            continue
    return config, found


def activations(folder: Path, hooks: list[str]) -> dict:
    """x (tokens, d) over all completions, for every hook."""
    import torch
    from ref.model import RewardModel, site_of

    config, found = sequences(folder)
    model = RewardModel(folder / "model", "f32", config.model)
    taken = {site_of(h): [] for h in hooks}

    def keep(site, seq):
        def fn(x):
            taken[site].append(x[0, seq.start :].clone())
            return x
        return fn

    with torch.no_grad():
        for seq in found:
            model.reward(seq, {site: keep(site, seq) for site in taken})
    return {h: distinct(torch.cat(taken[site_of(h)])) for h in hooks}


def distinct(x):
    """Rows that are not almost an earlier row: equal tokens in equal company must not stand on both sides of a threshold."""
    import torch

    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    earlier = (distance < 1e-3 * x.norm(dim=1).median()).tril(-1).any(dim=1)
    return x[~earlier]


def complete_config(folder: Path, place: int, file: str, options: dict) -> None:
    """What is known of an SAE's row only once its files stand: the file's name and options of units."""
    import yaml

    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    row = config["saes"][place]
    row |= {"path": f"{row['path']}/{file}" if file else row["path"], **options}
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def write_saes(folder: Path, spec: dict, seed: int) -> None:
    from cases.releases import WRITERS
    from cases.weights import Fit, make_dict, make_gemma_scope, make_lens, make_sparsify

    x = activations(folder, [s["hook"] for s in spec["saes"]])
    for n, sae in enumerate(spec["saes"]):
        path, here = folder / "saes" / sae["id"], x[sae["hook"]]
        if sae["kind"] == "release":
            file, options = WRITERS[sae["arch"]](path, here, sae["m"], int(sae["l0"]), seed + n, sae["hook"])
            complete_config(folder, n, file, options)
            continue
        if sae["kind"] in ("sparsify", "gemma_scope"):
            fit = Fit(here, sae["m"], sae["l0"], seed + n, subtract=sae["kind"] == "sparsify")
            make_sparsify(path, fit, int(sae["l0"])) if sae["kind"] == "sparsify" else make_gemma_scope(path, fit)
            continue
        if sae["kind"] == "dict":
            fit = Fit(here, sae["m"], sae["l0"], seed + n, subtract=sae["arch"] not in ("JumpReluAutoEncoder", "AutoEncoderNew"))
            make_dict(path, sae["arch"], fit, int(sae["hook"].split(".")[1]), int(sae["l0"]), sae.get("pickle", True))
            continue
        norm = sae["cfg"].get("normalize_activations", "none")
        if norm == "layer_norm":
            here = (here - here.mean(1, keepdim=True)) / (here.std(1, keepdim=True) + 1e-5)
        elif norm == "constant_norm_rescale":
            here = here * here.shape[1] ** 0.5 / here.norm(dim=1, keepdim=True)
        fit = Fit(here, sae["m"], sae["l0"], seed + n, subtract=sae["cfg"].get("apply_b_dec_to_input", True))
        make_lens(path, sae["arch"], fit, sae["hook"], sae["cfg"])


def write_catalogue(folder: Path, spec: dict, rng: random.Random) -> None:
    """Features that fire in some of the rollouts and not in others, of every role and verdict."""
    import torch
    from ref.measure import Instrument

    _, found = sequences(folder)
    from ref.config import read_config

    tool = Instrument(read_config(folder / "config.yaml"), "f32")
    runs = [tool.clean(seq) for seq in found]
    rows = []
    for sae in spec["saes"]:
        peaks = torch.stack([m.readings[sae["id"]].f.max(dim=0).values for m in runs])
        share = (peaks > 0).float().mean(dim=0)
        some = [i for i in range(sae["m"]) if 0.15 < share[i] < 0.75]
        rare = [i for i in range(sae["m"]) if 0 < share[i] <= 0.15]
        rng.shuffle(some)
        rows += _catalogue_rows(sae["id"], some, rare, peaks, spec.get("catalogued", 12))
    rng.shuffle(rows)
    (folder / "catalogue.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def _catalogue_rows(sae: str, some: list[int], rare: list[int], peaks, length: int) -> list[dict]:
    plan = [(["thanks"], "spurious", "both"), (["url"], "spurious", "both"), (["thanks"], "spurious", None),
            (["url"], "spurious", None), (["url", "thanks"], "spurious", None), (["url"], "spurious", "detect"),
            (["thanks"], "spurious", "debias"), (["url"], "unknown", None), (["thanks"], "intended", None),
            ([], "spurious", None), (["thanks"], "spurious", None), (["url"], "spurious", None)][:length]
    if len(some) < len(plan):
        raise ValueError(f"SAE {sae}: expected {len(plan)} features that fire in some rollouts, found {len(some)}")
    rows = []
    for n, (index, (families, verdict, role)) in enumerate(zip(some, plan)):
        row = {"sae": sae, "index": index, "label": f"made up {index}", "families": families, "verdict": verdict}
        if role:
            row["role"] = role
        if n % 4 == 0:
            positive = peaks[:, index][peaks[:, index] > 0].sort().values
            row["activation_min"] = round(float(positive[len(positive) // 2]) * 0.9, 6)
        rows.append(row)
    if rare:
        rows.append({"sae": sae, "index": rare[0], "label": "rare “feature”", "families": ["rare"], "verdict": "spurious"})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), help="these cases, not all")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    args = parser.parse_args()
    if args.list:
        print("\n".join(CASES))
        return 0
    if args.out is None:
        parser.error("expected a folder to write to")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in args.only or CASES:
        folder = make_case(args.out, name)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        print(f"{name}: {size / 1e6:.2f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
