"""Lines in, verdicts out: groups, advantages, rules, and the shape of a verdict."""

import hashlib

import numpy as np
import torch
from tokenizers import Tokenizer

from .config import Config
from .measure import Instrument, Measured, spurious
from .text import Encoder, Refused, check_fields, group_key, identity, parse_line

DETECT, DEBIAS, ANY = ("detect", "both"), ("debias", "both"), ("detect", "debias", "both")


def f32(value) -> float | None:
    return None if value is None else float(np.float32(value))


class Member:
    """One rollout that is being judged, and its place in the output."""

    def __init__(self, line: int, row: dict, measured: Measured, warnings: set[str]):
        self.line = line
        self.row = row
        self.m = measured
        self.warnings = warnings
        self.flags: list[dict] = []
        self.explain: list[dict] = []


class Judge:
    def __init__(self, config: Config, tokens: bool = False, dtype: str | None = None, explain: bool = False):
        self.config = config
        self.tokens = tokens
        self.explain = explain
        self.tool = Instrument(config, dtype)
        folder = config.folder / config.model["path"]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.encoder = Encoder(tokenizer, self.tool.model.config.to_dict(), {**config.model, "pooling": self.tool.model.head.pooling}, folder)
        self.debias = spurious(config.catalogue, DEBIAS)
        self.family_sets = {}
        for feature in config.catalogue.values():
            for family in feature.families:
                self.family_sets.setdefault(family, spurious(config.catalogue, DETECT, [family]))
        self.rule_sets = {r["id"]: spurious(config.catalogue, DETECT, r["families"]) for r in config.rules}
        self.provenance = hashlib.sha256(repr((config.model, config.saes, config.rules)).encode()).hexdigest()[:16]

    def run(self, lines: list[bytes]) -> list[dict]:
        """One output object for each input line, in order."""
        out: list[dict | None] = [None] * len(lines)
        part: list[Member] = []
        current, seen, taken = None, set(), set()
        for n, line in enumerate(lines):
            row = parse_line(line)
            if row is None:
                out[n] = {"line": n + 1, "error": {"code": "INVALID_ARGUMENT",
                                                   "message": f"expected a JSON object, found {line[:60]!r}"}}
                continue
            key = group_key(row)
            if key is None or key != current:
                self._finish(part, out)
                part, current = [], key
                split = key in seen
                seen.add(key)
            try:
                part.append(self._admit(n, row, split, taken))
            except Refused as refused:
                names = {name: row.get(name) for name in ("run", "step", "group", "id")}
                out[n] = {**names, "error": {"code": refused.code, "message": str(refused)}}
        self._finish(part, out)
        return out

    def _admit(self, n: int, row: dict, split: bool, taken: set) -> Member:
        name = identity(row)
        check_fields(row, self.tool.model.vocab_rows)
        if name in taken:
            raise Refused("ALREADY_EXISTS", f"expected a new rollout, found {name} a second time")
        seq = self.encoder.encode(row)
        taken.add(name)
        warnings = set(seq.warnings)
        if split:
            warnings.add("group_split")
        measured = self.tool.clean(seq)
        trainer = row.get("trainer_reward")
        if trainer is not None and abs(trainer - float(measured.reward)) > self.config.trainer_tolerance:
            warnings.add("trainer_reward_differs")
        return Member(n, row, measured, warnings)

    def _finish(self, part: list[Member], out: list) -> None:
        """Judges a whole part of a group."""
        for rule in self.config.rules:
            self._apply_rule(rule, part)
        for member in part:
            when = self.config.attribution["when"]
            if self.config.attribution["method"] != "none" and (when == "all" or member.flags):
                self.tool.attribute(member.m)
        for member in part:
            out[member.line] = self._verdict(member, part)

    def _advantages(self, part: list[Member], rewards: list[np.float32]) -> list[float | None]:
        if len(part) < 2:
            return [None] * len(part)
        mean = sum(float(r) for r in rewards) / len(rewards)
        return [float(r) - mean for r in rewards]

    def _pair(self, part: list[Member], members: frozenset) -> list[tuple]:
        """(advantage, counterfactual advantage, flip) of every member, for one ablated set."""
        before = self._advantages(part, [x.m.reward for x in part])
        after = self._advantages(part, [self.tool.ablated_reward(x.m, members) for x in part])
        return [(a, c, None if a is None else a * c < 0) for a, c in zip(before, after)]

    def _apply_rule(self, rule: dict, part: list[Member]) -> None:
        members = self.rule_sets[rule["id"]]
        pairs = self._pair(part, members) if rule.get("advantage_flip") else [(None, None, None)] * len(part)
        for member, pair in zip(part, pairs):
            active = sorted((k for k in members if self.tool.active(member.m, k)), key=self._order)
            if not active:
                continue
            effect = self.tool.effect(member.m, members)
            fires, margin = self._decide(rule, float(effect), pair)
            if self.explain:
                member.explain.append({"rule": rule["id"], "fires": fires, "effect": f32(effect), "margin": margin})
            if fires:
                member.flags.append({"rule": rule["id"], "effect": f32(effect),
                                     "features": [{"sae": s, "index": i} for s, i in active]})

    def _decide(self, rule: dict, effect: float, pair: tuple) -> tuple[bool, float]:
        """Whether the rule fires, and how far (reward units) from any of its decisions going the other way."""
        sd, checks = self.config.reward_sd, []
        if rule["direction"] != "either":
            checks.append((effect < 0 if rule["direction"] == "raised" else effect > 0, abs(effect)))
        if rule.get("effect_min") is not None:
            checks.append((abs(effect) >= rule["effect_min"], abs(abs(effect) - rule["effect_min"])))
        if rule.get("effect_sd_min") is not None:
            in_sd = abs(f32(effect / sd))
            checks.append((in_sd >= rule["effect_sd_min"], abs(in_sd - rule["effect_sd_min"]) * sd))
        if rule.get("advantage_flip"):
            before, after, flip = pair
            checks.append((bool(flip), float("inf") if flip is None else min(abs(before), abs(after))))
        failing = [margin for ok, margin in checks if not ok]
        return not failing, max(failing) if failing else min(margin for _, margin in checks)

    def _order(self, key) -> tuple[int, int]:
        return self.tool.by_id[key[0]].order, key[1]

    def _verdict(self, member: Member, part: list[Member]) -> dict:
        m, sd = member.m, self.config.reward_sd
        effect = self.tool.effect(m, self.debias)
        advantage, counterfactual, flip = self._pair(part, self.debias)[part.index(member)]
        out = {name: member.row[name] for name in ("run", "step", "group", "id")}
        out |= {
            "reward": f32(m.reward),
            "counterfactual_reward": f32(self.tool.ablated_reward(m, self.debias)),
            "effect": f32(effect),
            "effect_sd": None if sd is None else f32(float(effect) / sd),
            "advantage": f32(advantage),
            "counterfactual_advantage": f32(counterfactual),
            "advantage_flip": flip,
            "scored_position": None if self.tool.model.head.pooling == "mean" else m.seq.scored,
            "token_count": len(m.seq.ids),
            "truncated": m.seq.truncated,
            "saes": [{k: v if isinstance(v, str) else f32(v) for k, v in self.tool.sae_sums(m, s.id).items()}
                     for s in self.tool.saes],
            "families": self._families(m),
            "flags": member.flags,
            "provenance": self.provenance,
            "features": self._features(m),
            "warnings": sorted(member.warnings),
        }
        if self.tokens:
            out["tokens"] = self._tokens(member)
        if self.explain:
            out["explain"] = self._explain(member)
        return out

    def _families(self, m: Measured) -> list[dict]:
        return [{"family": family, "effect": f32(self.tool.effect(m, members))}
                for family, members in self.family_sets.items()
                if any(self.tool.active(m, k) for k in members)]

    def _features(self, m: Measured) -> list[dict]:
        """The top by |attribution| and every active spurious one, in one order."""
        flagged = {k for k in spurious(self.config.catalogue, ANY) if self.tool.active(m, k)}
        values: dict = {k: None for k in flagged}
        if m.grads is not None:
            everything = {}
            for sae in self.tool.saes:
                sums = self.tool.attributions(m, sae.id).sum(dim=0)
                for index in (m.readings[sae.id].f != 0).any(dim=0).nonzero().flatten().tolist():
                    everything[(sae.id, index)] = f32(sums[index].item())
            top = sorted(everything, key=lambda k: (-abs(everything[k]), *self._order(k)))
            values |= {k: everything[k] for k in top[: self.config.attribution["top"]]}
            values |= {k: everything[k] for k in flagged}
        keys = sorted(values, key=lambda k: (-abs(values[k] or 0.0), *self._order(k)))
        return [self._feature(m, k, values[k], k in flagged) for k in keys]

    def _feature(self, m: Measured, key, attribution: float | None, flagged: bool) -> dict:
        f, known = m.readings[key[0]].f[:, key[1]], self.config.catalogue.get(key)
        each = self.config.each and flagged
        return {
            "sae": key[0], "index": key[1],
            "label": known.label if known else None,
            "families": known.families if known else [],
            "verdict": known.verdict if known else "unknown",
            "attribution": attribution,
            "ablation_effect": f32(self.tool.effect(m, frozenset([key]))) if each else None,
            "activation_max": f32(f.max().item()),
            "activation_sum": f32(f.double().sum().item()),
            "peak_position": m.positions[int(f.argmax())],
        }

    def _tokens(self, member: Member) -> dict:
        m = member.m
        ids = [m.seq.ids[p] for p in m.positions]
        per_sae = {}
        for sae in self.tool.saes:
            per_sae[sae.id] = None if m.grads is None else self.tool.attributions(m, sae.id)

        def row(sae_id: str, chosen: list[int] | None):
            if per_sae[sae_id] is None:
                return None
            values = per_sae[sae_id] if chosen is None else per_sae[sae_id][:, chosen]
            return [f32(v) for v in values.sum(dim=1).tolist()]

        flagged = {}
        for flag in member.flags:
            members = self.rule_sets[flag["rule"]]
            flagged[flag["rule"]] = {s.id: row(s.id, [i for name, i in sorted(members) if name == s.id])
                                     for s in self.tool.saes}
        return {"position": m.positions, "id": ids, "text": [self.encoder.text_of(i) for i in ids],
                "attribution": {s.id: row(s.id, None) for s in self.tool.saes}, "flagged": flagged}

    def _explain(self, member: Member) -> dict:
        """For comparison only: how near this rollout stands to decisions that rounding could turn."""
        m, near = member.m, float("inf")
        for (sae, index), feature in self.config.catalogue.items():
            peak = float(m.readings[sae].f[:, index].max())
            if feature.verdict == "spurious" and peak > 0:
                near = min(near, abs(peak - feature.activation_min) / max(1.0, peak))
        return {"rules": member.explain, "activity_margin": near}


def read_lines(data: bytes) -> list[bytes]:
    """Lines without their ends; a newline at the end of the data starts no line."""
    lines = data.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def seed_torch(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
