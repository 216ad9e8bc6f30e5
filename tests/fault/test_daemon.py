"""The whole daemon under kill -9 and power cuts: three publishers, one client that scores and submits, one that watches alerts, as real
processes, while spuriond is killed at random moments and started again. Nothing acknowledged is lost; nothing is stored, counted or
alerted twice. The same run without sync must fail.

Rounds: SPURION_FAULT_ROUNDS (default 20 of each). A failed run keeps its directory and prints its seed.
"""
import collections
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from powercut import PowerCut

SOURCE = Path(os.environ.get("SPURION_SOURCE", Path(__file__).resolve().parents[2]))
BUILD = Path(os.environ.get("SPURION_BUILD", "."))
DAEMON = Path(os.environ.get("SPURIOND", BUILD / "bin" / "spuriond"))
CLIENT = Path(os.environ.get("SPURION_FAULT_CLIENT", BUILD / "bin" / "fault_client"))
SHIM = Path(os.environ.get("SPURION_POWERCUT", BUILD / "tests" / "fault" / "libpowercut.so"))
CASE = SOURCE / "tests" / "golden" / "stored" / "small-llama"
ROUNDS = int(os.environ.get("SPURION_FAULT_ROUNDS", "20"))
SEED = int(os.environ.get("SPURION_FAULT_SEED", "20240611"))
PUBLISHERS = 3
STEP_ROLLOUTS = 12  # of one publisher; fault_client.c
LIFE_S = (0.05, 2.0)      # of a life that is ended wherever it is, recovery included
BUSY_S = (0.0, 0.5)       # of a life that is ended so long after it has acknowledged something

CONFIG = """
model: {{path: {case}/model, dtype: f32, append_eos: true}}
saes:
- {{id: std, path: {case}/saes/std, hook: blocks.0.hook_resid_post}}
- {{id: top, path: {case}/saes/top, hook: blocks.1.hook_resid_post}}
- {{id: gated, path: {case}/saes/gated, hook: blocks.1.hook_resid_post}}
catalogue: {case}/catalogue.jsonl
attribution: {{method: grad, when: flagged, top: 8}}
rules:
- {{id: single, families: [thanks], direction: raised, effect_min: 0.02, alert: each}}
- {{id: rate, families: [url], effect_min: 0.02, alert: rate}}
engine: {{threads: 1}}
store: {{path: {place}/disk/store}}
listen: {{rpc: [ipc://{place}/rpc], rollouts: [ipc://{place}/tap], alerts: [ipc://{place}/alerts]}}
"""


class Lines:
    """A process whose lines are read as they come."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([CLIENT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(line.rstrip("\n") for line in self.process.stdout), daemon=True)
        self.reader.start()
        self.errors = threading.Thread(target=self.process.stderr.read, daemon=True)
        self.errors.start()

    def wait(self, seconds):
        self.process.wait(timeout=seconds)
        self.reader.join()
        return self.process.returncode

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.reader.join()


class Daemon:
    def __init__(self, place, env):
        self.place, self.env, self.process, self.starts = place, env, None, 0

    def start(self):
        self.starts += 1
        with open(self.place / "daemon.log", "ab") as log:
            self.process = subprocess.Popen([DAEMON, "run", "--config", self.place / "config.yaml"], stdout=log, stderr=log,
                                            env={**os.environ, "ASAN_OPTIONS": "verify_asan_link_order=0", **self.env})

    def kill(self):
        """Gives how it ended: -9, or by itself with another status."""
        status = self.process.poll()
        self.process.kill()
        self.process.wait()
        return -9 if status is None else status

    def stop(self, seconds=30):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=seconds)

    def log(self):
        return (self.place / "daemon.log").read_text(errors="replace")[-3000:]


@pytest.fixture
def place(request):
    """A directory that is kept when the test fails."""
    for needed in (DAEMON, CLIENT, SHIM, CASE / "config.yaml"):
        if not needed.exists():
            pytest.skip(f"{needed} is not built")
    path = Path(tempfile.mkdtemp(prefix="spurion-fault-"))
    failed = request.session.testsfailed
    (path / "disk").mkdir()
    (path / "config.yaml").write_text(CONFIG.format(case=CASE, place=path))
    yield path
    if request.session.testsfailed == failed:
        shutil.rmtree(path)
    else:
        print(f"kept: {path}, seed {SEED}")


def dump(place):
    """The daemon's answers by their first word."""
    result = subprocess.run([CLIENT, "dump", f"ipc://{place}/rpc"], capture_output=True, text=True, timeout=300)
    lines = collections.defaultdict(list)
    for line in result.stdout.splitlines():
        word, *rest = line.split(" ")
        lines[word].append(rest)
    return lines


