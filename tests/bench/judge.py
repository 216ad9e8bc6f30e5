"""`spuriond judge` as a process that stays: rollouts in, verdicts out, wall time from the first byte written to the last verdict read."""

import fcntl
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import case

F_SETPIPE_SZ = 1031
PIPE_BYTES = 1 << 20  # the whole input at once: judge sees all groups before it forms micro-batches
FLUSH = {"run": "end of the input so far"}  # no rollout: ends the open group, and is refused


class Judge:
    """One configuration, loaded once. profile: after close(), what --profile says, over every run since the start. spent: of the last run alone."""

    def __init__(self, program: str, config: Path, name: str = "spurion"):
        self.name, self.turns, self.profile, self._last = name, 0, None, None
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([program, "judge", "--config", str(config), "--profile=each"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors, env=case.environment())
        fcntl.fcntl(self.process.stdin, F_SETPIPE_SZ, PIPE_BYTES)
        self.run([])  # answers once everything is loaded

    def run(self, rows: list[dict]) -> tuple[float, list[dict]]:
        self.turns += 1
        lines = [{**r, "run": f"bench {self.turns}"} for r in rows] + [FLUSH]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if len(data) > PIPE_BYTES:
            raise ValueError(f"expected input of at most {PIPE_BYTES} bytes, found {len(data)}")
        begin = time.perf_counter()
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells
        answers = [self.process.stdout.readline() for _ in lines]
        took = time.perf_counter() - begin
        if not answers[-1]:
            raise RuntimeError(f"spuriond judge: expected {len(lines)} lines, found its end: {self._words()}")
        self.spent = self._spent()
        verdicts = [json.loads(a) for a in answers[:-1]]
        for v in verdicts:
            if "error" in v:
                raise RuntimeError(f"spuriond judge: expected a verdict, found {v}")
        return took, verdicts

    def _spent(self) -> dict | None:
        """What --profile=each says now, less what it said after the run before: engine_s and the classes."""
        now, before = self._report(), self._last
        self._last = now or before
        return now if before is None else less(now, before)

    def _report(self) -> dict | None:
        reports = [line for line in self._words().splitlines() if line.startswith("{") and line.endswith("}}}")]
        return json.loads(reports[-1]) if reports else None

    def _words(self) -> str:
        end = os.fstat(self.errors.fileno()).st_size
        return os.pread(self.errors.fileno(), 6000, max(0, end - 6000)).decode(errors="replace")

    def close(self) -> None:
        if self.process.stdin.closed:
            return
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait(timeout=120)
        self.profile = self._report()
        self.errors.close()


def less(a: dict, b: dict) -> dict:
    """a - b, number by number."""
    return {k: less(v, b[k]) if isinstance(v, dict) else v - b[k] for k, v in a.items()}


def mean(profiles: list[dict], runs: int) -> dict:
    """The sum of profiles over so many runs."""
    def part(values):
        return {k: part([v[k] for v in values]) for k in values[0]} if isinstance(values[0], dict) else sum(values) / runs

    return part(profiles)


def rows_of(verdicts: list[dict]) -> list[dict]:
    """What is compared with the peers."""
    out = []
    for v in verdicts:
        row = {"reward": v["reward"]}
        if v["saes"] and v["saes"][0]["attribution_sum"] is not None:
            s = v["saes"][0]
            row |= {k: s[k] for k in ("attribution_sum", "error_attribution", "bias_attribution")}
            row["features"] = [f["index"] for f in v["features"]]
        out.append(row)
    return out
