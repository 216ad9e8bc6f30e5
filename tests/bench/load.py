"""Part `load`: the daemon at full load against `judge`, and the latency of verdicts under Poisson arrivals. Real daemon, store, libspurion."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import case
from judge import Judge

TOKENS_MAX = 4096  # of both sides, so that a few dozen connections fill a micro-batch
START_SECONDS = 120


class Daemon:
    """`spuriond run` on a configuration, with a store and sockets in a folder of its own."""

    def __init__(self, program: str, config: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="spurion-bench."))
        self.url = f"ipc://{self.folder}/rpc.sock"
        command = [program, "run", "--config", str(config), "--set", f"store.path={self.folder}/store"]
        for name in ("rpc", "rollouts", "alerts"):
            command += ["--set", f"listen.{name}=[ipc://{self.folder}/{name}.sock]"]
        self.log = open(self.folder / "log", "wb")
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log, env=case.environment())
        end = time.monotonic() + START_SECONDS
        while not (self.folder / "rpc.sock").exists():
            if self.process.poll() is not None or time.monotonic() > end:
                words = self.words()
                self.close()
                raise RuntimeError(f"spuriond run: expected it to listen, found: {words}")
            time.sleep(0.01)

    def words(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Scene:
    """A model, a shape of rollouts, and how long to look at it."""

    def __init__(self, name: str, config: Path, vocab: int, prompt: int, completion: int, group: int, groups: int, seconds: float):
        self.name, self.config, self.vocab, self.groups, self.seconds = name, config, vocab, groups, seconds
        self.prompt, self.completion, self.group = prompt, completion, group
        self.connections = min(160, max(4, 3 * TOKENS_MAX // (prompt + group * completion)))


def bench_load(context: dict, daemon: Daemon, scene: Scene, mode: str, groups: int, rate: float, run: str) -> dict:
    command = [context["bin"] / "bench_load", daemon.url, mode, scene.connections, groups, rate, scene.prompt, scene.completion, scene.group,
               scene.vocab, 11, run]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench_load {mode}: {done.stderr[-500:]}; {daemon.words()}")
    found = json.loads(done.stdout)
    if found["refused"]:
        raise RuntimeError(f"bench_load {mode}: expected every rollout to be judged, found {found['refused']} of {found['rollouts']} refused")
    return found


def engine_rate(judge: Judge, scene: Scene, groups: int, seed: int) -> float:
    """Rollouts a second of the engine alone, by judge's own clock around it."""
    rows = case.rollouts({"vocab_size": scene.vocab}, scene.prompt, scene.completion, scene.group, groups, seed)
    part = max(1, 2 * TOKENS_MAX // (scene.prompt + scene.group * scene.completion)) * scene.group  # what fits judge's input pipe
    seconds = 0.0
    for at in range(0, len(rows), part):
        judge.run(rows[at : at + part])
        seconds += judge.spent["engine_s"]
    return len(rows) / seconds


def full_rate(found: dict, group: int) -> float:
    """Rollouts a second: the slope of answers over time. Answers of one micro-batch come together, so a quotient of counts at two of its edges
    would count one of them twice; and the time before the first answer is not the daemon's rate."""
    done = sorted(found["done"])
    return statistics.linear_regression(done, range(len(done))).slope * group


def latency(found: dict) -> dict:
    ms = sorted(1e3 * (d - a) for a, d in zip(found["arrival"], found["done"]))
    return {"groups": len(ms), "p50_ms": statistics.median(ms), "p99_ms": ms[min(len(ms) - 1, int(0.99 * len(ms)))], "max_ms": ms[-1]}


def full_load(context: dict, scene: Scene, rounds: int) -> dict:
    """Engine alone and daemon in turns, both loaded all the while: the machine's rate changes within minutes, so each round is short and has
    a share of its own."""
    out = {"engine": [], "daemon": [], "share": []}
    judge, daemon = Judge(context["program"], scene.config), Daemon(context["program"], scene.config)
    try:
        engine_rate(judge, scene, min(scene.groups, scene.connections), 1)
        bench_load(context, daemon, scene, "closed", min(scene.groups, scene.connections), 0, "warm")
        for n in range(rounds):
            turns = [lambda n=n: out["engine"].append(engine_rate(judge, scene, scene.groups, n)),
                     lambda n=n: out["daemon"].append(full_rate(bench_load(context, daemon, scene, "closed", scene.groups, 0, f"full {n}"), scene.group))]
            for turn in turns[:: -1 if n % 2 else 1]:
                turn()
            out["share"].append(out["daemon"][-1] / out["engine"][-1])
            print(f"  {scene.name} round {n + 1}: engine {out['engine'][-1]:.1f}, daemon {out['daemon'][-1]:.1f} rollouts/s", file=sys.stderr)
    finally:
        judge.close()
        daemon.close()
    return out


def look(context: dict, scene: Scene, rounds: int) -> dict:
    out = {"prompt": scene.prompt, "completion": scene.completion, "group": scene.group, "connections": scene.connections,
           "groups": scene.groups, **full_load(context, scene, rounds), "latency": {}}
    capacity = statistics.median(out["daemon"]) / scene.group
    daemon = Daemon(context["program"], scene.config)
    try:
        bench_load(context, daemon, scene, "closed", min(scene.groups, scene.connections), 0, "warm")
        for share in (0.5, 0.8):
            rate = share * capacity
            groups = max(10, int(rate * scene.seconds))
            found = bench_load(context, daemon, scene, "poisson", groups, rate, f"poisson {share}")
            out["latency"][str(share)] = {"rate": rate, **latency(found)}
            print(f"  {scene.name} at {share:.0%}: {out['latency'][str(share)]}", file=sys.stderr)
    finally:
        daemon.close()
    return out


def demo_config(context: dict) -> Path:
    """The demo's configuration with this benchmark's threads and micro-batches."""
    source = case.HERE.parents[1] / "deploy/demo"
    text = (source / "spurion.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("engine:", "store:", "listen:"))]
    text = "\n".join(lines).replace("path: model", f"path: {source}/model").replace("path: saes", f"path: {source}/saes")
    text = text.replace("catalogue: catalogue", f"catalogue: {source}/catalogue")
    path = context["folder"] / "demo.yaml"
    path.write_text(text + f"\nengine: {{threads: 2, tokens_max: {TOKENS_MAX}, memory_max: 4GiB}}\n")
    return path


def run(context: dict, rounds: int, keep) -> dict:
    """keep: called with what is done so far."""
    tiny, shape = context["tiny"], context["shape"]
    own = case.configure(context["folder"], "load", shape, "attr", tokens_max=TOKENS_MAX)
    scenes = [Scene("demo model", demo_config(context), 4096, 48, 48, 4, 20 if tiny else 500, 1 if tiny else 20)]
    if not tiny:
        scenes.append(Scene("135M", own, shape["vocab_size"], 64, 64, 4, 80, 60))
    done = {}
    for scene in scenes:
        done[scene.name] = look(context, scene, rounds)
        keep(done)
    return done
