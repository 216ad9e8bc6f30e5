"""The comparison itself: it must see every kind of difference, or the golden tests prove nothing."""

import copy
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import compare, read_verdicts  # noqa: E402

ROWS = read_verdicts(HERE / "stored" / "small-llama" / "expected.jsonl")
SD = compare(ROWS, ROWS).reward_sd


def _changed(change) -> list[dict]:
    rows = copy.deepcopy(ROWS)
    change(rows)
    return rows


def _first(rows, test):
    return next(r for r in rows if test(r))


def test_compare_equal_to_itself():
    report = compare(ROWS, json.loads(json.dumps(ROWS)))
    assert report.equal and not report.near and max(v for v, _ in report.worst.values()) == 0


def test_compare_refuses_every_numeric_change():
    for name in ("reward", "counterfactual_reward", "effect", "effect_sd", "advantage", "counterfactual_advantage"):
        rows = _changed(lambda rows: _first(rows, lambda r: r[name] is not None).__setitem__(name, SD * 0.37 + 1e-3))
        assert not compare(ROWS, rows).equal, name
    for name in ("attribution_sum", "error_attribution", "bias_attribution", "baseline_reward", "residual", "l0_mean"):
        rows = _changed(lambda rows: rows[3]["saes"][1].__setitem__(name, rows[3]["saes"][1][name] + 1.0))
        assert not compare(ROWS, rows).equal, name
    for name in ("attribution", "activation_max", "activation_sum", "peak_position", "index"):
        rows = _changed(lambda rows: rows[3]["features"][0].__setitem__(name, rows[3]["features"][0][name] + 1))
        assert not compare(ROWS, rows).equal, name


def test_compare_holds_the_tolerance():
    def moved(by):
        return _changed(lambda rows: rows[2].__setitem__("reward", rows[2]["reward"] + by * SD))

    assert compare(ROWS, moved(0.9e-4)).equal
    assert not compare(ROWS, moved(1.2e-4)).equal


def test_compare_refuses_changes_of_shape():
    changes = [
        lambda rows: rows.pop(),
        lambda rows: rows[1].pop("effect"),
        lambda rows: rows[1].pop("features"),
        lambda rows: rows[1].update(warnings=["group_split"]),
        lambda rows: rows[1].update(truncated=True),
        lambda rows: rows[1].update(token_count=rows[1]["token_count"] + 1),
        lambda rows: rows[1].update(provenance="0123"),
        lambda rows: rows[1]["features"].pop(0),
        lambda rows: rows[1]["features"].reverse(),
        lambda rows: rows[1]["saes"].reverse(),
        lambda rows: rows[1]["features"].append(rows[1]["features"][0]),
        lambda rows: _first(rows, lambda r: r["flags"])["flags"].pop(0),
        lambda rows: _first(rows, lambda r: r["flags"])["flags"][0]["features"].append({"sae": "std", "index": 0}),
        lambda rows: _first(rows, lambda r: r["families"])["families"].pop(),
        lambda rows: _first(rows, lambda r: len(r["families"]) > 1)["families"].reverse(),
        lambda rows: rows[1].pop("tokens"),
        lambda rows: rows[1]["tokens"]["text"].__setitem__(0, "?"),
        lambda rows: rows[1]["tokens"]["attribution"]["std"].__setitem__(0, 3 * SD + 9),
        lambda rows: rows[1].update(error={"code": "INTERNAL", "message": "expected x, found y"}),
    ]
    for number, change in enumerate(changes):
        assert not compare(ROWS, _changed(change)).equal, f"change {number} went unseen"


def test_compare_refused_lines():
    want = read_verdicts(HERE / "stored" / "refused" / "expected.jsonl")
    assert compare(want, copy.deepcopy(want) and [dict(r, provenance="0" * 16) if "error" not in r else r for r in want]).equal
    wrong = [dict(r, provenance="0" * 16) if "error" not in r else r for r in copy.deepcopy(want)]
    bad = next(r for r in wrong if "error" in r and "line" not in r)
    bad["error"] = {"code": "INTERNAL", "message": bad["error"]["message"]}
    assert not compare(want, wrong).equal
