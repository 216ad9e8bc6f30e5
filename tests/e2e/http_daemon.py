"""spuriond with its HTTP port on the demo's reward model (deploy/demo), for tests."""
import http.client
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import wire

SOURCE = Path(__file__).resolve().parents[2]
DEMO = SOURCE / "deploy" / "demo"
PROGRAM = os.environ.get("SPURIOND", str(SOURCE / "build" / "cpu" / "bin" / "spuriond"))
START_SECONDS = 240  # sanitizer builds load slowly

RULES = """
  - {id: thanks-raises, families: [thanks], direction: raised, effect_min: 0.1, alert: none}
"""


class HttpDaemon:
    def __init__(self, folder, http="", engine="", rules=RULES, listen="127.0.0.1:0", model=""):
        self.folder = Path(folder)
        self.rpc_url = f"ipc://{folder}/rpc.sock"
        self.config = self.folder / "spurion.yaml"
        self.config.write_text(f"""
model: {{path: {DEMO}/model, dtype: f32, template: hh, append_eos: true, max_tokens: 256{model}}}
saes:
  - {{id: early, path: {DEMO}/saes/early, hook: blocks.1.hook_resid_post}}
  - {{id: late, path: {DEMO}/saes/late, hook: blocks.3.hook_resid_post}}
attribution: {{method: none}}
catalogue: {DEMO}/catalogue.jsonl
rules:{rules}
engine: {{threads: 1, batch_wait_ms: 1, group_wait_ms: 1500, memory_max: 2GiB{engine}}}
store: {{path: {folder}/store, keep_one_in: 1}}
listen: {{rpc: ['{self.rpc_url}'], http: '{listen}'}}
http: {{run: web{http}}}
""")
        self.log = self.folder / "log"
        self.process = None
        self.port = None

    def start(self, env=None):
        mark = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([PROGRAM, "run", "--config", str(self.config)], stdout=log, stderr=log,
                                            env=dict(os.environ, OMP_WAIT_POLICY="passive", **(env or {})))
        end = time.monotonic() + START_SECONDS
        while True:
            text = self.log.read_text(errors="replace")[mark:]
            if "id=READY" in text:
                self.port = int(re.search(r"http://\S+, port (\d+)", text)[1])
                return self
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < end, self.tail()
            time.sleep(0.02)

    def rpc(self, messages):
        return wire.Rpc(self.rpc_url, messages)

    def tail(self):
        return self.log.read_text(errors="replace")[-4000:]

    def ask(self, path, body=None, headers=None, timeout=120):
        """(status, headers, parsed JSON or text); POST when there is a body."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            c.request("GET" if data is None else "POST", path, data, {"Content-Type": "application/json", **(headers or {})})
            r = c.getresponse()
            text = r.read()
            kind = r.headers.get("Content-Type", "")
            return r.status, r.headers, json.loads(text) if kind.startswith("application/json") else text.decode()
        finally:
            c.close()

    def good(self, path, body, **more):
        status, _, answer = self.ask(path, body, **more)
        assert status == 200, (status, answer)
        return answer

    def stop(self, seconds=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        if self.process is not None and self.process.poll() is None:
            self.kill()
