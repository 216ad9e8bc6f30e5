"""GGUF through spurion-convert, on files that the gguf library writes from seeded models of transformers and from real vocabularies."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from gguf_files import BLOCKS, QUANTISED, add_tokenizer, write_model
from harness import ROOT, missing, need_program, need_shared, need_torch, parse, run_judge

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
         "max_position_embeddings": 128, "pad_token_id": None, "num_labels": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
MODELS = {  # name: GGUF architecture, class of transformers, configuration
    "llama": ("llama", "Llama", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "llama-3.1": ("llama", "Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", "Llama", {**GROUPED, "tie_word_embeddings": True,
                                        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("llama", "Mistral", {**GROUPED, "sliding_window": 9, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "qwen2": ("qwen2", "Qwen2", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", "Qwen3", {**GROUPED, "head_dim": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma2": ("gemma2", "Gemma2", {**GROUPED, "query_pre_attn_scalar": 64, "sliding_window": 9, "attn_logit_softcapping": 30.0,
                                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "gpt2": ("gpt2", "GPT2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320, "num_labels": 1,
                              "pad_token_id": None}),
    "neox": ("gptneox", "GPTNeoX", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "neox-serial": ("gptneox", "GPTNeoX", {**SIZES, "use_parallel_residual": False, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
}


@pytest.fixture(autouse=True)
def _needs():
    need_torch()
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        missing(f"needs the Python package gguf ({error})")


def _convert(path, *options) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "client" / "python")}
    return subprocess.run([sys.executable, "-m", "spurion.convert", str(path), *options], env=env, capture_output=True, text=True)


def _converted(path, *options):
    done = _convert(path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(path.with_suffix(""))
    return path.with_suffix("")


def _model(name: str, head: bool = True):
    import torch
    import transformers

    architecture, family, config = MODELS[name]
    torch.manual_seed(len(name))
    kind = getattr(transformers, f"{family}For{'SequenceClassification' if head else 'CausalLM'}")
    model = kind(getattr(transformers, f"{family}Config")(**config)).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 1.0 if key.startswith("score") else 0.06
            if parameter.dim() < 2 and not key.endswith("bias") and not (architecture == "gemma2"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def _tiny_vocabulary(writer) -> None:
    """300 byte-level tokens and one special: enough to be a tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "abcdeht" for b in "abcdeh "[:6]]
    tokens = ["<|endoftext|>", *alphabet, *(a + b for a, b in merges)]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    t = Tokenizer(model)
    t.add_special_tokens(["<|endoftext|>"])
    add_tokenizer(writer, json.loads(t.to_str()), "gpt2", "gpt-2", eos_token_id=0, bos_token_id=0)


def _reward(model, ids: list[int]):
    import torch

    with torch.no_grad():
        base = getattr(model, model.base_model_prefix)
        return (base(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0]).double().item()


@pytest.mark.parametrize("name", list(MODELS))
def test_gguf_gives_back_the_model(tmp_path, name):
    """A seeded reward model, through GGUF and back: the same tensors to the bit, the same rewards by transformers and by the daemon."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = _model(name)
    write_model(tmp_path / "rm.gguf", model, MODELS[name][0], tokenizer=_tiny_vocabulary)
    folder = _converted(tmp_path / "rm.gguf")
    back = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(back) is type(model)
    exact = MODELS[name][0] != "gemma2"  # (w + 1) - 1 rounds
    for key, want in model.state_dict().items():
        got = back.state_dict()[key]
        assert torch.equal(got, want) if exact else torch.allclose(got, want, rtol=0, atol=2e-7), key
    prompts = [list(range(3, 3 + n)) for n in (1, 7, 40)]
    rows = [{"run": "r", "step": 0, "group": f"g{n}", "id": "0", "prompt_ids": p, "completion_ids": [(5 * i) % 300 for i in range(25)]}
            for n, p in enumerate(prompts)]
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{path: {folder.name}, dtype: f32}}\nsaes: []\nattribution: {{method: none}}\n")
    status, lines, error = run_judge(config, "".join(json.dumps(r) + "\n" for r in rows).encode())
    assert status == 0, (lines, error)
    for row, verdict in zip(rows, parse(lines)):
        ids = row["prompt_ids"] + row["completion_ids"]
        want = _reward(model, ids)
        assert abs(_reward(back, ids) - want) <= 2e-5 * max(1, abs(want))
        assert abs(verdict["reward"] - want) <= 1e-4 * max(1, abs(want)), (name, verdict["reward"], want)


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTISED, *BLOCKS])
def test_gguf_every_type(tmp_path, kind):
    """Every type: the values the gguf library dequantises, in transformers' row order, which its own GGUF loader gives too."""
    import torch
    from gguf_files import permute
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = _model("llama", head=False)
    stands = write_model(tmp_path / "lm.gguf", model, "llama", kind, _tiny_vocabulary)
    found = load_file(_converted(tmp_path / "lm.gguf") / "model.safetensors")
    assert set(found) == set(stands)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="lm.gguf", dtype=torch.float32).state_dict()
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    error = norm = 0.0
    for key, tensor in found.items():
        assert tensor.dtype == (kept if tensor.dim() > 1 else torch.float32), key
        assert torch.equal(tensor.float(), theirs[key].float()), f"{key} is not what transformers reads"
        heads = 4 if ".q_proj." in key else 2 if ".k_proj." in key else 0
        x = tensor.float().numpy()
        assert (permute(x, heads) if heads else x).tobytes() == stands[key].astype("float32").tobytes(), key
        error += float((tensor.float() - model.state_dict()[key]).norm() ** 2)
        norm += float(model.state_dict()[key].norm() ** 2)
    if kind not in BLOCKS:  # those are random: only the others stand for the model
        limit = {"F16": 3e-4, "BF16": 3e-3, "Q8_0": 1e-2, "Q4_0": 0.12, "Q4_1": 0.1, "Q5_0": 0.06, "Q5_1": 0.05}[kind]
        assert 0 < (error / norm) ** 0.5 < limit


