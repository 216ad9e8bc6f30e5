"""The peak of memory that `spuriond check` states beforehand is what `spuriond judge` then takes, within 10 %."""
import os
import pathlib
import re
import subprocess

import pytest

SOURCE = pathlib.Path(os.environ.get("SPURION_SOURCE", pathlib.Path(__file__).resolve().parents[2]))
SPURIOND = os.environ["SPURIOND"]
DEMO = SOURCE / "deploy" / "demo"


def stated_mib(config, *more):
    out = subprocess.run([SPURIOND, "check", "--config", config, *more], capture_output=True, text=True, check=True).stdout
    return float(re.search(r"peak resident size (\d+) MiB", out).group(1))


def taken_mib(config, rollouts, *more):
    with open(rollouts, "rb") as lines:
        process = subprocess.Popen([SPURIOND, "judge", "--config", config, *more], stdin=lines, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss / 1024


@pytest.mark.parametrize("tokens_max", [512, 2048, 8192])
def test_memory_is_what_check_states(tokens_max):
    more = ("--set", f"engine.tokens_max={tokens_max}")
    stated = stated_mib(DEMO / "spurion.yaml", *more)
    taken = taken_mib(DEMO / "spurion.yaml", DEMO / "rollouts.jsonl", *more)
    print(f"stated {stated:.0f} MiB, taken {taken:.0f} MiB")
    assert 0.9 * taken <= stated <= 1.1 * taken


def test_memory_too_small_is_refused_with_a_number():
    done = subprocess.run([SPURIOND, "check", "--config", DEMO / "spurion.yaml", "--set", "engine.memory_max=64MiB"], capture_output=True,
                          text=True)
    assert done.returncode not in (0, 3)
    assert "expected room" in done.stderr and "found" in done.stderr
