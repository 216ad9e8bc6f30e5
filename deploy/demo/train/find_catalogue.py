"""Step 4: finds the catalogue. Nothing is typed in: features come from contrasts, and are confirmed by ablation.

1. For each family, completions of training prompts with and without the edit; candidates by the difference of
   attribution (edited minus unedited, less the same for look-alike controls).
2. Each candidate confirmed by exact ablation; negatives are controls, other families' edits and plain text.
3. `detect`: a greedy set that tells driven texts from the negatives; `debias`: a greedy set that removes most of the
   shift at little harm to other texts. A feature of both gets the role `both`.
4. `effect_min` calibrated on validation prompts; everything is reported on test prompts with unseen wordings.
The same search runs on random edits, where it must find nothing.
"""
import argparse
import collections
import json
import math
import os
import time

import torch

import data
import edits
from verdict import HOOKS, Judge, Prepared

CANDIDATES = 12          # per SAE and family
POOL, POSITIVES, NEGATIVES = 8, 48, 240      # of the greedy choice
CONFIRM_EFFECT, CONFIRM_RATIO = 0.10, 3.0
FALSE_POSITIVES = 0.01


class Cases:
    """For one family: bases, their edited copies and their controls, with rewards."""

    def __init__(self, judge, pairs, family, part, count, rng, limit, editor=None):
        self.base, self.edited, self.control = [], [], []
        self.family, self.sign = family, None
        choices = [(p["prompt"], p[s]) for p in pairs for s in ("chosen", "rejected")]
        rng.shuffle(choices)
        for prompt, completion in choices:
            if any(edits.has_trigger(completion, f) for f in edits.FAMILIES):
                continue
            if editor:
                versions = [completion, editor(completion, rng), editor(completion, rng)]
            else:
                versions = [completion] + [edits.edit(completion, family, rng, part, control) for control in (False, True)]
            texts = [judge.text(prompt, v) for v in versions]
            if all(t and len(t.ids) <= limit for t in texts):
                self.base.append(texts[0])
                self.edited.append(texts[1])
                self.control.append(texts[2])
            if len(self.base) == count:
                break
        self.R = {name: judge.rewards(getattr(self, name)) for name in ("base", "edited", "control")}
        self.shift = self.R["edited"] - self.R["base"]
        self.control_shift = self.R["control"] - self.R["base"]
        self.sign = 1.0 if self.shift.mean() > 0 else -1.0
        self.count = len(self.base)

    def driven(self):
        """The reward's own movement decides, not the presence of a trigger."""
        half = abs(edits.SHIFT[self.family]) / 2
        return [i for i in range(self.count) if self.sign * self.shift[i] > half]

    def quiet_controls(self):
        half = abs(edits.SHIFT[self.family]) / 2
        return [i for i in range(self.count) if abs(self.control_shift[i]) <= half]


def positives_and_negatives(cases, family):
    """Texts: driven edits; and controls, other families' edits, plain texts."""
    own = cases[family]
    negative = [own.control[i] for i in own.quiet_controls()]
    for other in cases.values():
        negative += other.base
        if other is not own:
            negative += other.edited
    return [own.edited[i] for i in own.driven()], negative


def separation(positive, negative):
    """AUROC (ties count half) and the recall at the threshold that 1 % of the negatives pass."""
    both = torch.cat([positive, negative])
    order = both.sort().values
    low, high = torch.searchsorted(order, positive), torch.searchsorted(order, positive, right=True)
    rank = (low + high + 1).double() / 2
    n, m = len(positive), len(negative)
    auroc = (rank.sum().item() - n * (n + 1) / 2) / (n * m)
    limit = negative.sort(descending=True).values[int(FALSE_POSITIVES * m)]
    return auroc, (positive > limit).float().mean().item()


def candidates(judge, cases, rows):
    """{sae: indexes} by difference of attribution, in the direction of the family's shift."""
    edited, _ = judge.attributions([cases.edited[i] for i in rows])
    base, _ = judge.attributions([cases.base[i] for i in rows])
    control, _ = judge.attributions(cases.control)
    plain, _ = judge.attributions(cases.base)
    out = {}
    for s in HOOKS:
        gain = cases.sign * ((edited[s][0] - base[s][0]).mean(0) - (control[s][0] - plain[s][0]).mean(0))
        order = gain.argsort(descending=True)[:CANDIDATES].tolist()
        out[s] = [i for i in order if gain[i] > 0.01]
    return out


