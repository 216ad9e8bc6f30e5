"""What publishing costs a trainer in Python: the time of Client.publish for 8 rollouts of 1,000 tokens (texts of 4 bytes a token; token ids as
arrays or as lists), with a daemon that takes them, one that hangs (SIGSTOP), and none. Wall clock of the calling thread, so waiting would show.

    python3 tests/bench/bench_publish.py [BATCHES]
"""
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


def batch(step, ids):
    names = [{"step": step, "group": "g", "id": str(i), "group_size": ROLLOUTS} for i in range(ROLLOUTS)]
    if ids:
        make = np.arange if ids == "arrays" else lambda a, b: list(range(a, b))
        return [dict(n, prompt_ids=make(500, 1000), completion_ids=make(3000, 3500)) for n in names]
    return [dict(n, prompt="Why? " * (TOKENS * 2 // 5), completion="So it is. " * (TOKENS * 2 // 10)) for n in names]


def measure(client, what, ids, batches):
    ready = [batch(i, ids) for i in range(batches)]
    took = []
    for b in ready:
        start = time.perf_counter()
        client.publish(b)
        took.append((time.perf_counter() - start) * 1e6)
        time.sleep(0.002)  # a trainer does something else in between
    took.sort()
    print(f"{what:28} median {statistics.median(took):7.1f} us  90% {took[batches * 9 // 10]:7.1f} us  99% {took[batches * 99 // 100]:7.1f} us  "
          f"largest {took[-1]:8.1f} us", flush=True)


def main():
    batches = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    from spurion import Client

    with tempfile.TemporaryDirectory() as folder:
        d = demo.Demo(folder, "engine.threads=1").start()
        try:
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
