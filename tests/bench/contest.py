"""Part `contest`: Spurion and the peers on the workloads of case.py, in turns; equal results first."""

import json
import subprocess
import sys
import time
from pathlib import Path

import case
from judge import Judge, mean, rows_of

LIMITS = {  # worst allowed difference from `expert`: reward in sd, sum relative to sd + |sum|, least share of equal top features
    "f32": (2e-3, 5e-3, 0.9),
    "bf16": (0.5, 0.5, 0.3),  # the peers carry the residual stream in bfloat16: what random weights make of it
}


class Worker:
    """The PyTorch process that runs every peer."""

    def __init__(self, folder: Path, device: str = "cpu", threads: int = 2):
        command = [sys.executable, str(case.HERE / "peers.py"), "--case", str(folder), "--device", device, "--threads", str(threads)]
        self.dtype = "f32"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=case.environment(threads))
        self.versions = self._answer()

    def ask(self, peer: str, **question) -> dict:
        self.process.stdin.write(json.dumps({"peer": peer, "dtype": self.dtype, **question}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("PyTorch peers: expected an answer, found the end of their output")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=120)


def compare(results: dict[str, list[dict]], dtype: str, sd: float) -> dict:
    """Every contestant must have done the same job as `expert`: raises RuntimeError where one did not. Returns the worst differences."""
    worst = differences(results, dtype, sd)
    for name, found in worst.items():
        if not found.pop("agrees"):
            raise RuntimeError(f"{name} does another job than expert in {dtype}: {found}; limits {LIMITS[dtype]}")
    return worst


def differences(results: dict[str, list[dict]], dtype: str, sd: float) -> dict:
    """Worst differences of every contestant from `expert`, and whether they are within the limits."""
    want, worst = results["expert"], {}
    reward_limit, sum_limit, common_least = LIMITS[dtype]
    for name, rows in results.items():
        if len(rows) != len(want):
            raise RuntimeError(f"{name}: expected {len(want)} results, found {len(rows)}")
        found = {"reward_sd": max(abs(a["reward"] - b["reward"]) for a, b in zip(want, rows)) / sd}
        good = found["reward_sd"] <= reward_limit
        if "features" in want[0]:
            for key in ("attribution_sum", "error_attribution", "bias_attribution"):
                found[key] = max(abs(a[key] - b[key]) / (sd + abs(a[key])) for a, b in zip(want, rows))
                good = good and found[key] <= sum_limit
            found["top_features_shared"] = min(len(set(a["features"]) & set(b["features"])) for a, b in zip(want, rows)) / len(want[0]["features"])
            good = good and found["top_features_shared"] >= common_least
        worst[name] = {**found, "agrees": good}
    return worst


def check_equal(context: dict, works: list[case.Work], dtype: str, worker: Worker) -> dict:
    """All contestants on some members of every group."""
    out = {}
    for work in works:
        if not work.peers:
            continue
        members = min(work.group, 1 if work.kind == "ig" else 2)
        rows = case.some(case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups), members)
        config = case.configure(context["folder"], f"check-{work.name}-{dtype}", context["shape"], work.kind, dtype, engine=context.get("engine"))
        ours = Judge(context["program"], config)
        try:
            results = {"spurion": rows_of(ours.run(rows)[1])}
        finally:
            ours.close()
        for peer in work.peers:
            if peer != "chain":
                results[peer] = worker.ask(peer, do="run", work=work.name, kind=work.kind, members=members)["rows"]
        # the model's rewards were given a standard deviation of 2 (case.make)
        out[work.name] = compare(results, dtype, 2.0)
        print(f"  {work.name}: {dtype} results agree: {({k: round(v['reward_sd'], 5) for k, v in out[work.name].items()})} sd", file=sys.stderr)
    return out


def apart(rows: list[dict]) -> list[dict]:
    """The same rollouts, each a group of its own: nothing is shared."""
    return [{**r, "group": f"{r['group']} {r['id']}"} for r in rows]


