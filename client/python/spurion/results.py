"""What comes back: verdicts, rows, records, alerts. Numbers mean what docs/verdict.md says; None is null."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

import numpy as np

from ._rollout import Rollout, unpack
from .errors import RolloutError, code_name

WARNINGS = ("boundary", "bos_once", "pad_scored", "group_split", "trainer_reward_differs", "prompt_truncated", "eos_doubled", "date_fixed")
ACTIONS = ("none", "log", "alert", "down_weight", "replace", "drop")
VERDICTS = ("unknown", "spurious", "intended")
KINDS = ("none", "rate", "each", "trainer_reward", "store")
T = TypeVar("T")


def _opt(x: Any, name: str) -> float | None:
    if not x.HasField(name):
        return None
    value = getattr(x, name)
    return None if isinstance(value, float) and math.isnan(value) else value


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def warning_names(bits: int) -> list[str]:
    """The set of warnings, in alphabetical order."""
    return sorted(name for i, name in enumerate(WARNINGS) if bits >> i & 1)


@dataclass(slots=True)
class Feature:
    """One SAE feature in one rollout. attribution: + pushed the reward up. ablation_effect: + the reward rises when it is removed."""

    sae: str
    index: int
    label: str | None
    families: list[str]
    verdict: str
    attribution: float | None
    ablation_effect: float | None
    activation_max: float
    activation_sum: float
    peak_position: int


@dataclass(slots=True)
class Flag:
    """A rule that fired. effect = reward without its features - reward."""

    rule: str
    effect: float
    features: list[tuple[str, int]]


@dataclass(slots=True)
class Sae:
    """The share of one SAE; never to be added over SAEs."""

    sae: str
    attribution_sum: float | None
    error_attribution: float | None
    bias_attribution: float | None
    baseline_reward: float | None
    residual: float | None
    l0_mean: float | None


@dataclass(slots=True)
class Tokens:
    """Per-token view of the completion: attribution[sae] and flagged[rule][sae] are arrays of len(id), reward units."""

    position: list[int]
    id: list[int]
    text: list[str]
    text_bytes: list[bytes]
    attribution: dict[str, np.ndarray]
    flagged: dict[str, dict[str, np.ndarray]]


@dataclass(slots=True)
class Action:
    """What the rules ask a trainer to do (docs/verdict.md, section 6): none, log, alert, down_weight, replace, drop; by which rule; with what
    reward, weight of the loss, and advantage in the group as it is then."""

    name: str = "none"
    rule: str | None = None
    reward: float | None = None
    weight: float = 1.0
    advantage: float | None = None


@dataclass(slots=True)
class Verdict:
    """One rollout judged, or refused: then error is (code name, reason) and there are no numbers."""

    run: str
    step: int
    group: str
    id: str
    attempt: int = 0
    reward: float | None = None
    counterfactual_reward: float | None = None
    effect: float | None = None
    effect_sd: float | None = None
    advantage: float | None = None
    counterfactual_advantage: float | None = None
    advantage_flip: bool | None = None
    scored_position: int | None = None
    token_count: int | None = None
    truncated: bool | None = None
    saes: list[Sae] = field(default_factory=list)
    families: dict[str, float] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    action: Action = field(default_factory=Action)
    provenance: str = ""
    features: list[Feature] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tokens: Tokens | None = None
    error: tuple[str, str] | None = None

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """(run, step, group, id, attempt)"""
        return self.run, self.step, self.group, self.id, self.attempt

    @property
    def rules(self) -> list[str]:
        """Names of the rules that fired."""
        return [f.rule for f in self.flags]

    def to_dict(self) -> dict[str, Any]:
        """The object that `spuriond judge` prints (docs/verdict.md, section 4)."""
        out: dict[str, Any] = {"run": self.run, "step": self.step, "group": self.group, "id": self.id}
        if self.attempt:
            out["attempt"] = self.attempt
        if self.error:
            return {**out, "error": {"code": self.error[0], "message": self.error[1]}}
        for name in ("reward", "counterfactual_reward", "effect", "effect_sd", "advantage", "counterfactual_advantage", "advantage_flip",
                     "scored_position", "token_count", "truncated"):
            out[name] = getattr(self, name)
        out["saes"] = [plain(s) for s in self.saes]
        out["families"] = [{"family": k, "effect": v} for k, v in self.families.items()]
        out["flags"] = [{"rule": f.rule, "effect": f.effect, "features": [{"sae": s, "index": i} for s, i in f.features]} for f in self.flags]
        out["action"] = plain(self.action)
        out["provenance"] = self.provenance
        out["features"] = [plain(f) for f in self.features]
        out["warnings"] = self.warnings
        if self.tokens is not None:
            t = self.tokens
            out["tokens"] = {"position": t.position, "id": t.id, "text": t.text,
                             "attribution": {s: a.tolist() for s, a in t.attribution.items()},
                             "flagged": {r: {s: a.tolist() for s, a in x.items()} for r, x in t.flagged.items()}}
        return out

    def _repr_html_(self) -> str:
        from .display import verdict_html

        return verdict_html(self)


def plain(x: Any) -> dict[str, Any]:
    """A result as a dict of its fields."""
    return {f.name: getattr(x, f.name) for f in fields(x)}


def _tokens_of(t: Any, saes: list[str], rules: list[str]) -> Tokens:
    n = len(t.id)
    ends = np.cumsum(np.fromiter(t.text_size, dtype=np.int64, count=len(t.text_size)))
    starts = ends - np.fromiter(t.text_size, dtype=np.int64, count=len(t.text_size))
    pieces = [t.text[a:b] for a, b in zip(starts, ends)]
    attribution = np.fromiter(t.attribution, dtype=np.float32, count=len(t.attribution))
    flagged = np.fromiter(t.flagged, dtype=np.float32, count=len(t.flagged))
    attribution = attribution.reshape(len(saes), n) if attribution.size else attribution
    flagged = flagged.reshape(len(rules), len(saes), n) if flagged.size else flagged
    return Tokens(list(t.position), list(t.id), [p.decode("utf-8", "replace") for p in pieces], pieces,
                  {s: attribution[i] for i, s in enumerate(saes)} if attribution.size else {},
                  {r: {s: flagged[k, i] for i, s in enumerate(saes)} for k, r in enumerate(rules)} if flagged.size else {})


def _features_of(v: Any, saes: list[str]) -> list[Feature]:
    names = [f.decode() for f in v.family_name]
    label: dict[int, tuple[str, str, list[str]]] = {}
    at = 0
    for i, place in enumerate(v.labelled):
        count = v.label_family_count[i]
        label[place] = (v.label[i].decode(), VERDICTS[v.label_verdict[i]], [names[k] for k in v.label_family[at:at + count]])
        at += count
    out = []
    for i, sae in enumerate(v.feature_sae):
        text, verdict, families = label.get(i, (None, "unknown", []))
        out.append(Feature(saes[sae], v.feature_index[i], text, families, verdict,
                           _null(v.feature_attribution[i]) if v.feature_attribution else None,
                           _null(v.feature_ablation_effect[i]) if v.feature_ablation_effect else None,
                           v.feature_activation_max[i], v.feature_activation_sum[i], v.feature_peak_position[i]))
    return out


def verdict_of(v: Any) -> Verdict:
    """A verdict out of the wire's message."""
    out = Verdict(v.run.decode(), v.step, v.group.decode(), v.id.decode(), v.attempt)
    if v.code:
        out.error = (code_name(v.code), v.message.decode(errors="replace"))
        return out
    for name in ("reward", "counterfactual_reward", "effect", "effect_sd", "advantage", "counterfactual_advantage", "advantage_flip",
                 "scored_position", "token_count"):
        setattr(out, name, _opt(v, name))
    out.truncated = v.truncated
    saes = [s.decode() for s in v.sae]
    columns = [[_null(x) for x in c] or [None] * len(saes) for c in
               (v.sae_attribution_sum, v.sae_error_attribution, v.sae_bias_attribution, v.sae_baseline_reward, v.sae_residual, v.sae_l0_mean)]
    out.saes = [Sae(s, *(c[i] for c in columns)) for i, s in enumerate(saes)]
    out.families = {f.decode(): e for f, e in zip(v.family, v.family_effect)}
    at = 0
    for rule, effect, count in zip(v.flag_rule, v.flag_effect, v.flag_feature_count):
        refs = zip(v.flag_feature_sae[at:at + count], v.flag_feature_index[at:at + count])
        out.flags.append(Flag(rule.decode(), effect, [(saes[s], i) for s, i in refs]))
        at += count
    out.action = Action(ACTIONS[v.action] if v.action < len(ACTIONS) else str(v.action), v.action_rule.decode() if v.HasField("action_rule") else None,
                        _opt(v, "action_reward"), v.action_weight if v.HasField("action_weight") else 1.0, _opt(v, "action_advantage"))
    out.provenance = v.provenance.decode()
    out.features = _features_of(v, saes)
    out.warnings = warning_names(v.warnings)
    if v.HasField("tokens"):
        out.tokens = _tokens_of(v.tokens, saes, out.rules)
    return out


