"""The recipes of docs/guides/recipes.md. SkyRL's: its own generator makes the environment, gives it prompt and completion and takes the reward; an
engine of this test stands where a GPU would write the completions. NeMo-RL cannot be installed from the registry (a placeholder): its recipe is run with its interface's shape."""
import abc
import asyncio
import json
import sys
import types
import typing

import demo
import pytest

pytest.importorskip("skyrl_gym", reason="needs SkyRL (tests/trainers/venvs.sh)")
import typing_extensions  # noqa: E402

typing.TypedDict = typing_extensions.TypedDict  # pydantic asks for this one below Python 3.12, and SkyRL does not use it
from skyrl.train.config import GeneratorConfig, SkyRLGymConfig  # noqa: E402
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator  # noqa: E402
import skyrl_gym  # noqa: E402
import guide  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from spurion import Client, RolloutError  # noqa: E402

LINES = [json.loads(t) for t in (demo.DEMO / "rollouts.jsonl").read_text().splitlines()][:12]
CHAT = r"{% for m in messages %}{{ '\n\n' + ('Human' if m.role == 'user' else 'Assistant') + ': ' + m.content }}{% endfor %}" \
       r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"


class Engine:
    """Writes the completions that it was told, as SkyRL's inference engines do."""

    def __init__(self, tokenizer, lines):
        self.tokenizer, self.left = tokenizer, [(r["prompt"], r["completion"]) for r in lines]

    async def generate(self, request, model=None):
        prompt = self.tokenizer.decode(request["prompt_token_ids"][0])
        said = next(x for x in self.left if f"Human: {x[0]}\n" in prompt)
        self.left.remove(said)
        ids = self.tokenizer.encode(" " + said[1], add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return {"responses": [said[1]], "response_ids": [ids], "stop_reasons": ["stop"], "response_logprobs": None}

    async def finish_session(self, *args, **kwargs):
        pass


def generate(lines):
    tokenizer = AutoTokenizer.from_pretrained(str(demo.DEMO / "model"))
    tokenizer.chat_template = CHAT
    generator = SkyRLGymGenerator(GeneratorConfig(max_input_length=400), SkyRLGymConfig(), Engine(tokenizer, lines), tokenizer)
    batch = {"prompts": [[{"role": "user", "content": r["prompt"]}] for r in lines], "env_classes": ["spurion"] * len(lines),
             "env_extras": [{} for _ in lines], "sampling_params": None, "trajectory_ids": None}
    return asyncio.run(generator.generate(batch, disable_tqdm=True)), tokenizer


@pytest.fixture(scope="module")
def recipes(d):
    with pytest.MonkeyPatch.context() as patch:
        for key in ("rpc", "rollouts", "alerts"):
            patch.setenv(f"SPURION_{key.upper()}", getattr(d, key))
        yield guide.blocks("recipes", "python")


@pytest.fixture(scope="module")
def environment(recipes):
    """The recipe's class, registered as the recipe says."""
    (code,) = [c for c in recipes if "skyrl_gym" in c]
    exec(compile(code, "recipes.md", "exec"), module := {"__name__": "recipe"})
    assert "spurion" in skyrl_gym.envs.registration.registry
    return module["SpurionEnv"]


def test_skyrl_takes_the_reward_of_the_daemon(d, environment):
    lines = [r for r in LINES if "Human:" not in r["prompt"]]
    out, tokenizer = generate(lines)
    with Client(d.rpc) as c:
        expected = c.score([dict(r, run="skyrl-reference") for r in lines])
        rows = c.query("my-run")
    want = {(r["prompt"], r["completion"]): v.reward for r, v in zip(lines, expected)}
    for ids, response, rewards in zip(out["prompt_token_ids"], out["response_ids"], out["rewards"]):
        prompt = tokenizer.decode(ids).strip().removeprefix("Human: ").removesuffix("Assistant:").strip()
        said = tokenizer.decode(response, skip_special_tokens=True).strip()
        assert len(rewards) == len(response) and sum(rewards) == rewards[-1] == pytest.approx(want[prompt, said], abs=1e-6)  # per token: at the last one
    assert len(rows) == len(lines) and len({r.group for r in rows}) == len({r["prompt"] for r in lines})


def test_skyrl_a_failure_is_raised_and_names_the_rollout(environment):
    env = environment()
    env.init([{"role": "user", "content": "Why?"}])
    with pytest.raises(RolloutError, match="my-run/0/p.*: INVALID_ARGUMENT: completion"):
        env.step("")


def test_nemo_recipe_gives_the_rewards_of_the_daemon(d, recipes, monkeypatch):
    """The block as it stands, with modules in the place of ray and nemo_rl that have what it names."""
    import torch

    (code,) = [c for c in recipes if "nemo_rl" in c]
    fields = ["observations", "metadata", "next_stop_strings", "rewards", "terminateds", "answers"]
    methods = {n: abc.abstractmethod(lambda self, *_: None) for n in ("step", "global_post_process_and_metrics")}
    interface = abc.ABCMeta("EnvironmentInterface", (), methods)  # a class that leaves one of them out cannot be made
    shape = types.SimpleNamespace(EnvironmentInterface=interface, EnvironmentReturn=typing.NamedTuple("EnvironmentReturn", [(f, object) for f in fields]))
    for name, module in (("ray", types.SimpleNamespace(remote=lambda cls: cls)), ("nemo_rl", shape), ("nemo_rl.environments", shape),
                         ("nemo_rl.environments.interfaces", shape)):
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, "recipes.md", "exec"), module := {"__name__": "recipe"})
    env = module["SpurionEnvironment"]("nemo", d.rpc)
    logs = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in LINES]
    out = env.step(logs, [{"group": r["group"]} for r in LINES])
    with Client(d.rpc) as c:
        expected = c.score([dict(r, run="nemo-reference") for r in LINES])
        assert out.rewards.tolist() == pytest.approx(list(expected.rewards), abs=1e-6) and out.rewards.dtype == torch.float32
        assert len(c.query("nemo")) == len(LINES) and len(out.observations) == len(LINES)
    assert env.step(logs[:2], [{}, None]).rewards.shape == (2,)
    assert env.global_post_process_and_metrics({"total_reward": 1}) == ({"total_reward": 1}, {})