# ---- vocabularies ----

def _texts() -> list[str]:
    import random

    import fuzz_tokenizers

    return fuzz_tokenizers.strings(random.Random(11), 1500, ["<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<bos>", "<think>"])


def _same_ids(wanted: dict, folder) -> None:
    from tokenizers import Tokenizer

    want = Tokenizer.from_str(json.dumps(wanted))
    want.no_truncation()
    want.no_padding()
    texts, path = _texts(), folder / "tokenizer.json"
    got = Tokenizer.from_file(str(path))
    ours = subprocess.run([need_program("SPURION_TOKENIZE"), str(path)], input="".join(json.dumps(t) + "\n" for t in texts),
                          capture_output=True, text=True, check=True).stdout.splitlines()
    for text, line in zip(texts, ours, strict=True):
        ids = want.encode(text).ids
        assert got.encode(text).ids == ids, text[:200]
        assert json.loads(line) == ids, text[:200]


def _vocabulary_file(path, architecture: str, document: dict, kind: str, pre: str | None, **flags) -> None:
    import gguf
    import torch

    model = _model("gpt2" if architecture == "gptneox" else architecture)
    size = 1 + max(max(document["model"]["vocab"].values()), max((a["id"] for a in document["added_tokens"]), default=0))
    model.resize_token_embeddings(size, mean_resizing=False)
    if architecture == "gptneox":
        architecture = "gpt2"
    with torch.no_grad():
        write_model(path, model, architecture, "F16", lambda w: add_tokenizer(w, document, kind, pre, **flags))
    assert gguf.GGUFReader(str(path)).fields["tokenizer.ggml.model"].contents() == kind


REAL = {"gpt2": ("gpt2", "gpt2", "gpt-2", {}),
        "tinyllama-chat": ("llama", "llama", None, {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0})}


@pytest.mark.parametrize("name", list(REAL))
def test_gguf_real_vocabulary(tmp_path, name):
    """The published tokenizer.json, stored as a GGUF stores it, comes back with the same ids (for SentencePiece: the same merges)."""
    architecture, kind, pre, flags = REAL[name]
    document = json.loads(gzip.decompress(need_shared("data", "tokenizers", f"{name}.tokenizer.json.gz").read_bytes()))
    _vocabulary_file(tmp_path / "v.gguf", architecture, document, kind, pre, **flags)
    folder = _converted(tmp_path / "v.gguf")
    found = json.loads((folder / "tokenizer.json").read_text())
    pairs = [m.split(" ") if isinstance(m, str) else m for m in document["model"]["merges"]]
    assert found["model"]["vocab"] == document["model"]["vocab"]
    assert found["model"]["merges"] == pairs
    _same_ids(document, folder)


TRAINED = {"llama3": ("llama", "gpt2", "llama-bpe", "<|begin_of_text|>"), "qwen": ("qwen2", "gpt2", "qwen2", None),
           "smollm": ("llama", "gpt2", "smollm", None), "llama2": ("llama", "llama", None, "<s>"), "gemma": ("gemma2", "llama", None, "<bos>")}


@pytest.fixture(scope="module")
def pipelines():
    need_torch()  # before _needs, whose scope is narrower
    import fuzz_tokenizers

    return fuzz_tokenizers.pipelines()