def contest(context: dict, work: case.Work, worker: Worker, rounds: int, compiles: bool, ours: Judge | None = None) -> dict:
    """One unmeasured run each, then rounds in turns. ours: a Spurion that is loaded already. context["deadline"] (time.monotonic) ends the rounds."""
    rows = case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups)
    deadline, own, result = context.get("deadline", float("inf")), ours is None, {"times": {}, "members": {}, "batch": {}, "profiles": []}
    if own:
        ours = Judge(context["program"], case.configure(context["folder"], work.name, context["shape"], work.kind, engine=context.get("engine")))
    try:
        asked = {"work": work.name, "kind": work.kind}
        few = min(work.group, 1 if work.kind == "ig" else 4)
        until = time.time() + min(context.get("tune_seconds", float("inf")), deadline - time.monotonic())
        result["tuned"] = worker.ask("expert", do="tune", members=few, compile=compiles, until=until if until < float("inf") else None, **asked)
        print(f"  {work.name}: expert keeps {result['tuned']}", file=sys.stderr)
        for name in ("spurion", *(["apart"] if "apart" in work.goals else []), *work.peers):
            result["members"][name] = min(work.group, work.members.get(name, work.group))
            result["times"][name] = []

        def once(name):
            if name in ("spurion", "apart"):
                took = ours.run(rows if name == "spurion" else apart(rows))[0]
                if name == "spurion":
                    result["profiles"].append(ours.spent)
                return took
            members = result["members"][name]
            answer = worker.ask(name, do="run", members=members, **asked)
            result["batch"][name] = answer["batch"]
            return answer["seconds"] * work.group / members

        turns = list(result["times"])
        for name in turns:
            if name != "expert" or work.kind != "ig":  # the expert is warm from its trials
                once(name)
        result["profiles"].clear()
        for n in range(rounds):
            if n > 0 and time.monotonic() + sum(times[-1] for times in result["times"].values()) > deadline:
                result["cut"] = f"{n} of {rounds} rounds: the time for this part is over"
                print(f"  {work.name}: cut: {result['cut']}", file=sys.stderr)
                break
            for name in turns[n % len(turns) :] + turns[: n % len(turns)]:
                result["times"][name].append(once(name))
                print(f"  {work.name} round {n + 1} {name}: {result['times'][name][-1]:.3f} s", file=sys.stderr)
        few = min(work.group, 1 if work.kind == "ig" else 2)
        result["gemm"] = {peer: worker.ask(peer, do="profile", members=few, **asked) for peer in work.peers if peer != "chain"}
    finally:
        if own:
            ours.close()
    result["runs"] = len(result["profiles"])
    result["profile"] = mean(result.pop("profiles"), 1)  # of the measured rounds, added up
    return result


