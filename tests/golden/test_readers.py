"""The readers against the libraries that write the files: transformers, sae_lens, dictionary_learning, safetensors.

Seeded models and dictionaries are saved by the real libraries into a temporary directory; `readers_dump` shows what the C readers made of
them. Weights are compared by what the library's own modules compute from them (so a wrong split or transposition cannot agree by name),
dictionaries by encoding and decoding with a few lines of numpy from the canonical form (formats.md section 1).
"""

import contextlib
import importlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SOURCE = Path(os.environ.get("SPURION_SOURCE", Path(__file__).resolve().parents[2]))
DUMP = Path(os.environ.get("SPURION_READERS_DUMP", Path(os.environ.get("SPURION_BIN", SOURCE / "build/cpu/bin")) / "readers_dump"))
SHARED = Path(os.environ.get("SPURION_SHARED", SOURCE / "../shared"))

pytestmark = pytest.mark.skipif(not DUMP.exists(), reason=f"{DUMP} is not built")
torch.set_num_threads(1)

RELU, JUMPRELU, TOPK, GATED, GROUPMAX = range(5)
NORM_NONE, NORM_RESCALE, NORM_LAYER = range(3)


class Dump(dict):
    """The JSON of readers_dump, and its arrays."""

    def __init__(self, out, directory):
        super().__init__(out)
        self.directory = directory

    def array(self, name, shape=None):
        path = self.directory / f"{name}.f32"
        if not path.exists():
            return None
        x = np.fromfile(path, dtype="<f4")
        return x if shape is None else x.reshape(shape)


def run_dump(what, path, tmp_path, *arguments):
    out = tmp_path / f"dump{len(list(tmp_path.glob('dump*')))}"
    out.mkdir()
    done = subprocess.run([DUMP, what, path, out, *arguments], capture_output=True, text=True, timeout=120)
    return done, out


def dump(what, path, tmp_path, *arguments):
    done, out = run_dump(what, path, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    return Dump(json.loads(done.stdout), out)


def refused(what, path, tmp_path, *arguments):
    done, _ = run_dump(what, path, tmp_path, *arguments)
    assert done.returncode == 3, (done.returncode, done.stdout, done.stderr)
    return done.stderr


sys.path.insert(0, str(SOURCE / "client/python"))
from spurion import convert as spurion_convert  # noqa: E402


class Converted:
    def __init__(self, returncode, stderr):
        self.returncode, self.stderr = returncode, stderr


def convert(path):
    """`python -m spurion.convert PATH` without the seconds that a new process needs to import torch."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = spurion_convert.main([str(path)])
    return Converted(code, errors.getvalue())


# --- reward models ---

COMMON = dict(vocab_size=103, num_labels=1, bos_token_id=3, eos_token_id=[5, 7], pad_token_id=9)
LLAMA_SIZES = dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                   max_position_embeddings=96)

FAMILIES = {
    "gpt2": ("GPT2", dict(n_embd=48, n_layer=3, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True, layer_norm_epsilon=3e-5)),
    "gpt2_inner": ("GPT2", dict(n_embd=40, n_layer=2, n_head=2, n_positions=32, n_inner=72, scale_attn_weights=False,
                                activation_function="relu")),
    "gptj": ("GPTJ", dict(n_embd=48, n_layer=3, n_head=3, n_positions=64, rotary_dim=8)),
    "neox": ("GPTNeoX", dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80, max_position_embeddings=64,
                             rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5})),
    "neox_sequential": ("GPTNeoX", dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                        max_position_embeddings=64, use_parallel_residual=False, attention_bias=False)),
    "llama": ("Llama", dict(**LLAMA_SIZES, head_dim=24, rms_norm_eps=2e-5,
                            rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
    "llama_bias": ("Llama", dict(**LLAMA_SIZES, attention_bias=True, mlp_bias=True,
                                 rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
    "mistral": ("Mistral", dict(**LLAMA_SIZES, sliding_window=17)),
    "mistral_full": ("Mistral", dict(**LLAMA_SIZES, sliding_window=None)),
    "qwen2": ("Qwen2", dict(**LLAMA_SIZES, use_sliding_window=True, sliding_window=13, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(**LLAMA_SIZES, head_dim=32, attention_bias=True)),
    "gemma2": ("Gemma2", dict(**LLAMA_SIZES, head_dim=16, query_pre_attn_scalar=40, attn_logit_softcapping=30.0, sliding_window=11)),
}


def make_model(family, dtype=torch.float32):
    name, sizes = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, name + "Config")(**COMMON, **sizes)
    model = getattr(transformers, name + "ForSequenceClassification")(config)
    for parameter in model.parameters():  # zero biases and unit norms would hide a mistake
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.to(dtype).eval()


def layers_of(model):
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def linear(module, x):
    """A Linear's or Conv1D's output."""
    return module(torch.from_numpy(x)).detach().numpy()


def expected_projections(model, family, layer, x, heads, head_dim):
    """What the family's own modules give for q, k, v, o, and the MLP, from x (rows, width)."""
    block = layers_of(model)[layer]
    if family == "GPT2":
        q, k, v = np.split(linear(block.attn.c_attn, x), 3, axis=1)
        return dict(q=q, k=k, v=v), block.attn.c_proj, dict(up=block.mlp.c_fc, down=block.mlp.c_proj)
    if family == "GPTJ":
        a = block.attn
        return (dict(q=linear(a.q_proj, x), k=linear(a.k_proj, x), v=linear(a.v_proj, x)), a.out_proj,
                dict(up=block.mlp.fc_in, down=block.mlp.fc_out))
    if family == "GPTNeoX":
        fused = linear(block.attention.query_key_value, x).reshape(len(x), heads, 3, head_dim)
        parts = {n: fused[:, :, i].reshape(len(x), -1) for i, n in enumerate("qkv")}
        return parts, block.attention.dense, dict(up=block.mlp.dense_h_to_4h, down=block.mlp.dense_4h_to_h)
    a, m = block.self_attn, block.mlp
    return (dict(q=linear(a.q_proj, x), k=linear(a.k_proj, x), v=linear(a.v_proj, x)), a.o_proj,
            dict(gate=m.gate_proj, up=m.up_proj, down=m.down_proj))


def norms_of(model, family, layer):
    block = layers_of(model)[layer]
    if family in ("GPT2", "GPTJ"):
        out = dict(norm1=block.ln_1)
        if family == "GPT2":
            out["norm2"] = block.ln_2
    elif family == "Gemma2":
        out = dict(norm1=block.input_layernorm, post_attention=block.post_attention_layernorm, norm2=block.pre_feedforward_layernorm,
                   post_mlp=block.post_feedforward_layernorm)
    else:
        out = dict(norm1=block.input_layernorm, norm2=block.post_attention_layernorm)
    if family == "Qwen3":
        out.update(q=block.self_attn.q_norm, k=block.self_attn.k_norm)
    return out


def apply_norm(d, name, layer, x):
    w, b = d.array(f"{name}_{'norm' if name in 'qk' else 'w'}.{layer}"), d.array(f"{name}_b.{layer}") if name not in "qk" else None
    x = x.astype(np.float64)
    if d["norm"] == 1:
        x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + d["eps"])
    return x * w + (0 if b is None else b)


