"""What `spuriond check` says about heads and pooling, and what it refuses, with what was expected and what was found."""

import json
import shutil
import subprocess

import pytest
import yaml
from harness import made_case, need_program, need_torch


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURIOND")
    need_torch()


@pytest.fixture
def folder(tmp_path):
    """A case of one linear head, to be spoilt."""
    return copy("head-openrlhf", tmp_path)


def copy(name, tmp_path):
    shutil.copytree(made_case(name), tmp_path / "case", copy_function=shutil.copyfile)
    return tmp_path / "case"


def check(folder, **model) -> tuple[int, str]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= model
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run([need_program("SPURIOND"), "check", "--config", str(folder / "config.yaml")], capture_output=True, text=True, timeout=120,
                          check=False)
    return done.returncode, done.stdout + done.stderr


def tensors(folder, change) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def configure(folder, **more) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_heads_check_says_what_it_found(folder):
    status, text = check(folder)
    assert status == 0
    assert "head       value_head, 1 layer, 1 output; pooling last (the default)" in text


def test_heads_layers_and_pooling_of_the_checkpoint(tmp_path):
    status, text = check(copy("head-mean-bf16", tmp_path))
    assert status == 0 and "head       out_proj, 1 layer, 1 output; pooling mean\n" in text


def test_heads_missing_is_refused(folder):
    tensors(folder, lambda t: t.pop("value_head.weight"))
    status, text = check(folder)
    assert status not in (0, 3) and "missing score head: expected the tensor value_head.weight of shape (1, 48), found none" in text


def test_heads_never_trained_is_refused(folder):
    tensors(folder, lambda t: t["value_head.weight"].zero_())
    status, text = check(folder)
    assert status != 0 and "value_head.weight: expected a trained score head, found the same number (0) everywhere" in text


def test_heads_normaliser_must_be_there(tmp_path):
    folder = copy("head-beaver", tmp_path)
    tensors(folder, lambda t: t.pop("normalizer.var"))
    status, text = check(folder)
    assert status != 0 and "expected the tensors normalizer.mean and normalizer.var" in text


def test_heads_process_reward_models_are_refused(folder):
    configure(folder, architectures=["Qwen2ForProcessRewardModel"])
    status, text = check(folder)
    assert status != 0 and 'found "Qwen2ForProcessRewardModel"' in text


@pytest.mark.parametrize(("model", "said"), [
    ({"head_weights": None}, "model.head_index says which is the reward, or model.head_weights how they are weighed"),
    ({"head_weights": [1.0]}, "model.head_weights: expected 3 numbers (the head's outputs) and no model.head_index, found 1"),
    ({"head_index": 0}, "found 3 and a head_index"),
    ({"head_weights": [1, "two", 3]}, "model.head_weights: expected numbers, found 'two'"),
    ({"head_weights": None, "head_index": 3}, "model.head_index: expected 0 to 2"),
    ({"pooling": "max"}, "expected last, last_non_pad, first_eos"),
])
def test_heads_wrong_choices_are_refused(tmp_path, model, said):
    status, text = check(copy("head-outputs", tmp_path), **model)
    assert status != 0 and said in text, text


def test_heads_first_eos_needs_one(folder):
    configure(folder, eos_token_id=None)
    status, text = check(folder, pooling="first_eos")
    assert status != 0 and "first_eos: expected eos_token_id" in text


def test_heads_pad_that_is_eos_is_warned_of(folder):
    configure(folder, pad_token_id=1)
    assert "pad_token_id equals eos_token_id (1)" in check(folder)[1]
    assert "pad_token_id equals eos_token_id" not in check(folder, pooling="last_non_pad")[1]


# --- heads that nobody trained ---


def base_model(place, kind: str, **options):
    """A seeded language model of transformers, saved: what people point AutoModelForSequenceClassification at by mistake."""
    import torch
    import transformers

    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 703, "max_position_embeddings": 128, "pad_token_id": None, **options}
    net = getattr(transformers, kind)(transformers.LlamaConfig(**sizes))
    net.save_pretrained(place / "model", safe_serialization=True)
    return net


def untrained(tmp_path, kind: str, **options):
    """A case whose checkpoint is a base model; no SAEs."""
    folder = copy("head-openrlhf", tmp_path)
    for file in [*(folder / "model").glob("*.safetensors"), folder / "model" / "config.json"]:
        file.unlink()
    base_model(folder, kind, **options)
    (folder / "config.yaml").write_text("model: {path: model, dtype: f32}\n")
    return folder


@pytest.mark.parametrize("kind,options,found", [
    ("LlamaForCausalLM", {}, "a language-model head only (lm_head): this is no reward model"),
    ("LlamaForCausalLM", {"tie_word_embeddings": True}, "found none"),  # transformers leaves lm_head out of the file then
    ("LlamaModel", {}, "found none"),
])
def test_heads_a_base_model_is_refused(tmp_path, kind, options, found):
    status, text = check(untrained(tmp_path, kind, **options))
    assert status != 0 and "missing score head: expected the tensor score.weight" in text and found in text


def test_heads_one_that_the_index_names_but_no_file_has_is_refused(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model/model.safetensors")
    head = state.pop("value_head.weight")
    assert head.numel() > 1
    save_file(state, folder / "model/model-00001-of-00001.safetensors")
    (folder / "model/model.safetensors").unlink()
    names = dict.fromkeys([*state, "value_head.weight"], "model-00001-of-00001.safetensors")
    (folder / "model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    status, text = check(folder)
    assert status != 0 and "value_head.weight" in text and "expected" in text and "found" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_one_that_transformers_made_anew_is_doubted(tmp_path, dtype):
    """from_pretrained of a base model gives a reward model with a random head, and save_pretrained says nothing of it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = untrained(tmp_path, "LlamaForCausalLM")
    torch.manual_seed(6)
    net = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=getattr(torch, dtype))
    net.save_pretrained(folder / "model", safe_serialization=True)
    saved = json.loads((folder / "model/config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    status, text = check(folder)
    assert status == 0 and text.count("the score head (score) cannot be told from a fresh one") == 2  # on stdout and on stderr
    with torch.no_grad():
        net.score.weight.mul_(3)
    net.save_pretrained(folder / "model", safe_serialization=True)
    status, text = check(folder)
    assert status == 0 and "fresh one" not in text


@pytest.mark.parametrize("law", ["OpenRLHF", "torch"])
def test_heads_other_trainers_fresh_ones_are_doubted(folder, law):
    import torch

    def anew(state):
        torch.manual_seed(3)
        weight = state["value_head.weight"]
        wide = torch.zeros(4, weight.shape[1])  # enough numbers to say: 48 wide alone is too few
        if law == "OpenRLHF":
            wide.normal_(0, 1 / (weight.shape[1] + 1))
        else:
            wide = torch.nn.Linear(weight.shape[1], 4, bias=False).weight.detach()
        state["value_head.weight"] = wide.contiguous()

    tensors(folder, anew)
    status, text = check(folder, head_index=0)
    assert status == 0 and "cannot be told from a fresh one" in text
    assert law == "OpenRLHF" or "as torch draws it" in text  # 1 / 49 of OpenRLHF is 0.02 too


@pytest.mark.parametrize("name", ["head-openrlhf", "head-two-layer", "llama-v4-labels"])
def test_heads_fitted_ones_are_not_doubted(tmp_path, name):
    status, text = check(copy(name, tmp_path))
    assert status == 0 and "fresh one" not in text