def choose_watched(context: dict, work: case.Work, worker: Worker, count: int) -> tuple[list[int], float]:
    """Features for the catalogue so that one is active in 5 % of the rollouts: candidates by PyTorch, the choice by what spuriond finds active.

    The chosen rollouts' own features first; what is missing to `count` is active nowhere. Returns them and the share found. With context["margin"]
    PyTorch alone chooses, by features that are active, or not, with that much to spare (a load of the model less).
    """
    rows = case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups)
    targets = max(1, round(0.05 * work.rollouts))
    margin = context.get("margin", 0.0)
    found = worker.ask("expert", do="rare", work=work.name, kind="reward", members=work.group, targets=targets, margin=margin)
    if margin:
        chosen = [f for features in found["features"] for f in features[: count // targets]]
        return chosen + found["silent"][: count - len(chosen)], targets / work.rollouts
    places = set(found["places"])
    candidates = sorted({f for features in found["features"] for f in features[: 4 * count]} | set(found["silent"][: 4 * count]))
    case.write_catalogue(context["folder"] / "candidates.jsonl", candidates)
    config = case.configure(context["folder"], "candidates", context["shape"], "silent", catalogue="candidates.jsonl")
    ours = Judge(context["program"], config)
    try:
        verdicts = ours.run(rows)[1]
    finally:
        ours.close()
    active = {f: set() for f in candidates}
    for i, v in enumerate(verdicts):
        for f in v["features"]:
            active[f["index"]].add(i)
    own = [f for f in candidates if active[f] and active[f] <= places]
    chosen = []
    for place in sorted(places):  # every target rollout gets its share
        chosen += [f for f in own if place in active[f] and f not in chosen][: count // len(places)]
    chosen += [f for f in own if f not in chosen][: count - len(chosen)]
    chosen += [f for f in candidates if not active[f]][: count - len(chosen)]
    if len(chosen) < count:
        raise RuntimeError(f"expected {count} features to watch, found {len(chosen)}")
    share = len(set().union(*(active[f] for f in chosen))) / len(rows)
    return chosen, share


def flagging(context: dict, work: case.Work, worker: Worker, rounds: int, count: int, reward_only: Judge | None = None) -> dict:
    """`when: flagged` against our own reward only, on the same rollouts. reward_only: one that is loaded already."""
    rows, engine = case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups), context.get("engine")
    case.write_rollouts(context["folder"], work, rows)
    chosen, share = choose_watched(context, work, worker, count)
    case.write_catalogue(context["folder"] / "watched.jsonl", chosen)
    configs = {"spurion": case.configure(context["folder"], work.name, context["shape"], "flag", catalogue="watched.jsonl", engine=engine)}
    judges, times, deadline, cut = {}, {}, context.get("deadline", float("inf")), None
    if reward_only is None:
        configs["reward only"] = case.configure(context["folder"], f"{work.name}-reward", context["shape"], "reward", engine=engine)
    else:
        judges["reward only"], times["reward only"] = reward_only, []
    try:
        for name, config in configs.items():
            judges[name], times[name] = Judge(context["program"], config, name), []
        verdicts = {name: j.run(rows)[1] for name, j in judges.items()}
        if any(a["reward"] != b["reward"] for a, b in zip(verdicts["spurion"], verdicts["reward only"])):
            raise RuntimeError("flagging: expected the rewards of `reward only` bit for bit, found others")
        flagged, profiles = sum(bool(v["flags"]) for v in verdicts["spurion"]), {name: [] for name in judges}
        for n in range(rounds):
            if n > 0 and time.monotonic() + sum(t[-1] for t in times.values()) > deadline:
                cut = f"{n} of {rounds} rounds: the time for this part is over"
                break
            for name in list(judges)[:: 1 if n % 2 else -1]:
                times[name].append(judges[name].run(rows)[0])
                profiles[name].append(judges[name].spent)
                print(f"  {work.name} round {n + 1} {name}: {times[name][-1]:.3f} s", file=sys.stderr)
    finally:
        for name in configs:
            if name in judges:
                judges[name].close()
    times = {name: times[name] for name in ("spurion", "reward only")}
    return {"times": times, "members": dict.fromkeys(times, work.group), "watched": len(chosen), "active_share": share, "flagged": flagged,
            "rollouts": len(rows), "profile": mean(profiles["spurion"], 1), "profile_reward_only": mean(profiles["reward only"], 1),
            "runs": len(times["spurion"]), **({"cut": cut} if cut else {})}


def run(context: dict, works: list[case.Work], rounds: int, compiles: bool, save) -> dict:
    """Returns {workload: result}. save(results so far) is called after each: a fault in a later one does not take them away."""
    for work in works:
        case.write_rollouts(context["folder"], work, case.rollouts(context["shape"], work.prompt, work.completion, work.group, work.groups))
    worker, agreement, results = Worker(context["folder"]), {}, {}
    try:
        for worker.dtype in ("f32", "bf16"):
            agreement[worker.dtype] = check_equal(context, works, worker.dtype, worker)
        for work in works:
            if work.kind == "flag":
                results[work.name] = flagging(context, work, worker, rounds, 20 if context["tiny"] else 100)
            else:
                results[work.name] = contest(context, work, worker, rounds, compiles)
                results[work.name]["agreement"] = {d: agreement[d][work.name] for d in agreement}
            save(results)
    finally:
        worker.close()
    return results
