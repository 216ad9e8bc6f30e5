"""Rollouts as users hold them, and as the wire does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


from .errors import InvalidArgument

FIELDS = ("run", "step", "group", "id", "attempt", "prompt", "completion", "prompt_ids", "completion_ids", "trainer_reward", "tags",
          "group_size", "messages", "text_form")
FORMS = ("plain", "templated", "verbatim")


@dataclass(slots=True)
class Rollout:
    """One prompt and its completion, as texts or as token ids (docs/verdict.md, section 2).

    run, step, group, id and attempt name it; groups are judged together. Ids are the whole sequence: no template, no special tokens and no
    EOS are added then. Or as messages ({"role", "content"}, the last one the assistant's), which the daemon's template renders. text_form:
    "plain"; "templated" (no template and no EOS are added) or "verbatim" (nothing at all). trainer_reward is compared with the reward here; tags is any JSON object.
    """

    prompt: str | None = None
    completion: str | None = None
    prompt_ids: Sequence[int] | None = None
    completion_ids: Sequence[int] | None = None
    run: str | None = None
    step: int = 0
    group: str = "0"
    id: str = "0"
    attempt: int = 0
    trainer_reward: float | None = None
    tags: Mapping[str, Any] | None = field(default=None)
    group_size: int = 0
    messages: Sequence[Mapping[str, Any]] | None = None
    text_form: str = "plain"

    @property
    def key(self) -> tuple[str | None, int, str, str, int]:
        """(run, step, group, id, attempt)"""
        return self.run, self.step, self.group, self.id, self.attempt


def ids_of(value: Any, what: str) -> Sequence[int]:
    """Token ids out of a list, an array or a tensor of one dimension on the CPU."""
    if isinstance(value, (list, tuple)):
        return value
    device = getattr(value, "device", None)
    if device is not None and getattr(device, "type", "cpu") != "cpu":
        raise InvalidArgument(f"{what}: expected ids on the CPU, found them on {device} (call .cpu() first)")
    if getattr(value, "ndim", 1) != 1:
        raise InvalidArgument(f"{what}: expected one dimension, found shape {tuple(value.shape)}")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def pack(r: Rollout | Mapping[str, Any], run: bytes | None, out: Any) -> None:
    """Fills a message Rollout. run: of those that name none."""
    get: Callable[..., Any] = r.get if isinstance(r, Mapping) else lambda k, d=None: getattr(r, k, d)
    if isinstance(r, Mapping) and not r.keys() <= _KNOWN:
        raise InvalidArgument(f"rollout: expected the fields {', '.join(FIELDS)}, found {', '.join(sorted(set(r) - _KNOWN))}")
    name = get("run")
    if name is None and run is None:
        raise InvalidArgument("rollout: expected the name of a run in it or of the call, found none")
    out.run = name.encode() if name is not None else run
    out.step = get("step", 0)
    out.group = str(get("group", "0")).encode()
    out.id = str(get("id", "0")).encode()
    for key in ("attempt", "group_size"):
        if get(key):
            setattr(out, key, get(key))
    for key in ("prompt", "completion"):
        if get(key) is not None:
            setattr(out, key, get(key).encode("utf-8", "surrogatepass"))
    for key in ("prompt_ids", "completion_ids"):
        if get(key) is not None:
            getattr(out, key).extend(ids_of(get(key), key))
    if get("trainer_reward") is not None:
        out.trainer_reward = get("trainer_reward")
    if get("messages") is not None:
        out.messages = json.dumps(list(get("messages")), ensure_ascii=False).encode()
    if get("text_form") not in (None, "plain"):
        if get("text_form") not in FORMS:
            raise InvalidArgument(f"text_form: expected {', '.join(FORMS)}, found {get('text_form')!r}")
        out.text_form = FORMS.index(get("text_form"))
    if get("tags") is not None:
        out.tags = json.dumps(get("tags"), ensure_ascii=False).encode()


_KNOWN = set(FIELDS)


def pack_all(rollouts: Iterable[Rollout | Mapping[str, Any]], run: str | None, add: Any) -> None:
    """Adds every rollout to a repeated field of a message."""
    packed = run.encode() if run is not None else None
    for r in rollouts:
        pack(r, packed, add())


def unpack(r: Any) -> Rollout:
    """A rollout out of the wire's message."""
    text = {k: getattr(r, k).decode("utf-8", "replace") if r.HasField(k) else None for k in ("prompt", "completion")}
    return Rollout(text["prompt"], text["completion"], list(r.prompt_ids or r.prompt_ids_fixed) or None,
                   list(r.completion_ids or r.completion_ids_fixed) or None, r.run.decode(), r.step,
                   r.group.decode(), r.id.decode(), r.attempt, r.trainer_reward if r.HasField("trainer_reward") else None,
                   json.loads(r.tags) if r.HasField("tags") else None, r.group_size, json.loads(r.messages) if r.HasField("messages") else None,
                   FORMS[r.text_form] if r.text_form < len(FORMS) else str(r.text_form))



