"""Spurion in slime: a reward, a filter that drops flagged samples, and a tap of whole batches. docs/guides/slime.md shows them.

    --custom-rm-path spurion.slime.reward
    --rollout-sample-filter-path spurion.slime.drop_flagged
    --rollout-all-samples-process-path spurion.slime.publish_all

Settings come from the environment: SPURION_RUN (needed), SPURION_RPC, SPURION_ROLLOUTS, SPURION_REWARD (clean | counterfactual),
SPURION_DROP_RULES (names with commas; empty: all). Samples need prompt, response, group_index, index; what is said of a sample stands in
sample.metadata["spurion"]. Failures raise and name the sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ._naming import default_attempt, text_of
from .aio import AsyncClient
from .client import Client
from .errors import InvalidArgument

_clients: dict[tuple[str, int], Any] = {}


def _run() -> str:
    run = os.environ.get("SPURION_RUN")
    if not run:
        raise InvalidArgument("SPURION_RUN: expected the name of a run in the environment, found none")
    return run


def _client(kind: Any) -> Any:
    key = (kind.__name__, os.getpid())
    if key not in _clients:
        _clients[key] = kind(run=_run(), timeout=110.0)  # below slime's 120 s
    return _clients[key]


def _rollout(args: Any, sample: Any) -> dict[str, Any]:
    size = int(getattr(args, "n_samples_per_prompt", 0) or 0)
    step = getattr(sample, "rollout_id", None)
    return {"run": _run(), "step": int(step if step is not None else getattr(args, "rollout_id", 0) or 0), "group": str(sample.group_index),
            "id": str(sample.index), "attempt": default_attempt(), "group_size": size, "prompt": text_of(sample.prompt),
            "completion": sample.response}


def _note(sample: Any, v: Any) -> None:
    if getattr(sample, "metadata", None) is None:
        sample.metadata = {}
    sample.metadata["spurion"] = {"reward": v.reward, "counterfactual_reward": v.counterfactual_reward, "effect": v.effect, "rules": v.rules}


async def reward(args: Any, sample: Any, **_: Any) -> Any:
    """--custom-rm-path: the reward of a sample, or of a list of them (--group-rm), from the daemon."""
    samples = sample if isinstance(sample, (list, tuple)) else [sample]
    verdicts = await _client(AsyncClient).score([_rollout(args, s) for s in samples])
    for s, v in zip(samples, verdicts):
        _note(s, v)
    which = os.environ.get("SPURION_REWARD", "clean")
    if which not in ("clean", "counterfactual"):
        raise InvalidArgument(f"SPURION_REWARD: expected clean or counterfactual, found {which!r}")
    values = [float(v.counterfactual_reward if which == "counterfactual" else v.reward) for v in verdicts]
    return values if isinstance(sample, (list, tuple)) else values[0]


def _flat(samples: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    for s in samples:
        out += _flat(s) if isinstance(s, (list, tuple)) else [s]
    return out


def drop_flagged(args: Any, data: Any, **_: Any) -> None:
    """--rollout-sample-filter-path: sets remove_sample on those that a rule flagged. Samples that were not judged yet are judged now."""
    samples = _flat(data)
    new = [s for s in samples if "spurion" not in (getattr(s, "metadata", None) or {})]
    if new:
        for s, v in zip(new, _client(Client).score([_rollout(args, s) for s in new])):
            _note(s, v)
    wanted = {r for r in os.environ.get("SPURION_DROP_RULES", "").split(",") if r}
    for s in samples:
        rules = s.metadata["spurion"]["rules"]
        if any(not wanted or r in wanted for r in rules):
            s.remove_sample = True


def publish_all(args: Any, all_samples: Any, *_: Any, **__: Any) -> None:
    """--rollout-all-samples-process-path: publishes the whole batch to be watched. Never waits, never raises for a daemon that is away."""
    samples = _flat(all_samples)
    if not samples:
        return
    rollouts = [_rollout(args, s) for s in samples]
    for r, s in zip(rollouts, samples):
        if isinstance(getattr(s, "reward", None), (int, float)):
            r["trainer_reward"] = float(s.reward)
    _client(Client).publish(rollouts, step_end=max(r["step"] for r in rollouts))


