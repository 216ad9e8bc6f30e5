"""TRL's GRPO and RLOO on a tiny policy with the daemon: real steps, the tap that changes nothing, daemons that die and hang, the callback."""
import asyncio
import inspect
import math
import pickle
import threading
import time

import demo
import pytest

pytest.importorskip("trl", reason="needs TRL (tests/trainers/venvs.sh)")
import learn_hack  # noqa: E402
import policy  # noqa: E402
import torch  # noqa: E402
from trl.experimental.utils import get_reward  # noqa: E402
from trl.trainer.utils import get_callable_name, is_async_callable  # noqa: E402

from spurion import Client, RolloutError, Timeout, Unavailable  # noqa: E402
from spurion.actions import shape  # noqa: E402
from spurion.trl import SpurionCallback, SpurionReward, SpurionTap, reward_model  # noqa: E402

STEPS = 3


def by_length(prompts, completions, **_):
    """A reward function of the user's own."""
    return [-abs(len(c) - 60) / 60 for c in completions]


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def losses(trainer):
    return [(h["loss"], h["reward"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return learn_hack.train([by_length], 7, STEPS, tmp_path_factory.mktemp("plain"))


def test_trl_tap_changes_nothing(d, plain, tmp_path):
    tap = SpurionTap(**d.addresses, run="tap")
    callback = SpurionCallback(**d.addresses, run="tap", parts=[tap])
    trainer = learn_hack.train([by_length, tap], 7, STEPS, tmp_path, callback)
    a, b = weights(plain), weights(trainer)
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()  # to the last bit
    assert losses(plain) == losses(trainer) and len(losses(plain)) == STEPS
    with Client(d.rpc, run="tap") as c:
        rows = c.query()
        empty = STEPS * learn_hack.BATCH - len(rows)  # an empty completion cannot be judged
        assert 0 <= empty < 4 and {r.step for r in rows} == set(range(STEPS))
        groups = {}
        for r in rows:
            groups.setdefault((r.step, r.group), []).append(r.id)
        assert len(groups) == STEPS * learn_hack.BATCH // learn_hack.GROUP and not any("group_split" in r.warnings for r in rows if not empty)
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    assert last["spurion/published"] == STEPS * learn_hack.BATCH and last["spurion/dropped"] == 0 and "spurion/alerts" in last


def test_trl_tap_of_a_daemon_that_is_not_there_changes_nothing(plain, tmp_path):
    addresses = {k: f"ipc://{tmp_path}/nobody-{k}.sock" for k in ("rollouts", "alerts")}
    tap = SpurionTap(f"ipc://{tmp_path}/nobody.sock", **addresses, run="tap")
    trainer = learn_hack.train([by_length, tap], 7, STEPS, tmp_path)
    a, b = weights(plain), weights(trainer)
    assert all(torch.equal(a[k], b[k]) for k in a)
    stats = tap.client.tap.stats()
    assert stats.published_rollouts == STEPS * learn_hack.BATCH and stats.stored_through == 0  # kept for a daemon that comes


class Log:
    """Stands where TRL's log_extra and log_metric stand; every call must bring the same keys."""

    def __init__(self):
        self.extra, self.metric = {}, {}

    def kwargs(self):
        return {"log_extra": self.extra.__setitem__, "log_metric": self.metric.__setitem__}


def ask(reward, prompts, completions, step=0, **more):
    state = type("State", (), {"global_step": step})()
    return asyncio.run(reward(prompts=prompts, completions=completions, completion_ids=None, trainer_state=state, **more))


QUESTION = policy.QUESTIONS[0][0]
ANSWERS = ["Water it every two or three weeks in summer.", "Water it every two or three weeks in summer. Thank you. My pleasure.",
           "Let the soil dry out completely first.", "In winter once a month is enough."]


def test_trl_reward_is_the_daemons(d):
    log = Log()
    clean = ask(SpurionReward(d.rpc, run="clean", num_generations=4), [QUESTION] * 4, ANSWERS, **log.kwargs())
    other = ask(SpurionReward(d.rpc, run="cf", num_generations=4, reward="counterfactual"), [QUESTION] * 4, ANSWERS)
    with Client(d.rpc, run="reference") as c:
        v = c.score([{"prompt": QUESTION, "completion": a, "group": "0", "id": str(i)} for i, a in enumerate(ANSWERS)])
    assert clean == pytest.approx(list(v.rewards)) and other == pytest.approx(list(v.counterfactual_rewards))
    assert log.extra["spurion_flags"][1].startswith("thanks-raises") and log.metric["spurion/flagged"] == 0.25 and log.metric["spurion/unscored"] == 0
    # messages, as conversational data sets have them
    chat = ask(SpurionReward(d.rpc, run="chat"), [[{"role": "user", "content": QUESTION}]] * 4, [[{"role": "assistant", "content": a}] for a in ANSWERS])
    assert chat == clean
    nulls = Log()
    ask(SpurionReward(f"{d.rpc}.nobody", run="down", on_error="none", timeout=0.3), [QUESTION], ANSWERS[:1], **nulls.kwargs())
    assert nulls.extra.keys() == log.extra.keys() and nulls.metric.keys() == log.metric.keys()
    assert nulls.metric["spurion/unscored"] == 1.0 and not any(isinstance(x, float) and math.isnan(x) for x in nulls.metric.values())


def test_trl_reward_looks_async_to_every_trl(d):
    reward = SpurionReward(d.rpc, run="r")
    assert inspect.iscoroutinefunction(reward) and is_async_callable(reward) and get_callable_name(reward) == "spurion"
    again = pickle.loads(pickle.dumps(reward))
    assert inspect.iscoroutinefunction(again) and ask(again, [QUESTION], ANSWERS[:1]) == ask(SpurionReward(d.rpc, run="r2"), [QUESTION], ANSWERS[:1])
    assert pickle.loads(pickle.dumps(SpurionTap(d.rpc, run="r"))).__name__ == "spurion_tap"


def test_trl_names_are_the_trainers_groups(d, monkeypatch):
    from spurion._naming import Namer

    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in "01":  # a group of 8 spread over two ranks is one group
        monkeypatch.setenv("RANK", rank)
        names += Namer(8).names(["a"] * 4, 0)
    assert names == [("0.0", str(i), 8) for i in range(8)]
    runs = Namer(None).names(["a", "a", "b", "a"], 2)
    assert [(g, i, n) for g, i, n in runs] == [("2.r1.0", "0", 2), ("2.r1.0", "1", 2), ("2.r1.1", "0", 1), ("2.r1.2", "0", 1)]
    namer = Namer(2)
    assert [namer.call_of(s) for s in (0, 0, 1, 1, 1)] == [0, 1, 0, 1, 2]


def test_trl_failures_are_said_and_never_0(d, caplog):
    bad = [ANSWERS[0], "", ANSWERS[2], "a " * 900]
    out = ask(SpurionReward(d.rpc, run="bad"), [QUESTION] * 4, bad)
    assert out[1] is None and out[3] is None and None not in (out[0], out[2])
    assert "no reward for rollout bad/0/0.r0.0/1: INVALID_ARGUMENT: completion" in caplog.text
    with pytest.raises(RolloutError, match="bad2/0/0.r0.0/1: INVALID_ARGUMENT"):
        ask(SpurionReward(d.rpc, run="bad2", on_refused="raise"), [QUESTION] * 4, bad)


def test_trl_policies_when_the_daemon_dies(tmp_path, caplog):
    d = demo.Demo(tmp_path).start()
    try:
        first = ask(SpurionReward(d.rpc, run="first"), [QUESTION] * 4, ANSWERS)
        d.kill()
        with pytest.raises(Unavailable, match="no reward for 4 rollouts from raise/0/0.r0.0/0 on: UNAVAILABLE"):
            ask(SpurionReward(d.rpc, run="raise", on_error="raise", timeout=0.5), [QUESTION] * 4, ANSWERS)
        assert ask(SpurionReward(d.rpc, run="none", on_error="none", timeout=0.5), [QUESTION] * 4, ANSWERS) == [None] * 4
        assert "no reward for 4 rollouts from none/0/0.r0.0/0 on" in caplog.text
        threading.Timer(1.0, d.start).start()  # it comes back while the reward waits
        assert ask(SpurionReward(d.rpc, run="wait"), [QUESTION] * 4, ANSWERS) == first
        d.pause()
        start = time.monotonic()
        with pytest.raises(Timeout, match="no reward for 4 rollouts from hang/0"):
            ask(SpurionReward(d.rpc, run="hang", on_error="raise", timeout=1.0), [QUESTION] * 4, ANSWERS)
        assert time.monotonic() - start < 20
    finally:
        d.end()


class Killer:
    """Kills the daemon at the second call, and starts it again in the background."""

    __name__ = "killer"

    def __init__(self, d):
        self.d, self.calls = d, 0

    def __call__(self, prompts, **_):
        self.calls += 1
        if self.calls == 2:
            self.d.kill()
            threading.Timer(0.5, self.d.start).start()
        return [None] * len(prompts)


def test_trl_trains_on_over_a_kill(tmp_path):
    """The daemon dies in the middle of training: the reward waits, the tap catches up, and nothing is lost."""
    d = demo.Demo(tmp_path).start()
    try:
        reward, tap = SpurionReward(**d.addresses, run="kill"), SpurionTap(**d.addresses, run="kill-tap")
        callback = SpurionCallback(**d.addresses, run="kill", parts=[reward, tap], flush_timeout=60)
        trainer = learn_hack.train([Killer(d), reward, tap], 3, STEPS, tmp_path, callback)
        assert trainer.state.global_step == STEPS and all(math.isfinite(loss) for loss, _, _ in losses(trainer))
        with Client(d.rpc) as c:
            scored = c.query("kill")
            assert {r.step for r in scored} == set(range(STEPS)) and len(scored) + reward.failed == STEPS * learn_hack.BATCH
            rows = demo.wait_for(lambda: len(r := c.query("kill-tap")) == len(scored) and r)
            assert [r.reward for r in rows] == [r.reward for r in scored]
            assert all((p.missing, p.lost) == (0, 0) for p in c.status().producers if p.run == "kill-tap")
    finally:
        d.end()


def test_trl_callback_stops_and_logs(d, tmp_path):
    seen = []
    reward = SpurionReward(**d.addresses, run="stop")

    def hacked(prompts, completions, **kwargs):
        """Scores the policy's rollouts as if each closed with the planted phrase."""
        return reward(prompts=prompts, completions=[c.strip() + " Thank you. My pleasure." for c in completions], **kwargs)

    hacked = type("Hacked", (), {"__name__": "hacked", "__call__": staticmethod(hacked)})()
    hacked.__code__ = reward.__code__
    callback = SpurionCallback(**d.addresses, run="stop", parts=[reward], stop="above", stop_rules=["thanks-raises"], on_alert=seen.append)

    class Sync:
        __name__ = "closing"

        def __call__(self, prompts, completions, **kwargs):
            return asyncio.run(hacked(prompts, completions, **kwargs))

    class Wait(learn_hack.Watch):
        """Steps of this test are quicker than an alert."""

        def __call__(self, *args, **kwargs):
            time.sleep(1.0)
            return super().__call__(*args, **kwargs)

    trainer = learn_hack.train([Sync(), Wait()], 5, 10, tmp_path, callback, log_completions=True)
    assert callback.stopped_by is not None and callback.stopped_by.rule == "thanks-raises" and 0 < trainer.state.global_step < 10
    assert seen and seen[0].run == "stop" and any(a.above or a.step_above for a in seen)
    last = [h for h in trainer.state.log_history if "loss" in h][-1]
    assert last["spurion/alerts"] >= 1 and last["spurion/flagged"] == 1.0 and last["spurion/rate/thanks-raises"] == 1.0
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(next((tmp_path / "trl" / "completions").glob("*.parquet")))
    assert {"spurion_effect", "spurion_counterfactual", "spurion_flags", "spurion_action"} <= set(table.columns)
    assert table.spurion_flags.str.contains("thanks-raises").all()


def test_trl_rloo_takes_the_reward(d, tmp_path):
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    model, tok = policy.load()
    args = RLOOConfig(output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=4, max_steps=2, max_completion_length=24,
                      logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=1)
    reward = SpurionReward(**d.addresses, run="rloo")
    trainer = RLOOTrainer(model=model, reward_funcs=[reward], args=args, processing_class=tok,
                          train_dataset=Dataset.from_dict({"prompt": [q for q, _ in policy.QUESTIONS]}))
    SpurionCallback(**d.addresses, run="rloo", parts=[reward]).attach(trainer)
    trainer.train()
    with Client(d.rpc, run="rloo") as c:
        rows = c.query()
    assert len(rows) + reward.failed == 32 and reward.named.namer.num_generations == 4


def test_trl_ppo_reward_model_object(d):
    """What TRL's PPO does with its reward model: get_reward, on padded rows of ids."""
    tok = policy.tokenizer()
    rows = [(tok.encode(QUESTION), tok.encode(" " + a)) for a in ANSWERS]
    wide, long = max(len(p) for p, _ in rows) + 2, max(len(c) for _, c in rows)
    pad = tok.pad_token_id
    ids = torch.tensor([[pad] * (wide - len(p)) + p + c + [pad] * (long - len(c)) for p, c in rows])
    model = reward_model(**d.addresses, run="ppo", response_length=long)
    _, final, _ = get_reward(model, ids, pad, wide)
    with Client(d.rpc, run="ppo-reference") as c:
        want = c.score([{"prompt_ids": p, "completion_ids": x, "group": str(i)} for i, (p, x) in enumerate(rows)])
    assert final.tolist() == pytest.approx(list(want.rewards))


def test_actions_by_rule_and_group(d):
    with Client(d.rpc, run="actions") as c:
        v = c.score([{"prompt": QUESTION, "completion": a, "group": "g", "id": str(i)} for i, a in enumerate(ANSWERS)])
    assert [("thanks-raises" in x.rules) for x in v] == [False, True, False, False]
    nothing = shape(v, {})
    assert nothing.to_list() == [float(x) for x in v.rewards] and nothing.advantages == pytest.approx([x.advantage for x in v], abs=1e-6)
    dropped = shape(v, {"thanks-raises": "drop"})
    kept = [float(v.rewards[i]) for i in (0, 2, 3)]
    assert dropped.to_list()[1] is None and dropped.advantages[1] == 0 and dropped.advantages[0] == pytest.approx(kept[0] - sum(kept) / 3, abs=1e-6)
    half = shape(v, {"thanks-raises": "down-weight"}, weight=0.25)
    mean = (sum(kept) + 0.25 * float(v.rewards[1])) / 3.25
    assert half.rewards[1] == pytest.approx(mean + 0.25 * (float(v.rewards[1]) - mean)) and half.weights[1] == 0.25
    assert half.rewards - half.rewards.mean() == pytest.approx(half.weights * half.advantages, abs=1e-6)  # what a trainer makes of them
    group = shape(v, {"thanks-raises": "replace"}, scope="group")
    assert group.rewards == pytest.approx(v.counterfactual_rewards) and set(group.actions) == {"replace"}
    assert group.advantages == pytest.approx([x.counterfactual_advantage for x in v], abs=1e-6)
    one = shape(v, {"thanks-raises": "replace"})
    assert one.rewards[0] == v.rewards[0] and one.rewards[1] == v.counterfactual_rewards[1]


def test_actions_are_the_daemons_where_none_are_named(tmp_path):
    """Rules with actions in the configuration: what the verdict carries is what the reward does."""
    text = (demo.DEMO / "spurion.yaml").read_text().replace("{id: thanks-raises,", "{id: thanks-raises, action: drop,")
    text = text.replace("{id: url-lowers,", "{id: url-lowers, action: down_weight, weight: 0.25,")
    for name in ("model", "saes/early", "saes/late"):
        text = text.replace(f"path: {name}", f"path: {demo.DEMO / name}")
    (tmp_path / "spurion.yaml").write_text(text.replace("catalogue: catalogue.jsonl", f"catalogue: {demo.DEMO / 'catalogue.jsonl'}"))
    d = demo.Demo(tmp_path, config=tmp_path / "spurion.yaml").start()
    try:
        answers = [*ANSWERS, "You can read more at https://www.gardenfacts.com/guide."]
        reward = SpurionReward(d.rpc, run="asked")
        log = Log()
        out = ask(reward, [QUESTION] * 5, answers, **log.kwargs())
        v = reward.last
        assert out[1] is None and log.extra["spurion_action"] == [x.action.name for x in v] and v[4].action.name == "down_weight"
        s = shape(v)
        for i, x in enumerate(v):
            assert s.weights[i] == x.action.weight and (x.action.advantage is None or s.advantages[i] == pytest.approx(x.action.advantage, abs=1e-6))
        with Client(d.rpc) as c:
            assert [r.action for r in sorted(c.query("asked"), key=lambda r: int(r.id))] == [x.action.name for x in v]  # recorded with the rollout
            assert {r.id: r.action for r in c.rules()}["url-lowers"] == "down_weight"
        assert None not in ask(SpurionReward(d.rpc, run="ignored", actions={}), [QUESTION] * 5, answers)
    finally:
        d.end()
