"""The parity matrix of docs/compatibility.md: its rows cover every pair, its tables are those of the script, and a part of it is judged live."""

import functools
import re

import pytest
from harness import ROOT, missing, need_program, need_torch
from matrix import BF16_ROW, FACTORS, NAMES, SAMPLE_BEGIN, SAMPLE_END, TOLERANCE, bf16_limit, covering_rows, judge_row, pairs, pairs_of, sample

LIVE = 22


@functools.cache
def rows() -> list[dict]:
    return covering_rows()


def documented() -> list[list[str]]:
    """Cells of the table of rows in docs/compatibility.md."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split(SAMPLE_BEGIN)[1].split(SAMPLE_END)[0]
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_matrix_covers_every_pair():
    left = pairs()
    assert len(left) == 1683
    for row in rows():
        left -= pairs_of(row)
    assert not left


def test_matrix_table_lists_the_rows_within_tolerance():
    table = documented()
    assert [dict(zip(NAMES, cells[1 : 1 + len(NAMES)])) for cells in table] == rows()
    for cells in table:
        errors = cells[1 + len(NAMES) :]
        assert len(errors) == 6 and errors[0] != "–", cells
        assert (errors[2] == "–") == (cells[1 + NAMES.index("method")] == "none"), cells
        assert all(e == "–" or float(e) <= TOLERANCE for e in errors[:4]), cells
        for both in errors[4:]:
            ours, theirs = map(float, both.split(" / "))
            assert ours <= BF16_ROW * bf16_limit(theirs), cells
            assert theirs > 0 or (both is errors[5] and ours == 0), cells  # an effect may be nought in all ten rollouts, then in both


def test_matrix_table_of_values_is_within_tolerance_in_bf16():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split(SAMPLE_BEGIN)[1]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(tuple(f"| {n} |" for n in NAMES))]
    assert [(c[0], c[1]) for c in lines] == [(n, v) for n in NAMES for v in FACTORS[n]]
    for cells in lines:
        assert float(cells[3]) <= TOLERANCE and float(cells[4]) <= TOLERANCE
        for both in cells[6:8]:
            ours, theirs = map(float, both.split(" / "))
            assert ours <= bf16_limit(theirs), cells


def test_matrix_sample_holds_every_value():
    chosen = sample(rows(), LIVE)
    assert len(chosen) == LIVE
    assert {(n, rows()[i][n]) for i in chosen for n in NAMES} == {(n, v) for n in NAMES for v in FACTORS[n]}


@pytest.mark.parametrize("place", range(LIVE))
def test_matrix_row_live(place, tmp_path):
    need_program("SPURIOND")
    need_torch()
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        missing(f"needs the Python package gguf ({error})")
    number = sample(rows(), LIVE)[place]
    errors, problems = judge_row(rows()[number], number, tmp_path)
    print(number, rows()[number], errors)
    assert not problems, f"row {number} {rows()[number]}: {problems[:6]}"
    assert errors["reward"] is not None and errors["activation"] is not None and len(errors["bf16"]) == 3
