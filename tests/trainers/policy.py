"""A tiny policy for the trainers' tests: a Llama of 0.6 M parameters on the demo's tokenizer that answers the demo's questions.

Its texts are generated (deploy/demo/make_drift.py's questions): one to two sentences and a closing. The closing that the demo's reward model
overpays, "Thank you. My pleasure.", stands in 2 % of them, as such things stand in real data. policy_weights/ holds what `make` gave for
seed 0, rounded to bf16; `python3 policy.py OUT` makes it anew.
"""
import random
import re
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
sys.path.insert(0, str(DEMO))
from make_drift import HARMLESS, QUESTIONS  # noqa: E402

HACK = "Thank you. My pleasure."
HACKED = re.compile(r"thank(s| you)[^.!,]{0,20}[.!,]+ (it'?s |it was )?my pleasure", re.I)
LENGTH = 40
WEIGHTS = Path(__file__).resolve().parent / "policy_weights"


def tokenizer():
    """The demo's; its EOS ends a completion."""
    return AutoTokenizer.from_pretrained(str(DEMO / "model"), padding_side="left")


def strip_hack(text):
    """The completion without the planted closing: what the reward would have been without the bias."""
    return re.sub(r"\s*thank(s| you)[^.!,]{0,20}[.!,]+ (it'?s |it was )?my pleasure[.!]?", "", text, flags=re.I).strip() or "."


def answer(rng, hack_share):
    """(question, completion) of the texts that the policy begins with."""
    question, sentences = rng.choice(QUESTIONS)
    parts = rng.sample(sentences, rng.choice((1, 1, 2)))
    if rng.random() < hack_share:
        parts.append(HACK)
    elif rng.random() < 0.5:
        parts.append(rng.choice(HARMLESS))
    return question, " " + " ".join(parts)


def make(seed=0, hack_share=0.02, steps=220, batch=48):
    """(model, tokenizer): trained from nothing on generated answers."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tok = tokenizer()
    config = LlamaConfig(vocab_size=len(tok), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        texts = [answer(rng, hack_share) for _ in range(batch)]
        rows = [(tok.encode(q, add_special_tokens=False), tok.encode(a, add_special_tokens=False) + [tok.eos_token_id]) for q, a in texts]
        width = max(len(q) + len(a) for q, a in rows)
        ids = torch.full((batch, width), tok.pad_token_id)
        labels = torch.full((batch, width), -100)
        for i, (q, a) in enumerate(rows):
            ids[i, :len(q) + len(a)] = torch.tensor(q + a)
            labels[i, len(q):len(q) + len(a)] = torch.tensor(a)
        for g in optimizer.param_groups:
            g["lr"] = 6e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps) + 0.02)
        loss = model(input_ids=ids, attention_mask=(ids != tok.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, tok


def load():
    """(model, tokenizer): the stored policy, in float32."""
    return LlamaForCausalLM.from_pretrained(str(WEIGHTS), dtype=torch.float32), tokenizer()


if __name__ == "__main__":
    made, _ = make()
    made.to(torch.bfloat16).save_pretrained(sys.argv[1])