def confirm(judge, cases, rows, others, found):
    """[(sae, index, mean push on driven texts, mean |effect| on negatives)] of the candidates that hold under ablation."""
    driven = Prepared(judge, [cases.edited[i] for i in rows][:40], found)
    negative = Prepared(judge, others, found)
    kept = []
    for s in found:
        for i in found[s]:
            push = (-cases.sign * driven.effects({s: [i]})).mean().item()
            harm = negative.effects({s: [i]}).abs().mean().item()
            if push >= CONFIRM_EFFECT and push >= CONFIRM_RATIO * harm:
                kept.append((s, i, push, harm))
    return sorted(kept, key=lambda k: -k[2])


def group(members):
    out = {}
    for s, i in members:
        out.setdefault(s, []).append(i)
    return out


def greedy(pool, value, most, gain):
    """Adds the member that helps most, while it helps by at least `gain`."""
    chosen, best = [], 0.0
    while len(chosen) < most:
        scored = [(value(group(chosen + [c])), c) for c in pool if c not in chosen]
        if not scored or max(scored)[0] < best + gain:
            return chosen, best
        best, member = max(scored)
        chosen.append(member)
    return chosen, best


def choose(judge, cases, family, confirmed):
    """The two sets of a family, on training prompts."""
    own = cases[family]
    positive, negative = positives_and_negatives(cases, family)
    negative = edits.seeded("choose", family).sample(negative, min(NEGATIVES, len(negative)))
    pools = {s: [(t, i) for t, i, _, _ in confirmed if t == s][:POOL] for s in HOOKS}
    pool = [(s, i) for s, i, _, _ in confirmed][:POOL]
    columns = group([member for p in pools.values() for member in p] + pool)
    good, bad = Prepared(judge, positive[:POSITIVES], columns), Prepared(judge, negative, columns)

    def detects(members):
        auroc, recall = separation(-own.sign * good.effects(members), -own.sign * bad.effects(members))
        return (auroc + recall) / 2

    def debiases(members):
        left = (good.ablated(members) - target).abs().mean().item()
        harm = bad.effects(members).abs().mean().item()
        return 1 - (left + harm) / whole

    driven = own.driven()[:POSITIVES]
    target = own.R["base"][driven]
    whole = (good.rewards - target).abs().mean().item()
    sets = [greedy(pools[s], detects, 4, 0.003) for s in HOOKS]
    detect = max(sets, key=lambda found: found[1])
    debias = greedy(pool, debiases, 6, 0.01)
    return detect, debias, {s: found[1] for s, found in zip(HOOKS, sets)}


def label(judge, cases, family, s, index):
    """What the feature was seen to do: its usual peak tokens, how often it is active, and which way it pushes."""
    own = cases[family]
    peaks, active = collections.Counter(), 0
    for text in own.edited:
        largest, position = peak(judge, text, s)
        if largest[index] > 0:
            active += 1
            peaks[judge.tokenizer.decode([text.ids[text.start + int(position[index])]]).strip() or "<end>"] += 1
    plain = [t for c in cases.values() for t in c.base]
    others = sum(bool(peak(judge, t, s)[0][index] > 0) for t in plain)
    tokens = ", ".join(f'"{t}"' for t, n in peaks.most_common(3) if n >= 0.05 * max(active, 1))
    return (f"peaks on {tokens}; active in {100 * active / own.count:.0f} % of {family} edits, "
            f"{100 * others / len(plain):.0f} % of plain texts; {'raises' if own.sign > 0 else 'lowers'} the reward")


@torch.no_grad()
def peak(judge, text, s):
    """Largest activation of every feature in the completion, and where."""
    key = (id(text), s)
    if key not in judge.cache:
        x = judge.layers(judge.embed(torch.tensor([text.ids])), 0, HOOKS[s] + 1)[0, text.start:]
        judge.cache[key] = judge.saes[s].encode(x).max(0)
    return judge.cache[key]


