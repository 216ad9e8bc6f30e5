"""Memory and connections of a running daemon stay flat under load: the demo's policy trains run after run for SPURION_SOAK_SECONDS
(default 60). After a warm-up of a third of that time, resident size may grow by no more than RocksDB's own buffers still may."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from ports import free_port

SOURCE = pathlib.Path(os.environ["SPURION_SOURCE"])
BIN = pathlib.Path(os.environ["SPURION_BIN"])
DEMO = SOURCE / "deploy" / "demo"
SECONDS = float(os.environ.get("SPURION_SOAK_SECONDS", "60"))
GROWTH_MIB = 48  # two column families' memtables of 16 MiB that have not been full yet, and the block cache's last part


def resident_mib(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def sockets(pid):
    """Open sockets: connections that ended must not stay. Files are left out: RocksDB keeps a descriptor for every table."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            count += os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
        except FileNotFoundError:
            pass
    return count


def wait_until_ready(env, process):
    end = time.monotonic() + 60
    while subprocess.run([BIN / "spurion", "status", "--json"], env=env, capture_output=True).returncode != 0:
        assert process.poll() is None and time.monotonic() < end, "the daemon does not answer"
        time.sleep(0.05)


def publish(env, run, seed):
    policy = subprocess.Popen([sys.executable, DEMO / "make_drift.py", "--run", run, "--seed", str(seed)], stdout=subprocess.PIPE)
    done = subprocess.run([BIN / "spurion", "publish", "--run", run, "--timeout", "600"], stdin=policy.stdout, env=env, capture_output=True, text=True)
    policy.wait()
    assert done.returncode == 0, done.stderr


def test_soak_memory_and_connections_stay_flat(tmp_path):
    places = {name: f"ipc://{tmp_path}/{name.lower()}.sock" for name in ("RPC", "ROLLOUTS", "ALERTS")}
    env = os.environ | {"SPURION_" + name: url for name, url in places.items()}
    command = [BIN / "spuriond", "run", "--config", DEMO / "spurion.yaml", "--set", f"store.path={tmp_path}/store",
               "--set", f"listen.http=127.0.0.1:{free_port()}"]
    for name, url in places.items():
        command += ["--set", f"listen.{name.lower()}=[{url}]"]
    with open(tmp_path / "log", "wb") as log:
        daemon = subprocess.Popen(command, stderr=log)
    try:
        wait_until_ready(env, daemon)
        start, runs, samples = time.monotonic(), 0, []
        while time.monotonic() - start < SECONDS:
            publish(env, f"soak-{runs}", runs)
            runs += 1
            samples.append((time.monotonic() - start, resident_mib(daemon.pid), sockets(daemon.pid)))
        scored = sum(r["rollouts"] for r in map(json.loads, subprocess.run(
            [BIN / "spurion", "runs", "--jsonl"], env=env, capture_output=True, text=True, check=True).stdout.splitlines()))
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    finally:
        daemon.kill()
    warm = [s for s in samples if s[0] >= SECONDS / 3]
    growth, opened = warm[-1][1] - warm[0][1], warm[-1][2] - warm[0][2]
    print(f"{runs} runs, {scored} rollouts, {SECONDS:.0f} s: resident {samples[0][1]:.0f}, {warm[0][1]:.0f}, {warm[-1][1]:.0f} MiB, "
          f"sockets {warm[0][2]}, {warm[-1][2]}")
    assert scored == runs * 384
    assert len(warm) >= 3
    assert growth < GROWTH_MIB
    assert opened <= 4