class Table(list[T], Generic[T]):
    """A list of results that can become columns, a pandas frame or an Arrow table."""

    _columns: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Any]]:
        """One flat dict for each result."""
        return [{name: _flat(getattr(x, name)) for name in self._columns} for x in self]

    def columns(self) -> dict[str, list[Any]]:
        """Name to values, in the order of the results."""
        return {name: [_flat(getattr(x, name)) for x in self] for name in self._columns}

    def to_pandas(self) -> Any:
        """A pandas.DataFrame (needs pandas)."""
        import pandas

        return pandas.DataFrame(self.columns(), columns=list(self._columns))

    def to_arrow(self) -> Any:
        """A pyarrow.Table (needs pyarrow). Rules and warnings are lists of strings."""
        import pyarrow

        schema = {"step": pyarrow.int64(), "attempt": pyarrow.int32(), "rules": pyarrow.list_(pyarrow.string()),
                  "warnings": pyarrow.list_(pyarrow.string()), "advantage_flip": pyarrow.bool_(), "token_count": pyarrow.int32(),
                  "time_ms": pyarrow.int64(), "whole": pyarrow.bool_(), "error": pyarrow.string(), "seq": pyarrow.int64(),
                  "flagged": pyarrow.int64(), "scored": pyarrow.int64(), "above": pyarrow.bool_(), "step_above": pyarrow.bool_()}
        words = ("run", "group", "id", "kind", "rule", "text", "action")
        values = self.columns()
        types = {n: schema.get(n, pyarrow.string() if n in words else pyarrow.float32()) for n in values}
        return pyarrow.table({n: pyarrow.array(v, type=types[n]) for n, v in values.items()})

    def _repr_html_(self) -> str:
        from .display import table_html

        return table_html(self.records())


