"""GGUF files for tests: models of transformers written by the gguf library the way llama.cpp's converter writes them, with every row
order it changes changed here by its own formula, so that undoing it is tested against the model and not against our reading of it."""

import numpy as np

QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # the library quantises these; of the others it only reads blocks
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_COMMON = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "score": "cls.output"}
_LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
          "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_LLAMA = {**_COMMON, **{f"model.layers.{{}}.{a}": f"blk.{{}}.{b}" for a, b in _LAYER.items()},
          "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm"}
NAMES = {
    "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "gemma2": {**_LLAMA, "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
               "model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm",
               "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm"},
    "gpt2": {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "score": "cls.output",
             "lm_head": "output",
             **{f"transformer.h.{{}}.{a}": f"blk.{{}}.{b}" for a, b in {
                 "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
                 "mlp.c_proj": "ffn_down"}.items()}},
    "gptneox": {"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "score": "cls.output", "embed_out": "output",
                **{f"gpt_neox.layers.{{}}.{a}": f"blk.{{}}.{b}" for a, b in {
                    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "attention.query_key_value": "attn_qkv",
                    "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}.items()}},
}


def gguf_name(name: str, architecture: str) -> str:
    stem, _, ending = name.rpartition(".")
    parts = stem.split(".")
    layer = next((p for p in parts if p.isdigit()), None)
    pattern = ".".join("{}" if p.isdigit() else p for p in parts)
    return f"{NAMES[architecture][pattern].format(layer)}.{ending}"


def permute(weights, heads: int):
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape))


def as_written(name: str, x, architecture: str, config):
    """The values as llama.cpp stores them."""
    if architecture == "llama" and ".q_proj." in name:
        return permute(x, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return permute(x, config.num_key_value_heads)
    if architecture == "gemma2" and name.endswith("norm.weight"):
        return x + np.float32(1)
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return x.T
    if architecture == "gptneox" and ".query_key_value." in name:  # GPTNeoXModel: q, k, v apart, one after the other
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        y = x.reshape(heads, 3, size, *x.shape[1:])
        return np.concatenate([y[:, part].reshape(heads * size, *x.shape[1:]) for part in range(3)])
    return x


def _keys(writer, architecture: str, config) -> None:
    get = lambda *names: next(getattr(config, n) for n in names if getattr(config, n, None) is not None)  # noqa: E731
    hidden, heads = get("hidden_size"), get("num_attention_heads")
    writer.add_context_length(get("max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_block_count(get("num_hidden_layers"))
    writer.add_head_count(heads)
    writer.add_feed_forward_length(getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * hidden)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * (hidden // heads)))
        writer.add_parallel_residual(config.use_parallel_residual)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim if getattr(config, "head_dim", None) else hidden // heads)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        if getattr(config, "sliding_window", None):
            writer.add_sliding_window(config.sliding_window)
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def add_tokenizer(writer, document: dict, kind: str, pre: str | None, **flags) -> None:
    """The vocabulary of a tokenizer.json, as llama.cpp's converter stores it."""
    vocab = {**document["model"]["vocab"], **{a["content"]: a["id"] for a in document["added_tokens"]}}
    tokens = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1])]
    added = {a["content"]: 3 if a["special"] else 4 for a in document["added_tokens"]}
    unknown = document["model"].get("unk_token")
    types = [2 if t == unknown else added.get(t, 6 if len(t) == 6 and t.startswith("<0x") else 1) for t in tokens]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre:
        writer.add_tokenizer_pre(pre)
    if kind == "gpt2":
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]])
    else:  # SentencePiece trains BPE in the order of ids: scores 0, -1, -2, ..., and a very low one for runs of spaces, as Llama has it
        first = next(n for n, t in enumerate(types) if n > 0 and t == 1)
        runs = [len(t) > 1 and set(t) == {"\u2581"} for t in tokens]
        writer.add_token_scores([-1e9 if run else -float(max(0, n - first)) for n, run in enumerate(runs)])
    for name, value in flags.items():
        getattr(writer, f"add_{name}")(value)


def rope_freqs(config):
    """Divisors of llama3 scaling, as llama.cpp's converter computes them (float32)."""
    rope, half = config.rope_parameters, config.head_dim // 2
    out = []
    for n in range(half):
        frequency = 1.0 / rope["rope_theta"] ** (2 * n / config.head_dim)
        wave = 2 * np.pi / frequency
        low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        if wave < original / high:
            out.append(1.0)
        elif wave > original / low:
            out.append(rope["factor"])
        else:
            smooth = (original / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, dtype=np.float32)


def write_model(path, model, architecture: str, kind: str = "F32", tokenizer=None) -> dict:
    """Writes a transformers model; matrices as `kind`, vectors F32. tokenizer(writer) adds a vocabulary.

    Gives the values that stand in the file, by transformers' name and in its row order (dequantised by the library)."""
    import gguf

    config, rng, stands = model.config, np.random.default_rng(5), {}
    writer = gguf.GGUFWriter(str(path), architecture)
    _keys(writer, architecture, config)
    if tokenizer is not None:
        tokenizer(writer)
    if architecture == "llama" and config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_freqs(config))
    quant = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = np.ascontiguousarray(as_written(name, parameter.detach().float().numpy(), architecture, config))
        if x.ndim < 2 or kind == "F32" or name.startswith("score"):
            writer.add_tensor(gguf_name(name, architecture), x)
            stands[name] = x
            continue
        if kind in BLOCKS:  # any bytes are blocks, with half-precision scales that are finite
            blocks = _random_blocks(rng, x.shape, kind)
        else:
            blocks = gguf.quantize(x, quant)
        raw = None if kind == "F16" else quant
        writer.add_tensor(gguf_name(name, architecture), blocks, raw_dtype=raw)
        stands[name] = gguf.dequantize(blocks, quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


def _random_blocks(rng, shape, kind: str):
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // values, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(2e-3).tobytes() * 2, dtype=np.uint8)
    at = {"Q2_K": (80, 4), "Q3_K": (108, 2), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 2)}[kind]
    blocks[:, at[0] : at[0] + at[1]] = scale[: at[1]]
    return blocks.reshape(*shape[:-1], -1)
