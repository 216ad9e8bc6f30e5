"""Exports of a run: Parquet with the evidence, and completions as TRL writes them. Needs pyarrow.

    spurion-export my-run -o my-run.parquet
    spurion-export my-run --trl completions/

Rollouts that were not kept whole (docs/store.md: flagged ones and one in 64 of the rest are) have no texts and no features; they are
rows with nulls in the Parquet file, and left out of the completions. datasets.load_dataset("parquet", data_files="my-run.parquet") reads both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._rollout import Rollout
from .analysis import columns_of
from .client import Client
from .errors import SpurionError
from .results import Record, Row, Verdict

SCHEMA_VERSION = 1


def _bare(r: Row) -> Record:
    """What a row says of a rollout that was not kept whole."""
    v = Verdict(r.run, r.step, r.group, r.id, r.attempt, r.reward, r.counterfactual_reward, r.effect, r.effect_sd, r.advantage,
                r.counterfactual_advantage, r.advantage_flip, warnings=r.warnings)
    return Record(Rollout(run=r.run, step=r.step, group=r.group, id=r.id, attempt=r.attempt), v, r.time_ms)


def records(client: Client, run: str, *, whole_only: bool = False, **where: Any) -> list[Record]:
    """Every rollout of a run (or those of the conditions of Client.query), with what is stored of it."""
    rows = client.query(run, **where)
    return [client.get(*r.key) if r.whole else _bare(r) for r in rows if r.whole or not whole_only]


def to_arrow(found: Sequence[Record]) -> Any:
    """A pyarrow.Table with a fixed schema, also when there are no rows."""
    import pyarrow as pa

    text, f32 = pa.string(), pa.float32()
    flag = pa.struct([("rule", text), ("effect", f32)])
    feature = pa.struct([("sae", text), ("index", pa.int32()), ("label", text), ("activation_max", f32), ("attribution", f32),
                         ("ablation_effect", f32)])
    types = {"step": pa.int64(), "attempt": pa.int32(), "advantage_flip": pa.bool_(), "scored_position": pa.int32(), "token_count": pa.int32(),
             "truncated": pa.bool_(), "warnings": pa.list_(text), "flags": pa.list_(flag), "top_features": pa.list_(feature), "time_ms": pa.int64()}
    words = ("run_id", "group_id", "rollout_id", "prompt", "completion", "provenance")
    columns = columns_of(found)
    arrays = {n: pa.array(v, type=types.get(n, text if n in words else f32)) for n, v in columns.items()}
    return pa.table(arrays).replace_schema_metadata({"spurion.schema_version": str(SCHEMA_VERSION)})


def write_parquet(client: Client, run: str, path: str | Path, **where: Any) -> int:
    """Writes the run; how many rollouts."""
    import pyarrow.parquet as pq

    table = to_arrow(records(client, run, **where))
    pq.write_table(table, str(path))
    return int(table.num_rows)


def write_completions(client: Client, run: str, folder: str | Path, **where: Any) -> int:
    """completions_{step:05d}.parquet for each step, with TRL's columns (step, prompt, completion, rewards, advantage) and ours; how many rollouts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    steps: dict[int, list[Record]] = {}
    for x in records(client, run, whole_only=True, **where):
        steps.setdefault(x.verdict.step, []).append(x)
    for step, found in steps.items():
        v = [x.verdict for x in found]
        table = pa.table({"step": pa.array([str(step)] * len(found)), "prompt": pa.array([x.rollout.prompt for x in found], pa.string()),
                          "completion": pa.array([x.rollout.completion for x in found], pa.string()),
                          "spurion": pa.array([x.reward for x in v], pa.float32()),
                          "spurion_counterfactual": pa.array([x.counterfactual_reward for x in v], pa.float32()),
                          "spurion_effect": pa.array([x.effect for x in v], pa.float32()),
                          "spurion_flags": pa.array([",".join(x.rules) for x in v], pa.string()),
                          "advantage": pa.array([x.advantage for x in v], pa.float32())})
        pq.write_table(table, str(out / f"completions_{step:05d}.parquet"))
    return sum(map(len, steps.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """The command spurion-export. Exit status: 0 done, 1 nothing found, 64 usage, 69 no daemon."""
    p = argparse.ArgumentParser(prog="spurion-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("-o", "--out", help="a Parquet file")
    p.add_argument("--trl", metavar="FOLDER", help="completions as TRL writes them")
    p.add_argument("--rpc", help="address of the daemon (SPURION_RPC)")
    p.add_argument("--flagged", action="store_true", help="flagged rollouts only")
    args = p.parse_args(argv)
    if not args.out and not args.trl:
        p.error("expected -o FILE or --trl FOLDER, found neither")
    where = {"flagged": True} if args.flagged else {}
    try:
        with Client(args.rpc) as c:
            c.hello(timeout=5)
            n = write_parquet(c, args.run, args.out, **where) if args.out else 0
            n = write_completions(c, args.run, args.trl, **where) if args.trl else n
    except ImportError as e:
        print(f"spurion-export: expected pyarrow (pip install 'spurion[arrow]'), found: {e}", file=sys.stderr)
        return 70
    except SpurionError as e:
        print(f"spurion-export: {e}", file=sys.stderr)
        return 69
    print(f"{n} rollouts", file=sys.stderr)
    return 0 if n else 1


if __name__ == "__main__":
    sys.exit(main())
