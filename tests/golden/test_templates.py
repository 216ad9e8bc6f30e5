"""Chat templates: the daemon's text against apply_chat_template of transformers, on the same jinja; known and unknown hashes; refusals."""

import functools
import hashlib
import json
import random
import subprocess

import pytest
from harness import HERE, need_program, need_torch

NAMES = sorted(p.stem for p in (HERE / "templates").glob("*.jinja"))
NAMED = {"llama3.2": "llama3.1"}  # the same rendering once the date is fixed
CONTENTS = ["Hello", "  spaces around \n", "two\n\nparagraphs\n", "\u00a0\u3000wide\u2028 spaces\u1680", "<|im_start|>user\nfake", "x", "é 東京 😀",
            "{{ not jinja }}", "tab\tand \u001c control", "ends with </s>", "\\n is no newline", "\"quotes\" 'both'"]


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURION_RENDER")
    need_torch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    need_torch()  # before _needs, whose scope is narrower
    from cases.words import train_tokenizer

    path = tmp_path_factory.mktemp("model")
    train_tokenizer("llama3", 300, 1).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}))
    return path


def render(folder, name: str, conversations: list) -> list[dict]:
    done = subprocess.run([need_program("SPURION_RENDER"), str(folder), name], input="".join(json.dumps(c) + "\n" for c in conversations),
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n") if line]


@functools.cache
def conversations() -> list[list[dict]]:
    """Seeded: one to four turns, with and without a system message, awkward contents."""
    rng, out = random.Random(7), []
    for n in range(60):
        messages = [{"role": "system", "content": rng.choice(CONTENTS)}] if n % 3 == 0 else []
        for _ in range(rng.randint(1, 4)):
            messages += [{"role": "user", "content": rng.choice(CONTENTS)}, {"role": "assistant", "content": rng.choice(CONTENTS)}]
        out.append(messages)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_templates_render_as_transformers(folder, name):
    from jinja2.exceptions import TemplateError
    from ref.chat import jinja_of, render as reference, specials

    ours, equal, refused = render(folder, NAMED.get(name, name), conversations()), 0, 0
    for messages, got in zip(conversations(), ours, strict=True):
        try:
            prompt, completion = reference(jinja_of(name), messages, specials(folder))
        except TemplateError:
            refused += 1
            assert "expected" in got["error"] and "found" in got["error"], got
            continue
        assert (got["prompt"], got["completion"]) == (prompt, completion), messages
        assert bool(got["warnings"] & 128) == (name in ("llama3.1", "llama3.2")), "date_fixed"
        equal += 1
    assert equal >= 40 and (refused > 0) == (name in ("gemma", "mistral"))


@pytest.mark.parametrize("name", NAMES)
def test_templates_of_a_checkpoint_are_known_by_hash(folder, tmp_path, name):
    """auto: from chat_template.jinja (transformers 5), tokenizer_config.json, or its list of named templates."""
    from ref.chat import jinja_of

    text = jinja_of(name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ways = {"jinja": config, "string": {**config, "chat_template": text},
            "list": {**config, "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]}}
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    want = render(folder, NAMED.get(name, name), messages)
    for way, value in ways.items():
        here = tmp_path / way
        here.mkdir()
        (here / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (here / "tokenizer_config.json").write_text(json.dumps(value))
        if way == "jinja":
            (here / "chat_template.jinja").write_text(text)
        assert render(here, "auto", messages) == want


def test_templates_published_hashes_are_those_of_our_files():
    """Hashes that public checkpoints are known by: Gemma 2, Qwen2, Qwen2.5, TinyLlama, Llama 3 to 3.2, Mistral v0.3, SmolLM2, Tulu 3."""
    from ref.chat import jinja_of

    published = {"gemma": "ecd6ae51", "qwen2.5": "cd8e9439", "zephyr": "66291cf0", "llama3": "ba03a121", "mistral": "26a59556",
                 "smollm2": "872be49d", "llama3.1": "e10ca381", "llama3.2": "5816fce1", "qwen2": "79320228", "tulu": "ac7498a3",
                 "chatml": "153280e3"}
    assert {n: hashlib.sha256(jinja_of(n).encode()).hexdigest()[:8] for n in published} == published


def test_templates_unknown_is_refused(folder, tmp_path):
    for name, config in (("unknown", {"chat_template": "{{ messages }}"}), ("none", {})):
        here = tmp_path / name
        here.mkdir()
        (here / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (here / "tokenizer_config.json").write_text(json.dumps(config))
        done = subprocess.run([need_program("SPURION_RENDER"), str(here), "auto"], input="", capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert "expected one that is known, found" in done.stderr and "model.template names" in done.stderr
        assert (hashlib.sha256(b"{{ messages }}").hexdigest() in done.stderr) == (name == "unknown")


@pytest.mark.parametrize(("line", "said"), [
    ([], "expected 2 to"), ([{"role": "user", "content": "a"}], "expected 2 to"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "expected the last one from the assistant, found user"),
    ([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}], "message 0: role: expected system, user or assistant"),
    ([{"role": "user", "content": [1]}, {"role": "assistant", "content": "b"}], "message 0: content: expected a text, found an array"),
    ([{"role": "user", "content": "a"}, "b"], "message 1: expected an object"),
    ([{"content": "a"}, {"role": "assistant", "content": "b"}], "found none"),
])
def test_templates_refuse_broken_messages(folder, line, said):
    assert said in render(folder, "chatml", [line])[0]["error"]
