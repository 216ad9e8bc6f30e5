"""A run as one HTML file: timeline, rules, features, worst rollouts with shaded tokens. No script, no network, light and dark.

    spurion-report my-run -o report.html        (spurion report my-run -o report.html does the same)
"""

from __future__ import annotations

import argparse
import html
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .analysis import Curve, RunAnalysis, Timeline, rate_bounds
from .client import Client
from .display import STYLE, body_html, number, safe
from .errors import NotFound, SpurionError

PAGE = """<style>
body{margin:0;background:#fff;color:#111}main{max-width:64em;margin:0 auto;padding:1em;font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.15em;margin:1.4em 0 .3em}.spurion{max-width:none;padding:.2em 0}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:currentColor}.axis{stroke:currentColor;stroke-opacity:.35}
.grid{stroke:currentColor;stroke-opacity:.12}.a{stroke:#0b62a4;fill:none;stroke-width:2}.b{stroke:#c2570c;fill:none;stroke-width:2;stroke-dasharray:6 3}
.band{fill:#0b62a4;fill-opacity:.18}.dot{fill:#0b62a4}.limit{stroke:#c2570c;stroke-dasharray:2 3}details{margin:.3em 0}
summary{cursor:pointer}summary:focus-visible{outline:2px solid #0b62a4}article{border-top:1px solid #8884;padding:.4em 0}
@media (prefers-color-scheme:dark){body{background:#111418;color:#eee}.a{stroke:#6bb5e8}.band{fill:#6bb5e8}.dot{fill:#6bb5e8}.b,.limit{stroke:#f59b52}}
</style>"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 880, 220, 56, 120, 12, 34


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    step = (high - low) / count
    return [low + i * step for i in range(count + 1)]


class _Chart:
    """Lines over steps as inline SVG, with a table behind it for who cannot see it."""

    def __init__(self, steps: Sequence[int], low: float, high: float, say: str, percent: bool = False):
        self.steps, self.say, self.percent = steps, say, percent
        pad = (high - low) * 0.06 or 0.5
        nice = next((x for x in (0.04, 0.1, 0.2, 0.4, 0.6, 0.8) if x >= high), 1.0)
        self.low, self.high = (0.0, nice) if percent else (low - pad, high + pad)
        self.parts: list[str] = []

    def x(self, step: int) -> float:
        first, last = self.steps[0], self.steps[-1]
        return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def points(self, values: Sequence[float]) -> str:
        return " ".join(f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(self.steps, values))

    def line(self, values: Sequence[float], css: str, name: str, dy: int = 4) -> None:
        self.parts.append(f'<polyline class="{css}" points="{self.points(values)}"/>')
        self.parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{self.y(values[-1]) + dy:.1f}">{html.escape(name)}</text>')

    def band(self, low: Sequence[float], high: Sequence[float]) -> None:
        back = " ".join(reversed(self.points(low).split()))
        self.parts.append(f'<polygon class="band" points="{self.points(high)} {back}"/>')

    def level(self, value: float, name: str) -> None:
        y = self.y(value)
        self.parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                          f'<text x="{WIDTH - RIGHT + 6}" y="{y + 4:.1f}">{html.escape(name)}</text>')

    def svg(self) -> str:
        form = "{:.0%}".format if self.percent else "{:.2f}".format
        grid = "".join(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
                       f'<text x="{LEFT - 6}" y="{self.y(v) + 4:.1f}" text-anchor="end">{form(v)}</text>' for v in _ticks(self.low, self.high))
        every = max(1, len(self.steps) // 8)
        axis = "".join(f'<text x="{self.x(s):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{s}</text>' for s in self.steps[::every])
        return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.say)}">{grid}{axis}'
                f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>{"".join(self.parts)}</svg>')


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in r) + "</tr>" for r in rows)
    return f'<div class="spurion"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _rewards(t: Timeline) -> str:
    steps = [p.step for p in t]
    values = [v for p in t for v in (p.reward_mean, p.counterfactual_mean)]
    last = t[-1]
    say = (f"Mean reward and mean counterfactual reward over {len(t)} steps: from {t[0].reward_mean:.2f} and {t[0].counterfactual_mean:.2f} "
           f"to {last.reward_mean:.2f} and {last.counterfactual_mean:.2f}")
    chart = _Chart(steps, min(values), max(values), say)
    apart = abs(chart.y(last.reward_mean) - chart.y(last.counterfactual_mean)) > 14
    up = last.reward_mean >= last.counterfactual_mean
    chart.line([p.reward_mean for p in t], "a", "reward", 4 if apart else (-4 if up else 14))
    chart.line([p.counterfactual_mean for p in t], "b", "counterfactual", 4 if apart else (14 if up else -4))
    rows = [[str(p.step), str(p.scored), f"{p.reward_mean:.3f}", f"{p.counterfactual_mean:.3f}", str(p.flagged)] for p in t]
    table = _table(("step", "rollouts", "reward", "counterfactual", "flagged"), rows)
    return f"{chart.svg()}<details><summary>as a table</summary>{table}</details>"


def _rate(curve: Curve, rule: str, rate_max: float | None) -> str:
    steps = [p.step for p in curve]
    chart = _Chart(steps, 0.0, max(max(p.upper for p in curve), rate_max or 0.0), f"Share of rollouts flagged by {rule}: from {curve[0].rate:.1%} to "
                   f"{curve[-1].rate:.1%}", percent=True)
    chart.band([p.lower for p in curve], [p.upper for p in curve])
    near = rate_max is not None and abs(chart.y(curve[-1].rate) - chart.y(rate_max)) < 14
    chart.line([p.rate for p in curve], "a", "rate", -8 if near else 4)
    if rate_max is not None:
        chart.level(rate_max, f"rate_max {rate_max:.1%}")
    rows = [[str(p.step), f"{p.flagged} of {p.scored}", f"{p.rate:.1%}", f"{p.lower:.1%} – {p.upper:.1%}"] for p in curve]
    return f'{chart.svg()}<details><summary>as a table</summary>{_table(("step", "flagged", "rate", "bounds (95 %)"), rows)}</details>'


def render(client: Client, run: str, worst: int = 8) -> str:
    """The report as a text. Raises NotFound for a run that is not stored."""
    a = RunAnalysis(client, run)
    timeline, totals, rules = a.timeline(), {c.rule: c.flagged for c in a.rules()}, client.rules()
    scored = sum(p.scored for p in timeline)
    alerts = client.stored_alerts(run)
    out = [f"<h1>Spurion: {safe(run)}</h1>"]
    flagged = sum(p.flagged for p in timeline)
    out.append(f"<p>{scored} rollouts in {len(timeline)} steps, {flagged} flagged ({flagged / max(scored, 1):.1%}), {len(alerts)} alerts, "
               f"{sum(x.above or x.step_above for x in alerts)} of them above their rule's rate. Written "
               f"{time.strftime('%Y-%m-%d %H:%M %Z')}; the daemon's provenance {html.escape(client.hello()['provenance'])}.</p>")
    out.append("<h2>Rewards</h2><p>The counterfactual reward is what the reward model gives without the catalogued spurious features; read how the two "
               "move apart, not the distance itself, because removing features shifts plain texts too.</p>")
    if timeline:
        out.append(_rewards(timeline))
    rows = []
    for rule in rules:
        k = totals.get(rule.id, 0)
        low, high = rate_bounds(k, scored)
        first = next((x.step for x in alerts if x.rule == rule.id and (x.above or x.step_above)), None)
        rows.append([safe(rule.id), safe(", ".join(rule.families) or "all"), str(k), f"{k / max(scored, 1):.1%}", f"{low:.1%} – {high:.1%}",
                     "–" if first is None else f"step {first}"])
    out.append("<h2>Rules</h2>" + _table(("rule", "families", "flagged", "rate", "bounds (95 %)", "first alert above rate_max"), rows))
    for rule in rules:
        if totals.get(rule.id) and timeline:
            out.append(f"<h3>{safe(rule.id)}</h3>" + _rate(a.rate_curve(rule.id), rule.id, rule.rate_max if rule.alert == "rate" else None))
    rows = [[f"{safe(f.sae)}/{f.index}", safe(f.label), f.verdict, str(f.active), number(f.attribution_mean), number(f.attribution_sum, 1)]
            for f in a.top_features(12)]
    out.append("<h2>Features that moved the rewards</h2>" + _table(("feature", "label", "verdict", "active in", "mean attribution", "sum"), rows,
                                                                   "catalogued features, + raised the reward"))
    flips = a.flipped()
    out.append(f"<h2>Advantages</h2><p>{len(flips)} of {scored} rollouts ({len(flips) / max(scored, 1):.1%}) would have an advantage of the other sign "
               "without the spurious features.</p>")
    out.append(f"<h2>What the spurious features paid most for</h2>{STYLE}")
    for record in a.records(a.worst(worst * 3))[:worst]:
        out.append(f'<article class="spurion">{body_html(record.verdict, record.rollout.prompt, record.rollout.completion)}</article>')
    title = f"<title>Spurion: {html.escape(run)}</title>"
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">{title}{STYLE}{PAGE}</head>'
            f'<body><main>{"".join(out)}</main></body></html>\n')


def main(argv: Sequence[str] | None = None) -> int:
    """The command spurion-report. Exit status: 0 done, 1 no such run, 64 usage, 69 no daemon, 74 output failed."""
    p = argparse.ArgumentParser(prog="spurion-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("-o", "--out", default="report.html", help="the file to write (report.html)")
    p.add_argument("--rpc", help="address of the daemon (SPURION_RPC)")
    p.add_argument("--worst", type=int, default=8, help="rollouts shown with their tokens (8)")
    args = p.parse_args(argv)
    try:
        with Client(args.rpc) as c:
            c.hello(timeout=5)
            text = render(c, args.run, args.worst)
        Path(args.out).write_text(text, encoding="utf-8")
    except NotFound as e:
        print(f"spurion-report: {e.text}", file=sys.stderr)
        return 1
    except SpurionError as e:
        print(f"spurion-report: {e}", file=sys.stderr)
        return 69
    except OSError as e:
        print(f"spurion-report: {args.out}: {e}", file=sys.stderr)
        return 74
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
