"""Puts calls of one rollout each together: trainers that ask one by one from many threads or coroutines get one Score for many."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from typing import Any

from .client import Client
from .errors import RolloutError, SpurionError
from .results import Verdict


class Batcher:
    """score(rollout) gives a Future of its Verdict. A thread of its own sends what came within wait seconds, at most size at once.

    A refused rollout's future raises RolloutError; where the call fails, all of its futures raise that. After fork it begins anew.
    """

    def __init__(self, client: Client, wait: float = 0.005, size: int = 256):
        self._client, self._wait, self._size = client, wait, size
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Condition()
        self._held: list[tuple[dict[str, Any], Future[Verdict]]] = []
        self._threads = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_client": self._client, "_wait": self._wait, "_size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def score(self, rollout: dict[str, Any]) -> Future[Verdict]:
        """Hands a rollout over; returns at once."""
        if self._pid != os.getpid():
            self._begin()
        future: Future[Verdict] = Future()
        with self._lock:
            self._held.append((rollout, future))
            if self._threads < 2:  # one sends while the other collects
                self._threads += 1
                threading.Thread(target=self._loop, name="spurion-batch", daemon=True).start()
            self._lock.notify()
        return future

    def _loop(self) -> None:
        while True:
            with self._lock:
                end = time.monotonic() + 5
                while not self._held:
                    left = end - time.monotonic()
                    if left <= 0:
                        self._threads -= 1
                        return
                    self._lock.wait(left)
            time.sleep(self._wait)
            with self._lock:
                taken, self._held = self._held[:self._size], self._held[self._size:]
            if taken:
                self._send(taken)

    def _send(self, taken: list[tuple[dict[str, Any], Future[Verdict]]]) -> None:
        try:
            verdicts = self._client.score([r for r, _ in taken], on_error="return")
        except SpurionError as e:
            for r, future in taken:
                text = f"no reward for rollout {r.get('run', self._client.run)}/{r['step']}/{r['group']}/{r['id']}: {e}"
                future.set_exception(type(e)(text, e.code, e.retry_after_ms) if type(e) is not RolloutError else e)
            return
        except Exception as e:  # noqa: BLE001: nobody may wait for ever
            for _, future in taken:
                future.set_exception(e)
            return
        for (_, future), v in zip(taken, verdicts):
            if v.error:
                future.set_exception(RolloutError([(*v.key[:4], *v.error)]))
            else:
                future.set_result(v)
