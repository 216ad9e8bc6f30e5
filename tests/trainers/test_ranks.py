"""TRL on two real processes (torchrun, gloo, CPU): groups are the trainer's own, also where one is spread over the ranks, and a rank that asks again
gets what it got."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import demo
import pytest

pytest.importorskip("trl", reason="needs TRL (tests/trainers/venvs.sh)")

from spurion import Client  # noqa: E402

GROUP, PER_RANK, STEPS = 8, 12, 2
RANK = Path(__file__).resolve().parent / "rank.py"


def test_ranks_share_groups_and_a_retry_is_the_same(d, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(demo.free_port()), str(RANK), str(tmp_path)]
    done = subprocess.run(command, env={**d.environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in (0, 1)]
    assert [r["world"] for r in ranks] == [2, 2] and [r["steps"] for r in ranks] == [STEPS, STEPS]
    assert ranks[0]["weights"] == ranks[1]["weights"]  # both took the same steps
    calls = [c for r in ranks for c in r["calls"]]
    assert len(calls) == 2 * STEPS and all(len(c[3]) == PER_RANK for c in calls)
    with Client(d.rpc) as c:
        rows = c.query("ranks")
        asked = 2 * PER_RANK * STEPS
        unscored = sum(x is None for call in calls for x in call[3])  # empty completions cannot be judged
        assert len(rows) == asked - unscored and unscored < 6
        groups = Counter((r.step, r.group) for r in rows)
        assert len(groups) == STEPS * 2 * PER_RANK // GROUP and set(groups.values()) <= {GROUP} | ({GROUP - 1, GROUP - 2} if unscored else set())
        assert not any("group_split" in r.warnings for r in rows if not unscored)
        # the group that both ranks have a half of was judged as one: its advantages are around its own mean
        for step in range(STEPS):
            halves = [x for r in ranks for call in r["calls"] if call[0] == step for x in call[3][(PER_RANK - GROUP // 2) * (r is ranks[0]):][:GROUP // 2]]
            spread = sorted(r.reward for r in rows if r.step == step and r.group == "0.1")
            assert spread == pytest.approx(sorted(x for x in halves if x is not None))
            mean = sum(spread) / len(spread)
            assert all(r.advantage == pytest.approx(r.reward - mean, abs=1e-5) for r in rows if r.step == step and r.group == "0.1")
        # asked again by new objects: the same rewards, and no rollout more
        assert all(r["again"] == r["calls"] for r in ranks)
        tapped = demo.wait_for(lambda: len(t := c.query("ranks-tap")) == len(rows) and t)
        assert sorted((r.step, r.group, r.id, r.reward) for r in tapped) == sorted((r.step, r.group, r.id, r.reward) for r in rows)
