"""From an input line to token ids: names, groups, templates, specials, the border of the completion."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer

from .chat import jinja_of, render, specials
from .heads import scored_position


class Refused(Exception):
    """This rollout cannot be judged; the others can."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass
class Sequence:
    """Token ids of a rollout. C = positions start..len(ids) (or from `lead` on with scope: all)."""

    ids: list[int]
    start: int
    lead: int
    truncated: bool = False
    scored: int = -1  # position that the head reads
    warnings: set[str] = field(default_factory=set)


def invalid(message: str) -> Refused:
    return Refused("INVALID_ARGUMENT", message)


def parse_line(line: bytes) -> dict | None:
    """The JSON object of a line, or None when the line holds none."""
    try:
        found = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def group_key(row: dict) -> tuple | None:
    """(run, step, group), or None when one of the three cannot be read."""
    run, step, group = row.get("run"), row.get("step"), row.get("group")
    if _is_text(run) and _is_whole(step) and _is_text(group):
        return run, step, group
    return None


def identity(row: dict) -> tuple:
    """The five-part identity; raises Refused when a name is missing or of another type."""
    for name in ("run", "group", "id"):
        if row.get(name) is None:
            raise invalid(f"{name}: expected a value, found none")
        if not _is_text(row[name]):
            raise invalid(f"{name}: expected Unicode text, found {row[name]!r}")
    for name in ("step", "attempt"):
        value = row.get(name, 0 if name == "attempt" else None)
        if not _is_whole(value):
            raise invalid(f"{name}: expected a whole number, found {value!r}")
    return row["run"], row["step"], row["group"], row["id"], row.get("attempt", 0)


def check_fields(row: dict, vocab_rows: int) -> None:
    """Types of the rollout's contents; raises Refused."""
    given = sorted(n for n in ("prompt", "completion", "prompt_ids", "completion_ids") if row.get(n) is not None)
    if row.get("messages") is not None:
        if given or not isinstance(row["messages"], list):
            raise invalid(f"expected a list of messages and nothing beside it, found {given}")
        return
    if given not in (["completion", "prompt"], ["completion_ids", "prompt_ids"]):
        raise invalid(f"expected prompt and completion, or prompt_ids and completion_ids; found {given}")
    for name in given:
        value = row[name]
        if name.endswith("_ids"):
            if not isinstance(value, list) or not all(_is_whole(i) and 0 <= i < vocab_rows for i in value):
                raise invalid(f"{name}: expected a list of ids from 0 to {vocab_rows - 1}, found {value!r}"[:200])
        elif not isinstance(value, str):
            raise invalid(f"{name}: expected a string, found {type(value).__name__}")
        elif not _is_text(value):
            raise invalid(f"{name}: expected Unicode text, found a lone surrogate")
    if row.get("completion") == "":
        raise invalid("completion: expected text, found an empty string")
    if row.get("completion_ids") == []:
        raise invalid("completion: expected at least one token, found none")
    trainer = row.get("trainer_reward")
    if trainer is not None and (isinstance(trainer, bool) or not isinstance(trainer, (int, float))
                                or trainer != trainer or abs(trainer) == float("inf")):
        raise invalid(f"trainer_reward: expected a finite number, found {trainer!r}")
    if row.get("tags") is not None and not isinstance(row["tags"], dict):
        raise invalid(f"tags: expected an object, found {type(row['tags']).__name__}")


