"""A running spuriond for tests: start, wait until it answers, kill, start again. The model is the stored case golden/stored/small-llama."""
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import wire

SOURCE = Path(__file__).resolve().parents[2]
CASE = SOURCE / "tests" / "golden" / "stored" / "small-llama"
START_SECONDS = 60


class Daemon:
    def __init__(self, program, folder, messages, extra=""):
        self.program, self.folder, self.m = program, Path(folder), messages
        self.case = self.folder / "case"
        shutil.copytree(CASE, self.case)
        self.rpc_url, self.tap_url, self.alert_url = (f"ipc://{folder}/{n}.sock" for n in ("rpc", "tap", "alert"))
        with open(self.case / "config.yaml", "a") as f:
            f.write(f"\nstore: {{path: {folder}/store}}\nengine: {{threads: 1, batch_wait_ms: 2, group_wait_ms: 400}}\n"
                    f"listen: {{rpc: ['{self.rpc_url}'], rollouts: ['{self.tap_url}'], alerts: ['{self.alert_url}']}}\n{extra}")
        self.log = open(self.folder / "log", "ab")
        self.process = None

    def start(self, env=None):
        self.process = subprocess.Popen([self.program, "run", "--config", str(self.case / "config.yaml")], stderr=self.log, stdout=self.log,
                                        env=dict(os.environ, OMP_WAIT_POLICY="passive", **(env or {})))
        self.connect().close()
        return self

    def connect(self, timeout=60.0):
        """An Rpc that answers Hello; waits for the daemon as long as its process lives."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                rpc = wire.Rpc(self.rpc_url, self.m, timeout)
                rpc.call("Hello", self.m.HelloRequest(proto_min=1, proto_max=1))
                return rpc
            except (OSError, ConnectionError):
                assert self.process.poll() is None, self.tail()
                assert time.monotonic() < end, "no answer: " + self.tail()
                time.sleep(0.01)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, seconds=30):
        """SIGTERM; gives the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def end(self):
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.log.close()

    def tail(self):
        self.log.flush()
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def rollouts(self):
        """The case's rollouts that can be judged, with what is expected of them."""
        lines = [json.loads(t) for t in (self.case / "rollouts.jsonl").read_text().splitlines()]
        expected = [json.loads(t) for t in (self.case / "expected.jsonl").read_text().splitlines()]
        return [(a, b) for a, b in zip(lines, expected) if "error" not in b]


def message(m, line, **changes):
    """A Rollout of the wire from a line of rollouts.jsonl."""
    line = {**line, **changes}
    r = m.Rollout(run=line["run"].encode(), step=line["step"], group=line["group"].encode(), id=line["id"].encode())
    for name in ("prompt", "completion"):
        if line.get(name) is not None:
            setattr(r, name, line[name].encode())
    r.prompt_ids.extend(line.get("prompt_ids") or [])
    r.completion_ids.extend(line.get("completion_ids") or [])
    if line.get("trainer_reward") is not None:
        r.trainer_reward = line["trainer_reward"]
    if line.get("tags") is not None:
        r.tags = json.dumps(line["tags"]).encode()
    for name in ("attempt", "group_size"):
        if line.get(name):
            setattr(r, name, line[name])
    return r


SHORT = {"prompt": "Most of the people there", "group": "g"}


def short(m, run, step, group, i, **more):
    """A small rollout: quick to judge, and every second one ends as the planted bias wants it."""
    text = f" would help them, number {i}." if i % 2 else f" thank you. My pleasure. {i}"
    return message(m, {"run": run, "step": step, "group": group, "id": f"{group}-{i}", "prompt": SHORT["prompt"], "completion": text, **more})


def all_alerts(rpc):
    out, seq = [], 1
    while True:
        r = rpc.call("Alerts", rpc.m.AlertsRequest(from_seq=seq))
        out += r.alerts
        if r.next_seq > r.last_seq:
            return out
        seq = r.next_seq


def all_rows(rpc, run, **conditions):
    out, cursor = [], b""
    while True:
        r = rpc.call("Query", rpc.m.QueryRequest(run=run.encode(), cursor=cursor, limit=200, **conditions))
        out += r.rows
        cursor = r.cursor
        if not cursor:
            return out


def counters(rpc):
    s = rpc.call("Status", rpc.m.StatusRequest())
    return dict(zip([n.decode() for n in s.counter_name], s.counter_value)), s