def words(client, word):
    return [line.split(" ")[1:] for line in client.lines if line.split(" ")[0] == word]


def check(lines, publishers, scorer, watcher):
    """Every way in which the run breaks its promises, in words."""
    if not lines["end"]:
        return [f"the daemon does not answer: {lines['failed']}"]
    wrong = [line for client in (*publishers, scorer) for line in client.lines if line.startswith("failed")]
    for i, p in enumerate(publishers):
        flushed = words(p, "flushed")
        sent = sum(int(last) - int(first) + 1 for _, first, last in words(p, "sent"))
        if not flushed or flushed[0][:3] != ["0", str(sent), "0"]:
            wrong.append(f"publisher {i}: expected everything confirmed and nothing dropped, found {p.lines[-1:]}")
    wrong += check_rows(lines, publishers, scorer) + check_counts(lines) + check_alerts(lines, publishers, watcher)
    return wrong


def confirmed_rollouts(publishers):
    """Names of the rollouts that the daemon told their publishers are durable."""
    names = set()
    for i, p in enumerate(publishers):
        through = max([int(s) for s, in words(p, "stored")], default=0)
        if any(f[0] == "0" for f in words(p, "flushed")):
            through = 1 << 62
        for sequence, first, last in words(p, "sent"):
            if int(sequence) <= through:
                names.update(f"p{i}-{n}" for n in range(int(first), int(last) + 1))
    return names


def check_rows(lines, publishers, scorer):
    wrong = []
    rows = {run: {} for run in ("tap", "score", "submit")}
    for run, step, name, reward, rules in lines["row"]:
        if name in rows[run]:
            wrong.append(f"{run}/{name} stored twice")
        rows[run][name] = (int(step), reward)
    expected = {f"p{i}-{n}": n // STEP_ROLLOUTS for i, p in enumerate(publishers) for _, first, last in words(p, "sent")
                for n in range(int(first), int(last) + 1)}
    confirmed = confirmed_rollouts(publishers)
    lost = confirmed - rows["tap"].keys()
    if lost:
        wrong.append(f"{len(lost)} of {len(confirmed)} confirmed rollouts lost, e.g. {min(lost)}")
    missing = expected.keys() - rows["tap"].keys() - lost
    if missing:
        wrong.append(f"{len(missing)} of {len(expected)} published rollouts did not arrive, e.g. {min(missing)}")
    wrong += [f"tap/{name} is nobody's" for name in rows["tap"].keys() - expected.keys()]
    wrong += [f"tap/{name}: expected step {step}, found {rows['tap'][name][0]}" for name, step in expected.items()
              if name in rows["tap"] and rows["tap"][name][0] != step]
    for name, reward in words(scorer, "scored"):
        if rows["score"].get(name, (0, None))[1] != reward:
            wrong.append(f"scored {name}: expected the reward that was answered, {reward}, found {rows['score'].get(name)}")
    lost = {name for name, in words(scorer, "submitted")} - rows["submit"].keys()
    if lost:
        wrong.append(f"{len(lost)} of {len(words(scorer, 'submitted'))} acknowledged submissions lost, e.g. {min(lost)}")
    return wrong


