#!/usr/bin/env python3
"""The outside judge: `reference.py --config C [--tokens] < rollouts.jsonl > verdicts.jsonl`.

PyTorch, transformers, sae_lens, dictionary_learning and tokenizers, one rollout at a time. Exit status: 0 all judged, 3 some refused.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent))


def shortest(value):
    """float32 values with the fewest digits that read back as the same float32."""
    import numpy as np

    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, list):
        return [shortest(v) for v in value]
    if isinstance(value, dict):
        return {k: v if k in ("explain", "step") else shortest(v) for k, v in value.items()}
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--tokens", action="store_true", help="per-token attributions, as in spuriond judge")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f64"), help="instead of model.dtype")
    parser.add_argument("--explain", action="store_true", help="add margins of decisions, for compare.py")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    from ref.config import read_config
    from ref.judge import Judge, read_lines, seed_torch

    seed_torch(args.threads)
    judge = Judge(read_config(args.config), tokens=args.tokens, dtype=args.dtype, explain=args.explain)
    verdicts = judge.run(read_lines(sys.stdin.buffer.read()))
    for verdict in verdicts:
        print(json.dumps(shortest(verdict), ensure_ascii=False))
    return 3 if any("error" in v for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
