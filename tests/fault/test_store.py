"""The store under kill -9, power cuts, failing syncs and a full disk: nothing acknowledged is lost, nothing is there or counted twice.

Every test has a control that must fail: acknowledging early, or without sync, must be found out, or the harness proves nothing.
Rounds: SPURION_FAULT_ROUNDS (default 20 of each). A failed run keeps its directory and prints its seed.
"""
import collections
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from powercut import PowerCut

BUILD = Path(os.environ.get("SPURION_BUILD", "."))
WRITER = Path(os.environ.get("SPURION_STORE_WRITER", BUILD / "bin" / "store_writer"))
SHIM = Path(os.environ.get("SPURION_POWERCUT", BUILD / "tests" / "fault" / "libpowercut.so"))
ROUNDS = int(os.environ.get("SPURION_FAULT_ROUNDS", "20"))
SEED = int(os.environ.get("SPURION_FAULT_SEED", "20240611"))
MASK = (1 << 64) - 1
STEP_ROLLOUTS = 64
RECORD_BYTES = 200
OVERLAP = 100  # rollouts that every life sends again


def mix(k):
    k ^= k >> 33
    k = k * 0xFF51AFD7ED558CCD & MASK
    k ^= k >> 33
    k = k * 0xC4CEB9FE1A85EC53 & MASK
    return k ^ k >> 33


def run_of(k):
    return "run-b" if k // STEP_ROLLOUTS % 2 else "run-a"


def is_flagged(k):
    return mix(k) % 5 == 0


def has_effect(k):
    return mix(k) % 3 != 0


CRC32C = []
for i in range(256):
    c = i
    for _ in range(8):
        c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
    CRC32C.append(c)


def record_crc(k, size):
    if not is_flagged(k):
        return 0
    c = 0xFFFFFFFF
    for b in bytes([ord("a") + mix(k) % 26]) * size:
        c = CRC32C[(c ^ b) & 0xFF] ^ c >> 8
    return c ^ 0xFFFFFFFF


class History:
    """What the writers said, over all their lives."""

    def __init__(self):
        self.acked, self.alerts, self.puts, self.marks, self.replies, self.failed, self.refused = set(), {}, {}, [], [], [], 0
        self.highest, self.conflicts = -1, []

    def line(self, line):
        word, *rest = line.split(" ", 2)
        if word == "ack":
            first, last = int(rest[0]), int(rest[1])
            self.acked.update(range(first, last + 1))
            if last < 1 << 40:
                self.highest = max(self.highest, last)
        elif word == "alert":
            if self.alerts.setdefault(int(rest[0]), rest[1]) != rest[1]:
                self.conflicts.append(f"alert {rest[0]}: {self.alerts[int(rest[0])]} and {rest[1]}")
        elif word == "put":
            self.puts[rest[1]] = int(rest[0])
        elif word == "mark":
            self.marks.append(rest[0])
        elif word == "reply":
            self.replies.append(rest[0])
        elif word == "refused":
            self.refused += 1
        elif word == "failed":
            self.failed.append(line)


def live(history, directory, delay, env=None, arguments=(), stop=None):
    """One life of a writer: killed after delay seconds (from its start, so recovery is hit too), or when stop says so. Gives its exit code."""
    first = max(0, history.highest + 1 - OVERLAP)
    process = subprocess.Popen([WRITER, "write", directory, str(first), "--record", str(RECORD_BYTES), *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env={**os.environ, "ASAN_OPTIONS": "verify_asan_link_order=0", **(env or {})})
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout.read().split(b"\n")[:-1]))
    if stop:
        stop(process, history)
    else:
        reader.start()
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join()
    process.wait()
    for line in lines:
        history.line(line.decode())
    return process.returncode


def dump(directory, history, env=None):
    """The store's lines by their first word; {'failed': ...} when it does not open."""
    result = subprocess.run([WRITER, "dump", directory], input="".join(k + "\n" for k in history.replies), capture_output=True, text=True,
                            env={**os.environ, "ASAN_OPTIONS": "verify_asan_link_order=0", **(env or {})}, timeout=120)
    lines = collections.defaultdict(list)
    for line in result.stdout.splitlines():
        word, *rest = line.split(" ")
        lines[word].append(rest)
    if result.returncode != 0 and not lines["failed"]:
        lines["failed"].append([f"exit {result.returncode}: {result.stderr[-500:]}"])
    return lines


