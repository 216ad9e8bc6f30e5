"""After training: query helpers, the report and the exports, on a run whose policy drifts into a hack (deploy/demo/make_drift.py)."""
import html.parser
import json
import os
import subprocess
import sys

import demo
import pytest

from spurion import Client, NotFound, RunAnalysis, export, report
from spurion.analysis import rate_bounds


@pytest.fixture(scope="module")
def drifted(d):
    text = subprocess.run([sys.executable, str(demo.DEMO / "make_drift.py"), "--steps", "8"], capture_output=True, text=True, check=True).stdout
    d.cli("publish", "--run", "drift", stdin=text)
    early = "".join(t for t in text.splitlines(keepends=True) if json.loads(t)["step"] < 3).replace('"drift"', '"early"')
    d.cli("publish", "--run", "early", stdin=early)
    with Client(d.rpc) as c:
        yield [json.loads(t) for t in text.splitlines()], c


def test_after_timeline_and_rates(d, drifted):
    lines, c = drifted
    a = RunAnalysis(c, "drift")
    rows = c.query("drift")
    timeline = a.timeline()
    for p in timeline:
        own = [r for r in rows if r.step == p.step]
        assert p.scored == len(own) and p.reward_mean == pytest.approx(sum(r.reward for r in own) / len(own), abs=1e-5)
        assert p.counterfactual_mean == pytest.approx(sum(r.counterfactual_reward for r in own) / len(own), abs=1e-5)
        assert p.flagged == sum(bool(r.rules) for r in own)
    curve = a.rate_curve("thanks-raises")
    assert [(p.step, p.flagged) for p in curve] == [(p.step, sum("thanks-raises" in r.rules for r in rows if r.step == p.step)) for p in timeline]
    assert all(p.lower <= p.rate <= p.upper for p in curve) and curve[-1].lower > curve[0].upper  # it learns the hack
    # the same bounds as the daemon's own, at its level
    for alert in c.stored_alerts("drift"):
        if alert.kind == "rate":
            assert rate_bounds(alert.flagged, alert.scored, alert.alpha) == pytest.approx((alert.rate_lower, alert.rate_upper), abs=1e-4)
    assert rate_bounds(0, 0) == (0.0, 1.0) and rate_bounds(0, 100)[0] == 0.0 and rate_bounds(100, 100)[1] == 1.0


def test_after_features_flips_and_worst(d, drifted):
    lines, c = drifted
    a = RunAnalysis(c, "drift")
    rows = c.query("drift")
    top = a.top_features()
    assert [abs(f.attribution_sum) for f in top] == sorted((abs(f.attribution_sum) for f in top), reverse=True) and len(top) == 8
    thanks = next(f for f in top if (f.sae, f.index) == ("late", 1699))
    steps = a.feature_by_step("late", 1699)
    assert sum(f.active for f in steps) == thanks.active and thanks.families == ["thanks"] and thanks.attribution_sum > 0
    assert steps[-1].active > steps[0].active
    flipped = a.flipped()
    assert {r.key for r in flipped} == {r.key for r in rows if r.advantage * r.counterfactual_advantage < 0} and flipped
    worst = a.worst(5)
    assert [r.effect for r in worst] == sorted(r.effect for r in rows)[:5]
    records = a.records(worst)
    assert records and all("pleasure" in r.rollout.completion for r in records)
    compared = {x.what: x for x in a.compare("early")}
    rate = compared["rate of thanks-raises"]
    assert rate.apart and rate.difference < 0 and rate.a == pytest.approx(sum("thanks-raises" in r.rules for r in rows) / len(rows))
    with pytest.raises(NotFound, match="nowhere"):
        RunAnalysis(c, "nowhere")


class Page(html.parser.HTMLParser):
    """Tags and what they ask for."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "action") or (v and "url(" in v)]
        if tag not in ("meta", "line", "polyline", "polygon", "br", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_after_report(d, drifted, tmp_path):
    env = dict(d.environment, PYTHONPATH=str(demo.PACKAGE))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "spurion-report").write_text(f"#!{sys.executable}\nimport sys\nfrom spurion.report import main\nsys.exit(main())\n")
    (programs / "spurion-report").chmod(0o755)
    env["PATH"] = f"{programs}:{os.environ['PATH']}"
    out = tmp_path / "report.html"
    done = subprocess.run([str(demo.BIN / "spurion"), "report", "drift", "-o", str(out)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote" in done.stderr
    text = out.read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.links == [] and "script" not in page.tags and page.tags.count("svg") >= 3
    for said in ("thanks-raises", "first alert above rate_max", "drift", "scale −", "Thank you"):
        assert said in text, said
    missing = subprocess.run([str(demo.BIN / "spurion"), "report", "nowhere", "-o", str(out)], env=env, capture_output=True, text=True)
    assert missing.returncode == 1 and "nowhere" in missing.stderr
    env["PATH"] = "/usr/bin:/bin"
    gone = subprocess.run([str(demo.BIN / "spurion"), "report", "drift"], env=env, capture_output=True, text=True)
    assert gone.returncode == 69 and "spurion-report in PATH" in gone.stderr


def test_after_report_escapes_what_rollouts_hold(d):
    evil = "<script>alert(1)</script> \u202eevil\u200b <img src=x onerror=alert(1)> Thank you. My pleasure."
    with Client(d.rpc, run="evil <b>") as c:
        c.score([{"prompt": "<b>Why?</b>", "completion": evil, "id": "<i>"}])
        text = report.render(c, "evil <b>")
        record = c.get("evil <b>", 0, "0", "<i>")
    for page in (text, record._repr_html_()):
        assert "<script" not in page and "<img" not in page and "<b>" not in page and "\u202e" not in page and "U+202E" in page


def test_after_shading_is_signed_and_symmetric(d):
    from spurion.display import shade

    text = shade([b"up", b" down", b" caf\xc3", b"\xa9", b" small"], [1.0, -0.5, 0.2, 0.2, 0.01])
    assert 'class="t up" style="background:rgb(67,147,195)' in text and 'class="t down"' in text  # M is the largest: full blue
    assert "rgb(242,176,128)" in text  # orange at half
    assert " café</span>" in text and "small</span>" not in text and "−1 to +1" in text


def test_after_parquet_and_trl_completions(d, drifted, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    lines, c = drifted
    n = export.write_parquet(c, "drift", tmp_path / "drift.parquet")
    table = pq.read_table(tmp_path / "drift.parquet").to_pylist()
    assert n == len(table) == len(lines)
    rows = {r.key[1:4]: r for r in c.query("drift")}
    for x in table:
        r = rows[x["step"], x["group_id"], x["rollout_id"]]
        assert x["reward"] == r.reward and ([f["rule"] for f in x["flags"]] == r.rules if r.whole else x["prompt"] is None)
    assert {"top_features", "provenance", "advantage_flip", "scored_position"} <= set(table[0])
    whole = export.write_completions(c, "drift", tmp_path / "completions")
    files = sorted((tmp_path / "completions").glob("completions_*.parquet"))
    assert len(files) == 8 and whole == sum(r.whole for r in rows.values())
    first = pq.read_table(files[-1])
    assert {"step", "prompt", "completion", "advantage", "spurion"} <= set(first.column_names) and first.num_rows > 0
    datasets = pytest.importorskip("datasets")
    assert len(datasets.load_dataset("parquet", data_files=str(tmp_path / "drift.parquet"), split="train", cache_dir=str(tmp_path / "cache"))) == n
