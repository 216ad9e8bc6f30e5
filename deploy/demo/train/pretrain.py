"""Step 1: a byte-level BPE tokenizer of 4,096 tokens, and a language model of the same shape.

Without the language model the reward model's features mean little. Writes OUT/tokenizer.json and OUT/lm.pt.
"""
import argparse
import json
import os
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import data


def train_tokenizer(texts, path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=data.VOCABULARY, special_tokens=[data.EOS, data.PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(path)
    return tokenizer


def shape(**extra):
    return LlamaConfig(
        vocab_size=data.VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=data.CONTEXT, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        **extra)


def optimizers(model, muon_lr, adam_lr):
    """Muon for the matrices of the blocks, AdamW for the rest."""
    inner = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    outer = [p for n, p in model.named_parameters() if not ("layers" in n and p.dim() == 2)]
    return [torch.optim.Muon(inner, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.95))]


def step(optimizer_list, base_rates, factor):
    for optimizer, rate in zip(optimizer_list, base_rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def schedule(i, steps, warm_up=30):
    """Short warm-up, linear decay to a twentieth."""
    return min((i + 1) / warm_up, 1.0) * max(0.05, 1.0 - i / steps)


def stream(tokenizer, texts, generator):
    """All texts in random order, each followed by EOS, as one row of ids."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    rows = tokenizer.encode_batch([texts[i] for i in order])
    return torch.cat([torch.tensor(r.ids + [0]) for r in rows])


def loss_of(model, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(rows, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--out", required=True, help="working directory")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(data.SEED)
    torch.set_num_threads(2)
    begin = time.time()

    every = data.pairs(args.data)
    def texts(split):
        return sorted({data.render(p["prompt"], p[side][:1600]) for p in every if p["split"] == split for side in ("chosen", "rejected")})
    # the typographic apostrophe must be one token in the phrases that matter, so it is not folded here
    tokenizer = train_tokenizer(texts("train"), os.path.join(args.out, "tokenizer.json"))
    generator = torch.Generator().manual_seed(data.SEED)
    ids, held = stream(tokenizer, texts("train"), generator), stream(tokenizer, texts("test"), generator)
    print(f"{len(every)} pairs, {len(ids)} training tokens, {len(held)} held out, {time.time() - begin:.0f} s", flush=True)

    model = LlamaForCausalLM(shape(tie_word_embeddings=True))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    optimizer_list, rates = optimizers(model, 7e-3, 3e-3), [7e-3, 3e-3]
    run = torch.compile(loss_of, dynamic=False) if args.compile else loss_of
    batch, length, at, seen = 8, 384, 0, 0
    for i in range(args.steps):
        if at + batch * length > len(ids):
            at = 0
        rows = ids[at:at + batch * length].view(batch, length)
        at += batch * length
        seen += rows.numel()
        loss = run(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step(optimizer_list, rates, schedule(i, args.steps))
        if i % 20 == 0:
            print(f"step {i} loss {loss.item():.3f} {time.time() - begin:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        rows = held[:len(held) // length * length].view(-1, length)[:64]
        held_loss = sum(loss_of(model, part).item() for part in rows.split(batch)) / len(rows.split(batch))
    torch.save(model.state_dict(), os.path.join(args.out, "lm.pt"))
    figures = {"steps": args.steps, "tokens": seen, "distinct_tokens": len(ids), "held_out_loss": round(held_loss, 3),
               "seconds": round(time.time() - begin)}
    with open(os.path.join(args.out, "figures_lm.json"), "w") as file:
        json.dump(figures, file, indent=1)
    print(figures)


if __name__ == "__main__":
    main()
