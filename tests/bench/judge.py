"""`spuriond judge` as a process that stays: rollouts in, verdicts out, wall time from the first byte written to the last verdict read."""

import fcntl
import json
import subprocess
import tempfile
import time
from pathlib import Path

import case

F_SETPIPE_SZ = 1031
PIPE_BYTES = 1 << 20  # the whole input at once: judge sees all groups before it forms micro-batches
FLUSH = {"run": "end of the input so far"}  # no rollout: ends the open group, and is refused


class Judge:
    """One configuration, loaded once. profile: after close(), what --profile says, over every run since the start."""

    def __init__(self, program: str, config: Path, name: str = "spurion"):
        self.name, self.turns, self.profile = name, 0, None
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([program, "judge", "--config", str(config), "--profile"], stdin=subprocess.PIPE,
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
        verdicts = [json.loads(a) for a in answers[:-1]]
        for v in verdicts:
            if "error" in v:
                raise RuntimeError(f"spuriond judge: expected a verdict, found {v}")
        return took, verdicts

    def _words(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-3000:]

    def close(self) -> None:
        if self.process.stdin.closed:
            return
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait(timeout=120)
        reports = [line for line in self._words().splitlines() if line.startswith("{") and "engine_s" in line]
        self.profile = json.loads(reports[-1]) if reports else None
        self.errors.close()


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
