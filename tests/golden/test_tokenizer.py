"""Token ids as the `tokenizers` library gives them: the tokenizers of the shared data, on all texts there.

`spurion-tokenize TOKENIZER_JSON < texts > ids`: JSON strings, one a line, to JSON arrays, with the special tokens added.
"""

import gzip
import json
import subprocess

import pytest
from harness import made_case, need_program, need_shared

TOKENIZERS = ("gpt2", "gpt-neox-20b_pythia", "tinyllama-chat")
AWKWARD = ["", " ", "  ", "\n", "\r\n\r\n", "\t \t", "a\u0000b", "don't", "don’t", "WE'LL", "é", "e\u0301", "ﬁ", "Ǆ", "가", "\u1112\u1161\u11ab",
           "😀👨‍👩‍👧", "\u200d", "\ufeff", "\u00a0x\u2003y", "١٢٣ ४५६", "½²", "  leading", "trailing  ", "a  b   c    d", "\u2028line",
           "<s>", "</s> x", "<|endoftext|>", " <|endoftext|> ", "<|padding|>", "x" * 3000, " " * 100, "\n" * 50, "<unk>", "▁x",
           "\U0001f1e9\U0001f1ea", "\ud7ff\ue000\U0010ffff", "İstanbul ǅ", "12345678901234567890", "http://a.b/c?d=e&f=g#h", "'s't're"]


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)


def _texts(name: str) -> list[str]:
    found = []
    with gzip.open(need_shared("data", name), "rt", encoding="utf-8") as lines:
        for line in lines:
            found += _strings(json.loads(line))
    assert len(found) > 400
    return list(dict.fromkeys(found))


def _library(path):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        from harness import missing

        missing(f"needs the Python package tokenizers ({error})")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check(path, texts: list[str]) -> None:
    wanted = _library(path)
    sent = "".join(json.dumps(t, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(texts))
    done = subprocess.run([need_program("SPURION_TOKENIZE"), str(path)], input=sent.encode("utf-8"), capture_output=True,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
    found = done.stdout.splitlines()
    assert len(found) == len(texts)
    wrong, tokens = [], 0
    for text, line in zip(texts, found):
        want = wanted.encode(text).ids
        tokens += len(want)
        if json.loads(line) != want:
            wrong.append((text, want, json.loads(line)))
    print(f"{path.name}: {len(texts)} texts, {tokens} tokens, {len(wrong)} different")
    assert not wrong, f"{len(wrong)} of {len(texts)} differ; first {wrong[0][0][:300]!r}:\n{wrong[0][1][:60]}\n{wrong[0][2][:60]}"


@pytest.fixture(params=TOKENIZERS)
def tokenizer_file(request, tmp_path):
    need_program("SPURION_TOKENIZE")
    packed = need_shared("data", "tokenizers", f"{request.param}.tokenizer.json.gz")
    out = tmp_path / "tokenizer.json"
    out.write_bytes(gzip.decompress(packed.read_bytes()))
    return out


@pytest.mark.parametrize("name", ["hh_harmless.jsonl.gz", "hh_helpful.jsonl.gz", "rmb_pairs.jsonl.gz", "rm_bench.jsonl.gz"])
def test_tokenizer_on_shared_texts(tokenizer_file, name):
    _check(tokenizer_file, _texts(name))


def test_tokenizer_on_awkward_texts(tokenizer_file):
    texts = AWKWARD + [a + b for a in AWKWARD for b in AWKWARD]
    _check(tokenizer_file, [t for t in texts if not any(0xD800 <= ord(c) < 0xE000 for c in t)])


@pytest.mark.parametrize("case", ["gptj-post", "llama-gqa"])
def test_tokenizer_of_the_cases(case):
    from harness import need_torch

    need_program("SPURION_TOKENIZE")
    need_torch()
    folder = made_case(case)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().splitlines()]
    texts = [r["prompt"] + r["completion"] for r in rows if "prompt" in r]
    _check(folder / "model" / "tokenizer.json", texts + AWKWARD)
