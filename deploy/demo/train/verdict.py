"""Rewards, attributions and joint ablations in PyTorch, in the daemon's exact semantics (several texts at once).

Completion positions only (with the appended EOS); at each hook the live activation is encoded and the members'
f_i D_i subtracted, the error stays, nothing is refilled in TopK. Causal attention, so right padding needs no mask.
"""
import os

import torch
from sae_lens import SAE
from tokenizers import Tokenizer
from transformers import LlamaForSequenceClassification

import data
from train_reward import pad

HOOKS = {"early": 1, "late": 3}          # SAE id -> block whose output it reads


def hook_name(block):
    return f"blocks.{block}.hook_resid_post"


class Text:
    """A prompt with a completion: ids, and where the completion starts."""

    def __init__(self, tokenizer, prompt, completion, limit=data.CONTEXT):
        self.prompt, self.completion = prompt, completion
        found = data.tokens(tokenizer, prompt, completion, limit)
        self.ids, self.start = found if found else (None, None)


class Judge:
    def __init__(self, model_directory, sae_directory=None):
        self.model = LlamaForSequenceClassification.from_pretrained(model_directory, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(os.path.join(model_directory, "tokenizer.json"))
        self.cache = {}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.saes = {}
        if sae_directory:
            for name in HOOKS:
                self.saes[name] = SAE.load_from_disk(os.path.join(sae_directory, name), device="cpu").eval()
                for parameter in self.saes[name].parameters():
                    parameter.requires_grad_(False)

    def text(self, prompt, completion):
        """None when it does not fit the context."""
        text = Text(self.tokenizer, prompt, completion)
        return text if text.ids else None

    def layers(self, x, first, last, at_hook=None):
        """Blocks first..last-1; at_hook(block, x) may replace a block's output."""
        positions = torch.arange(x.shape[1])[None]
        rotary = self.model.model.rotary_emb(x, positions)
        for block in range(first, last):
            x = self.model.model.layers[block](x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            x = x[0] if isinstance(x, tuple) else x
            if at_hook:
                x = at_hook(block, x)
        return x

    def embed(self, ids):
        return self.model.model.embed_tokens(ids)

    def head(self, x, last):
        hidden = self.model.model.norm(x[torch.arange(len(x)), last])
        return (hidden @ self.model.score.weight.T)[:, 0]

    def batches(self, texts, chunk=24):
        """(indexes, ids, last, completion mask) of texts of similar length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        for at in range(0, len(order), chunk):
            part = order[at:at + chunk]
            ids, last = pad([texts[i].ids for i in part], 8)
            position = torch.arange(ids.shape[1])[None]
            start = torch.tensor([texts[i].start for i in part])[:, None]
            yield part, ids, last, (position >= start) & (position <= last[:, None])

    @torch.no_grad()
    def rewards(self, texts):
        out = torch.zeros(len(texts))
        for part, ids, last, _ in self.batches(texts):
            out[part] = self.head(self.layers(self.embed(ids), 0, 5), last)
        return out

    def attributions(self, texts):
        """{sae: (attribution summed over the completion [n, m], largest activation [n, m])} and the rewards."""
        reward = torch.zeros(len(texts))
        out = {s: (torch.zeros(len(texts), sae.cfg.d_sae), torch.zeros(len(texts), sae.cfg.d_sae)) for s, sae in self.saes.items()}
        for part, ids, last, mask in self.batches(texts):
            points = {}

            def keep(block, x):
                if block in HOOKS.values():
                    x = x.detach().requires_grad_(True) if not points else x
                    x.retain_grad()
                    points[block] = x
                return x

            value = self.head(self.layers(self.embed(ids), 0, 5, keep), last)
            value.sum().backward()
            reward[part] = value.detach()
            for name, sae in self.saes.items():
                x = points[HOOKS[name]]
                with torch.no_grad():
                    f = sae.encode(x.detach()) * mask[..., None]
                    out[name][0][part] = (f * (x.grad @ sae.W_dec.T)).sum(1)
                    out[name][1][part] = f.amax(1)
        return out, reward

    def ablated(self, texts, members):
        """(rewards, effects) with the features {sae: [index, …]} removed jointly."""
        prepared = Prepared(self, texts, members)
        rewards = prepared.ablated(members)
        return rewards, rewards - prepared.rewards


class Prepared:
    """Texts with the clean activations at the hooks kept, for many ablations of features out of `columns`."""

    @torch.no_grad()
    def __init__(self, judge, texts, columns):
        self.judge, self.columns, self.batches = judge, {s: sorted(set(c)) for s, c in columns.items() if c}, []
        self.rewards = torch.zeros(len(texts))
        for part, ids, last, mask in judge.batches(texts):
            points = {}

            def keep(block, x):
                points[block] = x
                return x

            self.rewards[part] = judge.head(judge.layers(judge.embed(ids), 0, 5, keep), last)
            x = {s: points[HOOKS[s]] for s in self.columns}
            f = {s: judge.saes[s].encode(x[s])[..., self.columns[s]] * mask[..., None] for s in x}
            self.batches.append((part, last, mask, x, f))

    @torch.no_grad()
    def ablated(self, members):
        """Rewards without the members. Where none is active in the clean run nothing is computed: effect exactly 0."""
        members = {s: list(m) for s, m in members.items() if m}
        lowest = min(members, key=HOOKS.get)
        at = {s: [self.columns[s].index(i) for i in members[s]] for s in members}
        out = self.rewards.clone()
        for part, last, mask, x, f in self.batches:
            active = torch.stack([(f[s][..., at[s]] > 0).flatten(1).any(1) for s in members]).any(0)
            if not active.any():
                continue
            start = x[lowest][active] - f[lowest][active][..., at[lowest]] @ self.judge.saes[lowest].W_dec[members[lowest]]
            rows = torch.tensor(part)[active]
            out[rows] = self.finish(start, HOOKS[lowest], last[active], mask[active], members)
        return out

    def finish(self, x, block, last, mask, members):
        """The rest of the way up; later hooks encode what is there now."""
        def remove(here, x):
            for s in members:
                if HOOKS[s] == here:
                    live = self.judge.saes[s].encode(x)[..., members[s]] * mask[..., None]
                    x = x - live @ self.judge.saes[s].W_dec[members[s]]
            return x
        return self.judge.head(self.judge.layers(x, block + 1, 5, remove), last)

    def effects(self, members):
        return self.ablated(members) - self.rewards
