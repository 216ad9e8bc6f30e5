"""Spurion in TRL: a reward, a tap and a callback for GRPO and RLOO; a reward-model object for PPO. docs/guides/trl.md shows them at work.

Nothing here draws from the global random generators: with the tap a run's weights are the same to the last bit.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._naming import Namer, completion_text, default_attempt, rank_and_world, text_of
from .actions import Shaped, action_name, shape
from .aio import AsyncClient
from .client import Client
from .errors import InvalidArgument, RolloutError, ServerBusy, SpurionError, Timeout, Unavailable
from .results import Alert, Verdicts

try:
    from transformers import TrainerCallback as _TrainerCallback
except ImportError:  # the reward and the tap work without
    _TrainerCallback = object

log = logging.getLogger("spurion")
ON_ERROR = {"wait": 900.0, "raise": 30.0, "none": 10.0}  # and seconds that a call may take, below every trainer's own limit


class _Named:
    """Rollouts out of a reward function's arguments. rendered prompts: see render."""

    def __init__(self, run: str, num_generations: int | None, attempt: int | None, render: Callable[[Any], str] | None):
        if not run:
            raise InvalidArgument("expected the name of a run, the same on every rank, found none")
        self.run, self.attempt = run, default_attempt() if attempt is None else attempt
        self.render = render or text_of
        self.namer = Namer(num_generations)

    def rollouts(self, prompts: Sequence[Any], completions: Sequence[Any], step: int) -> list[dict[str, Any]]:
        names = self.namer.names(prompts, self.namer.call_of(step))
        return [{"run": self.run, "step": step, "group": g, "id": i, "attempt": self.attempt, "group_size": n, "prompt": self.render(p),
                 "completion": completion_text(c)} for p, c, (g, i, n) in zip(prompts, completions, names)]


def _step_of(trainer_state: Any, fallback: int) -> int:
    return int(trainer_state.global_step) if trainer_state is not None else fallback


