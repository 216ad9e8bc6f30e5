"""A running spuriond on the demo reward model, for the Python package's tests: start, kill, start again on the same store."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("SPURION_BUILD", SOURCE / "build" / "cpu"))
PACKAGE = BUILD / "python"
sys.path.insert(0, str(PACKAGE))
BIN = BUILD / "bin"
DEMO = SOURCE / "deploy" / "demo"
START_SECONDS = 60


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Demo:
    """The daemon, its addresses and its command line. tcp: on loopback instead of unix sockets."""

    def __init__(self, folder, *settings, tcp=False, config=DEMO / "spurion.yaml"):
        self.folder, self.config = Path(folder), config
        if tcp:
            self.rpc, self.rollouts, self.alerts = (f"tcp://127.0.0.1:{free_port()}" for _ in range(3))
        else:
            self.rpc, self.rollouts, self.alerts = (f"ipc://{folder}/{n}.sock" for n in ("rpc", "tap", "alerts"))
        self.http = f"127.0.0.1:{free_port()}"
        self.settings = ["store.path=" + str(self.folder / "store"), f"listen.rpc=[{self.rpc}]", f"listen.rollouts=[{self.rollouts}]",
                         f"listen.alerts=[{self.alerts}]", f"listen.http={self.http}", *settings]
        self.process = None
        self.log = open(self.folder / "spuriond.log", "ab")

    @property
    def environment(self):
        return dict(os.environ, SPURION_RPC=self.rpc, SPURION_ROLLOUTS=self.rollouts, SPURION_ALERTS=self.alerts, OMP_WAIT_POLICY="passive")

    @property
    def addresses(self):
        """Arguments of Client."""
        return {"addr": self.rpc, "rollouts": self.rollouts, "alerts": self.alerts}

    def start(self):
        command = [str(BIN / "spuriond"), "run", "--config", str(self.config)]
        for s in self.settings:
            command += ["--set", s]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=self.environment)
        from spurion import Client, SpurionError

        end = time.monotonic() + START_SECONDS
        with Client(self.rpc) as c:
            while True:
                assert self.process.poll() is None, self.tail()
                assert time.monotonic() < end, self.tail()
                try:
                    c.hello(timeout=0.5)
                    return self
                except SpurionError:
                    time.sleep(0.05)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self):
        """It hangs: it listens, and does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def end(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self.log.close()

    def tail(self):
        self.log.flush()
        return (self.folder / "spuriond.log").read_text(errors="replace")[-3000:]

    def cli(self, *words, stdin=None, status=0):
        """The C command line, which is libspurion; gives its stdout."""
        done = subprocess.run([str(BIN / "spurion"), *words], input=stdin, capture_output=True, text=True, env=self.environment, timeout=120)
        assert done.returncode == status, done.stderr
        return done.stdout


def wait_for(what, seconds=60):
    """What `what` gives, once it is true."""
    end = time.monotonic() + seconds
    while not (got := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return got