def _flat(value: Any) -> Any:
    return f"{value[0]}: {value[1]}" if isinstance(value, tuple) else value


class Verdicts(Table[Verdict]):
    """Verdicts in the order of the rollouts that were asked for."""

    _columns = ("run", "step", "group", "id", "attempt", "reward", "counterfactual_reward", "effect", "effect_sd", "advantage",
                "counterfactual_advantage", "advantage_flip", "rules", "warnings", "token_count", "error")

    @property
    def rewards(self) -> np.ndarray:
        """(n,) float32, NaN for the refused ones."""
        return self._array("reward")

    @property
    def counterfactual_rewards(self) -> np.ndarray:
        """(n,) float32, NaN for the refused ones."""
        return self._array("counterfactual_reward")

    def _array(self, name: str) -> np.ndarray:
        return np.array([math.nan if getattr(v, name) is None else getattr(v, name) for v in self], dtype=np.float32)

    @property
    def refused(self) -> list[tuple[str, int, str, str, str, str]]:
        """(run, step, group, id, code name, reason) of each that was refused."""
        return [(*v.key[:4], *v.error) for v in self if v.error]

    def check(self) -> Verdicts:
        """Raises RolloutError, which names every refused rollout and its reason; else gives itself."""
        if self.refused:
            raise RolloutError(self.refused)
        return self


