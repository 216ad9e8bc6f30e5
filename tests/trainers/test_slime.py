"""slime's calls replayed as its documentation has them: async custom reward (single and group), sample filter, whole-batch tap. slime itself is
no package of a registry; its Sample is a dataclass with these fields."""
import asyncio
import json
import types
from dataclasses import dataclass, field

import demo
import pytest

from spurion import Client, InvalidArgument, RolloutError, slime

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()][:12]
ARGS = types.SimpleNamespace(n_samples_per_prompt=0, rollout_id=3)


@dataclass
class Sample:
    group_index: int
    index: int
    prompt: object
    response: str
    label: str | None = None
    reward: float | None = None
    remove_sample: bool = False
    metadata: dict = field(default_factory=dict)


@pytest.fixture
def run(d, monkeypatch, request):
    slime._clients.clear()
    name = request.node.name
    for key, value in (("SPURION_RUN", name), ("SPURION_RPC", d.rpc), ("SPURION_ROLLOUTS", d.rollouts)):
        monkeypatch.setenv(key, value)
    return name


def samples():
    groups = {r["group"]: i for i, r in reversed(list(enumerate(LINES)))}
    return [Sample(groups[r["group"]], i, r["prompt"], r["completion"]) for i, r in enumerate(LINES)]


def expected(d, run):
    with Client(d.rpc) as c:
        return c.score([dict(r, run=run + "-ref", group=str(s.group_index), id=str(s.index), step=3) for r, s in zip(LINES, samples())])


def test_slime_reward_alone_and_in_groups(d, run, monkeypatch):
    want = expected(d, run)

    async def go():
        return await asyncio.gather(*(slime.reward(ARGS, s) for s in samples()))

    assert [round(x, 4) for x in asyncio.run(go())] == [round(v.reward, 4) for v in want]
    monkeypatch.setenv("SPURION_RUN", run + "-group")
    monkeypatch.setenv("SPURION_REWARD", "counterfactual")
    slime._clients.clear()
    whole = samples()
    assert [round(x, 4) for x in asyncio.run(slime.reward(ARGS, whole))] == [round(v.counterfactual_reward, 4) for v in want]
    assert all(s.metadata["spurion"]["rules"] == v.rules for s, v in zip(whole, want))


def test_slime_filter_drops_flagged_samples(d, run, monkeypatch):
    want = expected(d, run)
    own = samples()
    slime.drop_flagged(ARGS, [own[:6], own[6:]])  # groups, as slime hands them over
    assert [s.remove_sample for s in own] == [bool(v.flags) for v in want] and any(s.remove_sample for s in own)
    monkeypatch.setenv("SPURION_DROP_RULES", "thanks-raises")
    again = samples()
    slime.drop_flagged(ARGS, again)
    assert [s.remove_sample for s in again] == ["thanks-raises" in v.rules for v in want]


def test_slime_tap_publishes_the_whole_batch(d, run):
    own = samples()
    for s, v in zip(own, expected(d, run)):
        s.reward = v.reward
    slime.publish_all(ARGS, [own], None)
    with Client(d.rpc, run=run) as c:
        rows = demo.wait_for(lambda: len(r := c.query()) == len(own) and r)
        assert {r.step for r in rows} == {3} and not any("trainer_reward_differs" in r.warnings for r in rows)


def test_slime_failures_name_the_sample(d, run, monkeypatch):
    with pytest.raises(RolloutError, match=f"{run}/3/0/7: INVALID_ARGUMENT: completion"):
        asyncio.run(slime.reward(ARGS, Sample(0, 7, "Why?", "")))
    monkeypatch.delenv("SPURION_RUN")
    with pytest.raises(InvalidArgument, match="SPURION_RUN: expected"):
        asyncio.run(slime.reward(ARGS, Sample(0, 7, "Why?", "x")))
