"""Names for rollouts of trainers that send none: from step, call, rank and position, the same at every retry."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any


def rank_and_world() -> tuple[int, int]:
    """Of this process: torch.distributed's where it is at work, else the launcher's environment, else (0, 1)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def default_attempt() -> int:
    """How often the launcher (torchrun) has started this job anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)


class Namer:
    """Groups and ids of one process. num_generations: members of a group, when known; else runs of equal prompts are the groups.

    With it, groups are the trainer's own (position over all ranks // num_generations), also where one is spread over ranks.
    """

    def __init__(self, num_generations: int | None = None):
        self.num_generations = num_generations
        self._step = -1
        self._call = 0

    def call_of(self, step: int) -> int:
        """How many calls this step has seen before this one."""
        self._call = self._call + 1 if step == self._step else 0
        self._step = step
        return self._call

    def names(self, prompts: Sequence[Any], call: int) -> list[tuple[str, str, int]]:
        """(group, id, group size) of each."""
        rank, _ = rank_and_world()
        n, size = len(prompts), self.num_generations
        if size:
            first = rank * n
            out = [(f"{call}.{(first + i) // size}", str((first + i) % size), size) for i in range(n)]
            if all(out[i][0] != out[i - 1][0] or prompts[i] == prompts[i - 1] for i in range(1, n)):
                return out
        out, start, number = [], 0, 0
        for i in range(1, n + 1):
            if i == n or prompts[i] != prompts[start]:
                out += [(f"{call}.r{rank}.{number}", str(k), i - start) for k in range(i - start)]
                start, number = i, number + 1
        return out


def text_of(messages: Any) -> str:
    """A prompt or completion as text: strings as they are; of messages the one that there is, or a dialogue in the `hh` form."""
    if isinstance(messages, str):
        return messages
    turns = [(m["role"], _content(m)) for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return turns[0][1]
    said = "".join(("\n\nAssistant: " if role == "assistant" else "\n\nHuman: ") + text for role, text in turns)
    return said if turns and turns[-1][0] == "assistant" else said + "\n\nAssistant:"


def _content(message: Any) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def completion_text(completion: Any) -> str:
    """A completion as text: of messages, what the assistant says."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(m) for m in completion if m["role"] == "assistant")
