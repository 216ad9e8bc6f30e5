"""SAE formats beyond the three of test_readers: Gemma Scope, Llama Scope, OpenAI, Goodfire, and the units of every kind.

Judges: sae_lens's own loaders of these releases, run on files in the published layout with its downloads led to a local folder; where no
library can be installed (OpenAI's sparse_autoencoder, llamascopium), a few lines of PyTorch of the published code, said at the function.
"""

import io
import json
import math
import zipfile

import pytest

from test_readers import (D_IN, D_SAE, JUMPRELU, NORM_LAYER, NORM_RESCALE, RELU, TOPK, activations, check_against, convert, decode_saelens,
                          dictionary, dump, np, refused, saelens, safetensors_torch, save_dictionary, torch)
from test_readers import pytestmark  # noqa: F401

LLAMA_TOPK_UNITS = "features times their decoder norms"


def draw(seed, **shapes):
    """Named random tensors: matrices of useful size, biases, positive thresholds."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(*shape, generator=generator)
        if len(shape) == 2:
            out[name] = noise / math.sqrt(D_IN) * (0.5 + torch.rand(shape[0], 1, generator=generator))
        elif "threshold" in name:
            out[name] = noise.abs() * 0.4 + 0.1
        else:
            out[name] = noise * 0.3
    return out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """sae_lens's loaders with their downloads led to tmp_path/hub/<repository>/<file>."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")

    def download(repo_id, filename, subfolder=None, **_):
        return str(tmp_path / "hub" / repo_id / (subfolder or "") / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return loaders


def library_sae(config, state):
    """The SAE that sae_lens makes of what its loader gave, normalisation folded as its registry does."""
    import sae_lens
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    sizes = dict(zip(("d_in", "d_sae"), state["W_enc"].shape))  # ours are smaller than the release's
    config = handle_config_defaulting({**config, **sizes, "device": "cpu", "dtype": "float32"})
    kind, settings = sae_lens.registry.get_sae_class(config["architecture"])
    sae = kind(settings.from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({k: v.float() for k, v in state.items()})
    return sae.eval()


# --- Gemma Scope ---


def gemma_arrays(lower=False):
    t = draw(21, W_enc=(D_IN, D_SAE), W_dec=(D_SAE, D_IN), b_enc=(D_SAE,), b_dec=(D_IN,), threshold=(D_SAE,))
    return {(k.lower() if lower else k): v.numpy() for k, v in t.items()}


GEMMA = "google/gemma-scope-2b-pt-res"


@pytest.mark.parametrize("save", ["stored", "deflated", "lower", "fortran", "float16"])
def test_formats_gemma_scope_npz(save, hub, tmp_path):
    folder = "layer_12/width_16k/average_l0_82"
    place = tmp_path / "hub" / GEMMA / folder
    place.mkdir(parents=True)
    arrays = gemma_arrays(save == "lower")
    if save == "fortran":
        arrays["W_enc"] = np.asfortranarray(arrays["W_enc"])
    if save == "float16":
        arrays = {k: v.astype(np.float16) for k, v in arrays.items()}
    (np.savez_compressed if save == "deflated" else np.savez)(place / "params.npz", **arrays)
    d = dump("sae", place, tmp_path)
    assert (d["format"], d["kind"], d["hook_name"], d["d"], d["F"]) == ("gemma_scope", JUMPRELU, "blocks.12.hook_resid_post", D_IN, D_SAE)
    sae = library_sae(*hub.gemma_2_sae_huggingface_loader(GEMMA, folder)[:2])
    check_against(d, activations(), sae.encode, sae.decode)
    assert dict(dump("sae", place / "params.npz", tmp_path)) == dict(d)


def test_formats_gemma_scope_npz_square_matrices(tmp_path):
    """width == d: the shapes do not tell which way a matrix lies, the format does."""
    rng = np.random.default_rng(3)
    arrays = {k: rng.standard_normal((8, 8) if k.startswith("W") else 8).astype(np.float32) for k in ("W_enc", "W_dec", "b_enc", "b_dec")}
    arrays["threshold"] = np.full(8, 0.1, np.float32)
    for fortran in (False, True):
        place = tmp_path / f"s{fortran}"
        place.mkdir()
        np.savez(place / "params.npz", **{k: np.asfortranarray(v) if fortran else v for k, v in arrays.items()})
        d = dump("sae", place, tmp_path)
        np.testing.assert_array_equal(d.array("enc", (8, 8)), arrays["W_enc"].T)
        np.testing.assert_array_equal(d.array("dec", (8, 8)), arrays["W_dec"])


def test_formats_gemma_scope_large_npz_is_streamed(tmp_path):
    """A deflated matrix of many blocks, read transposed and to its end."""
    rng = np.random.default_rng(5)
    arrays = {"W_enc": rng.integers(-9, 9, (300, 500)), "W_dec": rng.integers(-9, 9, (500, 300)), "b_enc": rng.integers(-9, 9, 500),
              "b_dec": rng.integers(-9, 9, 300), "threshold": np.ones(500)}
    np.savez_compressed(tmp_path / "params.npz", **{k: v.astype(np.float64) for k, v in arrays.items()})
    d = dump("sae", tmp_path / "params.npz", tmp_path)
    np.testing.assert_array_equal(d.array("enc", (500, 300)), arrays["W_enc"].T)
    np.testing.assert_array_equal(d.array("dec", (500, 300)), arrays["W_dec"])


@pytest.mark.parametrize("repository,word", [("google/gemma-scope-2b-pt-att", "hook_z"), ("google/gemma-scope-2b-pt-transcoders", "transcoder")])
def test_formats_gemma_scope_others_are_refused(repository, word, tmp_path):
    place = tmp_path / repository / "layer_3/width_16k/average_l0_9"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **gemma_arrays())
    assert word in refused("sae", place, tmp_path)


def broken_npz(how):
    out = io.BytesIO()
    np.savez(out, **gemma_arrays())
    data = bytearray(out.getvalue())
    if how == "truncated":
        return bytes(data[: len(data) // 2])
    if how == "flipped":  # a bit of W_enc's data
        data[600] ^= 1
        return bytes(data)
    out = io.BytesIO()
    arrays = gemma_arrays()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_BZIP2 if how == "bzip2" else zipfile.ZIP_STORED) as z:
        for name, array in arrays.items():
            part = io.BytesIO()
            if how == "objects" and name == "b_enc":
                np.save(part, np.array([{}], dtype=object), allow_pickle=True)
            else:
                np.save(part, array.astype(">f4") if how == "big" else array)
            z.writestr(name + ".npy", part.getvalue())
        if how == "other":
            z.writestr("readme.txt", "x")
    return out.getvalue()


@pytest.mark.parametrize("how,message", [
    ("truncated", "no end of its directory"), ("flipped", "expected CRC-32"), ("bzip2", "expected stored or deflated"),
    ("objects", "type '|O'"), ("big", "type '>f4'"), ("other", "names NAME.npy"),
])
def test_formats_npz_faults_are_named(how, message, tmp_path):
    (tmp_path / "params.npz").write_bytes(broken_npz(how))
    assert message in refused("sae", tmp_path, tmp_path)


@pytest.mark.parametrize("folder,hook", [("resid_post/layer_9_width_16k_l0_small", "blocks.9.hook_resid_post"),
                                         ("mlp_out/layer_9_width_16k_l0_small", "blocks.9.hook_mlp_out")])
@pytest.mark.parametrize("config", [True, False])
def test_formats_gemma_scope_2(folder, hook, config, hub, tmp_path, monkeypatch):
    repository = "google/gemma-scope-2-270m-pt"
    place = tmp_path / "hub" / repository / folder
    place.mkdir(parents=True)
    tensors = {k: torch.from_numpy(v) for k, v in gemma_arrays(lower=True).items()}
    safetensors_torch.save_file(tensors, place / "params.safetensors")
    raw = hub._infer_gemma_3_raw_cfg_dict(repository, folder)
    (place / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(hub, "get_safetensors_tensor_shapes", lambda *_: {k: list(v.shape) for k, v in tensors.items()})
    sae = library_sae(*hub.gemma_3_sae_huggingface_loader(repository, folder)[:2])
    if not config:
        (place / "config.json").unlink()
    d = dump("sae", place, tmp_path)
    assert (d["format"], d["kind"]) == ("gemma_scope", JUMPRELU)
    assert d["hook_name"] == (raw["hf_hook_point_in"] if config else hook)
    check_against(d, activations(), sae.encode, sae.decode)
    (place / "config.json").write_text(json.dumps({**raw, "hf_hook_point_out": "model.layers.9.mlp.output"}))
    assert "transcoder" in refused("sae", place, tmp_path)
    (place / "config.json").write_text(json.dumps({**raw, "hf_hook_point_in": "model.layers.9.self_attn.o_proj.input"}))
    assert "hook_z" in refused("sae", place, tmp_path)


# --- Llama Scope ---


def linear_tensors(seed=31):
    return draw(seed, **{"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE), "decoder.bias": (D_IN,)})


def unit_columns(tensors):
    tensors["decoder.weight"] = tensors["decoder.weight"] / tensors["decoder.weight"].norm(dim=0)
    return {k: v.contiguous() for k, v in tensors.items()}


def test_formats_llama_scope_2024(hub, tmp_path):
    """Against sae_lens: the same support and reconstruction; its features are larger by s = sqrt(d) / norm (formats.md 2.5)."""
    repository, folder = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    place = tmp_path / "hub" / repository / folder
    (place / "checkpoints").mkdir(parents=True)
    tensors = unit_columns(linear_tensors())
    safetensors_torch.save_file({k: v.bfloat16() for k, v in tensors.items()}, place / "checkpoints/final.safetensors")
    hyper = {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post", "d_model": D_IN, "d_sae": D_SAE,
             "expansion_factor": D_SAE // D_IN, "act_fn": "jumprelu", "jump_relu_threshold": 0.35546875, "norm_activation": "dataset-wise",
             "sparsity_include_decoder_norm": False, "dataset_average_activation_norm": {"in": 10.8125, "out": 10.8125}}
    (place / "hyperparams.json").write_text(json.dumps(hyper))
    d = dump("sae", place, tmp_path)
    assert (d["format"], d["kind"], d["hook_name"]) == ("llama_scope", JUMPRELU, "blocks.15.hook_resid_post")
    config, state, _ = hub.llama_scope_sae_huggingface_loader(repository, folder)
    # their bfloat16 threshold is rounded after scaling; the arithmetic is compared, not that rounding
    state["threshold"] = torch.full((D_SAE,), config["jump_relu_threshold"])
    sae = library_sae(config, state)
    s = math.sqrt(D_IN) / 10.8125
    sae.fold_activation_norm_scaling_factor(s)
    check_against(d, activations(), lambda x: sae.encode(x) / s, lambda f: sae.decode(f * s), worst=1e-5)
    assert dict(dump("sae", place / "checkpoints/final.safetensors", tmp_path)) == dict(d)
    # the library loads topk with a threshold as jumprelu, and looks at f |D_i| when the norm is included
    (place / "hyperparams.json").write_text(json.dumps({**hyper, "act_fn": "topk", "top_k": 9}))
    assert dict(dump("sae", place, tmp_path)) == dict(d)


def open_moss(tensors, config, norm=None):
    """encode and decode of llamascopium's SparseAutoEncoder (models/sae.py, activation_functions.py), which cannot be installed here:
    normalize_activations, then p = x W_E + b_E, times the decoder's norm where it counts, the activation, and back."""
    W_E, W_D, b_E, b_D = (tensors[n] for n in ("W_E", "W_D", "b_E", "b_D"))
    h = W_D.norm(dim=1)

    def factor(x):
        if config["norm_activation"] == "token-wise":
            return math.sqrt(D_IN) / x.norm(dim=-1, keepdim=True)
        return math.sqrt(D_IN) / norm if config["norm_activation"] == "dataset-wise" else 1.0

    def encode(x):
        q = (x * factor(x)) @ W_E + b_E
        if config["sparsity_include_decoder_norm"]:
            q = q * h
        if config["act_fn"] == "relu":
            q = torch.relu(q)
        elif config["act_fn"] == "jumprelu":
            q = q * (q > tensors["log_jumprelu_threshold"].exp())
        else:
            values = torch.relu(q)
            q = values * (values >= values.kthvalue(D_SAE - config["top_k"] + 1, dim=-1, keepdim=True).values)
        return q / h if config["sparsity_include_decoder_norm"] else q

    def decode(f, x):
        return (f @ W_D + b_D) / factor(x)

    return encode, decode, h


def modern_tensors(seed=41):
    t = draw(seed, W_E=(D_IN, D_SAE), W_D=(D_SAE, D_IN), b_E=(D_SAE,), b_D=(D_IN,), log_jumprelu_threshold=(D_SAE,))
    t["log_jumprelu_threshold"] = t["log_jumprelu_threshold"].log()
    return t


HOOK_IN = "blocks.3.hook_resid_post"


@pytest.mark.parametrize("norm_activation", ["dataset-wise", "token-wise", "inference"])
@pytest.mark.parametrize("act_fn,include", [("relu", True), ("jumprelu", False), ("jumprelu", True), ("topk", False), ("topk", True)])
def test_formats_llamascopium(act_fn, include, norm_activation, tmp_path):
    tensors = modern_tensors()
    config = {"sae_type": "sae", "hook_point_in": HOOK_IN, "hook_point_out": HOOK_IN, "d_model": D_IN, "expansion_factor": D_SAE / D_IN,
              "use_decoder_bias": True, "act_fn": act_fn, "norm_activation": norm_activation, "top_k": 9,
              "sparsity_include_decoder_norm": include, "use_glu_encoder": False}
    saved = {k: v for k, v in tensors.items() if k != "log_jumprelu_threshold"}
    if act_fn == "jumprelu":
        saved["activation_function.log_jumprelu_threshold"] = tensors["log_jumprelu_threshold"]
    norm = 9.25
    saved[f"dataset_average_activation_norm.{HOOK_IN}"] = torch.tensor(norm)
    (tmp_path / "s").mkdir()
    safetensors_torch.save_file(saved, tmp_path / "s/sae_weights.safetensors")
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    d = dump("sae", tmp_path / "s", tmp_path)
    assert (d["format"], d["kind"]) == ("llama_scope", {"relu": RELU, "jumprelu": JUMPRELU, "topk": TOPK}[act_fn])
    assert d["norm"] == (NORM_RESCALE if norm_activation == "token-wise" else 0)
    encode, decode, h = open_moss(tensors, config, norm)
    x = torch.from_numpy(activations())
    if act_fn == "topk" and include:  # the one kind whose features we give in other units, and say so
        assert LLAMA_TOPK_UNITS in d["notes"]
        check_against(d, activations(), lambda v: encode(v) * h, lambda f: decode(f / h, x))
    else:
        check_against(d, activations(), encode, lambda f: decode(f, x))


@pytest.mark.parametrize("change,message", [
    ({"sae_type": "clt"}, 'found "clt"'), ({"hook_point_out": "blocks.4.hook_mlp_out"}, "transcoders are not read"),
    ({"use_glu_encoder": True}, "use_glu_encoder"), ({"act_fn": "batchtopk"}, 'found "batchtopk"'),
    ({"norm_activation": "batch-wise"}, 'found "batch-wise"'), ({"d_model": 7}, "d_model 7"), ({"top_k": D_SAE + 1, "act_fn": "topk"}, "top_k"),
    ({"hook_point_in": "blocks.1.attn.hook_z", "hook_point_out": "blocks.1.attn.hook_z"}, "hook_z"),
])
def test_formats_llamascopium_others_are_refused(change, message, tmp_path):
    safetensors_torch.save_file({k: v for k, v in modern_tensors().items() if k[0] in "Wb"}, tmp_path / "sae_weights.safetensors")
    config = {"sae_type": "sae", "hook_point_in": HOOK_IN, "hook_point_out": HOOK_IN, "d_model": D_IN, "act_fn": "relu",
              "norm_activation": "inference"}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert message in refused("sae", tmp_path, tmp_path)


def test_formats_llama_scope_r1_distill(hub, tmp_path):
    """Its norm stands in no file: refused until the user says the factor, then as sae_lens with the same one."""
    repository, folder = "fnlp/Llama-Scope-R1-Distill", "400M-Slimpajama-400M-OpenR1-Math-220k/L15R"
    place = tmp_path / "hub" / repository / folder
    place.mkdir(parents=True)
    tensors = linear_tensors(33)
    threshold = draw(34, log_jumprelu_threshold=(D_SAE,))["log_jumprelu_threshold"].log()
    safetensors_torch.save_file({**tensors, "log_jumprelu_threshold": threshold}, place / "sae_weights.safetensors")
    (place / "config.json").write_text(json.dumps({"sae_type": "sae", "hook_point_in": HOOK_IN, "hook_point_out": HOOK_IN, "d_model": D_IN,
                                                   "expansion_factor": D_SAE // D_IN, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
                                                   "sparsity_include_decoder_norm": False}))
    text = refused("sae", place, tmp_path)
    assert "FAILED_PRECONDITION" in text and "norm_factor" in text
    sae = library_sae(*hub.llama_scope_r1_distill_sae_huggingface_loader(repository, folder)[:2])
    sae.fold_activation_norm_scaling_factor(0.61)
    check_against(dump("sae", place, tmp_path, "", "0.61"), activations(), sae.encode, sae.decode)


# --- OpenAI, Goodfire, qresearch ---


def openai_encode(state, activation, k):
    """encode and decode of openai/sparse_autoencoder's Autoencoder (model.py), which is in no package index."""

    def normalise(x):
        if activation != "TopK":
            return x, 0.0, 1.0
        mean = x.mean(dim=-1, keepdim=True)
        x = x - mean
        std = x.std(dim=-1, keepdim=True)
        return x / (std + 1e-5), mean, std

    def encode(x):
        a = (normalise(x)[0] - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
        if activation == "ReLU":
            return torch.relu(a)
        top = torch.topk(a, k=k, dim=-1)
        return torch.zeros_like(a).scatter(-1, top.indices, torch.relu(top.values))

    def decode(f, x):
        _, mean, std = normalise(x)
        return (f @ state["decoder.weight"].T + state["pre_bias"]) * std + mean

    return encode, decode


@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_formats_openai(activation, tmp_path):
    place = tmp_path / "resid_post_attn_v5_32k/autoencoders"
    place.mkdir(parents=True)
    state = draw(51, pre_bias=(D_IN,), latent_bias=(D_SAE,), **{"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)})
    extra = {"stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long), "latents_activation_frequency": torch.ones(D_SAE),
             "latents_mean_square": torch.zeros(D_SAE), "activation": activation}
    if activation == "TopK":
        extra["activation_state_dict"] = {"k": 9, "postact_fn": "ReLU"}
    torch.save({**state, **extra}, place / "6.pt")
    assert "python -m spurion.convert" in refused("sae", place / "6.pt", tmp_path)
    assert "python -m spurion.convert" in refused("sae", place, tmp_path, "openai")
    assert convert(place / "6.pt").returncode == 0
    d = dump("sae", place / "6.pt", tmp_path)
    assert (d["format"], d["hook_name"]) == ("openai", "blocks.6.hook_resid_mid")
    assert (d["kind"], d["norm"], d["k"]) == ((TOPK, NORM_LAYER, 9) if activation == "TopK" else (RELU, 0, 0))
    encode, decode = openai_encode(state, activation, 9)
    check_against(d, activations(), encode, lambda f: decode(f, torch.from_numpy(activations())))
    assert dict(dump("sae", place, tmp_path, "openai")) == dict(d)


def test_formats_goodfire(hub, tmp_path):
    repository, file = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    place = tmp_path / "hub" / repository
    place.mkdir(parents=True)
    tensors = linear_tensors(61)
    torch.save({k.replace(".", "_linear."): v for k, v in tensors.items()}, place / file)
    config, state, _ = hub.get_goodfire_huggingface_loader(repository, file)
    sae = library_sae(config, state)
    assert convert(place / file).returncode == 0
    d = dump("sae", place / file, tmp_path)
    assert (d["format"], d["kind"], d["hook_name"]) == ("goodfire", RELU, "")
    check_against(d, activations(), sae.encode, sae.decode)


def test_formats_qresearch_deepseek(tmp_path):
    """encoder.* and decoder.* in a bare bfloat16 pickle: AutoEncoderNew's names and arithmetic."""
    tensors = {k: v.bfloat16() for k, v in linear_tensors(71).items()}
    torch.save(tensors, tmp_path / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    assert convert(tmp_path).returncode == 0
    d = dump("sae", tmp_path / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", tmp_path)
    w = {k: v.float() for k, v in tensors.items()}
    check_against(d, activations(), lambda x: torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"]),
                  lambda f: f @ w["decoder.weight"].T + w["decoder.bias"])


# --- detection and options ---


def test_formats_bare_files(tmp_path):
    """W_enc alone belongs to several formats: refused with the options that resolve it, each of which then works."""
    tensors = {k: torch.from_numpy(v) for k, v in gemma_arrays().items()}
    safetensors_torch.save_file(tensors, tmp_path / "a.safetensors")
    text = refused("sae", tmp_path / "a.safetensors", tmp_path)
    assert "gemma_scope" in text and "dictionary_learning:JumpReluAutoEncoder" in text
    first = dump("sae", tmp_path / "a.safetensors", tmp_path, "gemma_scope")
    second = dump("sae", tmp_path / "a.safetensors", tmp_path, "dictionary_learning:JumpReluAutoEncoder")
    assert first["kind"] == second["kind"] == JUMPRELU
    for name in ("enc", "enc_bias", "threshold", "dec", "dec_bias"):
        np.testing.assert_array_equal(first.array(name), second.array(name))
    safetensors_torch.save_file({**tensors, "W_skip": torch.eye(D_IN)}, tmp_path / "t.safetensors")
    assert "transcoder" in refused("sae", tmp_path / "t.safetensors", tmp_path)


@pytest.mark.parametrize("file,word", [("conf.yaml", "temporal"), ("wandb-config.yaml", "transcoder"), ("W_enc_0.safetensors", "cross-layer"),
                                       ("sae_weights.dcp", "distributed shards")])
def test_formats_others_are_refused_by_name(file, word, tmp_path):
    (tmp_path / file).write_text("x: 1\n")
    safetensors_torch.save_file({k: torch.from_numpy(v) for k, v in gemma_arrays().items()}, tmp_path / "layer_0.safetensors")
    assert word in refused("sae", tmp_path, tmp_path)


def test_formats_norm_factor_is_refused_where_it_means_nothing(tmp_path):
    np.savez(tmp_path / "params.npz", **gemma_arrays())
    assert "norm_factor: expected none" in refused("sae", tmp_path, tmp_path, "", "0.5")


def test_formats_saelens_norm_factor_of_the_user(tmp_path):
    sae = saelens(("JumpReLU", dict(normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)))
    sae.save_model(tmp_path / "s")
    assert "norm_factor" in refused("sae", tmp_path / "s", tmp_path)
    sae.fold_activation_norm_scaling_factor(0.37)
    check_against(dump("sae", tmp_path / "s", tmp_path, "", "0.37"), activations(), sae.encode, sae.decode)


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu_pre", "layer_norm", "norm_rescale"])
def test_formats_unit_decoder_as_fold_w_dec_norm(name, tmp_path):
    sae = saelens(name)
    sae.save_model(tmp_path / "s")
    sae.fold_W_dec_norm()
    d = dump("sae", tmp_path / "s", tmp_path, "", "0", "unit")
    check_against(d, activations(), sae.encode, lambda f: decode_saelens(sae, f))
    np.testing.assert_allclose(np.linalg.norm(d.array("dec", (D_SAE, D_IN)), axis=1), 1, rtol=1e-5)


def test_formats_unit_decoder_as_from_pretrained(tmp_path):
    """AutoEncoder.from_pretrained makes the decoder's columns 1 by default: published magnitudes are of that form."""
    module = pytest.importorskip("dictionary_learning")
    ae = dictionary("AutoEncoder")
    save_dictionary(ae, "AutoEncoder", tmp_path / "s")
    assert convert(tmp_path / "s").returncode == 0
    library = module.AutoEncoder.from_pretrained(tmp_path / "s/ae.pt")
    check_against(dump("sae", tmp_path / "s", tmp_path, "", "0", "unit"), activations(), library.encode, library.decode)


def test_formats_unit_decoder_is_refused_for_top_k(tmp_path):
    saelens("topk").save_model(tmp_path / "s")
    assert "unit_decoder" in refused("sae", tmp_path / "s", tmp_path, "", "0", "unit")


@pytest.mark.parametrize("seed", range(3))
def test_formats_random_order_of_keys(seed, tmp_path):
    """The order of cfg.json's keys varies between versions: it means nothing."""
    import random

    sae = saelens("topk_rescaled")
    sae.save_model(tmp_path / "s")
    first = dump("sae", tmp_path / "s", tmp_path)
    config = json.loads((tmp_path / "s/cfg.json").read_text())
    keys = list(config)
    random.Random(seed).shuffle(keys)
    (tmp_path / "s/cfg.json").write_text(json.dumps({k: config[k] for k in keys}))
    assert dict(dump("sae", tmp_path / "s", tmp_path)) == dict(first)


def test_formats_converted_llamascopium_pickle(tmp_path):
    """llamascopium's .pt holds {"sae": tensors, "version": text}."""
    torch.save({"sae": {k: v for k, v in modern_tensors().items() if k[0] in "Wb"}, "version": "1"}, tmp_path / "sae_weights.pt")
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": "sae", "hook_point_in": HOOK_IN, "d_model": D_IN, "act_fn": "relu",
                                                      "norm_activation": "inference"}))
    assert "python -m spurion.convert" in refused("sae", tmp_path, tmp_path)
    assert convert(tmp_path).returncode == 0
    assert dump("sae", tmp_path, tmp_path)["kind"] == RELU

