"""After training: what happened in a run. Everything comes from the daemon's counters and rows; numbers mean what docs/verdict.md says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .client import Client
from .errors import NotFound
from .results import Count, Record, Row, Rows, Table


def rate_bounds(flagged: int, scored: int, alpha: float = 0.05) -> tuple[float, float]:
    """Bounds of a rate: {p : E(p) < 1/alpha} with a Beta(1/2, 1/2) mixture, as the daemon's alerts have them (docs/alerts.md): valid at level
    1 - alpha also for who looks again and again at a growing sample."""
    if scored <= 0:
        return 0.0, 1.0
    s, n, limit = flagged, scored, math.log(1 / alpha)
    mixture = math.lgamma(s + 0.5) + math.lgamma(n - s + 0.5) - math.lgamma(n + 1) - math.log(math.pi)

    def log_e(p: float) -> float:
        return mixture - (s * math.log(p) if s else 0.0) - ((n - s) * math.log1p(-p) if n > s else 0.0)

    def edge(out: float, inside: float) -> float:
        for _ in range(60):
            middle = (out + inside) / 2
            out, inside = (out, middle) if log_e(middle) < limit else (middle, inside)
        return inside

    best = min(max(s / n, 1e-12), 1 - 1e-12)
    return (0.0 if s == 0 else edge(1e-15, best)), (1.0 if s == n else edge(1 - 1e-15, best))


@dataclass(slots=True)
class StepPoint:
    """One step: means of the rewards, and how many rollouts were flagged by any rule."""

    step: int
    scored: int
    flagged: int
    reward_mean: float
    reward_sd: float
    counterfactual_mean: float


@dataclass(slots=True)
class RatePoint:
    """A rule's rate in one step, with bounds at level 1 - alpha."""

    step: int
    flagged: int
    scored: int
    rate: float
    lower: float
    upper: float


@dataclass(slots=True)
class FeaturePoint:
    """A catalogued feature over all steps (step -1) or in one: in how many rollouts it was active, its mean attribution over these."""

    sae: str
    index: int
    label: str
    verdict: str
    families: list[str]
    step: int
    active: int
    attribution_sum: float
    attribution_mean: float


@dataclass(slots=True)
class Difference:
    """One quantity of two runs. lower, upper: bounds of each at level 95 %; difference = b - a."""

    what: str
    a: float
    a_lower: float
    a_upper: float
    b: float
    b_lower: float
    b_upper: float
    difference: float
    apart: bool


class Timeline(Table[StepPoint]):
    """Steps in their order."""

    _columns = ("step", "scored", "flagged", "reward_mean", "reward_sd", "counterfactual_mean")


class Curve(Table[RatePoint]):
    """A rule's rate over steps."""

    _columns = ("step", "flagged", "scored", "rate", "lower", "upper")


class Features(Table[FeaturePoint]):
    """Features, strongest first."""

    _columns = ("sae", "index", "label", "verdict", "families", "step", "active", "attribution_sum", "attribution_mean")


class Comparison(Table[Difference]):
    """Two runs side by side."""

    _columns = ("what", "a", "a_lower", "a_upper", "b", "b_lower", "b_upper", "difference", "apart")


def _step_point(c: Count) -> StepPoint:
    n = max(c.scored, 1)
    mean = c.reward_sum / n
    return StepPoint(c.step, c.scored, c.flagged, mean, math.sqrt(max(0.0, c.reward_square_sum / n - mean * mean)), c.counterfactual_sum / n)


