"""A rollout's verdict does not depend on its company: bit-equal alone, in its group, in the full batch, for every thread
count, in any order, and within every instruction set of oneDNN. JSON numbers are compared as the strings they are.
"""

import functools
import json
import random
import shutil
from pathlib import Path

import pytest
from harness import made_case, need_program, need_torch, run_judge
from make_cases import CASES

NAMES = ["gptj-post", "llama-gqa", "llama-bf16", "gptj-bf16", "gemma2-bf16", "head-mean-ig"]
ISAS = ["DEFAULT", "AVX512_CORE", "AVX2"]
FLAGS_OF = {"avx512_core": "avx512f", "avx2": "avx2"}


@pytest.fixture(autouse=True)
def _needs():
    need_program("SPURIOND")
    need_torch()


def _cpu_has(isa: str) -> bool:
    flag = FLAGS_OF.get(isa.lower())
    return flag is None or f" {flag} " in Path("/proc/cpuinfo").read_text()


@functools.cache
def _case(name: str, threads: int, tokens_max: int) -> Path:
    """The case with engine options set; `when: all`, so that attributions do not depend on a group's flags."""
    import yaml

    source = made_case(name)
    folder = source.parent / f"{name}-t{threads}-b{tokens_max}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["engine"] = {"threads": threads, "tokens_max": tokens_max}
    config["attribution"]["when"] = "all"
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def _lines(name: str) -> list[bytes]:
    return (made_case(name) / "rollouts.jsonl").read_bytes().splitlines()


def _name_of(line: bytes) -> tuple:
    row = json.loads(line)
    return row["run"], row["step"], row["group"], row["id"], row.get("attempt", 0)


def _group_rules(name: str) -> set[str]:
    return {r["id"] for r in CASES[name].get("rules", []) if r.get("advantage_flip")}


def _own_part(verdict: bytes, name: str) -> str:
    """A verdict without what speaks of its group, numbers as printed."""
    row = json.loads(verdict, parse_float=str, parse_int=str)
    rules = _group_rules(name)
    for field in ("advantage", "counterfactual_advantage", "advantage_flip", "action"):
        row.pop(field)
    row["flags"] = [f for f in row["flags"] if f["rule"] not in rules]
    row["warnings"] = [w for w in row["warnings"] if w != "group_split"]
    if "tokens" in row:
        row["tokens"]["flagged"] = {k: v for k, v in row["tokens"]["flagged"].items() if k not in rules}
    return json.dumps(row)


def _judge(name: str, lines: list[bytes], isa: str, threads: int = 1, tokens_max: int = 16384) -> dict:
    """Raw verdicts by identity."""
    env = {} if isa == "DEFAULT" else {"DNNL_MAX_CPU_ISA": isa, "ONEDNN_MAX_CPU_ISA": isa}
    config = _case(name, threads, tokens_max) / "config.yaml"
    _, out, _ = run_judge(config, b"\n".join(lines) + b"\n", tokens=True, env=env)
    assert len(out) == len(lines)
    verdicts = dict(zip(map(_name_of, lines), out, strict=True))
    assert not any(b'"error"' in v[:200] for v in out)
    return verdicts


@functools.cache
def _base(name: str, isa: str) -> dict:
    return _judge(name, _lines(name), isa)


def _same(name: str, isa: str, found: dict) -> None:
    base = _base(name, isa)
    wrong = [who for who, v in found.items() if _own_part(v, name) != _own_part(base[who], name)]
    assert not wrong, f"{len(wrong)} of {len(found)} differ, first {wrong[0]}:\n{_first_difference(base, found, wrong[0], name)}"


def _first_difference(base: dict, found: dict, who: tuple, name: str) -> str:
    a, b = _own_part(base[who], name), _own_part(found[who], name)
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"…{a[max(0, at - 80) : at + 80]}\n…{b[max(0, at - 80) : at + 80]}"


@pytest.fixture(params=ISAS)
def isa(request):
    if not _cpu_has(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def _groups(name: str) -> list[list[bytes]]:
    groups: dict = {}
    for line in _lines(name):
        groups.setdefault(_name_of(line)[:3], []).append(line)
    return list(groups.values())


@pytest.mark.parametrize("name", NAMES)
def test_invariance_same_input_twice(name, isa):
    assert _judge(name, _lines(name), isa) == _base(name, isa)


@pytest.mark.parametrize("name", NAMES)
def test_invariance_alone(name, isa):
    lines = random.Random(3).sample(_lines(name), 10)
    for line in lines:
        _same(name, isa, _judge(name, [line], isa))


@pytest.mark.parametrize("name", NAMES)
def test_invariance_in_its_group(name, isa):
    for lines in _groups(name):
        _same(name, isa, _judge(name, lines, isa))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [2, 3])
def test_invariance_threads(name, threads, isa):
    found = _judge(name, _lines(name), isa, threads=threads)
    _same(name, isa, found)
    assert [json.loads(v)["advantage"] for v in found.values()] == [json.loads(v)["advantage"] for v in _base(name, isa).values()]


@pytest.mark.parametrize("name", NAMES)
def test_invariance_small_batches(name, isa):
    _same(name, isa, _judge(name, _lines(name), isa, tokens_max=512))


@pytest.mark.parametrize("name", NAMES)
def test_invariance_long_prompts_in_pieces(name, isa):
    """Passes just large enough for the longest completion: longer rollouts have their prompts run piece after piece."""
    base = {who: json.loads(v) for who, v in _base(name, isa).items()}
    tails = {who: v["token_count"] - v["tokens"]["position"][0] for who, v in base.items()}
    tokens_max = max(16, *tails.values())
    longer = [v for v in base.values() if v["token_count"] > tokens_max]
    lines = _lines(name)
    if len(longer) < 3:  # the case's completions are as long as its prompts: take those that are shorter
        tokens_max = 16
        lines = [line for line in lines if tails[_name_of(line)] <= tokens_max]
        longer = [v for who, v in base.items() if tails[who] <= tokens_max < v["token_count"]]
    assert len(longer) >= 3
    _same(name, isa, _judge(name, lines, isa, tokens_max=tokens_max))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [1, 2])
def test_invariance_order_of_groups_and_members(name, seed, isa):
    rng, groups = random.Random(seed), _groups(name)
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    found = _judge(name, [line for group in groups for line in group], isa, threads=1 + seed)
    _same(name, isa, found)
    together = {who for group in groups for who in map(_name_of, group) if who[2] in ("g0", "g1", "g2", "g3")}
    for who in together:
        a, b = json.loads(_base(name, isa)[who]), json.loads(found[who])
        assert a["advantage"] == b["advantage"] and a["flags"] == b["flags"], who


@pytest.mark.parametrize("name", NAMES)
def test_invariance_sets_differ_little(name):
    """Across instruction sets verdicts need not be bit-equal; were they wildly apart, one path would be wrong."""
    rows = {i: [json.loads(v)["reward"] for v in _base(name, i).values()] for i in ISAS if _cpu_has(i)}
    limit = 0.2 if CASES[name].get("dtype") == "bf16" else 1e-3
    for values in rows.values():
        assert max(abs(a - b) for a, b in zip(values, rows["DEFAULT"])) <= limit
