"""A trainer process for the tests: publishes groups step by step over the tap, fills what was missed, survives restarts of the daemon.

usage: publisher.py SOURCE RPC TAP RUN NAME STEPS GROUPS MEMBERS RING SEED [STOP]. Prints one JSON line: what it sent, and what was lost.
Three of ten messages are kept back on purpose, so that Sync and the ring matter. With a file STOP it ends after the step in which that
file appears, at the latest after STEPS steps.
"""
import json
import os
import random
import sys
import time

import daemon
import wire


def connect(url, m, deadline):
    while True:
        try:
            return wire.Rpc(url, m, 10.0)
        except (OSError, ConnectionError):
            assert time.monotonic() < deadline, "daemon stays away"
            time.sleep(0.02)


def dial(p, url, deadline):
    while True:
        try:
            p.redial(url)
            return
        except (OSError, ConnectionError):
            assert time.monotonic() < deadline, "daemon stays away"
            time.sleep(0.02)


def synced(p, rpc_url, tap_url, closing, m, deadline):
    """Sync until everything up to here is stored or counted as lost; through restarts."""
    while True:
        try:
            r = p.sync(closing)
            if r.stored_through >= p.sequence:
                return r
            time.sleep(0.01)
        except wire.Error as e:
            if e.code not in (8, 14):
                raise
            time.sleep(0.02)
        except (OSError, ConnectionError):
            p.rpc.close()
            p.rpc = connect(rpc_url, m, deadline)
            dial(p, tap_url, deadline)
        assert time.monotonic() < deadline, "not stored in time"


def main():
    source, rpc_url, tap_url, run, name = sys.argv[1:6]
    steps, groups, members, ring, seed = map(int, sys.argv[6:11])
    m = wire.load_messages(source)
    deadline = time.monotonic() + 240
    rng = random.Random(seed)
    rpc = connect(rpc_url, m, deadline)
    p = wire.Publisher(tap_url, rpc, run, name, epoch=seed + 1, ring=ring)
    synced(p, rpc_url, tap_url, False, m, deadline)  # READY
    sent, step = 0, 0
    stop = sys.argv[11] if len(sys.argv) > 11 else None
    for step in range(steps):
        if stop and os.path.exists(stop):
            steps = step
            break
        for g in range(groups):
            group = f"{name}-s{step}-g{g}"
            members_of = [daemon.short(m, run, step, group, i, group_size=members) for i in range(members)]
            cut = rng.randint(1, members) if members > 1 else members
            for part in (members_of[:cut], members_of[cut:]):
                if part:
                    p.tap(part, send=rng.random() > 0.3)  # some never reach the wire: only Sync finds them
                    sent += len(part)
        p.tap(step_end=step, send=rng.random() > 0.3)
        if ring >= 1 << 20:
            synced(p, rpc_url, tap_url, False, m, deadline)
    r = synced(p, rpc_url, tap_url, True, m, deadline)
    print(json.dumps({"name": name, "steps": steps, "sent": sent, "feared": sum(p.lost.values()), "lost": r.lost_rollouts}))


main()