class RunAnalysis:
    """Questions about one run: RunAnalysis(Client(), "my-run").timeline().to_pandas()"""

    def __init__(self, client: Client, run: str):
        self.client, self.run = client, run
        if not any(r.run == run for r in client.runs()):
            raise NotFound(f"expected a run that is stored, found none of the name {run!r}")

    def timeline(self) -> Timeline:
        """Rewards and flags of each step."""
        return Timeline(_step_point(c) for c in self.client.counts(self.run) if c.step >= 0)

    def rules(self) -> list[Count]:
        """Totals of each rule that stands in force or flagged something."""
        return self.client.counts(self.run, "rule", totals=True)

    def rate_curve(self, rule: str, alpha: float = 0.05) -> Curve:
        """The rule's rate in each step, with bounds."""
        scored = {p.step: p.scored for p in self.timeline()}
        flagged = {c.step: c.flagged for c in self.client.counts(self.run, "rule", rule=rule)}
        return Curve(RatePoint(s, flagged.get(s, 0), n, flagged.get(s, 0) / n if n else 0.0, *rate_bounds(flagged.get(s, 0), n, alpha))
                     for s, n in scored.items())

    def top_features(self, limit: int = 20) -> Features:
        """Catalogued features by |sum of attribution| over the run: what moved the rewards most."""
        points = self._features(self.client.counts(self.run, "feature", totals=True))
        return Features(sorted(points, key=lambda p: -abs(p.attribution_sum))[:limit])

    def feature_by_step(self, sae: str, index: int) -> Features:
        """One catalogued feature, step by step."""
        return Features(self._features(self.client.counts(self.run, "feature", feature=(sae, index))))

    def _features(self, counts: Sequence[Count]) -> list[FeaturePoint]:
        known = {(e.sae, e.index): e for e in self.client.catalogue()}
        out = []
        for c in counts:
            e = known.get((c.sae, c.index))
            out.append(FeaturePoint(c.sae, c.index, e.label if e else "", e.verdict if e else "unknown", e.families if e else [], c.step, c.scored,
                                    c.effect_sum, c.effect_sum / max(c.scored, 1)))
        return out

    def flipped(self, limit: int | None = None) -> Rows:
        """Rollouts whose advantage turns its sign without the spurious features; the furthest apart first."""
        rows = [r for r in self.client.query(self.run) if r.advantage_flip]
        rows.sort(key=lambda r: -abs((r.advantage or 0.0) - (r.counterfactual_advantage or 0.0)))
        return Rows(rows[:limit])

    def worst(self, limit: int = 10, rule: str | None = None) -> Rows:
        """Rollouts that the spurious features paid most for (of one rule: by that rule's effect)."""
        return self.client.query(self.run, order="effect", limit=limit, rule=rule)

    def records(self, rows: Sequence[Row]) -> list[Record]:
        """The rows' records with their evidence; those that were not kept whole are left out."""
        return [self.client.get(*r.key) for r in rows if r.whole]

    def compare(self, other: str, alpha: float = 0.05) -> Comparison:
        """This run (a) against another (b): mean rewards (normal bounds over rollouts) and each rule's rate. apart: the bounds do not meet."""
        theirs = RunAnalysis(self.client, other)
        mine, others = self.timeline(), theirs.timeline()
        out = [_difference("reward", *_mean(mine, "reward_mean"), *_mean(others, "reward_mean")),
               _difference("counterfactual_reward", *_mean(mine, "counterfactual_mean"), *_mean(others, "counterfactual_mean"))]
        totals = [{c.rule: c.flagged for c in run.rules()} for run in (self, theirs)]
        counts = [sum(p.scored for p in t) for t in (mine, others)]
        for rule in sorted({*totals[0], *totals[1]}):
            rates = []
            for flagged, n in zip(totals, counts):
                k = flagged.get(rule, 0)
                rates += [k / n if n else 0.0, *rate_bounds(k, n, alpha)]
            out.append(_difference(f"rate of {rule}", *rates))
        return Comparison(out)


def _mean(points: Sequence[StepPoint], name: str) -> tuple[float, float, float]:
    n = sum(p.scored for p in points)
    if not n:
        return math.nan, math.nan, math.nan
    mean = sum(getattr(p, name) * p.scored for p in points) / n
    square = sum((p.reward_sd ** 2 + (p.reward_mean - mean) ** 2) * p.scored for p in points) / n if name == "reward_mean" else \
        sum((p.reward_sd ** 2 + (p.counterfactual_mean - mean) ** 2) * p.scored for p in points) / n
    half = 1.96 * math.sqrt(square / n)
    return mean, mean - half, mean + half


def _difference(what: str, a: float, al: float, au: float, b: float, bl: float, bu: float) -> Difference:
    return Difference(what, a, al, au, b, bl, bu, b - a, bl > au or al > bu)


def columns_of(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Records as flat columns, for exports."""
    out: dict[str, list[Any]] = {}

    def put(name: str, values: list[Any]) -> None:
        out[name] = values

    put("run_id", [x.verdict.run for x in records])
    put("step", [x.verdict.step for x in records])
    put("group_id", [x.verdict.group for x in records])
    put("rollout_id", [x.verdict.id for x in records])
    put("attempt", [x.verdict.attempt for x in records])
    put("prompt", [x.rollout.prompt for x in records])
    put("completion", [x.rollout.completion for x in records])
    for name in ("reward", "counterfactual_reward", "effect", "effect_sd", "advantage", "counterfactual_advantage", "advantage_flip", "scored_position",
                 "token_count", "truncated", "provenance", "warnings"):
        put(name, [getattr(x.verdict, name) for x in records])
    put("trainer_reward", [x.rollout.trainer_reward for x in records])
    put("flags", [[{"rule": f.rule, "effect": f.effect} for f in x.verdict.flags] for x in records])
    put("top_features", [[{"sae": f.sae, "index": f.index, "label": f.label, "activation_max": f.activation_max, "attribution": f.attribution,
                           "ablation_effect": f.ablation_effect} for f in x.verdict.features] for x in records])
    put("time_ms", [x.time_ms for x in records])
    return out
