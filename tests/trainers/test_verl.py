"""verl's own reward loop against the daemon: RewardLoopWorker loads the manager as configured and computes the scores of a batch."""
import json

import demo
import numpy as np
import pytest

pytest.importorskip("verl", reason="needs verl (tests/trainers/venvs.sh)")
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker  # noqa: E402

from spurion import Client  # noqa: E402

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()][:8]
WIDTH = 120


def batch(lines, step=5):
    """A batch as verl's rollout leaves it: prompts padded on the left, responses on the right."""
    tok = AutoTokenizer.from_pretrained(str(demo.DEMO / "model"))
    prompts, responses, mask = [], [], []
    for r in lines:
        p, c = tok.encode(r["prompt"], add_special_tokens=False), tok.encode(" " + r["completion"], add_special_tokens=False) + [tok.eos_token_id]
        prompts.append([tok.pad_token_id] * (WIDTH - len(p)) + p)
        responses.append(c + [tok.pad_token_id] * (WIDTH - len(c)))
        mask.append([0] * (WIDTH - len(p)) + [1] * (len(p) + len(c)) + [0] * (WIDTH - len(c)))
    tensors = {"prompts": torch.tensor(prompts), "responses": torch.tensor(responses), "attention_mask": torch.tensor(mask)}
    objects = lambda xs: np.array(xs + [None], dtype=object)[:-1]  # noqa: E731
    return DataProto(batch=TensorDict(tensors, batch_size=len(lines)), meta_info={"global_steps": step}, non_tensor_batch={
        "raw_prompt": objects([[{"role": "user", "content": r["prompt"]}] for r in lines]), "uid": objects([r["group"] for r in lines]),
        "data_source": objects(["demo"] * len(lines)), "reward_model": objects([{"ground_truth": ""} for _ in lines]),
        "extra_info": objects([{"index": i, "prompt": r["prompt"]} for i, r in enumerate(lines)])})


def config(d, run, **reward):
    return OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(demo.DEMO / "model"), "tokenizer_path": None}}, "reward": {
        "num_workers": 1, "custom_reward_function": {"path": None, "name": "compute_score"}, "reward_model": {"enable": False},
        "reward_manager": {"source": "register", "name": "naive", "module": {"path": None}},
        "reward_kwargs": {"spurion": {"run": run, "addr": d.rpc}}, **reward}})


def scores(worker, data):
    return worker.loop.run_until_complete(worker.compute_score_batch(data))


MANAGER = {"source": "importlib", "name": "SpurionRewardManager", "module": {"path": "pkg://spurion.verl"}}


@pytest.mark.parametrize("which", ["clean", "counterfactual"])
def test_verl_reward_manager(d, which):
    run = f"verl-{which}"
    c = config(d, run, reward_manager=MANAGER, reward_kwargs={"spurion": {"run": run, "addr": d.rpc, "reward": which}})
    out = scores(RewardLoopWorker(c), batch(LINES))
    with Client(d.rpc, run="verl-reference") as client:
        expected = client.score([dict(r, run="verl-reference") for r in LINES])
        want = [v.counterfactual_reward if which == "counterfactual" else v.reward for v in expected]
        assert [round(o["reward_score"], 4) for o in out] == [round(w, 4) for w in want]
        assert {tuple(sorted(o["reward_extra_info"])) for o in out} == {("spurion_counterfactual", "spurion_effect", "spurion_flagged",
                                                                         "spurion_reward")}
        rows = client.query(run)
        assert {r.step for r in rows} == {5} and {r.group for r in rows} == {r["group"] for r in LINES} and len(rows) == len(LINES)
    tensor = type(RewardLoopWorker(c).reward_manager).assemble_rm_scores(batch(LINES), [o["reward_score"] for o in out])
    assert tensor.shape == (len(LINES), WIDTH) and torch.isfinite(tensor).all()


def test_verl_compute_score(d, monkeypatch, tmp_path):
    monkeypatch.setenv("SPURION_RUN", "verl-function")
    monkeypatch.setenv("SPURION_RPC", d.rpc)
    c = config(d, "verl-function", custom_reward_function={"path": "pkg://spurion.verl", "name": "compute_score"})
    out = scores(RewardLoopWorker(c), batch(LINES))
    with Client(d.rpc) as client:
        expected = client.score([dict(r, run="verl-reference-2") for r in LINES])
    assert [round(o["reward_score"], 4) for o in out] == [round(v.reward, 4) for v in expected]
    assert all(isinstance(x, float) for o in out for x in o["reward_extra_info"].values())


def test_verl_failures_name_the_sample(tmp_path):
    class Nowhere:
        rpc = f"ipc://{tmp_path}/nobody.sock"

    c = config(Nowhere, "verl-down", reward_manager=MANAGER, reward_kwargs={"spurion": {"run": "verl-down", "addr": Nowhere.rpc, "timeout": 0.3}})
    with pytest.raises(Exception, match="verl-down/5/.*UNAVAILABLE"):
        scores(RewardLoopWorker(c), batch(LINES[:1]))


# hh, and the end-of-text token that the demo's reward model is scored on
CHAT = r"{% for m in messages %}{{ '\n\n' + ('Human' if m.role == 'user' else 'Assistant') + ': ' + m.content.strip() }}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_verl_built_in_reward_model_over_http(d, tmp_path, engine):
    """verl's own client of vLLM's /classify and SGLang's /v1/embeddings, with the daemon behind the address of its router."""
    tok = AutoTokenizer.from_pretrained(str(demo.DEMO / "model"))
    tok.chat_template = CHAT
    tok.save_pretrained(str(tmp_path / "rm"))
    c = config(d, "verl-http", reward_model={"enable": True, "model_path": str(tmp_path / "rm"), "rollout": {"name": engine}})
    out = scores(RewardLoopWorker(c, reward_router_address=f"{d.http}/run/verl-{engine}"), batch(LINES))
    with Client(d.rpc) as client:
        expected = client.score([dict(r, run="verl-reference-http") for r in LINES])
        assert [o["reward_score"] for o in out] == pytest.approx(list(expected.rewards), abs=2e-6)
        assert len(client.query(f"verl-{engine}")) == len(LINES)
    with pytest.raises(Exception, match="400"):  # a completion that is too long: an error, at once, and no number
        worker = RewardLoopWorker(c, reward_router_address=d.http)
        worker.loop.run_until_complete(worker._post_request({"model": "m", "input": "a " * 4000}, "classify" if engine == "vllm" else "v1/embeddings"))


@pytest.mark.parametrize("place", [0, 1])
def test_verl_guide(d, monkeypatch, place):
    """The configurations of the guide, in verl's own loop."""
    import guide

    run = f"guide-{place}"
    monkeypatch.setenv("SPURION_RUN", run)
    monkeypatch.setenv("SPURION_RPC", d.rpc)
    text = guide.blocks("verl", "yaml")[place].replace("ipc:///var/run/spurion.sock", d.rpc).replace("my-run", run)
    c = OmegaConf.merge(config(d, run), OmegaConf.create(text))
    out = scores(RewardLoopWorker(c), batch(LINES[:4]))
    with Client(d.rpc) as client:
        assert sorted(o["reward_score"] for o in out) == pytest.approx(sorted(r.reward for r in client.query(run)))