@dataclass(slots=True)
class Row:
    """What every judged rollout leaves, kept whole or not."""

    run: str
    step: int
    group: str
    id: str
    attempt: int
    reward: float | None
    counterfactual_reward: float | None
    effect: float | None
    effect_sd: float | None
    advantage: float | None
    counterfactual_advantage: float | None
    advantage_flip: bool | None
    rules: list[str]
    warnings: list[str]
    time_ms: int
    whole: bool
    action: str = "none"

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """(run, step, group, id, attempt)"""
        return self.run, self.step, self.group, self.id, self.attempt


class Rows(Table[Row]):
    """Rows of a query. cursor: to go on from, b"" at the end."""

    _columns = tuple(f.name for f in fields(Row))
    cursor: bytes = b""


def row_of(r: Any) -> Row:
    """A row out of the wire's message."""
    numbers: dict[str, Any] = {n: _opt(r, n) for n in ("reward", "counterfactual_reward", "effect", "effect_sd", "advantage",
                                                       "counterfactual_advantage", "advantage_flip")}
    action = ACTIONS[r.action] if r.action < len(ACTIONS) else str(r.action)
    return Row(r.run.decode(), r.step, r.group.decode(), r.id.decode(), r.attempt, **numbers, rules=[x.decode() for x in r.rule],
               warnings=warning_names(r.warnings), time_ms=r.time_ms, whole=r.whole, action=action)


@dataclass(slots=True)
class Record:
    """One stored rollout with its evidence; without texts where it was not kept whole."""

    rollout: Rollout
    verdict: Verdict
    time_ms: int

    def _repr_html_(self) -> str:
        from .display import record_html

        return record_html(self)


def record_of(r: Any) -> Record:
    """A record out of the wire's message."""
    return Record(unpack(r.rollout), verdict_of(r.verdict), r.time_ms)


@dataclass(slots=True)
class Worst:
    """A rollout that an alert names."""

    group: str
    id: str
    attempt: int
    effect: float


@dataclass(slots=True)
class Alert:
    """docs/alerts.md. kind: rate | each | trainer_reward | store."""

    epoch: int
    seq: int
    kind: str
    run: str
    step: int
    rule: str
    flagged: int
    scored: int
    rate: float | None
    rate_lower: float | None
    rate_upper: float | None
    rate_max: float | None
    alpha: float | None
    above: bool
    step_above: bool
    run_flagged: int
    run_scored: int
    run_rate_lower: float | None
    run_rate_upper: float | None
    worst: list[Worst]
    time_ms: int
    trainer_reward: float | None
    reward: float | None
    text: str

    def __str__(self) -> str:
        if self.kind == "rate":
            said = f"{self.flagged} of {self.scored} rollouts flagged ({(self.rate or 0):.1%})"
            said += f", above the allowed {self.rate_max:.1%}" if (self.above or self.step_above) and self.rate_max is not None else ""
        elif self.kind == "trainer_reward":
            said = f"the trainer's reward {self.trainer_reward:g} differs from {self.reward:g} here"
        else:
            said = self.text or "flagged"
        return f"{self.run} step {self.step}, {self.rule or self.kind}: {said}"


class Alerts(Table[Alert]):
    """Alerts in the order of their numbers."""

    _columns = tuple(f.name for f in fields(Alert) if f.name not in ("worst", "epoch"))


def alert_of(a: Any) -> Alert:
    """An alert out of the wire's message."""
    worst = [Worst(g.decode(), i.decode(), n, e) for g, i, n, e in
             zip(a.worst_group, a.worst_id, a.worst_attempt or [0] * len(a.worst_id), a.worst_effect)]
    return Alert(a.epoch, a.seq, KINDS[a.kind] if a.kind < len(KINDS) else str(a.kind), a.run.decode(), a.step, a.rule.decode(), a.flagged,
                 a.scored, _opt(a, "rate"), _opt(a, "rate_lower"), _opt(a, "rate_upper"), _opt(a, "rate_max"), _opt(a, "alpha"), a.above,
                 a.step_above, a.run_flagged, a.run_scored, _opt(a, "run_rate_lower"), _opt(a, "run_rate_upper"), worst, a.time_ms,
                 _opt(a, "trainer_reward"), _opt(a, "reward"), a.text.decode(errors="replace"))


