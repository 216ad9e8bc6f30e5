"""Spurion in verl: a reward manager and a compute_score. docs/guides/verl.md shows them.

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://spurion.verl
    reward.reward_manager.name=SpurionRewardManager

Settings come from the environment, which Ray passes on to workers (SPURION_RUN is needed; SPURION_RPC, SPURION_REWARD: clean |
counterfactual), or from `reward.reward_kwargs.spurion`: {run, addr, reward, timeout}. Every sample gets the same keys, all of them numbers. A
failure raises and names the sample.
"""

from __future__ import annotations

import os
from typing import Any

from ._naming import default_attempt, text_of
from .aio import AsyncClient
from .errors import InvalidArgument, RolloutError, SpurionError
from .openrlhf import Names

ROLLOUTS_PER_STEP = 1024
_clients: dict[tuple[Any, ...], tuple[AsyncClient, Names]] = {}


def _settings(given: Any) -> dict[str, Any]:
    out = {"run": os.environ.get("SPURION_RUN"), "addr": None, "reward": os.environ.get("SPURION_REWARD", "clean"), "timeout": 300.0,
           "rollouts_per_step": ROLLOUTS_PER_STEP}
    for key in out:
        if given is not None and given.get(key) is not None:
            out[key] = given.get(key)
    if not out["run"]:
        raise InvalidArgument("expected the name of a run (SPURION_RUN, or reward.reward_kwargs.spurion.run), found none")
    if out["reward"] not in ("clean", "counterfactual"):
        raise InvalidArgument(f"reward: expected clean or counterfactual, found {out['reward']!r}")
    return out


def _shared(s: dict[str, Any]) -> tuple[AsyncClient, Names]:
    key = (os.getpid(), s["run"], s["addr"])
    if key not in _clients:
        _clients[key] = (AsyncClient(s["addr"], run=s["run"], timeout=float(s["timeout"])), Names(s["run"], int(s["rollouts_per_step"])))
    return _clients[key]


async def _judge(s: dict[str, Any], prompt: str, completion: str, step: int | None, group: str | None, sample: str | None) -> dict[str, Any]:
    client, names = _shared(s)
    rollout = {**names.name(prompt, completion, step, group), "prompt": prompt, "completion": completion, "attempt": default_attempt()}
    if sample is not None:
        rollout["id"] = sample
    try:
        (v,) = await client.score([rollout])
    except RolloutError:
        raise
    except SpurionError as e:
        text = f"no reward for rollout {rollout['run']}/{rollout['step']}/{rollout['group']}/{rollout['id']}: {e}"
        raise type(e)(text, e.code, e.retry_after_ms) from e
    clean, counterfactual = v.reward, v.counterfactual_reward
    assert clean is not None and counterfactual is not None  # a refused one has raised
    value = counterfactual if s["reward"] == "counterfactual" else clean
    return {"score": float(value), "spurion_reward": float(clean), "spurion_counterfactual": float(counterfactual),
            "spurion_effect": float(v.effect or 0.0), "spurion_flagged": float(bool(v.flags))}


async def compute_score(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **kwargs: Any) -> dict[str, Any]:
    """For reward.custom_reward_function: {"score", "spurion_…"}. verl does not pass the prompt here, so the dataset must carry it:
    extra_info["prompt"], a text or messages; extra_info["index"] helps to name the sample."""
    prompt = (extra_info or {}).get("prompt", (extra_info or {}).get("question"))
    if prompt is None:
        raise InvalidArgument(f"compute_score: expected extra_info['prompt'] (data_source {data_source!r}), found "
                              f"{sorted(extra_info or {})}; or use SpurionRewardManager, which sees the prompt")
    return await _judge(_settings(kwargs.get("spurion")), text_of(prompt), solution_str, None, None, None)


try:
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase as _Base
except ImportError:  # compute_score works without; the manager needs verl
    _Base = object


class SpurionRewardManager(_Base):  # type: ignore[misc]  # of no type where verl is not installed
    """The reward of the daemon, with ids: group from `uid` where the batch carries it, step from meta_info."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, reward_router_address: Any = None, reward_model_tokenizer: Any = None):
        super().__init__(config, tokenizer, compute_score)
        kwargs = config.reward.get("reward_kwargs") or {}
        self.settings = _settings(kwargs.get("spurion"))

    async def run_single(self, data: Any) -> dict[str, Any]:
        """{"reward_score", "reward_extra_info"} of one sample (of the last sequence, where there are several)."""
        item = data[-1:][0]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1]:].sum())
        ids = responses[:length]
        completion = await self.loop.run_in_executor(None, lambda: self.tokenizer.decode(ids, skip_special_tokens=True))
        fields, meta = item.non_tensor_batch, getattr(data, "meta_info", None) or {}
        raw = fields.get("raw_prompt")
        if raw is None:
            raise InvalidArgument("SpurionRewardManager: expected raw_prompt in the batch (data.return_raw_chat=True), found none")
        prompt = raw if isinstance(raw, str) else text_of(list(raw))
        step, group = meta.get("global_steps"), fields.get("uid")
        out = await _judge(self.settings, prompt, completion, int(step) if step is not None and int(step) >= 0 else None,
                           str(group) if group is not None else None, None)
        return {"reward_score": out.pop("score"), "reward_extra_info": out}
