"""Every pipeline of tokenizer.json on fuzzed strings, and the work it takes on long texts without spaces.

The full run (10^6 strings a pipeline) is fuzz_tokenizers.py's; docs/compatibility.md has its counts. Here: SPURION_TOKENIZER_STRINGS
strings (default 8,000) of every published pipeline, a tenth of that of every odd one.
"""

import functools
import gzip
import json
import os
import random
import subprocess

import pytest
from harness import missing, need_program, need_shared

COUNT = int(os.environ.get("SPURION_TOKENIZER_STRINGS", "8000"))
REAL = ("gpt2", "gpt-neox-20b_pythia", "tinyllama-chat")
PUBLISHED = ("llama3", "qwen", "mistral-nemo", "gpt4o", "smollm", "llama2", "mistral", "gemma")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Texts without spaces (and one of spaces alone), by what they are made of; n bytes of each.
LONG = {
    "one letter": lambda n: "a" * n,
    "letters": lambda n: "".join(random.Random(5).choices(LETTERS, k=n)),
    "capitals": lambda n: "".join(random.Random(5).choices(LETTERS.upper(), k=n)),
    "digits": lambda n: "".join(random.Random(5).choices("0123456789", k=n)),
    "signs": lambda n: "".join(random.Random(5).choices(".,;:!?-_/()[]'", k=n)),
    "Chinese": lambda n: "".join(map(chr, random.Random(5).choices(range(0x4E00, 0x5E00), k=n // 3))),
    "emoji": lambda n: "\U0001f468\u200d\U0001f469\u200d\U0001f467" * (n // 18),
    "marks": lambda n: "e" + "\u0301\u0323" * (n // 4),
    "spaces": lambda n: " " * n,
    "newlines": lambda n: "\n \n" * (n // 3),
}


def _fuzz():
    need_program("SPURION_TOKENIZE")
    try:
        import fuzz_tokenizers
    except ImportError as error:
        missing(f"needs the Python package tokenizers ({error})")
    return fuzz_tokenizers


@functools.cache
def _trained() -> dict:
    fuzz = _fuzz()
    known = fuzz.pipelines()
    return known | fuzz.odd(known)


@pytest.fixture
def tokenizer_file(request, tmp_path):
    _fuzz()
    path = tmp_path / "tokenizer.json"
    if request.param in REAL:
        path.write_bytes(gzip.decompress(need_shared("data", "tokenizers", f"{request.param}.tokenizer.json.gz").read_bytes()))
    else:
        _trained()[request.param].save(str(path))
    return path


def _same(path, count: int, seed: str) -> None:
    fuzz = _fuzz()
    judge = fuzz.load(str(path))
    specials = [x.content for x in judge.get_added_tokens_decoder().values()]
    texts = fuzz.strings(random.Random(seed), count, specials)
    different, panics = fuzz.compare(need_program("SPURION_TOKENIZE"), seed, judge, str(path), texts)
    print(f"{seed}: {count} strings, {different} differences, {panics} panics of the library")
    assert different == 0
    assert panics < count / 20


@pytest.mark.parametrize("tokenizer_file", [*REAL, *PUBLISHED], indirect=True)
def test_tokenizer_pipeline_on_fuzzed_strings(tokenizer_file, request):
    _same(tokenizer_file, COUNT, request.node.callspec.params["tokenizer_file"])


def test_tokenizer_odd_rules_on_fuzzed_strings(tmp_path):
    names = [n for n in _trained() if n not in PUBLISHED]
    assert len(names) > 20
    for name in names:
        path = tmp_path / f"{name}.json"
        _trained()[name].save(str(path))
        _same(path, max(COUNT // 10, 100), name)


def _steps(path, texts: list[str]) -> list[list[int]]:
    sent = "".join(json.dumps(t) + "\n" for t in texts)
    done = subprocess.run([need_program("SPURION_TOKENIZE"), "--steps", str(path)], input=sent, capture_output=True, text=True,
                          check=True, timeout=600)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("tokenizer_file", [*REAL, "llama3", "qwen", "mistral-nemo", "llama2", "mistral", "gemma"], indirect=True)
def test_tokenizer_work_grows_as_the_text(tokenizer_file):
    """Steps counted, not timed: twice the bytes take at most 2.2 times the steps (n log n), and the ids are the library's."""
    judge, sizes = _fuzz().load(str(tokenizer_file)), [1 << 14, 1 << 16, 1 << 18]
    for what, made in LONG.items():
        texts = [made(n) for n in sizes]
        counted = _steps(tokenizer_file, texts)
        for (small, big), n in zip(zip(counted, counted[1:]), sizes):
            assert n / 8 < small[1] < 80 * n, (what, n, small)
            assert big[1] < 2.2**2 * small[1] + 1000, (what, n, small, big)
        assert counted[0][0] == len(judge.encode(texts[0], add_special_tokens=False).ids), what


@pytest.mark.parametrize("tokenizer_file", ["gpt2", "tinyllama-chat", "llama3"], indirect=True)
def test_tokenizer_megabyte_without_spaces(tokenizer_file):
    """1 MB in one word: the same ids as the library."""
    judge = _fuzz().load(str(tokenizer_file))
    text = LONG["letters"](1 << 20)
    done = subprocess.run([need_program("SPURION_TOKENIZE"), str(tokenizer_file)], input=json.dumps(text) + "\n", capture_output=True,
                          text=True, check=True, timeout=600)
    assert json.loads(done.stdout) == judge.encode(text).ids