@dataclass(slots=True)
class Count:
    """Counters of one step (-1: all steps). kind 2: effect_sum is of attribution, scored counts rollouts with the feature active."""

    step: int
    scored: int
    flagged: int
    effect_sum: float
    rule: str = ""
    sae: str = ""
    index: int = -1
    reward_sum: float = math.nan
    reward_square_sum: float = math.nan
    counterfactual_sum: float = math.nan


def counts_of(replies: Iterable[Any]) -> list[Count]:
    """Counters out of the wire's messages."""
    out = []
    for r in replies:
        for i, step in enumerate(r.step):
            c = Count(step, r.scored[i], r.flagged[i], r.effect_sum[i])
            if r.rule:
                c.rule = r.rule[i].decode()
            if r.feature_sae:
                c.sae, c.index = r.feature_sae[i].decode(), r.feature_index[i]
            if r.reward_sum:
                c.reward_sum, c.reward_square_sum, c.counterfactual_sum = r.reward_sum[i], r.reward_square_sum[i], r.counterfactual_sum[i]
            out.append(c)
    return out


@dataclass(slots=True)
class Rule:
    """A rule in force. families: [] means all."""

    id: str
    families: list[str]
    direction: str
    effect_min: float | None
    effect_sd_min: float | None
    advantage_flip: bool
    alert: str
    rate_max: float
    alpha: float
    action: str = "alert"
    weight: float | None = None


@dataclass(slots=True)
class CatalogueEntry:
    """A catalogued feature."""

    sae: str
    index: int
    label: str
    families: list[str]
    verdict: str
    role: str
    activation_min: float


@dataclass(slots=True)
class Run:
    """A run that the store knows."""

    run: str
    first_ms: int
    last_ms: int
    step_min: int
    step_max: int
    rollouts: int
    flagged: int


@dataclass(slots=True)
class Producer:
    """A producer of the tap, as the daemon sees it. stored: everything up to there is durable; lost: rollouts."""

    run: str
    name: str
    epoch: int
    stored: int
    highest: int
    missing: int
    lost: int


@dataclass(slots=True)
class Flight:
    """A rollout in flight."""

    run: str
    step: int
    group: str
    id: str
    stage: str
    age_ms: int


@dataclass(slots=True)
class Status:
    """State of the daemon."""

    version: str
    provenance: str
    uptime_ms: int
    ready: bool
    state: str
    queue_bytes: int
    queue_bytes_max: int
    counters: dict[str, int]
    in_flight: int
    flights: list[Flight]
    producers: list[Producer]
    engine: str


@dataclass(slots=True)
class Submitted:
    """What became of a submit: accepted (durable, and will be judged), duplicates among them, refused: (place, code name, reason)."""

    accepted: int
    duplicates: int
    refused: list[tuple[int, str, str]]


def status_of(s: Any) -> Status:
    """The status out of the wire's message."""
    flights = [Flight(r.decode(), t, g.decode(), i.decode(), k.decode(), a) for r, t, g, i, k, a in
               zip(s.flight_run, s.flight_step, s.flight_group, s.flight_id, s.flight_stage, s.flight_age_ms)]
    producers = [Producer(r.decode(), p.decode(), e, st, h, mi, lo) for r, p, e, st, h, mi, lo in
                 zip(s.producer_run, s.producer, s.producer_epoch, s.producer_stored, s.producer_highest, s.producer_missing, s.producer_lost)]
    return Status(s.version.decode(), s.provenance.decode(), s.uptime_ms, s.ready, s.state.decode(), s.queue_bytes, s.queue_bytes_max,
                  {n.decode(): v for n, v in zip(s.counter_name, s.counter_value)}, s.in_flight, flights, producers, s.engine.decode())