def check(lines, history, record_bytes=RECORD_BYTES):
    """Every way in which the store breaks its promises, in words."""
    if lines["failed"] or not lines["end"]:
        return [f"the store does not open: {lines['failed']}"]
    wrong = list(history.conflicts) + [" ".join(d) for d in lines["damaged"]] + [f for f in history.failed]
    numbers = [int(r[1]) for r in lines["row"]]
    stored = set(numbers)
    crcs = {}
    if len(stored) != len(numbers):
        wrong.append(f"{len(numbers) - len(stored)} rows stored twice")
    if history.acked - stored:
        wrong.append(f"{len(history.acked - stored)} of {len(history.acked)} acknowledged rollouts lost, e.g. {min(history.acked - stored)}")
    for run, number, step, digest, flags, size, crc in lines["row"]:
        k = int(number)
        h = mix(k)
        key = (h % 26 if is_flagged(k) else None)
        crcs.setdefault(key, record_crc(k, record_bytes))
        expected = [run_of(k), str(k // STEP_ROLLOUTS), "%02x%02x" % (h & 0xFF, h >> 8 & 0xFF), str(int(is_flagged(k))),
                    str(record_bytes if is_flagged(k) else 0), "%08x" % crcs[key]]
        if [run, step, digest, flags, size, crc] != expected:
            wrong.append(f"rollout {k}: expected {expected}, found {[run, step, digest, flags, size, crc]}")
    wrong += check_counts(lines, stored) + check_alerts(lines, stored, history) + check_inbox(lines, stored, history)
    return wrong


def check_counts(lines, stored):
    counts = collections.defaultdict(lambda: [0, 0])
    index = collections.Counter()
    for k in stored:
        run, step, flagged = run_of(k), k // STEP_ROLLOUTS, is_flagged(k)
        for key in ((run, "step", 0, step), (run, "run", 0, -1), (run, "rule", 0, step), (run, "rule-run", 0, -1), (run, "feature", mix(k) % 5, -1)):
            counts[key][0] += 1
            counts[key][1] += flagged
        index[run, "time"] += 1
        index[run, "effect"] += has_effect(k)
        index[run, "rule"] += flagged
        index[run, f"feature{mix(k) % 5}"] += 1
    found = {(run, name, int(i), int(step)): [int(scored), int(flagged)] for run, name, i, step, scored, flagged in lines["count"]}
    wrong = [f"counter {k}: expected {v}, found {found.get(k)}" for k, v in counts.items() if found.get(k) != v]
    wrong += [f"counter {k} of nothing" for k in found if k not in counts]
    for run, name, rows, damaged in lines["index"]:
        if int(rows) != index[run, name] or damaged != "0":
            wrong.append(f"index {run} {name}: expected {index[run, name]} rows, found {rows}, damaged {damaged}")
    return wrong


def check_alerts(lines, stored, history):
    wrong = []
    found = {int(n): text for n, text in lines["alert"]}
    if sorted(found) != list(range(1, len(found) + 1)):
        wrong.append(f"alerts are not numbered 1 to {len(found)}")
    twice = [t for t, n in collections.Counter(found.values()).items() if n > 1]
    if twice:
        wrong.append(f"{len(twice)} alerts stored twice, e.g. {twice[0]}")
    lost = [n for n, text in history.alerts.items() if found.get(n) != text]
    if lost:
        wrong.append(f"{len(lost)} of {len(history.alerts)} acknowledged alerts lost or changed, e.g. number {lost[0]}")
    each = {t for t in found.values() if t.startswith("each-")}
    expected = {f"each-{k}" for k in stored if is_flagged(k)}
    if each != expected:
        wrong.append(f"alerts of flagged rollouts: {len(expected - each)} missing, {len(each - expected)} of nothing")
    return wrong


def check_inbox(lines, stored, history):
    wrong = []
    inbox = [int(k) for _, k in lines["inbox"]]
    if len(set(inbox)) != len(inbox):
        wrong.append("an inbox entry is there twice")
    both = [k for k in inbox if k in stored]
    if both:
        wrong.append(f"{len(both)} rollouts judged and still in the inbox")
    lost = [k for k in history.puts if int(k) not in stored and int(k) not in set(inbox)]
    if lost:
        wrong.append(f"{len(lost)} of {len(history.puts)} accepted rollouts neither judged nor in the inbox")
    if history.marks:
        mark = lines["mark"][0][0] if lines["mark"] else None
        if mark is None or mark in history.marks[:-1]:
            wrong.append(f"producer mark: expected {history.marks[-1]} or a later one, found {mark}")
    missing = set(history.replies) - {k for k, in lines["reply"]}
    if missing:
        wrong.append(f"{len(missing)} of {len(history.replies)} replies lost")
    return wrong


@pytest.fixture
def place(request):
    """A directory that is kept when the test fails."""
    path = Path(tempfile.mkdtemp(prefix="spurion-fault-"))
    failed = request.session.testsfailed
    yield path
    if request.session.testsfailed == failed:
        shutil.rmtree(path)
    else:
        print(f"kept: {path}, seed {SEED}")


def report(name, rounds, history, extra=""):
    print(f"{name}: seed {SEED}, {rounds} rounds, {len(history.acked)} rollouts, {len(history.alerts)} alerts, {len(history.puts)} accepted {extra}")


def kill_rounds(place, rounds, arguments=(), until_wrong=False):
    random_delay = random.Random(SEED)
    history = History()
    for n in range(rounds):
        code = live(history, place / "store", random_delay.uniform(0.02, 1.0), arguments=arguments)
        assert code == -9, f"round {n}: the writer ended by itself with {code}: {history.failed}"
        if n % 5 == 4 or until_wrong or n == rounds - 1:
            wrong = check(dump(place / "store", history), history)
            if until_wrong and wrong:
                return wrong, history
            assert not wrong, f"round {n}: {wrong[:5]}"
    return [], history


def test_store_kill_loses_nothing(place):
    _, history = kill_rounds(place, ROUNDS)
    assert len(history.acked) > 50 * ROUNDS and len(history.puts) > ROUNDS
    report("kill -9", ROUNDS, history, "0 lost, 0 twice")


def test_store_kill_control_early_acknowledgement_is_caught(place):
    wrong, history = kill_rounds(place, 60, ["--ack-early"], until_wrong=True)
    assert any("lost" in w for w in wrong), "acknowledging before the commit was not caught: the harness proves nothing"


def cut_rounds(place, rounds, env, until_wrong=False):
    random_delay = random.Random(SEED + 1)
    history = History()
    (place / "disk").mkdir()
    cut = PowerCut(SHIM, place / "disk", place / "synced.log")
    dropped = 0
    for n in range(rounds):
        code = live(history, place / "disk" / "store", random_delay.uniform(0.02, 1.2), env={**cut.environment(), **env})
        if until_wrong and code != -9:
            return [f"the writer did not come up again: {history.failed}"], history, dropped
        assert code == -9, f"round {n}: the writer ended by itself with {code}: {history.failed}"
        dropped += cut.apply()[0]
        if n % 5 == 4 or until_wrong or n == rounds - 1:
            wrong = check(dump(place / "disk" / "store", history, {**cut.environment(), **env}), history)
            if until_wrong and wrong:
                return wrong, history, dropped
            assert not wrong, f"round {n}: {wrong[:5]}"
    return [], history, dropped


def test_store_power_cut_loses_nothing(place):
    _, history, dropped = cut_rounds(place, ROUNDS, {})
    assert len(history.acked) > 30 * ROUNDS
    report("power cut", ROUNDS, history, f"0 lost, 0 twice, {dropped} unsynced bytes dropped")


def test_store_power_cut_control_without_sync_loses(place):
    """The same run, not synced: it must lose, or the shim throws nothing away."""
    wrong, history, dropped = cut_rounds(place, 20, {"SPURION_STORE_SYNC": "0"}, until_wrong=True)
    assert wrong, f"nothing was lost without sync in 20 power cuts ({dropped} bytes dropped): the harness proves nothing"
    print(f"without sync: {wrong[:2]}")


def test_store_checker_sees_what_is_wrong(place):
    """The checker itself: a good store passes, and each kind of damage to its dump is named."""
    history = History()
    assert live(history, place / "store", 60, arguments=["--batches", "40"]) == 0
    good = dump(place / "store", history)
    assert check(good, history) == []

    def spoil(word, change):
        lines = collections.defaultdict(list, {k: [list(v) for v in vs] for k, vs in good.items()})
        change(lines[word])
        return check(lines, history)

    flagged = next(i for i, r in enumerate(good["row"]) if r[4] == "1")
    assert any("lost" in w for w in spoil("row", lambda rows: rows.pop()))
    assert any("twice" in w for w in spoil("row", lambda rows: rows.append(rows[0])))
    assert any("rollout" in w for w in spoil("row", lambda rows: rows[flagged].__setitem__(6, "00000000")))
    assert any("counter" in w for w in spoil("count", lambda counts: counts[3].__setitem__(4, str(int(counts[3][4]) + 1))))
    assert any("twice" in w for w in spoil("alert", lambda alerts: alerts.append([str(len(alerts) + 1), alerts[0][1]])))
    assert any("lost" in w for w in spoil("alert", lambda alerts: alerts.pop()))
    assert any("index" in w for w in spoil("index", lambda index: index[0].__setitem__(2, "0")))
    assert any("mark" in w for w in spoil("mark", lambda marks: marks.clear()))
    assert any("replies" in w for w in spoil("reply", lambda replies: replies.clear()))


def test_store_failed_sync_ends_acknowledgements(place):
    """A sync that fails once is the last: nothing is acknowledged after it on this handle, and all before it is there."""
    history = History()
    (place / "disk").mkdir()
    cut = PowerCut(SHIM, place / "disk", place / "synced.log")
    live(history, place / "disk" / "store", 60, env=cut.environment(), arguments=["--batches", "5"])
    seen = 0
    for n in (40, 41, 43, 47, 60):
        lines = subprocess.run([WRITER, "write", place / "disk" / "store", str(history.highest + 1), "--record", str(RECORD_BYTES),
                                "--batches", "300"],
                               env={**os.environ, **cut.environment(), "SPURION_SYNC_FAIL_AT": str(n), "ASAN_OPTIONS": "verify_asan_link_order=0"},
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60).stdout.splitlines()
        words = [line.split(" ")[0] for line in lines]
        for line in lines:
            if not line.startswith("failed"):
                history.line(line)
        if "ready" in words and "failed" in words:
            seen += 1
            at = words.index("failed")
            assert lines[at].startswith("failed 14 "), lines[at]
            assert words[at + 1:] == ["after"] and lines[at + 1] == "after 14", lines[at:]
        cut.apply()
        wrong = check(dump(place / "disk" / "store", history, cut.environment()), history)
        assert not wrong, f"sync {n} failed: {wrong[:5]}"
    assert seen >= 3, f"only {seen} of the failing syncs hit a commit"


FILES_THAT_ARE_NO_DATA = ("LOCK", "LOG", "OPTIONS", "IDENTITY", "SPURION")


def data_files(directory):
    return sorted(f for f in os.listdir(directory) if not f.startswith(FILES_THAT_ARE_NO_DATA) and os.path.getsize(directory / f))


def flip(path, at, bit):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def dump_flipped(place, store, history, name, at, bit):
    """What a copy of the store says with one bit of one file turned over."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(store, copy)
    flip(copy / name, at, bit)
    return dump(copy, history)


def is_loud(lines):
    return bool(lines["failed"] or lines["damaged"] or not lines["end"] or any(i[3] != "0" for i in lines["index"]))


def test_store_flipped_bits_are_never_silent(place):
    """One bit of the log, a table, the manifest: the store answers as before, or says that it is damaged."""
    rng = random.Random(SEED)
    history, store = History(), place / "store"
    assert live(history, store, 60, arguments=["--batches", "40"]) == 0
    assert live(history, store, 60, arguments=["--batches", "20"]) == 0  # now there are tables and a log
    shutil.copytree(store, place / "copy")
    good = dump(place / "copy", history)
    assert check(good, history) == []
    good = {word: rest for word, rest in good.items() if rest}
    names = data_files(store)
    kinds, loud = collections.Counter(), 0
    for _ in range(3 * ROUNDS):
        name = rng.choice(names)
        at, bit = rng.randrange(os.path.getsize(store / name)), rng.randrange(8)
        lines = dump_flipped(place, store, history, name, at, bit)
        kinds[name.rstrip("0123456789-").split(".")[-1] or name] += 1
        loud += is_loud(lines)
        assert is_loud(lines) or {word: rest for word, rest in lines.items() if rest} == good, f"{name}, byte {at}, bit {bit}: another answer, and nothing said"
    print(f"seed {SEED}: {3 * ROUNDS} bits in {dict(kinds)}: {loud} told, the rest without effect")
    assert loud > ROUNDS


def test_store_log_cut_is_told_and_its_control(place):
    """A log cut below what was synced. RocksDB takes it for a torn tail (the control: without SPURION-SYNCED it is silent)."""
    history, store = History(), place / "store"
    assert live(history, store, 60, arguments=["--batches", "10"]) == 0
    log = max(f for f in os.listdir(store) if f.endswith(".log"))
    for keep_file in (False, True):
        copy = place / f"copy-{keep_file}"
        shutil.copytree(store, copy)
        os.truncate(copy / log, os.path.getsize(copy / log) - 50)
        if not keep_file:
            os.unlink(copy / "SPURION-SYNCED")
        lines = dump(copy, history)
        if keep_file:
            assert lines["failed"] and lines["failed"][0][0] == "15", lines["failed"]
        else:
            assert not is_loud(lines) and any("lost" in w for w in check(lines, history)), "expected RocksDB to say nothing"


@pytest.fixture
def small_disk(place):
    """A file system of 256 MiB of its own."""
    path = place / "small"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", path], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def free_bytes(path):
    v = os.statvfs(path)
    return v.f_bavail * v.f_frsize


def fill(path, leave):
    with open(path / "ballast", "ab") as f:
        while free_bytes(path) > leave:
            f.write(bytes(min(1 << 20, free_bytes(path) - leave)))
            f.flush()


def read_until(process, history, words, seconds):
    """Feeds the writer's lines to the history until one begins with one of words; gives it."""
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        line = line.decode().rstrip("\n")
        history.line(line)
        if line.split(" ")[0] in words:
            return line
        assert time.monotonic() < deadline, f"none of {words} within {seconds} s; last: {line}"
    return None


def test_store_full_disk_refuses_and_comes_back(small_disk):
    history = History()
    least = 128 << 20
    process = subprocess.Popen([WRITER, "write", small_disk / "store", "0", "--record", str(RECORD_BYTES), "--min", str(least)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert read_until(process, history, ["ready", "failed"], 30) == "ready"
        for _ in range(50):
            read_until(process, history, ["ack", "failed"], 30)
        fill(small_disk, least - (1 << 20))
        line = read_until(process, history, ["refused", "failed"], 30)
        assert line.startswith("refused 8 ") and "expected" in line and "found" in line, line
        before = len(history.acked)
        os.unlink(small_disk / "ballast")
        start = time.monotonic()
        assert read_until(process, history, ["ack", "failed"], 5).startswith("ack")
        print(f"writes again {time.monotonic() - start:.2f} s after space came back")
        for _ in range(50):
            read_until(process, history, ["ack", "failed"], 30)
        assert len(history.acked) > before
    finally:
        process.kill()
        rest = process.stdout.read()
        process.wait()
    for line in rest.decode().split("\n")[:-1]:
        history.line(line)
    wrong = check(dump(small_disk / "store", history), history)
    assert not wrong, wrong[:5]


def test_store_does_not_open_on_a_full_disk(small_disk):
    """Recovery writes: space is checked before RocksDB is touched, and nothing aborts."""
    history = History()
    assert live(history, small_disk / "store", 60, arguments=["--batches", "30"]) == 0
    fill(small_disk, 4 << 20)
    result = subprocess.run([WRITER, "write", small_disk / "store", "0", "--min", str(64 << 20)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stdout.startswith("failed 8 "), (result.returncode, result.stdout)
    os.unlink(small_disk / "ballast")
    wrong = check(dump(small_disk / "store", history), history)
    assert not wrong, wrong[:5]


def test_store_full_disk_without_the_guard_loses_nothing(small_disk):
    """Losing the race for the last bytes: RocksDB may abort, but what was acknowledged is there when space is back."""
    history = History()
    fill(small_disk, 24 << 20)
    process = subprocess.Popen([WRITER, "write", small_disk / "store", "0", "--record", "60000", "--min", "1"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    lines = []
    reader = threading.Thread(target=lambda: [lines.append(line) for line in process.stdout])
    reader.start()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not any(line.startswith(b"refused") for line in lines):
        time.sleep(0.05)
    process.kill()
    process.wait()
    reader.join()
    for line in lines:
        if line.endswith(b"\n") and not line.startswith(b"failed"):
            history.line(line.decode().rstrip("\n"))
    print(f"ended with {process.returncode} after {len(history.acked)} rollouts (-6: abort)")
    assert len(history.acked) > 0
    os.unlink(small_disk / "ballast")
    wrong = check(dump(small_disk / "store", history), history, 60000)
    assert not wrong, wrong[:5]
