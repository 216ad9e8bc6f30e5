"""What publishing costs a trainer in Python: the time of Client.publish for 8 rollouts of 1,000 tokens (texts of 4 bytes a token; token ids as
arrays or as lists), with a daemon that takes them, one that hangs (SIGSTOP), and none. Wall clock of the calling thread, so waiting would show.
Between two calls the thread multiplies matrices for about 2 ms, as a trainer does something else: its caches are not warm for publish.

    python3 tests/bench/bench_publish.py [BATCHES] [--first]

--first: this thread goes before everything else on the machine (SCHED_FIFO; needs the right to), so that other programs do not count.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import demo  # noqa: E402
import numpy as np  # noqa: E402

ROLLOUTS, TOKENS = 8, 1000
KINDS = ("", "arrays", "lists")
WORK = np.random.default_rng(0).random((256, 256), np.float32)


def batch(step, ids):
    names = [{"step": step, "group": "g", "id": str(i), "group_size": ROLLOUTS} for i in range(ROLLOUTS)]
    if ids:
        make = np.arange if ids == "arrays" else lambda a, b: list(range(a, b))
        return [dict(n, prompt_ids=make(500, 1000), completion_ids=make(3000, 3500)) for n in names]
    return [dict(n, prompt="Why? " * (TOKENS * 2 // 5), completion="So it is. " * (TOKENS * 2 // 10)) for n in names]


def work(seconds=0.002):
    """What a trainer does in between."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        WORK @ WORK


def measure(client, what, ids, batches):
    took = []
    for i in range(batches):
        b = batch(i, ids)
        work()
        start = time.perf_counter()
        client.publish(b)
        took.append((time.perf_counter() - start) * 1e6)
    took.sort()
    print(f"{what:28} 10% {took[batches // 10]:7.1f} us  median {statistics.median(took):7.1f} us  90% {took[batches * 9 // 10]:7.1f} us  99% {took[batches * 99 // 100]:7.1f} us  "
          f"largest {took[-1]:8.1f} us", flush=True)


def main():
    words = sys.argv[1:]
    first = "--first" in words
    batches = next((int(w) for w in words if w.isdigit()), 300)
    from spurion import Client

    with tempfile.TemporaryDirectory() as folder:
        d = demo.Demo(folder, "engine.threads=1").start()
        try:
            if first:
                os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            print(f"{batches} batches of {ROLLOUTS} rollouts of {TOKENS} tokens")
            for ids in KINDS:
                with Client(**d.addresses, run="bench", producer=f"p{ids}", ring_bytes=256 << 20) as c:
                    c.tap.ready(30)
                    measure(c, f"{ids or 'texts'}, taken", ids, batches)
            d.pause()
            for ids in KINDS:
                with Client(**d.addresses, run="bench", producer=f"h{ids}", ring_bytes=256 << 20) as c:
                    measure(c, f"{ids or 'texts'}, the daemon hangs", ids, batches)
            d.resume()
            d.kill()
            for ids in KINDS:
                with Client(**d.addresses, run="bench", producer=f"d{ids}", ring_bytes=256 << 20) as c:
                    measure(c, f"{ids or 'texts'}, no daemon", ids, batches)
        finally:
            d.end()


if __name__ == "__main__":
    main()