class SpurionReward:
    """A reward function for GRPOTrainer and RLOOTrainer: the daemon's reward, or the one without the catalogued spurious features.

    run: the same on every rank. reward: "clean" or "counterfactual". actions: rule to what to do with its rollouts (spurion.actions), None: what
    the daemon's rules ask for, {}: nothing. num_generations: members of a group (SpurionCallback.attach fills it in). attempt: raise it when a run is resumed
    from a checkpoint (torchrun's restart count by default). on_error: while the daemon is away or hangs, "wait" (900 s), "raise" (30 s),
    "none" (10 s, then None for these rollouts, which TRL leaves out); timeout sets other seconds. on_refused: a rollout that cannot be
    judged (an empty completion, one that is too long) is None and said in a warning ("none"), or raises RolloutError ("raise"). Never a 0.
    render: a prompt of messages to text. Other options are Client's.

    Async: TRL gathers it together with other async rewards. One Score call for each call of TRL. Picklable.
    """

    def __init__(self, addr: str | None = None, *, run: str, reward: str = "clean", actions: Mapping[str, str] | None = None,
                 num_generations: int | None = None, attempt: int | None = None, on_error: str = "wait", timeout: float | None = None,
                 on_refused: str = "none", render: Callable[[Any], str] | None = None, name: str | None = None, down_weight: float = 0.5, **options: Any):
        if reward not in ("clean", "counterfactual"):
            raise InvalidArgument(f"reward: expected clean or counterfactual, found {reward!r}")
        if on_error not in ON_ERROR:
            raise InvalidArgument(f"on_error: expected wait, raise or none, found {on_error!r}")
        if on_refused not in ("none", "raise"):
            raise InvalidArgument(f"on_refused: expected none or raise, found {on_refused!r}")
        self.reward, self.on_error, self.on_refused = reward, on_error, on_refused
        self.actions = None if actions is None else {rule: action_name(a) for rule, a in actions.items()}
        self.timeout = ON_ERROR[on_error] if timeout is None else timeout
        self.down_weight = down_weight
        self.named = _Named(run, num_generations, attempt, render)
        options.setdefault("producer", f"trl-{rank_and_world()[0]}")
        self.client = AsyncClient(addr, run=run, timeout=self.timeout, **options)
        self._begin(name or ("spurion_counterfactual" if reward == "counterfactual" else "spurion"))

    def _begin(self, name: str) -> None:
        # what inspect.iscoroutinefunction looks at, so that trainers that ask it (TRL before 1.16) see an async function
        self.__name__ = self.__qualname__ = name
        call = type(self).__call__
        self.__code__, self.__defaults__, self.__kwdefaults__ = call.__code__, call.__defaults__, call.__kwdefaults__
        self.last: Verdicts | None = None
        self.failed = 0
        self._warned = 0.0

    def __getstate__(self) -> dict[str, Any]:
        skip = ("__code__", "__defaults__", "__kwdefaults__", "last")
        return {k: v for k, v in self.__dict__.items() if k not in skip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin(state["__name__"])

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, *, trainer_state: Any = None,
                       log_extra: Any = None, log_metric: Any = None, **columns: Any) -> list[float | None]:
        rollouts = self.named.rollouts(prompts, completions, _step_of(trainer_state, 0))
        shaped: Shaped | None = None
        try:
            verdicts = await self.client.score(rollouts, timeout=self.timeout, on_error="return")
            if verdicts.refused and self.on_refused == "raise":
                raise RolloutError(verdicts.refused)
            for refused in verdicts.refused:
                self._warn(f"no reward for rollout {'/'.join(map(str, refused[:4]))}: {refused[4]}: {refused[5]}")
            shaped = shape(verdicts, self.actions, weight=self.down_weight, base=self.reward)
            self.last = verdicts
            out = shaped.to_list()
        except (Unavailable, Timeout, ServerBusy) as e:
            first = rollouts[0]
            text = f"no reward for {len(rollouts)} rollouts from {first['run']}/{first['step']}/{first['group']}/{first['id']} on: {e}"
            if self.on_error != "none":
                raise type(e)(text, e.code, e.retry_after_ms) from e
            self._warn(text)
            verdicts, out = Verdicts(), [None] * len(rollouts)
        self.failed += sum(x is None for x in out)
        self._report(verdicts, shaped, len(rollouts), log_extra, log_metric)
        return out

    def _warn(self, text: str) -> None:
        if time.monotonic() - self._warned > 1:
            log.warning(text)
        self._warned = time.monotonic()

    def _report(self, verdicts: Verdicts, shaped: Shaped | None, n: int, log_extra: Any, log_metric: Any) -> None:
        """The same keys at every call and on every rank; what is missing is 0 beside spurion/unscored, because loggers break on NaN."""
        good = [v for v in verdicts if not v.error]
        if log_metric is not None:
            share = 1 / max(len(good), 1)
            log_metric("spurion/flagged", share * sum(bool(v.flags) for v in good))
            log_metric("spurion/effect", share * sum(v.effect or 0.0 for v in good))
            log_metric("spurion/counterfactual_reward", share * sum(v.counterfactual_reward or 0.0 for v in good))
            log_metric("spurion/advantage_flips", share * sum(bool(v.advantage_flip) for v in good))
            log_metric("spurion/unscored", 1.0 - len(good) / max(n, 1))
        if log_extra is not None:
            rows = list(verdicts) if len(verdicts) == n else [None] * n
            log_extra("spurion_effect", [v.effect if v else None for v in rows])
            log_extra("spurion_counterfactual", [v.counterfactual_reward if v else None for v in rows])
            log_extra("spurion_flags", [",".join(v.rules) if v else "" for v in rows])
            log_extra("spurion_action", shaped.actions if shaped else ["none"] * n)

    def step_end(self, step: int) -> None:
        """Tells the daemon that this process is done with a step; never raises, never waits long."""
        if self._stepper is None:
            self._stepper = Client(self.client._requests.rpc, run=self.named.run, producer=self.client._requests.producer, timeout=2.0)
        try:
            self._stepper.end_step(step, producer=True)
        except SpurionError as e:
            log.debug("step %d: %s", step, e)

    _stepper: Client | None = None


