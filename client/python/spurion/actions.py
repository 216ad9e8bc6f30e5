"""What a trainer does with flagged rollouts: drop, down-weight, or take the counterfactual reward; by rule, and with regard to the group.

A rule's action is the daemon's (`rules: - {id: …, action: …}`) unless the trainer names another here. log and alert change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InvalidArgument
from .results import Verdict

# weakest first: of a rollout under several rules the strongest holds
ACTIONS = ("log", "alert", "downweight", "counterfactual", "drop")
ALIASES = {"down-weight": "downweight", "down_weight": "downweight", "replace": "counterfactual"}


def action_name(name: str) -> str:
    """The action's own name; raises InvalidArgument."""
    name = ALIASES.get(name, name)
    if name not in ACTIONS:
        raise InvalidArgument(f"action: expected {', '.join(ACTIONS)}, found {name!r}")
    return name


@dataclass(slots=True)
class Shaped:
    """rewards: (n,) float32, NaN where dropped or unscored; give None to the trainer there, never 0. weights: (n,) 1, or less where
    down-weighted. advantages: (n,) reward minus the group's mean over what is not dropped, times the weight; 0 where dropped.
    actions: (n,) what was done."""

    rewards: np.ndarray
    weights: np.ndarray
    advantages: np.ndarray
    actions: list[str]

    def to_list(self) -> list[float | None]:
        """Rewards as trainers take them: None where there is none."""
        return [None if math.isnan(x) else float(x) for x in self.rewards]


def _chosen(v: Verdict, actions: Mapping[str, str]) -> str:
    if v.error:
        return "log"
    named = [action_name(actions.get(rule, actions.get("*", "log"))) for rule in v.rules]
    return max(named, key=ACTIONS.index, default="log")


def shape(verdicts: Sequence[Verdict], actions: Mapping[str, str], *, weight: float = 0.5, scope: str = "group",
          base: str = "clean") -> Shaped:
    """Applies actions. verdicts: n of any groups. actions: rule (or "*") to action.

    counterfactual: the reward without the spurious features. scope "group": then every member of that group gets its own counterfactual
    reward, because taking the features away moves unflagged rollouts too, and the two kinds do not compare; "rollout": only the flagged one.
    downweight: the rollout's distance from its group's mean is multiplied by weight. drop: no reward at all, and the others' mean is taken
    without it. base: "clean" or "counterfactual", the reward of what nothing is done to. Means in float64 over the float32 values.
    """
    if scope not in ("group", "rollout") or base not in ("clean", "counterfactual"):
        raise InvalidArgument(f"shape: expected scope group or rollout and base clean or counterfactual, found {scope!r}, {base!r}")
    n = len(verdicts)
    done = [_chosen(v, actions) for v in verdicts]
    groups: dict[tuple, list[int]] = {}
    for i, v in enumerate(verdicts):
        groups.setdefault((v.run, v.step, v.group), []).append(i)
    rewards, weights, advantages = np.full(n, np.nan, np.float32), np.ones(n, np.float32), np.zeros(n, np.float32)
    for members in groups.values():
        swap = scope == "group" and any(done[i] == "counterfactual" for i in members)
        for i in members:
            v = verdicts[i]
            if v.error or done[i] == "drop":
                continue
            other = base == "counterfactual" or swap or done[i] == "counterfactual"
            if swap and done[i] in ("log", "alert"):
                done[i] = "counterfactual"
            value = v.counterfactual_reward if other else v.reward
            rewards[i] = math.nan if value is None else value
        there = [i for i in members if not math.isnan(rewards[i])]
        if not there:
            continue
        mean = float(np.mean(rewards[there].astype(np.float64)))
        for i in there:
            if done[i] == "downweight":
                weights[i] = weight
                rewards[i] = mean + weight * (float(rewards[i]) - mean)
        mean = float(np.mean(rewards[there].astype(np.float64)))
        advantages[there] = rewards[there].astype(np.float64) - mean
    return Shaped(rewards, weights, advantages, done)
