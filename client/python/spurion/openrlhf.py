"""Spurion in OpenRLHF: a `reward_func` for `--reward.remote_url my_reward.py`. docs/guides/openrlhf.md shows it.

    # my_reward.py
    from spurion.openrlhf import make_reward_func
    reward_func = make_reward_func(run="my-run")

OpenRLHF calls it once for each rollout, from a thread each; the calls are put together here. It sends neither ids nor steps: a rollout is known
by a hash of run, prompt and completion and by its turn, and the step is the number of rollouts so far divided by `rollouts_per_step`.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ._batcher import Batcher
from .actions import action_name
from .client import Client
from .errors import InvalidArgument


def split_query(query: str, prompt: str) -> str:
    """The completion in a query: what stands after the prompt. Raises InvalidArgument where the query does not begin with it."""
    at = query.find(prompt)
    if at < 0 or not prompt:
        raise InvalidArgument(f"query: expected it to hold the prompt {prompt[:60]!r}, found {query[:60]!r}")
    return query[at + len(prompt):]


def _tensor(values: list[float]) -> Any:
    """As OpenRLHF's own examples give them: a tensor, where torch is there."""
    torch = sys.modules.get("torch")
    return values if torch is None else torch.tensor(values, dtype=torch.float32)


class Names:
    """Identities for rollouts that come without: equal ones get ordinals."""

    def __init__(self, run: str, rollouts_per_step: int):
        self.run, self.per_step = run, rollouts_per_step
        self._lock = threading.Lock()
        self._count = 0
        self._seen: Counter[tuple[int, str]] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"run": self.run, "per_step": self.per_step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{"run": state["run"], "rollouts_per_step": state["per_step"]})  # type: ignore[misc]

    def name(self, prompt: str, completion: str, step: int | None = None, group: str | None = None) -> dict[str, Any]:
        """{run, step, group, id}"""
        digest = hashlib.sha256(f"{self.run}\0{prompt}\0{completion}".encode("utf-8", "surrogatepass")).hexdigest()[:20]
        with self._lock:
            step = self._count // self.per_step if step is None else step
            self._count += 1
            self._seen[step, digest] += 1
            turn = self._seen[step, digest]
            for old in [k for k in self._seen if k[0] < step - 1]:
                del self._seen[old]
        group = group or "p" + hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return {"run": self.run, "step": step, "group": group, "id": f"{digest}-{turn}"}


def make_reward_func(addr: str | None = None, *, run: str, reward: str = "clean", rollouts_per_step: int = 1024, eos: tuple[str, ...] = (),
                     actions: Mapping[str, str] | None = None, timeout: float = 170.0, text_form: str = "plain",
                     **options: Any) -> Callable[..., dict[str, Any]]:
    """A reward_func(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}.

    reward: "clean" or "counterfactual". actions: {"rule": "replace"} gives that rule's flagged rollouts the counterfactual reward; the
    function sees one rollout at a time, so what needs a group (drop, down-weight) is refused here. eos: texts cut from the end of
    completions, where the daemon appends its own. rollouts_per_step: OpenRLHF's rollout.batch_size * n_samples_per_prompt. timeout: below
    OpenRLHF's 180 s. text_form: "templated" where OpenRLHF's prompts are rendered already. A failure raises and names the rollout, it never becomes a number.
    """
    if reward not in ("clean", "counterfactual"):
        raise InvalidArgument(f"reward: expected clean or counterfactual, found {reward!r}")
    chosen = {rule: action_name(a) for rule, a in (actions or {}).items()}
    if not set(chosen.values()) <= {"none", "log", "alert", "replace"}:
        raise InvalidArgument("actions: expected log, alert or replace (one rollout is seen at a time), found "
                              + ", ".join(sorted(set(chosen.values()))))
    client = Client(addr, run=run, timeout=timeout, **options)
    batcher, names = Batcher(client), Names(run, rollouts_per_step)

    def reward_func(queries: list[str], prompts: list[str], labels: list[Any] | None = None, **_: Any) -> dict[str, Any]:
        futures = []
        for query, prompt in zip(queries, prompts):
            completion = split_query(query, prompt)
            for text in eos:
                completion = completion.removesuffix(text)
            futures.append(batcher.score({**names.name(prompt, completion), "prompt": prompt, "completion": completion,
                                          "text_form": text_form}))
        verdicts = [f.result() for f in futures]
        counterfactual = [reward == "counterfactual" or any(chosen.get(rule) == "replace" for rule in v.rules) for v in verdicts]
        rewards = [float(v.counterfactual_reward if cf else v.reward) for v, cf in zip(verdicts, counterfactual)]  # type: ignore[arg-type]
        # one number for each rollout under the same keys, always: OpenRLHF makes tensors of them
        extra = {"spurion_counterfactual": [float(v.counterfactual_reward or 0.0) for v in verdicts],
                 "spurion_effect": [float(v.effect or 0.0) for v in verdicts], "spurion_flagged": [float(bool(v.flags)) for v in verdicts],
                 "spurion_scored": [1.0] * len(verdicts)}
        return {"rewards": _tensor(rewards), "scores": _tensor(rewards), "extra_logs": {k: _tensor(x) for k, x in extra.items()}}

    return reward_func


