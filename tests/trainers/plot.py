"""The picture of docs/guides/experiment.md from what learn_hack.py wrote: python3 tests/trainers/plot.py FOLDER OUT.png"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# blue and orange stay apart for colour-blind readers; line styles say it again
LOOK = {"clean": ("#e66101", "-", "the reward"), "counterfactual": ("#4393c3", "-", "counterfactual reward, catalogue_wide"),
        "uncatalogued": ("#555555", ":", "counterfactual, the hack not in the catalogue"),
        "shipped": ("#7b3294", "--", "counterfactual, the demo's own catalogue (removes a part)")}


def main(folder, out):
    runs = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("*.json"))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.8), constrained_layout=True)
    named = set()
    for r in sorted(runs, key=lambda r: list(LOOK).index(r["variant"])):
        colour, style, label = LOOK[r["variant"]]
        steps = range(len(r["hack"]))
        left.plot(steps, r["hack"], color=colour, ls=style, lw=1.8, label=None if label in named else label)
        named.add(label)
        if r["alert_step"] is not None:
            left.plot([r["alert_step"]], [r["hack"][r["alert_step"]]], "v", color="black", ms=8, label=None if "a" in named else "first alert above rate_max")
            named.add("a")
        if r["variant"] in ("clean", "counterfactual"):
            first = r["seed"] == 1
            right.plot(steps, r["reward"], color=colour, ls="-", lw=1.6, label=f"reward, trained on {label}" if first else None)
            right.plot(steps, r["true_reward"], color=colour, ls="--", lw=1.6, label=f"true reward, trained on {label}" if first else None)
    left.axhline(0.2, color="#999999", lw=0.8)
    left.set(xlabel="GRPO step (64 completions each)", ylabel="share that closes with the hack", ylim=(0, 1), title="the planted hack")
    right.set(xlabel="GRPO step", ylabel="mean reward", title="reward, and the same without the closing (true reward)")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:3])