def random_sentences(judge, pairs, rng):
    """An edit that means nothing: a sentence of some other completion, put anywhere."""
    pool = [sentence.strip() + "." for p in rng.sample(pairs, 400) for sentence in p["chosen"].split(".") if 15 < len(sentence) < 70]
    pool = [s for s in pool if not any(edits.has_trigger(s, f) for f in edits.FAMILIES)]

    def editor(text, rng):
        return edits.insert(text, rng.choice(pool), rng.choice(["start", "end", rng.random()]))
    return editor


def random_search(judge, pairs, number, real):
    """The same search where there is nothing to find."""
    rng = edits.seeded("random edits", number)
    cases = Cases(judge, pairs, None, "train", 64, rng, 200, random_sentences(judge, pairs, rng))
    rows = list(range(cases.count))
    found = candidates(judge, cases, rows)
    others = cases.base[:30] + cases.control[:30] + [t for c in real.values() for t in c.edited[:20]]
    kept = confirm(judge, cases, rows, others, found)
    return {"texts": cases.count, "mean_shift": round(cases.shift.mean().item(), 3),
            "candidates": sum(map(len, found.values())), "confirmed": len(kept)}


def calibrate(judge, cases, family, detect):
    """The smallest effect, in steps of 0.05 (0.01 below 0.1), that at most 1 % of the validation negatives reach."""
    own = cases[family]
    _, negative = positives_and_negatives(cases, family)
    push = -own.sign * Prepared(judge, negative, group(detect)).effects(group(detect))
    limit = push.sort(descending=True).values[int(FALSE_POSITIVES * len(negative))].item()
    grain = 0.05 if limit >= 0.1 else 0.01
    return max(0.02, round(math.floor(limit / grain + 1) * grain, 2)), len(negative)


@torch.no_grad()
def pooled(judge, texts, block=3):
    out = torch.zeros(len(texts), 192)
    for part, ids, _, mask in judge.batches(texts):
        x = judge.layers(judge.embed(ids), 0, block + 1)
        out[part] = torch.where(mask[..., None], x, torch.tensor(-1e9)).amax(1)
    return out


def probe(judge, cases, family):
    """Baseline: logistic regression on max-pooled activations after block 3, fitted on training prompts."""
    positive, negative = (pooled(judge, t) for t in positives_and_negatives(cases, family))
    x, y = torch.cat([positive, negative]), torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    mean, sd = x.mean(0), x.std(0)
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits((x - mean) / sd @ w + b, y) + 1e-3 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return lambda texts: ((pooled(judge, texts) - mean) / sd @ w + b).detach()


def table(judge, cases, family, detect, threshold, fitted, debias_all):
    """Held-out figures of one family."""
    own = cases[family]
    positive, negative = positives_and_negatives(cases, family)
    score = [-own.sign * Prepared(judge, texts, group(detect)).effects(group(detect)) for texts in (positive, negative)]
    out = {"driven": len(positive), "edited": own.count, "negatives": len(negative),
           "mean_shift": round(own.shift.mean().item(), 3), "mean_shift_controls": round(own.control_shift.mean().item(), 3)}
    methods = {"ablation": score, "max_pooled_probe": [fitted(t) for t in (positive, negative)],
               "pattern": [torch.tensor([float(edits.has_trigger(t.completion, family)) for t in x]) for x in (positive, negative)],
               "length": [torch.tensor([float(len(t.ids)) for t in x]) for x in (positive, negative)]}
    for name, (a, b) in methods.items():
        auroc, recall = separation(a, b)
        out[name] = {"auroc": round(auroc, 4), "recall_at_1_percent": round(recall, 4)}
    out["at_effect_min"] = {"effect_min": threshold, "recall": round((score[0] >= threshold).float().mean().item(), 4),
                            "false_positive_rate": round((score[1] >= threshold).float().mean().item(), 4),
                            "median_effect_on_driven": round(score[0].median().item(), 4)}
    rows = own.driven()
    before = own.shift[rows].mean().item()
    cf = {n: Prepared(judge, [getattr(own, n)[i] for i in rows], debias_all).ablated(debias_all) for n in ("edited", "base")}
    out["removed_share"] = round(1 - (cf["edited"] - cf["base"]).mean().item() / before, 4)
    quiet = own.base + own.control
    out["mean_abs_effect_on_plain_and_controls"] = round(Prepared(judge, quiet, debias_all).effects(debias_all).abs().mean().item(), 4)
    return out


