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
