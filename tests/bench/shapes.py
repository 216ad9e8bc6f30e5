"""Cases at real shapes: GPT-J-6B and Llama-3-8B with random weights, made where they are used (nothing is downloaded), and the workloads on them.

A checkpoint of 16 GB is written once, in the safetensors form that everybody reads: numbers drawn by torch on the device, shards written by several
threads. Names and shapes are those of transformers' own model, taken from an instance without storage.
"""

import json
import math
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import case

GPTJ = {"family": "gptj", "hidden_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "rotary_dim": 64, "intermediate_size": 16384, "vocab_size": 50400, "features": 65536, "k": 64}
LLAMA = {"family": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
         "intermediate_size": 14336, "vocab_size": 128256, "features": 65536, "k": 64}
TINY_GPTJ = {**GPTJ, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "rotary_dim": 8,
             "intermediate_size": 128, "vocab_size": 600, "features": 1024, "k": 4}
TINY_LLAMA = {**LLAMA, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "intermediate_size": 112, "vocab_size": 600, "features": 1024, "k": 4}
TITLES = {"gptj": "GPT-J-6B shape", "llama": "Llama-3-8B shape"}
WRITERS = 8
SHARDS = 8


def shape_of(family: str, tiny: bool, layers: int | None = None) -> dict:
    """layers: so many blocks of it instead of all."""
    shape = {"gptj": TINY_GPTJ if tiny else GPTJ, "llama": TINY_LLAMA if tiny else LLAMA}[family]
    return {**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}


def workloads(family: str, tiny: bool) -> list[case.Work]:
    """What is measured: T = 1,024 one by one, groups of 8, and the goals (tokens: tokens/s; a contestant: times faster)."""
    speed = {"gptj": (58000, 36000), "llama": (47000, 30000)}[family]
    alone, grouped = ("usual", "expert", "chain"), ("usual", "expert", "shared", "chain")
    works = [
        case.Work("reward_T1024", "reward", 64, 960, 1, 18, peers=alone, goals={"tokens": speed[0]}),
        case.Work("attr_T1024", "attr", 64, 960, 1, 18, peers=alone, goals={"tokens": speed[1], "expert": 1.15, "usual": 2.0}),
        case.Work("attr_512_512_8", "attr", 512, 512, 8, 4, peers=grouped, goals={"apart": 1.7, "expert": 2.0}),
        case.Work("flag_T1024", "flag", 64, 960, 1, 40, peers=(), goals={"reward only": 1.15}),
    ]
    if tiny:
        import dataclasses
        small = {64: 8, 960: 24, 512: 16}
        works = [dataclasses.replace(w, prompt=small[w.prompt], completion=small[w.completion], group=min(w.group, 4),
                                     groups=w.groups if w.kind == "flag" else 4) for w in works]
    return works


def config_of(shape: dict):
    from transformers import GPTJConfig, LlamaConfig

    common = {"vocab_size": shape["vocab_size"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_labels": 1, "dtype": "bfloat16"}
    if shape["family"] == "gptj":
        config = GPTJConfig(n_embd=shape["hidden_size"], n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
                            n_inner=shape["intermediate_size"], rotary_dim=shape["rotary_dim"], n_positions=case.CONTEXT,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, **common)
        config.architectures = ["GPTJForSequenceClassification"]
    else:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
        config = LlamaConfig(**{k: shape[k] for k in names}, max_position_embeddings=case.CONTEXT, rms_norm_eps=1e-5,
                             rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False, **common)
        config.architectures = ["LlamaForSequenceClassification"]
    return config


def scale_of(name: str, size: tuple) -> tuple[float, float]:
    """Mean and spread that keep a deep random model alive; the score gives rewards a spread of about 2."""
    if "norm" in name or "ln_" in name:
        return (0.0, 0.1) if name.endswith("bias") else (1.0, 0.2)
    if name.endswith("bias"):
        return 0.0, 0.2
    if "score" in name:
        return 0.0, 2.0 / math.sqrt(size[1])
    if "wte" in name or "embed" in name:
        return 0.0, 1.0
    return 0.0, (1.6 if "q_proj" in name or "k_proj" in name else 1.1) / math.sqrt(size[1])


def write_tensors(path: Path, tensors: list[tuple[str, tuple, str, callable]]) -> None:
    """A safetensors file: (name, shape, "BF16" or "F32", a function that gives the tensor on the CPU), one tensor in memory at a time."""
    import torch

    header, at = {}, 0
    for name, size, dtype, _ in tensors:
        bytes_ = math.prod(size) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, at + bytes_]}
        at += bytes_
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, make in tensors:
            data = memoryview(make().contiguous().view(torch.uint8).numpy()).cast("B")
            while data:
                data = data[f.write(data):]


def random_tensor(seed: int, name: str, size: tuple, dtype: str, device: str):
    """Drawn on the device, from a seed of the tensor's own."""
    import torch

    g = torch.Generator(device=device).manual_seed(seed)
    mean, spread = scale_of(name, size)
    kind = torch.bfloat16 if dtype == "BF16" else torch.float32
    return (torch.randn(size, generator=g, device=device, dtype=kind) * spread + mean).cpu()


def make_model(folder: Path, shape: dict, device: str) -> None:
    import torch
    from cases.words import train_tokenizer
    from transformers import AutoModelForSequenceClassification

    config = config_of(shape)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    train_tokenizer("gpt2" if shape["family"] == "gptj" else "llama3", 590, 1).save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        net = AutoModelForSequenceClassification.from_config(config)
    sizes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    shards, names = [[] for _ in range(SHARDS)], [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for seed, (name, size) in enumerate(sorted(sizes.items(), key=lambda kv: -math.prod(kv[1]))):
        lightest = min(range(SHARDS), key=lambda i: sum(math.prod(t[1]) for t in shards[i]))
        shards[lightest].append((name, size, "BF16", lambda seed=seed, name=name, size=size: random_tensor(seed, name, size, "BF16", device)))
    index = {t[0]: names[i] for i, shard in enumerate(shards) for t in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_tensors, [folder / n for n in names], shards))


def make_sae(place: Path, shape: dict, width: int, hook: str, device: str) -> None:
    """A TopK dictionary of random directions in SAELens' form: unit decoder rows, the encoder their transpose, no biases."""
    import torch

    d = shape["hidden_size"]
    place.mkdir(parents=True, exist_ok=True)
    g = torch.Generator(device=device).manual_seed(width)
    rows = torch.nn.functional.normalize(torch.randn(width, d, generator=g, device=device), dim=1)
    write_tensors(place / "sae_weights.safetensors",
                  [("W_enc", (d, width), "F32", lambda: rows.T.contiguous().cpu()), ("W_dec", (width, d), "F32", rows.cpu),
                   ("b_enc", (width,), "F32", lambda: torch.zeros(width)), ("b_dec", (d,), "F32", lambda: torch.zeros(d))])
    (place / "cfg.json").write_text(json.dumps({
        "architecture": "topk", "d_in": d, "d_sae": width, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "k": shape["k"], "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook}}))


def make(folder: Path, shape: dict, device: str, widths: tuple = ()) -> float:
    """Writes model, tokenizer and dictionaries, unless they are there. widths: further ones beside saes/mid. Returns the seconds it took."""
    begin, stamp, wanted = time.monotonic(), folder / "case.json", json.dumps({**shape, "widths": list(widths), "version": 1})
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder / "model", shape, device)
        make_sae(folder / "saes/mid", shape, shape["features"], case.hook_of(shape), device)
        for width in widths:
            make_sae(folder / f"saes/w{width}", shape, width, case.hook_of(shape), device)
        (folder / "catalogue.jsonl").write_text("")
        stamp.write_text(wanted)
    took = time.monotonic() - begin
    print(f"  {folder.name}: made in {took:.1f} s", file=sys.stderr)
    return took
