#!/usr/bin/env python3
"""Compares two verdict files field by field: `compare.py expected.jsonl found.jsonl [--tol 1e-4]`.

Strings, whole numbers, truth values and orders must be equal. Numbers may differ by --tol times the standard deviation
of the expected rewards (activations and attributions: plus --tol times their own size). Decisions that rounding can
turn (a rule's threshold, the edge of the feature list) are reported apart as `near` and are few, or it is a difference.
Standard library only. Exit status: 0 equal, 1 different, 2 unusable input.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

REWARD_FIELDS = ("reward", "counterfactual_reward", "effect", "advantage", "counterfactual_advantage")
EXACT_FIELDS = ("run", "step", "group", "id", "scored_position", "token_count", "truncated")
SAE_FIELDS = ("attribution_sum", "error_attribution", "bias_attribution", "baseline_reward", "residual")
FEATURE_EXACT = ("label", "families", "verdict", "peak_position")


@dataclass
class Report:
    """What a comparison found. worst: field -> (error / scale, where)."""

    problems: list[str] = field(default_factory=list)
    near: list[str] = field(default_factory=list)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    rows: int = 0
    reward_sd: float = 1.0

    @property
    def equal(self) -> bool:
        return not self.problems and len(self.near) <= 1 + self.rows // 10

    def text(self) -> str:
        lines = [f"{self.rows} lines, sd of the expected rewards {self.reward_sd:.6g}"]
        lines += [f"  worst {name:26s} {value:10.3g}  {where}" for name, (value, where) in sorted(self.worst.items())]
        lines += [f"  near: {n}" for n in self.near]
        lines += [f"  DIFFERENT: {p}" for p in self.problems[:40]]
        if len(self.problems) > 40:
            lines.append(f"  … and {len(self.problems) - 40} more")
        lines.append("equal" if self.equal else "different")
        return "\n".join(lines)


class Comparison:
    """One pass over two lists of verdicts."""

    def __init__(self, expected: list[dict], found: list[dict], tol: float):
        self.tol = tol
        self.report = Report(rows=len(expected))
        rewards = [r["reward"] for r in expected if isinstance(r.get("reward"), float)]
        if len(rewards) > 1 and statistics.pstdev(rewards) > 0:
            self.report.reward_sd = statistics.pstdev(rewards)
        acts = [f["activation_max"] for r in expected for f in r.get("features", [])]
        self.act_scale = statistics.median(acts) if acts else 1.0
        self.where = ""
        if len(expected) != len(found):
            self.problem("lines", len(expected), len(found))
        for n, (want, got) in enumerate(zip(expected, found)):
            self.where = f"line {n + 1} ({want.get('group')}/{want.get('id')})"
            self.row(want, got)
        self.provenance(found)

    def problem(self, name: str, want, got) -> None:
        self.report.problems.append(f"{self.where} {name}: expected {want!r}, found {got!r}"[:400])

    def near(self, name: str, text: str) -> None:
        self.report.near.append(f"{self.where} {name}: {text}")

    def exact(self, name: str, want, got) -> None:
        if want != got or isinstance(want, bool) != isinstance(got, bool):
            self.problem(name, want, got)

    def number(self, name: str, want, got, scale: float) -> bool:
        """|want - got| <= tol * scale; null only against null. Keeps the worst error in units of scale."""
        if want is None or got is None or isinstance(got, (bool, str)):
            if want is not None or got is not None:
                self.problem(name, want, got)
            return want is got
        error = abs(want - got)
        ratio = error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
        label = name.split("[")[0]
        if ratio > self.report.worst.get(label, (-1.0, ""))[0]:
            self.report.worst[label] = (ratio, self.where)
        if not ratio <= self.tol:
            self.problem(name, want, got)
        return ratio <= self.tol

    def row(self, want: dict, got: dict) -> None:
        if "error" in want or "error" in got:
            self.refused(want, got)
            return
        for name in EXACT_FIELDS:
            self.exact(name, want.get(name), got.get(name))
        sd = self.report.reward_sd
        for name in REWARD_FIELDS:
            self.number(name, want[name], got.get(name), sd)
        per_unit = abs(want["effect_sd"] / want["effect"]) if want["effect_sd"] and want["effect"] else 1.0
        self.number("effect_sd", want["effect_sd"], got.get("effect_sd"), sd * per_unit)
        self.flip(want, got)
        self.exact("warnings", sorted(want["warnings"]), sorted(got.get("warnings", ["absent"])))
        self.saes(want, got)
        self.families(want, got)
        self.flags(want, got)
        self.features(want, got)
        if "tokens" in want:
            self.token_table(want["tokens"], got.get("tokens"))

    def refused(self, want: dict, got: dict) -> None:
        for name in ("run", "step", "group", "id", "line"):
            if (name in want) != (name in got):
                self.problem(f"presence of {name}", name in want, name in got)
            self.exact(name, want.get(name), got.get(name))
        self.exact("error.code", want.get("error", {}).get("code"), got.get("error", {}).get("code"))
        message = got.get("error", {}).get("message", "")
        if "error" in want and not ("expected" in message and "found" in message):
            self.problem("error.message", "a text with expected and found", message)

    def flip(self, want: dict, got: dict) -> None:
        if want["advantage_flip"] == got.get("advantage_flip"):
            return
        if want["advantage"] is not None and isinstance(got.get("advantage_flip"), bool):
            size = min(abs(want["advantage"]), abs(want["counterfactual_advantage"]))
            if size <= self.tol * self.report.reward_sd:
                self.near("advantage_flip", f"an advantage of {size:.3g}")
                return
        self.problem("advantage_flip", want["advantage_flip"], got.get("advantage_flip"))

    def saes(self, want: dict, got: dict) -> None:
        self.exact("saes order", [s["sae"] for s in want["saes"]], [s["sae"] for s in got.get("saes", [])])
        for a, b in zip(want["saes"], got.get("saes", [])):
            size = max([abs(a[n]) for n in SAE_FIELDS if a[n] is not None], default=0.0)
            for name in SAE_FIELDS:
                scale = self.report.reward_sd + (0 if name == "baseline_reward" else size)
                self.number(f"saes.{name}", a[name], b.get(name), scale)
            self.l0(a, b)

    def l0(self, want: dict, got: dict) -> None:
        found = got.get("l0_mean")
        if not isinstance(found, (int, float)) or abs(found - want["l0_mean"]) > 0.5:
            self.problem("saes.l0_mean", want["l0_mean"], found)
        elif abs(found - want["l0_mean"]) > 1e-6 * (1 + want["l0_mean"]):
            self.near("saes.l0_mean", f"{want['l0_mean']} against {found}")

    def families(self, want: dict, got: dict) -> None:
        a, b = ({f["family"]: f["effect"] for f in x.get("families", [])} for x in (want, got))
        if list(a) != list(b):
            if self.by_activity(want):
                self.near("families", f"{list(a)} against {list(b)}, an activation at its minimum")
            else:
                self.problem("families", list(a), list(b))
        for name in a:
            if name in b:
                self.number(f"families.effect[{name}]", a[name], b[name], self.report.reward_sd)

    def by_activity(self, want: dict) -> bool:
        return want.get("explain", {}).get("activity_margin", math.inf) <= self.tol

    def flags(self, want: dict, got: dict) -> None:
        a, b = ({f["rule"]: f for f in x.get("flags", [])} for x in (want, got))
        margins = {r["rule"]: r["margin"] for r in want.get("explain", {}).get("rules", [])}
        for rule in sorted(set(a) ^ set(b)):
            if margins.get(rule, math.inf) <= 2 * self.tol * self.report.reward_sd or self.by_activity(want):
                self.near(f"flag {rule}", f"margin {margins.get(rule)}")
            else:
                self.problem(f"flag {rule}", rule in a, rule in b)
        both = [r for r in a if r in b]
        self.exact("flags order", both, [r for r in b if r in a])
        for rule in both:
            self.number(f"flags.effect[{rule}]", a[rule]["effect"], b[rule].get("effect"), self.report.reward_sd)
            if a[rule]["features"] != b[rule].get("features") and not self.by_activity(want):
                self.problem(f"flags.features[{rule}]", a[rule]["features"], b[rule].get("features"))

    def features(self, want: dict, got: dict) -> None:
        a, b = ({(f["sae"], f["index"]): f for f in x.get("features", [])} for x in (want, got))
        if len(b) != len(got.get("features", [])):
            self.problem("features", "each feature once", "a feature twice")
        for key in sorted(set(a) ^ set(b)):
            self.edge(key, a.get(key) or b.get(key), want, list((a if key in b else b).values()))
        for key in a:
            if key in b:
                self.feature(key, a[key], b[key])
        self.order(a, b, [s["sae"] for s in want["saes"]])

    def edge(self, key, row: dict, want: dict, others: list[dict]) -> None:
        """A feature on one side only: fine when its attribution stands at the edge of the top list."""
        plain = [abs(f["attribution"]) for f in others if f["attribution"] is not None and f["verdict"] != "spurious"]
        size = abs(row["attribution"] or 0.0)
        edge = min(plain, default=math.inf)
        if row["attribution"] is not None and abs(size - edge) <= 2 * self.tol * (self.report.reward_sd + size):
            self.near(f"feature {key}", f"attribution {size:.6g} at the edge {edge:.6g}")
        elif row["verdict"] == "spurious" and self.by_activity(want):
            self.near(f"feature {key}", "an activation at its minimum")
        else:
            self.problem(f"feature {key}", "listed on both sides", row)

    def feature(self, key, want: dict, got: dict) -> None:
        name = f"[{key[0]} {key[1]}]"
        for field_name in FEATURE_EXACT:
            self.exact(f"features.{field_name}{name}", want[field_name], got.get(field_name))
        sd = self.report.reward_sd
        size = abs(want["attribution"] or 0.0)
        self.number(f"features.attribution{name}", want["attribution"], got.get("attribution"), sd + size)
        self.number(f"features.ablation_effect{name}", want["ablation_effect"], got.get("ablation_effect"), sd)
        for field_name in ("activation_max", "activation_sum"):
            scale = self.act_scale + abs(want[field_name])
            self.number(f"features.{field_name}{name}", want[field_name], got.get(field_name), scale)

    def order(self, a: dict, b: dict, saes: list[str]) -> None:
        """found must be sorted by its own values, and by the expected ones up to near ties."""
        def size(row):
            return abs(row["attribution"] or 0.0)

        keys = list(b)
        for left, right in zip(keys, keys[1:]):
            if left[0] not in saes or right[0] not in saes:
                continue
            own = [(-size(b[k]), saes.index(k[0]), k[1]) for k in (left, right)]
            if own[0] > own[1]:
                self.problem("features order", "by |attribution|, then SAE and index", [left, right])
            if left in a and right in a:
                slack = 2 * self.tol * (self.report.reward_sd + size(a[left]))
                if size(a[left]) < size(a[right]) - slack:
                    self.problem("features order", "as expected up to near ties", [left, right])

    def token_table(self, want: dict, got: dict | None) -> None:
        if not isinstance(got, dict):
            self.problem("tokens", "an object", got)
            return
        for name in ("position", "id", "text"):
            self.exact(f"tokens.{name}", want[name], got.get(name))
        self.token_rows("tokens.attribution", want["attribution"], got.get("attribution"))
        # A rule without attributions (method none) may stand with nulls or not at all.
        told = {rule: rows for rule, rows in want["flagged"].items() if any(v is not None for v in rows.values())}
        silent = set(want["flagged"]) - set(told)
        self.exact("tokens.flagged rules", sorted(told), sorted(set(got.get("flagged", {})) - silent))
        for rule, rows in told.items():
            self.token_rows(f"tokens.flagged[{rule}]", rows, got.get("flagged", {}).get(rule))

    def token_rows(self, name: str, want: dict, got: dict | None) -> None:
        self.exact(f"{name} saes", list(want), list(got or {}))
        for sae, values in want.items():
            found = (got or {}).get(sae)
            if values is None or not isinstance(found, list) or len(found) != len(values):
                self.exact(f"{name}[{sae}]", values, found)
                continue
            top = max((abs(v) for v in values), default=0.0)
            for x, y in zip(values, found):
                self.number(f"{name}[{sae}]", x, y, self.report.reward_sd + top)

    def provenance(self, found: list[dict]) -> None:
        values = {r.get("provenance") for r in found if "error" not in r}
        for value in values:
            if not (isinstance(value, str) and len(value) == 16 and all(c in "0123456789abcdef" for c in value)):
                self.where = "file"
                self.problem("provenance", "16 hex digits", value)
        if len(values) > 1:
            self.where = "file"
            self.problem("provenance", "one value", sorted(map(str, values)))


def compare(expected: list[dict], found: list[dict], tol: float = 1e-4) -> Report:
    """The report of one comparison."""
    return Comparison(expected, found, tol).report


def read_verdicts(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expected", type=Path)
    parser.add_argument("found", type=Path)
    parser.add_argument("--tol", type=float, default=1e-4, help="in standard deviations of the expected rewards")
    args = parser.parse_args()
    try:
        report = compare(read_verdicts(args.expected), read_verdicts(args.found), args.tol)
    except (OSError, ValueError, KeyError) as error:
        print(f"compare: {error!r}", file=sys.stderr)
        return 2
    print(report.text())
    return 0 if report.equal else 1


if __name__ == "__main__":
    sys.exit(main())