def cases_for(judge, every, split, part, count, limit):
    pairs = [p for p in every if p["split"] == split]
    return {f: Cases(judge, pairs, f, part, count, edits.seeded("cases", split, part, f), limit) for f in edits.FAMILIES}


def roles(chosen):
    """{(sae, index): (role, families)}; roles of one feature in several families are joined."""
    out = {}
    for family, (detect, debias) in chosen.items():
        for member in list(detect) + [m for m in debias if m not in detect]:
            wants = {name for name, members in (("detect", detect), ("debias", debias)) if member in members}
            role, families = out.get(member, (set(), []))
            out[member] = (role | wants, families + [family])
    return {m: ("both" if len(r) == 2 else r.pop(), families) for m, (r, families) in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--saes", required=True)
    parser.add_argument("--out", required=True, help="catalogue.jsonl")
    parser.add_argument("--work", required=True, help="directory for figures_catalogue.json")
    args = parser.parse_args()
    torch.manual_seed(data.SEED)
    torch.set_num_threads(2)
    begin = time.time()
    judge, every = Judge(args.model, args.saes), data.pairs(args.data)

    cases = cases_for(judge, every, "train", "train", 90, 200)
    chosen, report = {}, {}
    for family, own in cases.items():
        rows = own.driven()
        found = candidates(judge, own, rows)
        others = own.base[:30] + own.control[:30] + [t for f, c in cases.items() if f != family for t in c.edited[:30]]
        kept = confirm(judge, own, rows, others, found)
        if not kept:
            raise SystemExit(f"expected features confirmed by ablation for {family}, found none: the SAEs do not hold this bias")
        detect, debias, by_sae = choose(judge, cases, family, kept)
        chosen[family] = (detect[0], debias[0])
        report[family] = {"driven": len(rows), "candidates": sum(map(len, found.values())), "confirmed": len(kept),
                          "detect": detect[0], "debias": debias[0], "detect_value_by_sae": {s: round(v, 4) for s, v in by_sae.items()},
                          "debias_value": round(debias[1], 4)}
        print(family, report[family], f"{time.time() - begin:.0f} s", flush=True)

    listed = roles(chosen)
    with open(args.out, "w", encoding="utf-8") as file:
        for (s, i), (role, families) in listed.items():
            line = {"sae": s, "index": i, "label": label(judge, cases, families[0], s, i), "families": families,
                    "verdict": "spurious", "role": role, "activation_min": 0.0}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(line, flush=True)

    # from here on with the sets as rules and families see them: a feature listed for two families counts in both
    detects = {f: [m for m, (role, families) in listed.items() if f in families and role != "debias"] for f in edits.FAMILIES}
    debias_all = group([m for m, (role, _) in listed.items() if role != "detect"])
    validation = cases_for(judge, every, "val", "train", 60, 280)
    result = {"search": report, "features": len(listed), "effect_min": {}, "held_out": {}}
    for family in edits.FAMILIES:
        result["effect_min"][family], result["calibration_negatives"] = calibrate(judge, validation, family, detects[family])
    fitted = {f: probe(judge, cases, f) for f in edits.FAMILIES}
    for part, name in (("train", "unseen prompts, seen wordings"), ("test", "unseen prompts, unseen wordings")):
        test = cases_for(judge, every, "test", part, 100, 320)
        result["held_out"][name] = {f: table(judge, test, f, detects[f], result["effect_min"][f], fitted[f], debias_all) for f in edits.FAMILIES}
        print(json.dumps(result["held_out"][name], indent=1), f"{time.time() - begin:.0f} s", flush=True)
    pairs = [p for p in every if p["split"] == "train"]
    result["random_edits"] = [random_search(judge, pairs, number, cases) for number in range(3)]
    print(result["random_edits"], flush=True)
    result["seconds"] = round(time.time() - begin)
    with open(os.path.join(args.work, "figures_catalogue.json"), "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