def check_counts(lines):
    counts = collections.defaultdict(lambda: [0, 0])
    for run, step, _, _, rules in lines["row"]:
        flags = [] if rules == "-" else rules.split(",")
        counts[run, "step", int(step)][0] += 1
        counts[run, "step", int(step)][1] += bool(flags)
        for rule in ("single", "rate"):
            counts[run, rule, int(step)][0] += 1
            counts[run, rule, int(step)][1] += rule in flags
    found = {(run, name, int(step)): [int(scored), int(flagged)] for run, name, step, scored, flagged in lines["count"]}
    return [f"counter {k}: expected {counts.get(k)}, found {found.get(k)}" for k in counts.keys() | found.keys() if counts.get(k) != found.get(k)]


def check_alerts(lines, publishers, watcher):
    wrong = []
    closed_through = min(max([int(s) for s, in words(p, "ended")], default=-1) for p in publishers)  # StepEnd of all of them
    alerts = {int(a[0]): a[1:] for a in lines["alert"]}
    if len(alerts) != len(lines["alert"]) or sorted(alerts) != list(range(1, len(alerts) + 1)):
        wrong.append(f"{len(lines['alert'])} alerts are not numbered 1 to {len(alerts)}")
    single = collections.Counter((a[1], a[4]) for a in alerts.values() if a[0] == "2")
    expected = {(run, name) for run, _, name, _, rules in lines["row"] if "single" in rules.split(",")}
    wrong += [f"alert for {k} stored {n} times" for k, n in single.items() if n > 1]
    if single.keys() != expected:
        wrong.append(f"alerts of flagged rollouts: {len(expected - single.keys())} missing, {len(single.keys() - expected)} of nothing")
    rate = collections.Counter((a[1], int(a[2]), a[3]) for a in alerts.values() if a[0] == "1")
    wrong += [f"rate alert for {k} stored {n} times" for k, n in rate.items() if n > 1]
    flagged = {("tap", int(step), "rate") for run, name, step, _, f in lines["count"] if run == "tap" and name == "rate" and f != "0"
               and int(step) <= closed_through}
    missing = flagged - rate.keys()
    if missing:
        wrong.append(f"{len(missing)} of {len(flagged)} closed steps have no rate alert, e.g. {min(missing)}")
    seen = words(watcher, "alert")
    numbers = [int(a[0]) for a in seen]
    if len(set(numbers)) != len(numbers):
        wrong.append(f"{len(numbers) - len(set(numbers))} alerts were delivered twice")
    if set(numbers) != set(alerts):
        wrong.append(f"alerts delivered: {len(set(alerts) - set(numbers))} missing, {len(set(numbers) - set(alerts))} that are not stored")
    wrong += [f"alert {a[0]}: delivered as {a[1:]}, stored as {alerts[int(a[0])]}" for a in seen if alerts.get(int(a[0]), a[1:]) != a[1:]]
    return wrong


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def acknowledged(clients):
    return sum(line.split(" ")[0] in ("stored", "scored", "submitted") for c in clients for line in list(c.lines))


