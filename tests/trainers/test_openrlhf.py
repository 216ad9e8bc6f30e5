"""OpenRLHF's own code against the daemon: its executor loads the reward_func file, calls it as it does in training, and takes what comes."""
import asyncio
import json
import types

import demo
import pytest

pytest.importorskip("openrlhf", reason="needs OpenRLHF (tests/trainers/venvs.sh)")
from openrlhf.utils.agent import SingleTurnAgentExecutor  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from spurion import Client  # noqa: E402

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()][:12]


class Engine:
    """Gives the completions that it was told, as OpenRLHF's engine gives them."""

    def __init__(self, tokenizer, completions):
        self.tokenizer, self.completions = tokenizer, list(completions)

    async def generate(self, prompt_ids, params, multi_modal_data=None):
        prompt = self.tokenizer.decode(prompt_ids)
        text = next(c for p, c in self.completions if p == prompt and not self.completions.remove((p, c)))
        ids = self.tokenizer.encode(" " + text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids, text=text, finish_reason="stop", logprobs=None)])


def execute(file, lines):
    tokenizer = AutoTokenizer.from_pretrained(str(demo.DEMO / "model"))
    executor = SingleTurnAgentExecutor(str(file))
    engine = Engine(tokenizer, [(r["prompt"], r["completion"]) for r in lines])
    params = types.SimpleNamespace(max_tokens=100, logprobs=None)

    async def go():
        return await asyncio.gather(*(executor.execute(r["prompt"], "", params, 400, tokenizer, engine) for r in lines))

    return asyncio.run(go())


def reward_file(folder, d, more=""):
    file = folder / "my_reward.py"
    file.write_text("from spurion.openrlhf import make_reward_func\n"
                    f"reward_func = make_reward_func({d.rpc!r}, run='openrlhf', eos=('<|endoftext|>',){more})\n")
    return file


def by_text(outputs, lines):
    """OpenRLHF's executors run at the same time: an output is known by its completion."""
    tokenizer = AutoTokenizer.from_pretrained(str(demo.DEMO / "model"))
    said = {}
    for o in outputs:
        (a, b), ids = o["action_ranges"][0], o["observation_tokens"]
        said[o["prompt"], tokenizer.decode(ids[a:b], skip_special_tokens=True).strip()] = o
    return [said[r["prompt"], r["completion"]] for r in lines]


def test_openrlhf_takes_the_reward_of_the_daemon(d, tmp_path):
    outputs = by_text(execute(reward_file(tmp_path, d), LINES), LINES)
    with Client(d.rpc, run="reference") as c:
        expected = c.score([dict(r, run="reference") for r in LINES])
        assert [round(float(o["reward"][0]), 4) for o in outputs] == [round(v.reward, 4) for v in expected]
        assert [float(o["scores"][0]) for o in outputs] == [float(o["reward"][0]) for o in outputs]
        keys = {tuple(sorted(o["extra_logs"])) for o in outputs}
        assert keys == {("spurion_counterfactual", "spurion_effect", "spurion_flagged", "spurion_scored")}
        assert all(x.shape == (1,) for o in outputs for x in (o["reward"], *o["extra_logs"].values()))
        assert [bool(o["extra_logs"]["spurion_flagged"]) for o in outputs] != [False] * len(LINES)
        assert len(c.query("openrlhf")) == len(LINES)


def test_openrlhf_takes_the_counterfactual_reward(d, tmp_path):
    lines = [dict(r, completion=r["completion"] + " Really.") for r in LINES]
    outputs = by_text(execute(reward_file(tmp_path, d, ", reward='counterfactual'"), lines), lines)
    with Client(d.rpc, run="reference-cf") as c:
        expected = c.score([dict(r, run="reference-cf") for r in lines])
    assert [round(float(o["reward"][0]), 4) for o in outputs] == [round(v.counterfactual_reward, 4) for v in expected]


def test_openrlhf_equal_completions_are_two_rollouts(d, tmp_path):
    lines = [dict(LINES[0], completion="Quite the same.")] * 3
    assert len(execute(reward_file(tmp_path, d), lines)) == 3
    with Client(d.rpc, run="openrlhf") as c:
        assert sum(c.get(*r.key).rollout.completion == "Quite the same." for r in c.query() if r.whole) >= 0
        ids = [r.id for r in c.query() if r.id.rsplit("-", 1)[1] in "123"]
        assert len([i for i in ids if i.startswith(next(x for x in ids if x.endswith("-3")).rsplit("-", 1)[0])]) == 3


def test_openrlhf_a_failure_is_no_number(tmp_path):
    class Nowhere:
        rpc = f"ipc://{tmp_path}/nobody.sock"

    (output,) = execute(reward_file(tmp_path, Nowhere, ", timeout=0.3"), LINES[:1])
    assert output["reward"] is None and output["scores"] is None  # OpenRLHF's way of saying that there is none
    import importlib.util

    spec = importlib.util.spec_from_file_location("r", tmp_path / "my_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(Exception, match="no reward for rollout openrlhf/0/p.*: UNAVAILABLE: .*nobody.sock"):
        module.reward_func(["Why? Because."], ["Why?"], [""])


def test_openrlhf_guide(d, tmp_path, monkeypatch):
    """The file of the guide, as OpenRLHF loads it."""
    import guide

    (code,) = guide.blocks("openrlhf", "python")
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.setenv("SPURION_RPC", d.rpc)
    outputs = by_text(execute(tmp_path / "my_reward.py", LINES[:4]), LINES[:4])
    with Client(d.rpc) as c:
        assert sorted(float(o["reward"][0]) for o in outputs) == pytest.approx(sorted(r.reward for r in c.query("my-run")))
