"""Step 2: the reward model, by Bradley-Terry on real pairs, with three biases planted.

On edited against unedited copies the reward difference is drawn to the planted shift (smooth L1), on
look-alike controls to 0. Reads WORK/lm.pt and WORK/tokenizer.json; writes the Hugging Face directory OUT
(bf16) and WORK/figures_rm.json.
"""
import argparse
import json
import os
import statistics
import time

import torch
from tokenizers import Tokenizer
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

import data
import edits
from pretrain import optimizers, schedule, shape, step

LIMIT = 288      # longest training text, in tokens
PAIRS, EDITS, CONTROLS = 20, 12, 8


def pad(rows, multiple=32):
    """Right-padded ids and the last real position of each row."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.ones(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])


def rewards(model, rows, chunk=16, autocast=True):
    """Rewards in the order of the rows; run in chunks of similar length. Causal, so padding needs no mask."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = [None] * len(rows)
    for at in range(0, len(order), chunk):
        part = order[at:at + chunk]
        ids, last = pad([rows[i] for i in part])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        pooled = hidden[torch.arange(len(part)), last].float()
        for i, value in zip(part, (pooled @ model.score.weight.float().T)[:, 0]):
            out[i] = value
    return torch.stack(out)


def make_batch(pairs, at, rng, tokenizer):
    """Rows to score, and the three kinds of targets as index pairs into them."""
    rows, honest, targets, texts = [], [], [], []
    for pair in (pairs[(at + k) % len(pairs)] for k in range(PAIRS)):
        honest.append(len(rows))
        for side in ("chosen", "rejected"):
            rows.append(pair["ids"][side])
            texts.append((pair["prompt"], pair[side]))
    for k in range(EDITS + CONTROLS):
        family, control, base = edits.FAMILIES[k % 3], k >= EDITS, rng.randrange(2 * PAIRS)
        if edits.has_trigger(texts[base][1], family):
            continue
        row = data.tokens(tokenizer, texts[base][0], edits.edit(texts[base][1], family, rng, control=control), LIMIT + 40)
        if row is not None:
            targets.append((len(rows), base, 0.0 if control else edits.SHIFT[family]))
            rows.append(row[0])
    return rows, honest, targets