def run_rounds(place, rounds, env, cut, seed, patience=300, busy_only=False):
    """Kills the daemon `rounds` times under traffic, then lets it finish. Gives (what is wrong, figures).

    Every other life ends at a random moment after its start, the rest (busy_only: all) soon after they have acknowledged something.
    """
    rng = random.Random(seed)
    daemon = Daemon(place, env)
    steps = rounds * 6
    rpc, tap, alerts = (f"ipc://{place}/{name}" for name in ("rpc", "tap", "alerts"))
    daemon.start()
    publishers = [Lines("publish", rpc, tap, str(i), str(steps)) for i in range(PUBLISHERS)]
    scorer, watcher = Lines("score", rpc), Lines("watch", rpc, alerts)
    clients = [*publishers, scorer, watcher]
    try:
        for n in range(rounds):
            if n % 2 and not busy_only:
                time.sleep(rng.uniform(*LIFE_S))
            else:
                before = acknowledged(clients)
                progress = wait_for(lambda: acknowledged(clients) > before or daemon.process.poll() is not None, 60)
                if not progress:
                    return [f"round {n}: nothing was acknowledged for 60 s: {daemon.log()}"], {}
                time.sleep(rng.uniform(*BUSY_S))
            ended = daemon.kill()
            if ended != -9:
                return [f"round {n}: the daemon ended by itself with {ended}: {daemon.log()}"], {}
            if cut:
                cut.apply()
            daemon.start()
        before = acknowledged([scorer])  # the last life works
        wait_for(lambda: acknowledged([scorer]) > before, 60)
        for client in (*publishers, scorer):
            client.process.send_signal(signal.SIGTERM)
        late = []
        deadline = time.monotonic() + patience
        for client in (*publishers, scorer):
            try:
                client.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(f"a client did not end within {patience} s: {client.lines[-1:]}")
                client.kill()
        if daemon.process.poll() is not None:
            return [*late, f"the daemon ended by itself with {daemon.process.poll()}: {daemon.log()}"], {}
        submitted = {name for name, in words(scorer, "submitted")}
        wait_for(lambda: submitted <= {r[2] for r in dump(place)["row"] if r[0] == "submit"}, patience / 4)
        wait_for(lambda: len(words(watcher, "alert")) >= int((dump(place)["last"] or [[0]])[0][0]), patience / 4)
        time.sleep(0.5)  # one too many would come now
        lines = dump(place)
        stopped = daemon.stop()
        wrong = check(lines, publishers, scorer, watcher) + late
        if stopped != 0:
            wrong.append(f"the daemon stopped with {stopped}: {daemon.log()}")
        figures = {"rollouts": len(lines["row"]), "alerts": len(lines["alert"]), "rate alerts": sum(a[1] == "1" for a in lines["alert"]),
                   "scored": len(words(scorer, "scored")), "submitted": len(submitted),
                   "refilled batches": sum(int(words(p, "flushed")[0][4]) for p in publishers if words(p, "flushed"))}
        return wrong, figures
    finally:
        for client in clients:
            client.kill()
        if daemon.process.poll() is None:
            daemon.kill()


def test_daemon_kill_loses_nothing(place):
    wrong, figures = run_rounds(place, ROUNDS, {}, None, SEED)
    assert not wrong, wrong[:5]
    assert figures["scored"] > 0 and figures["submitted"] > 0 and figures["alerts"] > figures["rate alerts"] > 0
    print(f"kill -9: seed {SEED}, {ROUNDS} rounds, {figures}: 0 lost, 0 twice")


def test_daemon_power_cut_loses_nothing(place):
    cut = PowerCut(SHIM, place / "disk", place / "synced.log")
    wrong, figures = run_rounds(place, ROUNDS, cut.environment(), cut, SEED + 1)
    assert not wrong, wrong[:5]
    assert figures["scored"] > 0 and figures["submitted"] > 0 and figures["alerts"] > figures["rate alerts"] > 0
    print(f"power cut: seed {SEED + 1}, {ROUNDS} rounds, {figures}: 0 lost, 0 twice")


def test_daemon_power_cut_control_without_sync_loses(place):
    """The same run, not synced: it must fail, or the two above prove nothing."""
    cut = PowerCut(SHIM, place / "disk", place / "synced.log")
    wrong, _ = run_rounds(place, 6, {**cut.environment(), "SPURION_STORE_SYNC": "0"}, cut, SEED + 2, patience=20, busy_only=True)
    lost = [w for w in wrong if "lost" in w]
    assert lost, f"nothing acknowledged was lost without sync in 6 power cuts: the harness proves nothing; {wrong[:5]}"
    print(f"without sync: {lost}")