@pytest.mark.parametrize("name", list(TRAINED))
def test_gguf_pipeline_by_name(tmp_path, pipelines, name):
    """The pipelines without a real file here: a GGUF names them, and the tokenizer.json written for that name gives the same ids."""
    architecture, kind, pre, bos = TRAINED[name]
    document = json.loads(pipelines[name].to_str())
    if kind == "llama":  # SentencePiece's order: merges as the ids of the vocabulary imply them
        sys.path.insert(0, str(ROOT / "client" / "python"))
        from spurion.gguf_tokenizer import sentencepiece_merges

        document["model"]["vocab"].update({a["content"]: a["id"] for a in document["added_tokens"]})  # as published files have them
        special = {a["content"] for a in document["added_tokens"] if a["special"]}
        vocab = sorted(document["model"]["vocab"].items(), key=lambda item: item[1])
        last = {t: -1e9 for t, _ in vocab if name == "llama2" and len(t) > 1 and set(t) == {"\u2581"}}
        scores = {t: last.get(t, -n) for t, n in vocab if t not in special and not t.startswith("<0x")}
        document["model"]["merges"] = sentencepiece_merges(document["model"]["vocab"], scores)
    flags = {"bos_token_id": pipelines[name].token_to_id(bos), "add_bos_token": True} if bos else {"add_bos_token": False}
    _vocabulary_file(tmp_path / "v.gguf", architecture, document, kind, pre, **flags)
    _same_ids(document, _converted(tmp_path / "v.gguf"))


# ---- what is refused ----

def test_gguf_refuses_by_name(tmp_path):
    import gguf
    import numpy as np

    def refused(name: str, make, *words: str) -> None:
        writer = gguf.GGUFWriter(str(tmp_path / name), "llama")
        make(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        done = _convert(tmp_path / name)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert all(w in done.stderr for w in words), done.stderr
        assert not (tmp_path / name).with_suffix("").exists()
        assert {p.suffix for p in tmp_path.iterdir()} == {".gguf"}, "something half-made was left"

    def shape(writer, layers: int = 1) -> None:
        writer.add_context_length(16)
        writer.add_embedding_length(32)
        writer.add_block_count(layers)
        writer.add_head_count(2)
        writer.add_feed_forward_length(64)
        writer.add_layer_norm_rms_eps(1e-5)

    def embedding(writer) -> None:
        writer.add_tensor("token_embd.weight", np.zeros((300, 32), dtype=np.float32))

    refused("a.gguf", lambda w: w.add_context_length(16), "expected the key llama.embedding_length", "found none")
    refused("b.gguf", lambda w: shape(w), "token_embd.weight", "found none")
    refused("c.gguf", lambda w: (shape(w), embedding(w)), "tokenizer.ggml.tokens", "found none")
    refused("d.gguf", lambda w: (shape(w), embedding(w), w.add_tensor("blk.0.ssm_a", np.zeros(4, dtype=np.float32))), "blk.0.ssm_a")
    refused("e.gguf", lambda w: (shape(w), embedding(w), w.add_tensor("blk.0.attn_q.weight", np.zeros((4, 50), dtype=np.uint8),
            raw_dtype=gguf.GGMLQuantizationType.IQ1_S)), "blk.0.attn_q.weight", "Q4_K", "found IQ1_S")
    refused("f.gguf", lambda w: (shape(w), embedding(w), w.add_tokenizer_model("gpt2"), w.add_token_list(["a"]), w.add_token_merges(["a a"]),
                                 w.add_tokenizer_pre("chameleon")), "tokenizer.ggml.pre", "smollm", "found chameleon", "--pre-tokenizer")
    refused("g.gguf", lambda w: (shape(w), embedding(w), w.add_tokenizer_model("t5"), w.add_token_list(["a"])), "found t5")
    refused("h.gguf", lambda w: (shape(w), embedding(w), w.add_rope_scaling_type(gguf.RopeScalingType.YARN)), "rope.scaling.type", "found yarn")
    refused("i.gguf", lambda w: (shape(w), embedding(w), w.add_expert_count(8)), "dense", "8 experts")
    (tmp_path / "j.gguf").write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16)
    (tmp_path / "k.gguf").write_bytes(b"PK\x03\x04")
    for name in ("j.gguf", "k.gguf"):
        done = _convert(tmp_path / name)
        assert done.returncode == 1 and "expected a GGUF file" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_gguf_option_and_force(tmp_path):
    """--pre-tokenizer names what the file does not; a directory that stands is left alone without --force."""
    writer_model = _model("llama")
    write_model(tmp_path / "m.gguf", writer_model, "llama", tokenizer=lambda w: (
        w.add_tokenizer_model("gpt2"), w.add_token_list(["a", "b", "ab"]), w.add_token_merges(["a b"])))
    assert _convert(tmp_path / "m.gguf").returncode == 1
    folder = _converted(tmp_path / "m.gguf", "--pre-tokenizer", "smollm")
    assert json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]["type"] == "Digits"
    (folder / "keep").write_text("mine")
    again = _convert(tmp_path / "m.gguf", "--pre-tokenizer", "gpt-2")
    assert again.returncode == 0 and "--force" in again.stderr and again.stdout == ""
    _converted(tmp_path / "m.gguf", "--pre-tokenizer", "gpt-2", "--force")
    assert json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    assert (folder / "keep").read_text() == "mine"
