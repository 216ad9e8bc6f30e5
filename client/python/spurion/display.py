"""Rich display for notebooks and reports: self-contained HTML, no script, no network. Rollout text is always escaped.

Tokens are shaded by a signed value on one symmetric linear scale from -M to M, M = the largest |value| shown, printed beside. Blue raised the
reward, orange lowered it (101 apart for deuteranopes, 86 for protanopes, CIE76); an overline stands for raised, an underline for lowered, so
that colour is never alone. On a dark ground at most 0.7 of the colour keeps the text's contrast above 4.5:1.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from .results import Record, Verdict

RAISED, LOWERED = (0x43, 0x93, 0xC3), (0xE6, 0x61, 0x01)
WHOLE = 24        # characters of a table's cell that are not broken
SHOWN_MIN = 0.05  # of the scale: below, a token is not shaded
STYLE = """<style>
.spurion{font:14px/1.5 system-ui,sans-serif;color:#111;background:#fff;max-width:60em;padding:.4em .6em}
.spurion table{border-collapse:collapse;margin:.4em 0}.spurion caption{text-align:left;font-weight:600;padding:.2em 0}
.spurion th,.spurion td{padding:.15em .6em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
.spurion td.n{text-align:right;font-variant-numeric:tabular-nums}.spurion td.w{white-space:nowrap}.spurion.rows{max-width:none;overflow-x:auto}
.spurion .text{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0}
.spurion .t{border-radius:2px;color:inherit}.spurion .up{text-decoration:overline 2px}.spurion .down{text-decoration:underline 2px}
.spurion .note{color:#555;font-size:.9em}.spurion .chip{border:1px solid #888;border-radius:3px;padding:0 .2em;font-size:.8em}
.spurion .role{font-weight:600;color:#555;margin-top:.5em}
@media (prefers-color-scheme:dark){.spurion{color:#eee;background:#111418}.spurion th,.spurion td{border-color:#333}.spurion .note,.spurion .role{color:#aaa}
.spurion .t{background:color-mix(in srgb,rgb(var(--c)) calc(var(--a)*70%),#111418)!important}}
</style>"""


def safe(text: str) -> str:
    """Text for HTML: escaped; control, bidirectional and zero-width characters as visible chips."""
    out = []
    for c in text:
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp"):
            out.append(html.escape(c))
        else:
            out.append(f'<span class="chip">U+{ord(c):04X}</span>')
    return "".join(out)


def number(value: Any, digits: int = 3) -> str:
    """A number as people read it; a dash for none."""
    return "–" if value is None else f"{value:+.{digits}f}" if isinstance(value, float) else str(value)


def _pieces(texts: Sequence[bytes], values: Sequence[float]) -> list[tuple[str, float]]:
    """Tokens that end inside a character are shown together, with the sum of their values."""
    out, held, total = [], b"", 0.0
    for i, (text, value) in enumerate(zip(texts, values)):
        held, total = held + text, total + float(value)
        try:
            out.append((held.decode(), total))
        except UnicodeDecodeError:
            if len(held) < 8 and i + 1 < len(texts):
                continue
            out.append((held.decode("utf-8", "replace"), total))
        held, total = b"", 0.0
    return out


def shade(texts: Sequence[bytes], values: Sequence[float], scale: float | None = None) -> str:
    """The completion with its tokens shaded, and the scale under it. values: reward units, one for each token; scale: M, else the largest."""
    pieces = _pieces(texts, values)
    m = scale or max((abs(v) for _, v in pieces), default=0.0)
    out = []
    for text, value in pieces:
        if not m or abs(value) < SHOWN_MIN * m:
            out.append(safe(text))
            continue
        colour = RAISED if value > 0 else LOWERED
        alpha = min(1.0, abs(value) / m)
        r, g, b = (round(255 + alpha * (c - 255)) for c in colour)
        out.append(f'<span class="t {"up" if value > 0 else "down"}" style="background:rgb({r},{g},{b});--c:{",".join(map(str, colour))};'
                   f'--a:{alpha:.3f}" title="{value:+.4f}">{safe(text)}</span>')
    note = f'<div class="note">scale −{m:.3g} to +{m:.3g} (reward units); blue, overlined: raised the reward; orange, underlined: lowered it</div>'
    return f'<div class="text" dir="auto">{"".join(out)}</div>{note}'


def table_html(records: Sequence[Mapping[str, Any]], caption: str = "", rows_max: int = 50) -> str:
    """A plain table; long ones say how many rows are left out."""
    if not records:
        return f'{STYLE}<div class="spurion">{html.escape(caption or "nothing")}</div>'
    names = list(records[0])

    def cell(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "" if value is None else str(value)
            return f"<td{' class=w' if len(text) <= WHOLE else ''}>{safe(text)}</td>"  # a short name stays in one line
        return f'<td class="n">{value:.4g}</td>' if isinstance(value, float) else f'<td class="n">{value}</td>'

    head = "".join(f'<th scope="col">{html.escape(n).replace("_", "_<wbr>")}</th>' for n in names)
    body = "".join("<tr>" + "".join(cell(r[n]) for n in names) + "</tr>" for r in records[:rows_max])
    more = f'<div class="note">{len(records) - rows_max} more rows</div>' if len(records) > rows_max else ""
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'{STYLE}<div class="spurion rows"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}</div>'


def _summary(v: Verdict) -> str:
    rows = [("reward", number(v.reward)), ("without the spurious features (counterfactual)", number(v.counterfactual_reward)),
            ("effect of removing them", number(v.effect)), ("advantage → counterfactual", f"{number(v.advantage)} → {number(v.counterfactual_advantage)}"
                                                           + (" (the sign turns)" if v.advantage_flip else "")),
            ("rules", ", ".join(f"{f.rule} ({number(f.effect)})" for f in v.flags) or "none"), ("warnings", ", ".join(v.warnings) or "none")]
    return "<table>" + "".join(f'<tr><th scope="row">{html.escape(a)}</th><td>{safe(b)}</td></tr>' for a, b in rows) + "</table>"


def _features(v: Verdict, most: int = 10) -> str:
    if not v.features:
        return ""
    head = "".join(f'<th scope="col">{h}</th>' for h in ("feature", "label", "verdict", "attribution", "largest activation"))
    body = "".join(f"<tr><td>{safe(f.sae)}/{f.index}</td><td>{safe(f.label or '')}</td><td>{f.verdict}</td><td class=\"n\">{number(f.attribution)}</td>"
                   f'<td class="n">{f.activation_max:.3g}</td></tr>' for f in v.features[:most])
    return f"<table><caption>features, + pushed the reward up</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _strongest(v: Verdict) -> tuple[str, Any] | None:
    """The SAE with the largest token, and its attribution."""
    if v.tokens is None or not v.tokens.attribution:
        return None
    sae = max(v.tokens.attribution, key=lambda s: float(abs(v.tokens.attribution[s]).max(initial=0.0)))  # type: ignore[union-attr]
    return sae, v.tokens.attribution[sae]


def aligned(texts: Sequence[bytes], completion: str | None) -> list[bytes]:
    """The tokens' texts with the completion's own bytes where the daemon gives U+FFFD, for tokens that end inside a character: the first of a
    run of such tokens gets all of its bytes, the others none."""
    whole, at, out, run = (completion or "").encode("utf-8", "surrogatepass"), 0, list(texts), -1
    for i, text in enumerate(texts):
        if b"\xef\xbf\xbd" in text:
            run = i if run < 0 else run
            continue
        if run < 0 and not whole.startswith(text, at):
            text = text.strip()  # the template's leading space
        found = whole.find(text, at) if run >= 0 else at if whole.startswith(text, at) else -1
        if found < 0:
            break  # the appended EOS
        if run >= 0:
            out[run:i] = [whole[at:found]] + [b""] * (i - run - 1)
            run = -1
        at = found + len(text)
    else:
        i = len(texts)
    if run >= 0 and whole[at:]:
        out[run:i] = [whole[at:]] + [b""] * (i - run - 1)
    return out


def body_html(v: Verdict, prompt: str | None = None, completion: str | None = None) -> str:
    """One rollout, without the style."""
    if v.error:
        return f"<div>{safe('/'.join(map(str, v.key[:4])))}: {html.escape(v.error[0])}: {safe(v.error[1])}</div>"
    out = [f'<div class="role">{safe("/".join(map(str, v.key[:4])))}</div>']
    if prompt is not None:
        out.append(f'<div class="role">prompt</div><div class="text" dir="auto">{safe(prompt)}</div>')
    shaded = _strongest(v)
    if shaded is not None and v.tokens is not None:
        out.append(f'<div class="role">completion, shaded by attribution of SAE {safe(shaded[0])}</div>{shade(aligned(v.tokens.text_bytes, completion), shaded[1])}')
    elif completion is not None:
        out.append(f'<div class="role">completion</div><div class="text" dir="auto">{safe(completion)}</div>')
    return "".join(out) + _summary(v) + _features(v)


def verdict_html(v: Verdict) -> str:
    """A verdict for a notebook."""
    return f'{STYLE}<div class="spurion">{body_html(v)}</div>'


def record_html(r: Record) -> str:
    """A stored rollout for a notebook: prompt, shaded completion, numbers, features."""
    return f'{STYLE}<div class="spurion">{body_html(r.verdict, r.rollout.prompt, r.rollout.completion)}</div>'