def apply_template(name: str, prompt: str, completion: str) -> tuple[str, str]:
    if name == "none":
        return prompt, completion
    if name == "hh":
        if not (prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:")):
            prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
        return prompt, completion if completion.startswith(" ") else " " + completion
    raise ValueError(f"template: expected none or hh, found {name!r}")


class Encoder:
    """Texts or ids of a rollout to a Sequence."""

    def __init__(self, tokenizer: Tokenizer, model_config: dict, options: dict, folder: Path):
        """folder: of the checkpoint, for its special tokens' texts."""
        self.chat = None
        if options["template"] not in ("none", "hh"):
            self.chat = (jinja_of(options["template"]), specials(folder))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.options = options
        self.pad_id = model_config.get("pad_token_id")
        self.bos_id = _first(model_config.get("bos_token_id"))
        self.eos_id = _first(model_config.get("eos_token_id"))
        eos = model_config.get("eos_token_id")
        self.eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        probe = tokenizer.encode("a")
        count = 0
        while count < len(probe.ids) and probe.special_tokens_mask[count]:
            count += 1
        self.specials = probe.ids[:count]
        self.bos_text = tokenizer.id_to_token(self.bos_id) if self.bos_id is not None else None
        context = model_config.get("max_position_embeddings", model_config.get("n_positions"))
        self.max_tokens = min(options["max_tokens"] or context, context)

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _lead(self, ids: list[int]) -> int:
        if self.specials and ids[: len(self.specials)] == self.specials:
            return len(self.specials)
        return int(self.bos_id is not None and ids[:1] == [self.bos_id])

    def _from_texts(self, row: dict) -> Sequence:
        warnings, specials = set(), list(self.specials)
        if self.chat:
            pair = [{"role": "user", "content": row.get("prompt")}, {"role": "assistant", "content": row.get("completion")}]
            try:
                prompt, completion = render(self.chat[0], row.get("messages") or pair, self.chat[1])
            except TemplateError as refused:
                raise invalid(f"messages: expected what the template takes, found {refused}") from refused
            warnings |= {"date_fixed"} if self.options["template"] == "llama3.1" else set()
        else:
            prompt, completion = apply_template(self.options["template"], row["prompt"], row["completion"])
        if self.bos_text and prompt.startswith(self.bos_text):
            warnings.add("bos_once")
            specials = [i for i in specials if i != self.bos_id]
        before, both = self.tokenize(prompt), self.tokenize(prompt + completion)
        start = 0
        while start < len(before) and start < len(both) and before[start] == both[start]:
            start += 1
        if start < len(before):
            warnings.add("boundary")
        if start >= len(both):
            raise invalid("completion: expected at least one token, found none")
        if self.chat and self.options["append_eos"] and both[-1] in self.eos_ids:
            warnings.add("eos_doubled")
        ids = specials + both + ([self.eos_id] if self.options["append_eos"] else [])
        return Sequence(ids=ids, start=len(specials) + start, lead=self._lead(ids), warnings=warnings)

    def encode(self, row: dict) -> Sequence:
        """Raises Refused (INVALID_ARGUMENT, OUT_OF_RANGE)."""
        if row.get("prompt_ids") is not None:
            ids = row["prompt_ids"] + row["completion_ids"]
            seq = Sequence(ids=ids, start=len(row["prompt_ids"]), lead=self._lead(ids))
        else:
            seq = self._from_texts(row)
        seq.lead = min(seq.lead, seq.start)
        self._fit(seq)
        pooling = self.options.get("pooling") or "last"
        if pooling == "last" and self.pad_id is not None and seq.ids[-1] == self.pad_id:
            seq.warnings.add("pad_scored")
        scored = scored_position(seq.ids, seq.start, pooling, self.pad_id, self.eos_ids)
        if scored is None:
            raise invalid(f"completion: expected a token other than pad_token_id ({self.pad_id}), found none")
        seq.scored = scored
        return seq

    def _fit(self, seq: Sequence) -> None:
        excess = len(seq.ids) - self.max_tokens
        if excess <= 0:
            return
        if self.options["on_too_long"] != "truncate_prompt":
            raise Refused("OUT_OF_RANGE", f"expected at most {self.max_tokens} tokens, found {len(seq.ids)}")
        if excess > seq.start - seq.lead:
            raise Refused("OUT_OF_RANGE", f"expected at most {self.max_tokens} tokens without the prompt, "
                                          f"found {seq.lead + len(seq.ids) - seq.start}")
        del seq.ids[seq.lead : seq.lead + excess]
        seq.start -= excess
        seq.truncated = True

    def text_of(self, token_id: int) -> str:
        """A token's bytes as text, U+FFFD for what is no whole UTF-8 character."""
        return token_bytes(self.tokenizer, token_id).decode("utf-8", errors="replace")


def _first(value):
    return value[0] if isinstance(value, list) else value


def _byte_table() -> dict[str, int]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in kept}
    rest = [b for b in range(256) if b not in kept]
    table.update({chr(256 + n): b for n, b in enumerate(rest)})
    return table


BYTE_OF = _byte_table()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes a token stands for: byte-level alphabet, `<0xHH>` pieces, or plain text with U+2581 for a space."""
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    if token_id in tokenizer.get_added_tokens_decoder():
        return token.encode("utf-8")
    if is_byte_level(tokenizer):
        return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode("utf-8")
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def is_byte_level(tokenizer: Tokenizer) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