class SpurionTap:
    """A reward function that gives [None]*n and publishes the rollouts to be watched: training is unchanged to the last bit, and never waits.

    Put it beside your own reward functions. Options are SpurionReward's and Client's.
    """

    def __init__(self, addr: str | None = None, *, run: str, num_generations: int | None = None, attempt: int | None = None,
                 render: Callable[[Any], str] | None = None, name: str = "spurion_tap", tags: Mapping[str, Any] | None = None, **options: Any):
        self.named = _Named(run, num_generations, attempt, render)
        self.tags = dict(tags) if tags else None
        options.setdefault("producer", f"trl-{rank_and_world()[0]}")
        self.client = Client(addr, run=run, **options)
        self.__name__ = name
        self._step: int | None = None
        self._dropped = 0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, *, trainer_state: Any = None,
                 log_extra: Any = None, log_metric: Any = None, **columns: Any) -> list[None]:
        step = _step_of(trainer_state, 0)
        try:
            if self._step is not None and step > self._step:
                self.client.publish((), step_end=step - 1)
            rollouts = self.named.rollouts(prompts, completions, step)
            if self.tags:
                for r in rollouts:
                    r["tags"] = self.tags
            if not self.client.publish(rollouts):
                log.warning("tap: the ring is full, %d rollouts of step %d are dropped and counted", len(rollouts), step)
        except SpurionError as e:  # a malformed rollout: training goes on, and this is said
            self._dropped += len(prompts)
            log.warning("tap: %d rollouts of step %d not published: %s", len(prompts), step, e)
        self._step = step
        if log_metric is not None:
            s = self.client.tap.stats()
            log_metric("spurion/published", float(s.published_rollouts))
            log_metric("spurion/dropped", float(s.dropped_rollouts + self._dropped))
            log_metric("spurion/unconfirmed_bytes", float(s.ring_bytes))
        return [None] * len(prompts)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def step_end(self, step: int) -> None:
        """Everything of this step has been published; never waits."""
        if self._step is not None:
            self.client.publish((), step_end=step)
            self._step = max(self._step, step)


