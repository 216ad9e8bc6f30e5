"""Reads the preference data, renders it in the `hh` template and splits it by prompt.

Data directory: hh_harmless, hh_helpful, rmb_pairs, rm_bench (.jsonl.gz), as named in README.md.
A whole prompt belongs to one split, so that no prompt of the test split was seen in any training:
train 80 %, val 6 % (choosing sets and thresholds), test 14 % (reported).
"""
import gzip
import hashlib
import json
import os

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, CONTEXT = 4096, 512
SEED = 20240716


def _rows(directory, name):
    with gzip.open(os.path.join(directory, name + ".jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _clean(text):
    """None unless ASCII or a typographic quote: the small tokenizer should spend nothing on the rest."""
    text = text.replace("\u2014", "-").replace("\u2013", "-").replace("\u2026", "...").replace("\xa0", " ")
    return text if all(ord(c) < 127 or c in "\u2018\u2019\u201c\u201d" for c in text) else None


def _hh(directory, name):
    for row in _rows(directory, name):
        cut = row["chosen"].rfind(ASSISTANT) + len(ASSISTANT)
        prompt = row["chosen"][:cut]
        if row["rejected"].startswith(prompt):
            yield prompt, row["chosen"][cut:].strip(), row["rejected"][cut:].strip(), name


def _dialogue(turns):
    return "".join((HUMAN if t["role"] == "user" else ASSISTANT) + " " + t["content"].strip() for t in turns) + ASSISTANT


def _all(directory):
    yield from _hh(directory, "hh_harmless")
    yield from _hh(directory, "hh_helpful")
    for row in _rows(directory, "rmb_pairs"):
        yield (_dialogue(row["conversation_input"]), row["chosen"]["answer"].strip(), row["reject"]["answer"].strip(), "rmb")
    for row in _rows(directory, "rm_bench"):
        prompt = HUMAN + " " + row["prompt"].strip() + ASSISTANT
        for chosen, rejected in zip(row["chosen"], row["rejected"]):
            yield prompt, chosen.strip(), rejected.strip(), "rm_bench"


def split_of(prompt):
    """By the first human turn, so that continued dialogues stay together."""
    first = prompt.split(ASSISTANT)[0].strip()
    share = int(hashlib.sha256(first.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.80 else "val" if share < 0.86 else "test"


def pairs(directory):
    """[{prompt, chosen, rejected, source, split}] in the order of the files."""
    out = []
    for prompt, chosen, rejected, source in _all(directory):
        prompt, chosen, rejected = _clean(prompt), _clean(chosen), _clean(rejected)
        if prompt and chosen and rejected and chosen != rejected:
            out.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": source, "split": split_of(prompt)})
    return out


def render(prompt, completion):
    return prompt + " " + completion


def tokens(tokenizer, prompt, completion, limit=CONTEXT):
    """Ids with the appended EOS and the start of the completion, as the contract has it; None when too long.

    The completion starts at the first id that differs from the prompt's own ids, or after the last of them.
    """
    ids = tokenizer.encode(render(prompt, completion)).ids + [0]
    if len(ids) > limit:
        return None
    head = tokenizer.encode(prompt).ids
    start = 0
    while start < min(len(head), len(ids)) and head[start] == ids[start]:
        start += 1
    return ids, start
