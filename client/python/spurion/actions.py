"""What a trainer does with flagged rollouts: drop, down-weight, or take the counterfactual reward; by rule, and with regard to the group.

A rule's action is the daemon's (`rules: - {id: …, action: …}`, docs/verdict.md section 6), which records it with the rollout; a trainer may name
another here. log and alert change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InvalidArgument
from .results import ACTIONS, Verdict

ALIASES = {"downweight": "down_weight", "down-weight": "down_weight", "counterfactual": "replace"}


def action_name(name: str) -> str:
    """The action's own name; raises InvalidArgument."""
    name = ALIASES.get(name, name)
    if name not in ACTIONS:
        raise InvalidArgument(f"action: expected {', '.join(ACTIONS)}, found {name!r}")
    return name


@dataclass(slots=True)
class Shaped:
    """rewards: (n,) float32, NaN where dropped or unscored; give None to the trainer there, never 0. A trainer that takes its group's mean of them
    gets weight * advantage. weights: (n,) of the loss: 1, less where down-weighted, 0 where dropped. advantages: (n,) as docs/verdict.md
    defines action.advantage (the weight is not in it), 0 where dropped. actions: (n,) what was done."""

    rewards: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    actions: list[str]

    def to_list(self) -> list[float | None]:
        """Rewards as trainers take them: None where there is none."""
        return [None if math.isnan(x) else float(x) for x in self.rewards]


def _chosen(v: Verdict, actions: Mapping[str, str] | None, weight: float) -> tuple[str, float]:
    if v.error:
        return "none", 0.0
    if actions is None:
        return v.action.name, v.action.weight
    named = [action_name(actions.get(rule, actions.get("*", "log"))) for rule in v.rules]
    strongest = max(named, key=ACTIONS.index, default="none")
    return strongest, weight if strongest == "down_weight" else 0.0 if strongest == "drop" else 1.0


def shape(verdicts: Sequence[Verdict], actions: Mapping[str, str] | None = None, *, weight: float = 0.5, scope: str = "rollout",
          base: str = "clean") -> Shaped:
    """Applies actions. verdicts: n of any groups. actions: rule (or "*") to action, or None: what the daemon's rules ask for.

    replace: the reward without the spurious features, for the flagged rollout; with scope "group" for every member of its group, because taking
    features away moves unflagged rollouts too, and the two kinds compare badly. down_weight: reward' = m + weight * (reward - m), m the
    group's weighted mean, so that the group's plain mean of reward' is m again. drop: no reward, and the others' mean without it. base:
    "clean" or "counterfactual", the reward of what nothing is done to. Means in float64 over the float32 values.
    """
    if scope not in ("group", "rollout") or base not in ("clean", "counterfactual"):
        raise InvalidArgument(f"shape: expected scope group or rollout and base clean or counterfactual, found {scope!r}, {base!r}")
    n = len(verdicts)
    chosen = [_chosen(v, actions, weight) for v in verdicts]
    done = [name for name, _ in chosen]
    weights = np.array([w for _, w in chosen], np.float32)
    groups: dict[tuple[str, int, str], list[int]] = {}
    for i, v in enumerate(verdicts):
        groups.setdefault((v.run, v.step, v.group), []).append(i)
    rewards, advantages = np.full(n, np.nan, np.float32), np.zeros(n, np.float32)
    for members in groups.values():
        swap = scope == "group" and any(done[i] == "replace" for i in members)
        for i in members:
            v = verdicts[i]
            if v.error or done[i] == "drop":
                continue
            if swap and done[i] in ("none", "log", "alert"):
                done[i] = "replace"
            other = base == "counterfactual" or done[i] == "replace"
            value = v.counterfactual_reward if other else v.reward
            rewards[i] = math.nan if value is None else value
        there = [i for i in members if not math.isnan(rewards[i])]
        w, r = weights[there].astype(np.float64), rewards[there].astype(np.float64)
        if not there or w.sum() <= 0:
            continue
        mean = float((w * r).sum() / w.sum())
        advantages[there] = r - mean
        rewards[there] = np.where(w == 1.0, r, mean + w * (r - mean))
    return Shaped(rewards, weights, advantages, done)
