"""tokenizer.json from the vocabulary a GGUF file carries. A GGUF holds tokens, scores or merges, and the *name* of a pipeline
(``tokenizer.ggml.model``, ``tokenizer.ggml.pre``); normaliser and splitting are the published ones of that name. A name that is not
known is refused: another splitting would give other ids, and other rewards, without a sign of it."""

from __future__ import annotations

from typing import Any

META = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token_type

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}"


class TokenizerError(Exception):
    """A vocabulary that cannot become a tokenizer.json; the text says what was expected and found."""


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)]}

# tokenizer.ggml.pre -> pre_tokenizer, normalizer, ignore_merges, whether BOS stands before a text when the file does not say
PIPELINES = {
    "gpt-2": (_byte_level(True), None, False, False),
    "gpt2": (_byte_level(True), None, False, False),
    "olmo": (_byte_level(True), {"type": "NFC"}, False, False),
    "smollm": (_DIGITS, None, False, False),
    "starcoder": (_DIGITS, None, False, False),
    "llama3": (_split(LLAMA3), None, True, True),
    "llama-v3": (_split(LLAMA3), None, True, True),
    "llama-bpe": (_split(LLAMA3), None, True, True),
    "qwen2": (_split(QWEN2), {"type": "NFC"}, False, False),
    "tekken": (_split(TEKKEN), None, True, True),
}


def byte_alphabet() -> str:
    """The 256 characters of GPT-2's byte-level spelling."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return "".join(map(chr, own)) + "".join(chr(256 + n) for n in range(68))


def _added(tokens: list[str], types: list[int], alphabet: set[str] | None) -> list[dict[str, Any]]:
    """Control tokens are special, user-defined ones are not; both are looked for in the raw text."""
    out = []
    for n, (content, kind) in enumerate(zip(tokens, types)):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and content:
            if alphabet is not None and kind == UNKNOWN and set(content) <= alphabet and n > 0:
                continue  # byte-level vocabularies have no unknown token; the mark is the writer's default
            out.append({"id": n, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                        "special": kind != USER_DEFINED})
    return out


def _post_processor(fields: dict[str, Any], tokens: list[str], bos_default: bool, byte_level: bool) -> dict[str, Any] | None:
    """BOS before and EOS after, where the file says so (or is silent, and its kind has them)."""
    sides = {}
    for side, name, default in (("bos", "bos_token_id", bos_default), ("eos", "eos_token_id", False)):
        wanted = fields.get(f"tokenizer.ggml.add_{side}_token", default)
        number = fields.get(f"tokenizer.ggml.{name}")
        if not wanted:
            continue
        if number is None:
            raise TokenizerError(f"tokenizer.ggml.{name}: expected an id, since add_{side}_token is on, found none")
        if not 0 <= number < len(tokens):
            raise TokenizerError(f"tokenizer.ggml.{name}: expected an id below {len(tokens)}, found {number}")
        sides[side] = (int(number), tokens[number])
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True} if byte_level else None
    if not sides:
        return plain
    special = {text: {"id": text, "ids": [number], "tokens": [text]} for number, text in sides.values()}

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        piece: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        before: list[dict[str, Any]] = [{"SpecialToken": {"id": sides["bos"][1], "type_id": type_id}}] if "bos" in sides else []
        after: list[dict[str, Any]] = [{"SpecialToken": {"id": sides["eos"][1], "type_id": type_id}}] if "eos" in sides else []
        return before + piece + after

    template = {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1), "special_tokens": special}
    return {"type": "Sequence", "processors": [plain, template]} if plain else template


def _document(added: list[Any], normalizer: Any, pre_tokenizer: Any, post_processor: Any, decoder: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model}


def _bpe(vocab: dict[str, Any], merges: list[Any], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges, **more}


def _byte_level_document(fields: dict[str, Any], tokens: list[str], types: list[int], pre: str | None) -> dict[str, Any]:
    pre = pre or fields.get("tokenizer.ggml.pre")
    if pre not in PIPELINES:
        raise TokenizerError(f"tokenizer.ggml.pre: expected one of {', '.join(sorted(PIPELINES))}, found "
                             f"{pre or 'none'}; --pre-tokenizer NAME says which of these the model was trained with")
    pre_tokenizer, normalizer, ignore_merges, bos = PIPELINES[pre]
    if fields.get("general.architecture") == "gptneox":
        normalizer = {"type": "NFC"}  # all published NeoX and Pythia files
    if "tokenizer.ggml.merges" not in fields:
        raise TokenizerError("tokenizer.ggml.merges: expected the merges of a byte-level vocabulary, found none")
    merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    for n, merge in enumerate(merges):
        if len(merge) != 2:
            raise TokenizerError(f"tokenizer.ggml.merges[{n}]: expected two tokens with a space between, found {merge!r}")
    alphabet = set(byte_alphabet())
    vocab: dict[str, int] = {}
    for n, token in enumerate(tokens):
        vocab.setdefault(token, n)
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _document(_added(tokens, types, alphabet), normalizer, pre_tokenizer, _post_processor(fields, tokens, bos, True), decoder,
                     _bpe(vocab, merges, ignore_merges=ignore_merges))


def sentencepiece_merges(vocab: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """Merges that a SentencePiece BPE vocabulary implies: every split of a token into two tokens, best score first; among splits
    of one token, by the ids of the halves."""
    merges = []
    for token, _ in sorted(scores.items(), key=lambda item: -item[1]):  # stable: ties in the order of ids
        own = [(vocab[token[:i]], vocab[token[i:]], token[:i], token[i:])
               for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += [[left, right] for _, _, left, right in sorted(own)]
    return merges


def _sentencepiece_document(fields: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    gemma = fields.get("general.architecture", "").startswith("gemma")
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores: expected {len(tokens)} scores, found {'none' if scores is None else len(scores)}")
    if gemma:  # runs of spaces are stored as spaces; merges follow the order of ids, not the scores
        tokens = [META * len(t) if " " in t and not t.strip(" ") else t for t in tokens]
        scores = [-n for n in range(len(tokens))]
    vocab: dict[str, int] = {}
    for n, token in enumerate(tokens):
        vocab.setdefault(token, n)
    plain = {t: float(s) for t, s, kind in zip(tokens, scores, types) if kind in (NORMAL, USER_DEFINED, UNUSED) and t}
    merges = sentencepiece_merges(vocab, plain)
    unknown = next((t for t, kind in zip(tokens, types) if kind == UNKNOWN), None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    prefix = not gemma and fields.get("tokenizer.ggml.add_space_prefix", True)
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": META}, replace]} if prefix else replace
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False} if gemma else None
    decoders = [{"type": "Replace", "pattern": {"String": META}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return _document(_added(tokens, types, None), normalizer, split, _post_processor(fields, tokens, True, False),
                     {"type": "Sequence", "decoders": decoders},
                     _bpe(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))


def tokenizer_json(fields: dict[str, Any], pre: str | None = None) -> dict[str, Any]:
    """The tokenizer.json of GGUF metadata (key to plain value; arrays as lists). pre: instead of tokenizer.ggml.pre.

    Raises TokenizerError for a kind or pipeline that is not known, or a vocabulary that is not whole."""
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise TokenizerError("tokenizer.ggml.tokens: expected a vocabulary, found none")
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type: expected {len(tokens)} types, found {len(types)}")
    if kind == "gpt2":
        return _byte_level_document(fields, tokens, types, pre)
    if kind == "llama":
        return _sentencepiece_document(fields, tokens, types)
    raise TokenizerError(f"tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama (SentencePiece-style BPE), found {kind}")