def affine(d, name, layer, x, rows):
    w, b = d.array(f"{name}.{layer}", (rows, x.shape[1])), d.array(f"{name}_b.{layer}")
    return x.astype(np.float64) @ w.T.astype(np.float64) + (0 if b is None else b)


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_weights_compute_what_transformers_modules_do(family, tmp_path):
    name = FAMILIES[family][0]
    model = make_model(family)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB" if family in ("llama", "neox", "gpt2") else "1GB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1 or family not in ("llama", "neox", "gpt2")
    d = dump("model", tmp_path / "m", tmp_path)
    rng = np.random.default_rng(1)
    width, H, KV, hd = d["hidden"], d["heads"], d["kv_heads"], d["head_dim"]
    x = rng.standard_normal((5, width)).astype(np.float32)
    close = dict(rtol=2e-5, atol=2e-5)
    for layer in range(d["layers"]):
        qkv, o, mlp = expected_projections(model, name, layer, x, H, hd)
        for part, value in qkv.items():
            np.testing.assert_allclose(affine(d, part, layer, x, (H if part == "q" else KV) * hd), value, **close)
        z = rng.standard_normal((5, H * hd)).astype(np.float32)
        np.testing.assert_allclose(affine(d, "o", layer, z, width), linear(o, z), **close)
        h = rng.standard_normal((5, d["ff"])).astype(np.float32)
        for part, module in mlp.items():
            source = h if part == "down" else x
            np.testing.assert_allclose(affine(d, part, layer, source, width if part == "down" else d["ff"]), linear(module, source), **close)
        for norm, module in norms_of(model, name, layer).items():
            source = rng.standard_normal((5, hd if norm in "qk" else width)).astype(np.float32)
            np.testing.assert_allclose(apply_norm(d, norm, layer, source), linear(module, source), **close)
    base = model.base_model
    final = getattr(base, "ln_f", None) or getattr(base, "final_layer_norm", None) or base.norm
    np.testing.assert_allclose(apply_norm(d, "final", 0, x), linear(final, x), **close)
    np.testing.assert_array_equal(d.array("score.0", (1, width)), model.score.weight.detach().numpy())
    table = d.array("embed.0", (103, width)) * d["embed_scale"]
    ids = torch.arange(103)
    np.testing.assert_allclose(table, base.get_input_embeddings()(ids).detach().numpy(), rtol=1e-6)
    if name == "GPT2":
        np.testing.assert_array_equal(d.array("position.0", (d["context"], width)), base.wpe.weight.detach().numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_config_equals_transformers(family, tmp_path):
    name = FAMILIES[family][0]
    model = make_model(family)
    model.save_pretrained(tmp_path / "m")
    c, d = model.config, dump("model", tmp_path / "m", tmp_path)
    assert d["architecture"] == name + "ForSequenceClassification"
    assert (d["hidden"], d["layers"], d["heads"], d["vocab"], d["context"]) == (
        c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size, c.max_position_embeddings)
    assert d["kv_heads"] == getattr(c, "num_key_value_heads", c.num_attention_heads)
    assert d["outputs"] == 1 and d["head_bias"] == 0
    assert (d["bos"], d["eos"], d["pad"]) == (3, [5, 7], 9)
    eps = [getattr(c, key) for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if hasattr(c, key)][0]
    assert d["eps"] == np.float32(eps)
    for layer, block in enumerate(layers_of(model)):
        attention = [getattr(block, key) for key in ("attn", "attention", "self_attn") if hasattr(block, key)][0]
        if hasattr(attention, "scaling"):
            scale = attention.scaling
        else:
            scale = 1 / math.sqrt(d["head_dim"])
        if name == "GPT2":
            scale = (1 / math.sqrt(d["head_dim"]) if c.scale_attn_weights else 1) / (layer + 1 if c.scale_attn_by_inverse_layer_idx else 1)
        assert d["attention_scale"][layer] == pytest.approx(scale, rel=1e-6)
        window = getattr(attention, "sliding_window", None)
        if name == "Mistral":
            window = c.sliding_window
        assert d["window"][layer] == (window or 0)
    assert d["parallel"] == (name == "GPTJ" or (name == "GPTNeoX" and c.use_parallel_residual))
    assert d["softcap"] == pytest.approx(getattr(c, "attn_logit_softcapping", None) or 0)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("gpt2")])
