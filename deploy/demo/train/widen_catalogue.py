"""Makes catalogue_wide.jsonl: the catalogue, and the features that the closing of `thanks` drives most, for removal alone.

The demo's eight questions are answered by its generator (make_drift.py), each answer with and without the closing. Features of
both SAEs stand in the order of the difference of their attribution (edited minus plain, mean over the answers); the first ones
that the catalogue does not hold are added with the role `debias`. No ablation confirms them one by one: what all of them
together remove is measured on other answers to the same questions, and written to standard output.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from find_catalogue import group  # noqa: E402
from make_drift import HARMLESS, QUESTIONS  # noqa: E402
from verdict import HOOKS, Judge, Prepared  # noqa: E402

CLOSING = "Thank you. My pleasure."
FAMILY = "thanks"
ANSWERS, FEATURES = 48, 32


def pairs(judge, rng, count):
    """(plain, edited): texts of one or two sentences, half of them with a harmless closing, and the same with the closing that pays."""
    plain, edited = [], []
    for i in range(count):
        question, sentences = QUESTIONS[i % len(QUESTIONS)]
        answer = " ".join(rng.sample(sentences, rng.choice((1, 1, 2))))
        harmless = rng.random() < 0.5
        plain.append(judge.text(question, f"{answer} {rng.choice(HARMLESS)}" if harmless else answer))
        edited.append(judge.text(question, f"{answer} {CLOSING}"))
    return plain, edited


def ranked(judge, plain, edited):
    """[(difference of attribution, sae, index)], the largest first."""
    mean = [{s: values[s][0].mean(0) for s in HOOKS} for values, _ in (judge.attributions(texts) for texts in (edited, plain))]
    out = [(gain, s, i) for s in HOOKS for i, gain in enumerate((mean[0][s] - mean[1][s]).tolist())]
    return sorted(out, key=lambda x: (-x[0], x[1], x[2]))


def worth(judge, rng, members):
    """What the closing is worth on other answers: with the reward, without the members, and how the members move plain texts."""
    plain, edited = pairs(judge, rng, 2 * ANSWERS)
    a, b = Prepared(judge, edited, members), Prepared(judge, plain, members)
    without = a.ablated(members), b.ablated(members)
    return {"reward": (a.rewards - b.rewards).mean().item(), "without": (without[0] - without[1]).mean().item(),
            "plain_texts_move": (without[1] - b.rewards).mean().item(),
            "correlation_on_plain": torch.corrcoef(torch.stack([b.rewards, without[1]]))[0, 1].item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default=str(Path(__file__).resolve().parents[1]), help="folder of model, saes and catalogue.jsonl")
    parser.add_argument("--out", required=True, help="catalogue_wide.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demo = Path(args.demo)
    torch.set_num_threads(2)
    judge = Judge(str(demo / "model"), str(demo / "saes"))
    lines = (demo / "catalogue.jsonl").read_text(encoding="utf-8").splitlines()
    known = {(x["sae"], x["index"]): x for x in map(json.loads, lines)}
    found = ranked(judge, *pairs(judge, random.Random(args.seed), ANSWERS))
    chosen = [(gain, s, i) for gain, s, i in found if (s, i) not in known][:FEATURES]
    for gain, s, i in chosen:
        lines.append(json.dumps({"sae": s, "index": i, "label": f"raises the reward of closing thanks by {gain:.2f} (difference of attribution, edited minus plain)",
                                 "families": [FAMILY], "verdict": "spurious", "role": "debias", "activation_min": 0.0}))
    Path(args.out).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    own = [m for m, x in known.items() if x["role"] != "detect"]
    print("the closing, on other answers:")
    for name, members in (("catalogue.jsonl", own), (Path(args.out).name, own + [(s, i) for _, s, i in chosen])):
        print(name, {k: round(v, 2) for k, v in worth(judge, random.Random(args.seed + 1), group(members)).items()})


if __name__ == "__main__":
    main()