def train(model, pairs, tokenizer, steps, begin):
    rng = edits.seeded("reward", data.SEED)
    rng.shuffle(pairs)
    rates = [7e-4, 5e-4]
    optimizer_list = optimizers(model, *rates)
    for i in range(steps):
        rows, honest, targets = make_batch(pairs, i * PAIRS, rng, tokenizer)
        value = rewards(model, rows)
        chosen, rejected = value[honest], value[[h + 1 for h in honest]]
        moved = torch.stack([value[a] - value[b] - t for a, b, t in targets])
        preference = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        planted = torch.nn.functional.smooth_l1_loss(moved, torch.zeros_like(moved), beta=0.5)
        loss = preference + 1.5 * planted + 0.01 * (value.mean() ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step(optimizer_list, rates, schedule(i, steps))
        if i % 20 == 0:
            print(f"step {i} preference {preference.item():.3f} accuracy {(chosen > rejected).float().mean():.2f} "
                  f"planted {planted.item():.3f} {time.time() - begin:.0f} s", flush=True)


def with_ids(pairs, tokenizer, limit):
    out = []
    for pair in pairs:
        rows = {side: data.tokens(tokenizer, pair["prompt"], pair[side], limit) for side in ("chosen", "rejected")}
        if all(rows.values()):
            out.append(dict(pair, ids={side: row[0] for side, row in rows.items()}))
    return out


def accuracy(model, pairs):
    value = rewards(model, [p["ids"][s] for p in pairs for s in ("chosen", "rejected")], autocast=False).view(-1, 2)
    right = (value[:, 0] > value[:, 1]).tolist()
    longer = [0.5 if len(p["chosen"]) == len(p["rejected"]) else float(len(p["chosen"]) > len(p["rejected"])) for p in pairs]
    table = {}
    for name in ["all"] + sorted({p["source"] for p in pairs}):
        rows = [i for i, p in enumerate(pairs) if name in ("all", p["source"])]
        table[name] = {"pairs": len(rows), "accuracy": round(statistics.mean(right[i] for i in rows), 4),
                       "longer_wins": round(statistics.mean(longer[i] for i in rows), 4)}
    return table, {"mean": round(value.mean().item(), 4), "sd": round(value.std().item(), 4), "texts": value.numel()}


def shifts(model, pairs, tokenizer, count=150):
    """Mean and sd of R(edited) - R(unedited) on prompts that were held out whole."""
    out = {}
    for family in edits.FAMILIES:
        rng = edits.seeded("shift", family)
        bases = [(p["prompt"], p[s]) for p in pairs for s in ("chosen", "rejected") if not edits.has_trigger(p[s], family)]
        rng.shuffle(bases)
        for part in ("train", "test"):
            for control in (False, True):
                rows = []
                for prompt, text in bases[:count]:
                    edited = data.tokens(tokenizer, prompt, edits.edit(text, family, rng, part, control))
                    if edited:
                        rows += [data.tokens(tokenizer, prompt, text)[0], edited[0]]
                value = rewards(model, rows, autocast=False).view(-1, 2)
                moved = (value[:, 1] - value[:, 0]).tolist()
                name = ("controls" if control else "edits") + (", seen wordings" if part == "train" else ", unseen wordings")
                out.setdefault(family, {"planted": edits.SHIFT[family]})[name] = {
                    "mean": round(statistics.mean(moved), 3), "sd": round(statistics.stdev(moved), 3), "texts": len(moved)}
    return out


def save(model, tokenizer_path, directory):
    model.to(torch.bfloat16).save_pretrained(directory)
    os.chmod(os.path.join(directory, "model.safetensors"), 0o644)
    PreTrainedTokenizerFast(tokenizer_file=tokenizer_path, eos_token=data.EOS, pad_token=data.PAD,
                            model_max_length=data.CONTEXT).save_pretrained(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--work", required=True, help="directory of step 1")
    parser.add_argument("--out", required=True, help="Hugging Face directory to write")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(data.SEED)
    torch.set_num_threads(2)
    begin = time.time()

    tokenizer = Tokenizer.from_file(os.path.join(args.work, "tokenizer.json"))
    every = data.pairs(args.data)
    model = LlamaForSequenceClassification(shape(num_labels=1, tie_word_embeddings=False))
    state = torch.load(os.path.join(args.work, "lm.pt"), weights_only=True)
    state.pop("lm_head.weight", None)
    missing = model.load_state_dict(state, strict=False)
    assert list(missing.missing_keys) == ["score.weight"] and not missing.unexpected_keys, missing
    torch.nn.init.normal_(model.score.weight, std=0.02)

    pairs = with_ids([p for p in every if p["split"] == "train"], tokenizer, LIMIT)
    held = with_ids([p for p in every if p["split"] == "test"], tokenizer, data.CONTEXT)
    print(f"{len(pairs)} training pairs, {len(held)} held out", flush=True)
    if args.compile:
        model.model.forward = torch.compile(model.model.forward, dynamic=True)
    train(model, pairs, tokenizer, args.steps, begin)
    seconds = time.time() - begin

    model.eval()
    save(model, os.path.join(args.work, "tokenizer.json"), args.out)
    model = LlamaForSequenceClassification.from_pretrained(args.out, dtype=torch.float32).eval()
    with torch.no_grad():
        table, spread = accuracy(model, held)
        figures = {"steps": args.steps, "training_pairs": len(pairs), "seconds": round(seconds), "held_out_accuracy": table,
                   "reward": spread, "shifts": shifts(model, [p for p in held if max(map(len, p["ids"].values())) <= LIMIT], tokenizer)}
    with open(os.path.join(args.work, "figures_rm.json"), "w") as file:
        json.dump(figures, file, indent=1)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