def test_readers_rotary_table_equals_transformers(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "m")
    d = dump("model", tmp_path / "m", tmp_path)
    table = d.array("rope", (d["context"], d["rot"] // 2, 2))
    if family == "gptj":
        from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

        sin, cos = create_sinusoidal_positions(d["context"], d["rot"]).numpy().reshape(d["context"], 2, -1).transpose(1, 0, 2)
    else:
        positions = torch.arange(d["context"])[None]
        cos, sin = (x[0, :, : d["rot"] // 2].numpy() for x in model.base_model.rotary_emb(torch.zeros(1, 1, 8), positions))
    # one unit in the last place of a frequency turns into its angle: 96 * 6e-8
    np.testing.assert_allclose(table[:, :, 0], cos, atol=1e-5)
    np.testing.assert_allclose(table[:, :, 1], sin, atol=1e-5)


def as_transformers_4(config):
    """The same config.json as transformers 4 wrote it."""
    old = dict(config)
    rope = old.pop("rope_parameters", None) or {}
    old["torch_dtype"] = old.pop("dtype", "float32")
    if "rope_theta" in rope:
        old["rotary_emb_base" if old["model_type"] == "gpt_neox" else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["rotary_pct"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        kind = rope.pop("rope_type")
        rope["type" if kind == "linear" else "rope_type"] = kind
        old["rope_scaling"] = rope
    elif old["model_type"] not in ("gpt2", "gptj"):
        old["rope_scaling"] = None
    if old["model_type"] != "mistral":
        old.pop("layer_types", None)
    return old


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_config_of_transformers_4_and_5_agree(family, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path / "m")
    new = dump("model", tmp_path / "m", tmp_path)
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(as_transformers_4(json.loads(path.read_text()))))
    old = dump("model", tmp_path / "m", tmp_path)
    assert dict(old) == dict(new)
    assert (old.array("rope") == new.array("rope")).all() if new["rot"] else True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_readers_convert_half_types_exactly(dtype, tmp_path):
    model = make_model("gemma2", dtype)
    model.save_pretrained(tmp_path / "m")
    d = dump("model", tmp_path / "m", tmp_path)
    w = model.base_model.layers[1].self_attn.q_proj.weight.detach()
    np.testing.assert_array_equal(d.array("q.1", tuple(w.shape)), w.float().numpy())
    assert np.float32(d["embed_scale"]) == np.float32(math.sqrt(48))  # rounded by the pass, whose dtype may be another


def test_readers_head_of_openrlhf(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config.update(architectures=["RewardModel"], value_head_prefix="value_head", normalize_reward=True, mean=0.25, std=1.5)
    config.pop("id2label")
    path.write_text(json.dumps(config))
    tensors = safetensors_torch.load_file(tmp_path / "m/model.safetensors")
    tensors["value_head.weight"] = tensors.pop("score.weight")
    safetensors_torch.save_file(tensors, tmp_path / "m/model.safetensors")
    d = dump("model", tmp_path / "m", tmp_path)
    assert (d["outputs"], d["head_normalized"], d["head_mean"], d["head_std"]) == (1, 1, 0.25, 1.5)
    np.testing.assert_array_equal(d.array("score.0"), model.score.weight.detach().numpy()[0])


def test_readers_head_rows_and_bias_come_from_the_tensor(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config.pop("id2label")
    path.write_text(json.dumps(config))
    tensors = safetensors_torch.load_file(tmp_path / "m/model.safetensors")
    tensors["score.weight"] = torch.randn(3, 48)
    tensors["score.bias"] = torch.randn(3)
    safetensors_torch.save_file(tensors, tmp_path / "m/model.safetensors")
    d = dump("model", tmp_path / "m", tmp_path)
    assert d["outputs"] == 3 and d["head_bias"] == 1
    np.testing.assert_array_equal(d.array("score_b.0"), tensors["score.bias"].numpy())


def test_readers_names_without_the_prefix_and_pickled_shards(tmp_path):
    """A base model's names, in two .bin shards with their index, as torch saved models before safetensors."""
    model = make_model("gptj")
    model.save_pretrained(tmp_path / "m")
    tensors = {n.removeprefix("transformer."): t for n, t in model.state_dict().items()}
    names = sorted(tensors)
    (tmp_path / "m/model.safetensors").unlink()
    shards = [names[::2], names[1::2]]
    for i, part in enumerate(shards):
        torch.save({n: tensors[n] for n in part}, tmp_path / f"m/pytorch_model-{i}.bin")
    weight_map = {n: f"pytorch_model-{i}.bin" for i, part in enumerate(shards) for n in part}
    (tmp_path / "m/pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save({"lr": 1.0}, tmp_path / "m/training_args.bin")
    assert "python -m spurion.convert" in refused("model", tmp_path / "m", tmp_path)
    done = convert(tmp_path / "m")
    assert done.returncode == 0, done.stderr
    d = dump("model", tmp_path / "m", tmp_path)
    np.testing.assert_array_equal(d.array("q.1", (48, 48)), model.base_model.h[1].attn.q_proj.weight.detach().numpy())


def test_readers_resized_embedding_rows_hold(tmp_path):
    model = make_model("llama")
    model.resize_token_embeddings(110)
    model.config.vocab_size = 103
    model.save_pretrained(tmp_path / "m")
    d = dump("model", tmp_path / "m", tmp_path)
    assert (d["vocab"], d["vocab_rows"]) == (103, 110)


# --- dictionaries ---


def canonical_norm(d, x):
    """u, and the token's scale and shift of the output."""
    if d["norm"] == NORM_RESCALE:
        factor = math.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)
        return x * factor, 1 / factor, 0
    if d["norm"] == NORM_LAYER:
        mean, sd = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        return (x - mean) / (sd + 1e-5), sd, mean
    return x, 1, 0


def canonical_pre(d, x):
    u, scale, shift = canonical_norm(d, x.astype(np.float64))
    p = u @ d.array("enc", (d["F"], d["d"])).T.astype(np.float64)
    bias = d.array("enc_bias")
    return p if bias is None else p + bias, scale, shift


def canonical_encode(d, x):
    p, scale, shift = canonical_pre(d, x)
    h = d.array("scale")
    q = p if h is None else p * h
    if d["kind"] == RELU:
        f = np.maximum(q, 0)
    elif d["kind"] == JUMPRELU:
        f = np.maximum(q, 0) * (q > d.array("threshold"))
    elif d["kind"] == GATED:
        f = (p + d.array("gate_bias") > 0) * np.maximum(p * d.array("mag_scale") + d.array("mag_bias"), 0)
    else:
        f = np.zeros_like(q)
        k = d["k"]
        for row, source in zip(f, q):
            if d["kind"] == TOPK:
                index = np.argsort(-source, kind="stable")[:k]
            else:
                index = np.maximum(source, 0).reshape(k, -1).argmax(1) + np.arange(k) * (d["F"] // k)
            row[index] = np.maximum(source[index], 0)
    return f, scale, shift


def canonical_decode(d, f, scale, shift):
    return (f @ d.array("dec", (d["F"], d["d"])).astype(np.float64) + d.array("dec_bias")) * scale + shift


def check_against(d, x, encode, decode, worst=1e-5):
    """Same support outside of a margin about the kink, values and reconstruction to `worst` of their size."""
    f, scale, shift = canonical_encode(d, x)
    with torch.no_grad():
        wanted = encode(torch.from_numpy(x))
        wanted_x = decode(wanted).numpy().astype(np.float64)
        wanted = wanted.numpy().astype(np.float64)
    size = np.abs(wanted).max()
    assert size > 0
    apart = (f > 0) != (wanted > 0)
    # 12 of 20,000 would be a wrong threshold, not rounding
    assert apart.sum() <= 1 + wanted.size // 5000, f"{apart.sum()} of {wanted.size} features differ in support"
    error = np.abs(np.where(apart, 0, f - wanted)).max() / size
    assert error <= worst, f"activations differ by {error}"
    x_hat = canonical_decode(d, wanted, scale, shift)
    error = np.abs(x_hat - wanted_x).max() / np.abs(wanted_x).max()
    assert error <= worst, f"reconstruction differs by {error}"
    assert 0 < (wanted > 0).mean() < 0.9


D_IN, D_SAE = 40, 120
METADATA = dict(model_name="zoo", hook_name="blocks.1.hook_resid_post", prepend_bos=True, context_size=64)


def randomize(module, seed):
    """Random values of useful size in every parameter and buffer of floating type."""
    torch.manual_seed(seed)
    for name, p in list(module.named_parameters()) + list(module.named_buffers()):
        if not p.dtype.is_floating_point:
            continue
        noise = torch.randn_like(p)
        if p.dim() == 2:
            p.data = noise / math.sqrt(D_IN) * (0.5 + torch.rand(p.shape[0], 1)).to(p)
        elif "threshold" in name:
            p.data = noise.abs() * 0.4 + 0.1
        else:
            p.data = noise * 0.3


def activations(seed=0, count=160, shift=0.5):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, D_IN)) * rng.uniform(0.5, 3, (count, 1)) + shift).astype(np.float32)


SAELENS = {
    "standard": ("Standard", {}),
    "standard_raw": ("Standard", dict(apply_b_dec_to_input=False)),
    "gated": ("Gated", {}),
    "gated_no_subtraction": ("Gated", dict(apply_b_dec_to_input=False)),
    "jumprelu": ("JumpReLU", dict(apply_b_dec_to_input=False)),
    "jumprelu_pre": ("JumpReLU", dict(apply_b_dec_to_input=True)),
    "topk": ("TopK", dict(k=9)),
    "topk_rescaled": ("TopK", dict(k=9, rescale_acts_by_decoder_norm=True)),
    "layer_norm": ("Standard", dict(normalize_activations="layer_norm")),
    "layer_norm_topk": ("TopK", dict(k=7, normalize_activations="layer_norm", rescale_acts_by_decoder_norm=True)),
    "norm_rescale": ("JumpReLU", dict(normalize_activations="constant_norm_rescale")),
}


def saelens(name, training=False):
    sae_lens = pytest.importorskip("sae_lens")
    kind, options = SAELENS[name] if isinstance(name, str) else name
    word = "Training" if training else ""
    config = getattr(sae_lens, f"{kind}{word}SAEConfig")(d_in=D_IN, d_sae=D_SAE, **options)
    config.metadata.__dict__.update(METADATA)
    sae = getattr(sae_lens, f"{kind}{word}SAE")(config)
    randomize(sae, 7)
    return sae


@pytest.mark.parametrize("name", SAELENS)
def test_readers_saelens_encodes_as_the_library(name, tmp_path):
    sae = saelens(name)
    sae.save_model(tmp_path / "s")
    d = dump("sae", tmp_path / "s", tmp_path)
    assert (d["format"], d["hook_name"], d["d"], d["F"]) == ("saelens", "blocks.1.hook_resid_post", D_IN, D_SAE)
    assert d["kind"] == {"Standard": RELU, "Gated": GATED, "JumpReLU": JUMPRELU, "TopK": TOPK}[SAELENS[name][0]]
    check_against(d, activations(), sae.encode, lambda f: decode_saelens(sae, f))


def decode_saelens(sae, f):
    """decode() of a per-token norm needs what encode() left behind; it is used once."""
    sae.encode(torch.from_numpy(activations()))
    return sae.decode(f)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_readers_saelens_batchtopk_exported_and_raw_agree(kind, rescale, tmp_path):
    options = dict(k=8.0, rescale_acts_by_decoder_norm=rescale)
    if kind.startswith("M"):
        options["matryoshka_widths"] = [30, 60, D_SAE]
    sae = saelens((kind, options), training=True)
    sae.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
    sae.save_inference_model(tmp_path / "exported")
    sae.save_model(tmp_path / "raw")
    assert safetensors_torch.load_file(tmp_path / "raw/sae_weights.safetensors")["topk_threshold"].dtype == torch.float64
    import sae_lens

    library = sae_lens.SAE.load_from_disk(tmp_path / "exported")
    for place in ("exported", "raw"):
        d = dump("sae", tmp_path / place, tmp_path)
        assert d["kind"] == JUMPRELU
        check_against(d, activations(), library.encode, library.decode)


def test_readers_saelens_topk_training_checkpoint_honours_the_flag(tmp_path):
    sae = saelens(("TopK", dict(k=6, rescale_acts_by_decoder_norm=True)), training=True)
    sae.save_model(tmp_path / "raw")
    check_against(dump("sae", tmp_path / "raw", tmp_path), activations(), sae.encode, sae.decode)


def test_readers_saelens_constant_scale_is_folded_from_its_file(tmp_path):
    sae = saelens(("JumpReLU", dict(normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)))
    sae.save_model(tmp_path / "s")
    text = refused("sae", tmp_path / "s", tmp_path)
    assert "FAILED_PRECONDITION" in text and "expected_average_only_in" in text and "activation_scaler.json" in text
    (tmp_path / "s/activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    sae.fold_activation_norm_scaling_factor(0.37)
    check_against(dump("sae", tmp_path / "s", tmp_path), activations(), sae.encode, sae.decode)


def flat_config(config, **changes):
    """A cfg.json as SAELens wrote it before version 6."""
    metadata = config.pop("metadata")
    old = {**config, "model_name": metadata["model_name"], "hook_point": metadata["hook_name"], "hook_point_head_index": None,
           "activation_fn_str": "relu", "normalize_activations": "none", "finetuning_scaling_factor": False, "context_size": 64,
           "dtype": "torch.float32", "sae_lens_training_version": "3.13.0"}
    old.update(changes)
    return old


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_readers_saelens_before_version_6(tmp_path):
    sae = saelens("topk")
    sae.save_model(tmp_path / "s")
    cfg = tmp_path / "s/cfg.json"

    def older(config):
        config.pop("k"), config.pop("rescale_acts_by_decoder_norm"), config.pop("architecture")
        return flat_config(config, architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 9},
                           normalize_activations=False)

    rewrite(cfg, older)
    d = dump("sae", tmp_path / "s", tmp_path)
    assert (d["kind"], d["k"], d["hook_name"]) == (TOPK, 9, "blocks.1.hook_resid_post")
    import sae_lens

    library = sae_lens.SAE.load_from_disk(tmp_path / "s")
    check_against(d, activations(), library.encode, library.decode)
    rewrite(cfg, lambda c: {**c, "activation_fn_str": "tanh-relu"})
    assert 'expected relu or topk, found "tanh-relu"' in refused("sae", tmp_path / "s", tmp_path)
    rewrite(cfg, lambda c: {**c, "activation_fn_str": "relu", "normalize_activations": True})
    assert "expected_average_only_in" in refused("sae", tmp_path / "s", tmp_path)


def test_readers_saelens_centred_weights(tmp_path):
    """center_writing_weights: the dictionary saw x - mean(x)."""
    sae = saelens("standard")
    sae.save_model(tmp_path / "s")

    def centred(config):
        config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True}
        return config

    rewrite(tmp_path / "s/cfg.json", centred)
    d = dump("sae", tmp_path / "s", tmp_path)
    check_against(d, activations(), lambda x: sae.encode(x - x.mean(1, keepdim=True)), sae.decode)


@pytest.mark.parametrize("kind,options,found", [
    ("AbsTopK", dict(k=5), "abstopk"),
    ("MatchingPursuit", {}, "matching_pursuit"),
    ("Temporal", dict(n_heads=1, bottleneck_factor=1), "temporal"),
    ("Transcoder", dict(d_out=D_IN, apply_b_dec_to_input=False), "transcoder"),
    ("SkipTranscoder", dict(d_out=D_IN, apply_b_dec_to_input=False), "skip_transcoder"),
    ("JumpReLUTranscoder", dict(d_out=D_IN, apply_b_dec_to_input=False), "jumprelu_transcoder"),
    ("JumpReLUSkipTranscoder", dict(d_out=D_IN, apply_b_dec_to_input=False), "jumprelu_skip_transcoder"),
])
def test_readers_saelens_others_are_refused_by_name(kind, options, found, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    name = kind if kind.endswith("Transcoder") else f"{kind}SAE"
    config = getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, **options)
    config.metadata.__dict__.update(METADATA)
    getattr(sae_lens, name)(config).save_model(tmp_path / "s")
    text = refused("sae", tmp_path / "s", tmp_path)
    assert "architecture: expected" in text and f'found "{found}"' in text
    assert "take an SAE of" in text  # what to do


@pytest.mark.parametrize("change,message", [
    (dict(normalize_activations="covariance_whitening"), 'found "covariance_whitening"'),
    (dict(reshape_activations="hook_z"), "hook_z"),
    (dict(d_in=D_IN + 1), f"expected d_in {D_IN + 1}"),
    (dict(d_out=7), "d_out"),
    (dict(architecture="temporal"), 'found "temporal"'),
    (dict(metadata={"hook_name": "blocks.1.attn.hook_z"}), "SAEs on attention heads, hook_z, are not read"),
    (dict(metadata={"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"}), "transcoders are not read"),
])
def test_readers_saelens_wrong_configurations_are_refused(change, message, tmp_path):
    sae = saelens("standard")
    sae.save_model(tmp_path / "s")
    rewrite(tmp_path / "s/cfg.json", lambda c: {**c, **change})
    assert message in refused("sae", tmp_path / "s", tmp_path)


def part(name):
    return importlib.import_module(f"dictionary_learning.{name}")


DICTIONARIES = {
    "AutoEncoder": lambda m: m.AutoEncoder(D_IN, D_SAE),
    "AutoEncoderNew": lambda m: part("dictionary").AutoEncoderNew(D_IN, D_SAE),
    "GatedAutoEncoder": lambda m: m.GatedAutoEncoder(D_IN, D_SAE),
    "JumpReluAutoEncoder": lambda m: m.JumpReluAutoEncoder(D_IN, D_SAE),
    "AutoEncoderTopK": lambda m: part("trainers.top_k").AutoEncoderTopK(D_IN, D_SAE, 9),
    "BatchTopKSAE": lambda m: part("trainers.batch_top_k").BatchTopKSAE(D_IN, D_SAE, 9),
    "MatryoshkaBatchTopKSAE": lambda m: part("trainers.matryoshka_batch_top_k").MatryoshkaBatchTopKSAE(D_IN, D_SAE, 9, [40, D_SAE - 40]),
}


def dictionary(name):
    module = pytest.importorskip("dictionary_learning")
    ae = DICTIONARIES[name](module)
    randomize(ae, 11)
    for part in ("encoder", "decoder"):  # strides as the library's own initialisation leaves them
        if hasattr(ae, part):
            weight = getattr(ae, part).weight
            weight.data = weight.data.T.contiguous().T
    return ae


def save_dictionary(ae, name, path, config=True, saved=None):
    path.mkdir()
    torch.save(ae.state_dict() if saved is None else saved, path / "ae.pt")
    if config:
        trainer = dict(dict_class=name, activation_dim=D_IN, dict_size=D_SAE, layer=1, lm_name="zoo", submodule_name="resid_post_layer_1")
        (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))


def library_encode(ae):
    return lambda x: ae.encode(x)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_readers_dictionary_learning_encodes_as_the_library(name, tmp_path):
    ae = dictionary(name)
    save_dictionary(ae, name, tmp_path / "s")
    assert "python -m spurion.convert" in refused("sae", tmp_path / "s", tmp_path)
    assert "python -m spurion.convert" in refused("sae", tmp_path / "s/ae.pt", tmp_path)
    assert convert(tmp_path / "s/ae.pt").returncode == 0
    kept = safetensors_torch.load_file(tmp_path / "s/ae.safetensors")
    assert set(kept) == set(ae.state_dict())
    for tensor in kept:
        assert torch.equal(kept[tensor], ae.state_dict()[tensor]), tensor
    d = dump("sae", tmp_path / "s", tmp_path)
    assert (d["architecture"], d["hook_name"]) == (name, "blocks.1.hook_resid_post")
    check_against(d, activations(), library_encode(ae), ae.decode)
    again = dump("sae", tmp_path / "s/ae.pt", tmp_path)
    assert dict(again) == dict(d)


@pytest.mark.parametrize("name", ["AutoEncoder", "GatedAutoEncoder", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK",
                                  "JumpReluAutoEncoder"])
def test_readers_dictionary_learning_backup_is_scaled(name, tmp_path):
    ae = dictionary(name)
    save_dictionary(ae, name, tmp_path / "s", saved={"step": 5, "ae": ae.state_dict(), "optimizer": {}, "config": {}, "norm_factor": 1.7})
    assert convert(tmp_path / "s").returncode == 0
    ae.scale_biases(1.7)
    check_against(dump("sae", tmp_path / "s", tmp_path), activations(), library_encode(ae), ae.decode)


@pytest.mark.parametrize("name", ["IdentityDict", "CrossCoder", "BatchTopKCrossCoder"])
def test_readers_dictionary_learning_others_are_refused_by_name(name, tmp_path):
    save_dictionary(dictionary("AutoEncoder"), name, tmp_path / "s")
    assert convert(tmp_path / "s").returncode == 0
    text = refused("sae", tmp_path / "s", tmp_path)
    assert "dict_class: expected AutoEncoder, " in text and f'found "{name}"' in text and "format: dictionary_learning:CLASS" in text
    assert dump("sae", tmp_path / "s", tmp_path, "dictionary_learning:AutoEncoder")["architecture"] == "AutoEncoder"


@pytest.mark.parametrize("name", DICTIONARIES)
def test_readers_dictionary_learning_without_a_configuration(name, tmp_path):
    ae = dictionary(name)
    save_dictionary(ae, name, tmp_path / "s", config=False)
    assert convert(tmp_path / "s").returncode == 0
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        text = refused("sae", tmp_path / "s", tmp_path)
        assert "AutoEncoderTopK" in text and "BatchTopKSAE" in text
        d = dump("sae", tmp_path / "s", tmp_path, f"dictionary_learning:{name}")
    else:
        d = dump("sae", tmp_path / "s", tmp_path)
    assert d["architecture"] == name
    check_against(d, activations(), library_encode(ae), ae.decode)


def sparsify_encode(state, cfg):
    """sparsify is not in the package index this test may use; its encode, from its source (formats.md 2.3)."""

    def encode(x):
        a = torch.relu((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
        k = cfg["k"]
        if cfg["activation"] == "topk":
            values, index = a.topk(k, dim=-1, sorted=False)
        else:
            values, index = a.unflatten(-1, (k, -1)).max(dim=-1)
            index = index + torch.arange(k) * (D_SAE // k)
        return torch.zeros_like(a).scatter(-1, index, values)

    return encode


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_readers_sparsify(activation, tmp_path):
    place = tmp_path / "layers.2"
    place.mkdir()
    torch.manual_seed(3)
    state = {"encoder.weight": torch.randn(D_SAE, D_IN) / 6, "encoder.bias": torch.randn(D_SAE) * 0.2,
             "W_dec": torch.randn(D_SAE, D_IN) / 6, "b_dec": torch.randn(D_IN) * 0.2}
    cfg = dict(activation=activation, expansion_factor=3, normalize_decoder=True, num_latents=0, k=12, multi_topk=False,
               skip_connection=False, transcode=False, d_in=D_IN)
    safetensors_torch.save_file(state, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps(cfg))
    d = dump("sae", place, tmp_path)
    assert (d["kind"], d["k"], d["hook_name"]) == (GROUPMAX if activation == "groupmax" else TOPK, 12, "blocks.2.hook_resid_post")
    check_against(d, activations(), sparsify_encode(state, cfg), lambda f: f @ state["W_dec"] + state["b_dec"])
    for change, word in ((dict(transcode=True), "transcode"), (dict(skip_connection=True), "skip_connection"), (dict(k=7), "k")):
        if "k" in change and activation == "topk":
            continue
        (place / "cfg.json").write_text(json.dumps({**cfg, **change}))
        assert word in refused("sae", place, tmp_path)


def test_readers_convert_keeps_what_is_no_tensor(tmp_path):
    """The shape of OpenAI's files: texts and numbers among the tensors."""
    torch.save({"pre_bias": torch.ones(3), "activation": "TopK", "activation_state_dict": {"k": 32, "postact_fn": "ReLU"},
                "shared": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "7.pt")
    assert convert(tmp_path / "7.pt").returncode == 0
    from safetensors import safe_open

    with safe_open(tmp_path / "7.safetensors", "pt") as file:
        assert json.loads(file.metadata()["activation_state_dict"]) == {"k": 32, "postact_fn": "ReLU"}
        assert json.loads(file.metadata()["activation"]) == "TopK"
        assert torch.equal(file.get_tensor("shared"), torch.arange(6.0).reshape(2, 3).T)


def test_readers_convert_is_a_program(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE / "client/python"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-m", "spurion.convert", tmp_path], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "w.safetensors"), "")
    assert "converted before" in convert(tmp_path).stderr
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "empty").returncode == 1 and convert(tmp_path / "none").returncode == 1


def test_readers_convert_runs_nothing(tmp_path):
    """A pickle that wants to run code is refused, and has not run."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    torch.save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "e.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("e.pt", "plain.pt"):
        done = convert(tmp_path / name)
        assert done.returncode == 1 and "expected a checkpoint of tensors" in done.stderr
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("case", ["gptj", "llama", "qwen3", "refused"])
def test_readers_example_cases(case, tmp_path):
    source = SHARED / "data/example_cases" / case
    if not source.exists():
        pytest.skip(f"{source} is not here")
    shutil.copytree(source, tmp_path / case)
    d = dump("model", tmp_path / case / "model", tmp_path)
    assert d["outputs"] == 1
    for place in sorted((tmp_path / case / "saes").iterdir()):
        if (place / "ae.pt").exists():
            os.chmod(place, 0o755)
            assert convert(place).returncode == 0
        s = dump("sae", place, tmp_path)
        assert s["d"] == d["hidden"] and s["F"] == 300