class SpurionCallback(_TrainerCallback):  # type: ignore[misc]  # of no type where transformers is not installed
    """Alerts of the run into the trainer's logger as spurion/* metrics, and an optional stop. Ends steps for the reward and the tap.

        trainer = GRPOTrainer(..., reward_funcs=[reward])
        SpurionCallback(run="my-run", parts=[reward]).attach(trainer)

    stop: None; "above": end training when a rate is above its rule's rate_max by the bounds that the alert carries; "any": at any alert.
    stop_rules: only for these. on_alert is called for every alert (in the training thread). Alerts come over a thread; training never waits.
    """

    def __init__(self, addr: str | None = None, *, run: str, parts: Sequence[Any] = (), stop: str | None = None,
                 stop_rules: Sequence[str] | None = None, on_alert: Callable[[Alert], None] | None = None, flush_timeout: float = 30.0,
                 **options: Any):
        if stop not in (None, "above", "any"):
            raise InvalidArgument(f"stop: expected None, above or any, found {stop!r}")
        self.client = Client(addr, run=run, **options)
        self.run, self.parts, self.stop, self.stop_rules, self.on_alert = run, list(parts), stop, stop_rules, on_alert
        self.flush_timeout = flush_timeout
        self.alerts: list[Alert] = []
        self.stopped_by: Alert | None = None
        self._new: deque[Alert] = deque()
        self._close: Callable[[], None] | None = None
        self._metrics: dict[str, float] = {"spurion/alerts": 0.0, "spurion/alerts_above": 0.0}

    def attach(self, trainer: Any) -> SpurionCallback:
        """Puts the callback before the reporters (callbacks=[…] would put it behind them, and they would not see the metrics), and tells
        the parts how many generations a group has."""
        for part in self.parts:
            part.named.namer.num_generations = part.named.namer.num_generations or getattr(trainer, "num_generations", None)
        handler = trainer.callback_handler
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._close is None:
            self._close = self.client.on_alert(self._new.append, run=self.run)

    def _drain(self) -> None:
        while self._new:
            a = self._new.popleft()
            self.alerts.append(a)
            above = a.above or a.step_above or a.kind in ("each", "trainer_reward")
            self._metrics["spurion/alerts"] += 1.0
            self._metrics["spurion/alerts_above"] += float(above)
            if a.kind == "rate":
                self._metrics[f"spurion/rate/{a.rule}"] = float(a.rate or 0.0)
                self._metrics[f"spurion/step/{a.rule}"] = float(a.step)
            log.warning("%s", a) if above else log.info("%s", a)
            if self.on_alert is not None:
                self.on_alert(a)
            wanted = self.stop_rules is None or a.rule in self.stop_rules
            if self.stopped_by is None and wanted and (self.stop == "any" or (self.stop == "above" and above)):
                self.stopped_by = a
                log.warning("training stops: %s", a)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        for part in self.parts:
            part.step_end(state.global_step - 1)
        self._drain()
        if self.stop is not None and _agree(self.stopped_by is not None):
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._drain()
        if logs is not None and state.is_world_process_zero:
            logs.update(self._metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in self.parts:
            part.step_end(state.global_step)
            if isinstance(part, SpurionTap):
                try:
                    part.client.leave(self.flush_timeout)
                except SpurionError as e:
                    log.warning("tap: %s", e)
        self._drain()
        if self._close is not None:
            self._close()
            self._close = None


def _agree(mine: bool) -> bool:
    """Whether any rank says so: all of them must stop at the same step."""
    import sys

    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return mine
    import torch

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([float(mine)], device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())


def reward_model(addr: str | None = None, *, run: str, response_length: int, reward: str = "clean", attempt: int | None = None,
                 timeout: float = ON_ERROR["wait"], **options: Any) -> Any:
    """A reward-model object for trainers that take only a model (TRL's PPO, until it was removed): what trl.experimental.utils.get_reward calls. Its
    calls are counted as steps.

    The trainer's ids go to the daemon as they are, so the policy's tokenizer must be the reward model's. response_length: the
    trainer's own; what stands before it in a row is the prompt. Every position of a row carries the row's reward, so that it does not matter
    which one is read. Needs torch; has no parameters.
    """
    import torch

    client = Client(addr, run=run, timeout=timeout, **options)
    count = [0]

    class Backbone(torch.nn.Module):  # type: ignore[misc]
        """Sends rows of ids (B, T) to the daemon; gives (B, T, 1)."""

        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            call, rows = count[0], []
            count[0] += 1
            border = input_ids.shape[1] - response_length
            for i in range(input_ids.shape[0]):
                ids, mask = input_ids[i].tolist(), attention_mask[i].tolist()
                prompt = [t for t, keep in zip(ids[:border], mask[:border]) if keep]
                response = [t for t, keep in zip(ids[border:], mask[border:]) if keep]
                rows.append({"step": call, "group": str(i), "id": "0", "attempt": default_attempt() if attempt is None else attempt,
                             "prompt_ids": prompt, "completion_ids": response})
            verdicts = client.score(rows)
            values = verdicts.counterfactual_rewards if reward == "counterfactual" else verdicts.rewards
            out = torch.tensor(values.tolist(), device=input_ids.device)
            hidden = out[:, None, None].expand(*input_ids.shape, 1)
            return type("Output", (), {"last_hidden_state": hidden, "hidden_states": (hidden,)})()  # TRL read the second until 1.13

    class RewardModel(torch.nn.Module):  # type: ignore[misc]
        """Looks like a sequence classifier of one label to get_reward."""

        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    return RewardModel()
