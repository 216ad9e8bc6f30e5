"""Step 3: two sparse autoencoders on the reward model's residual stream, saved by sae_lens.

`early`: TopK after block 1. `late`: JumpReLU after block 3, trained as BatchTopK (the batch's k·B largest
stay) with the threshold followed by a moving average, then exported with that threshold. Activations come
from completion positions, edited texts and controls among them, since verdicts read no others.
"""
import argparse
import json
import os
import time

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

import data
import edits
from verdict import HOOKS, Judge, hook_name

WIDTH, K, BATCH = 2048, 24, 4096


def texts_of(judge, pairs, rng, edited_share):
    """Every completion as it is, and some with an edit or a control of a random family."""
    out = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            completion = pair[side]
            if rng.random() < edited_share:
                completion = edits.edit(completion, rng.choice(edits.FAMILIES), rng, control=rng.random() < 0.25)
            out.append(judge.text(pair["prompt"], completion))
    return [t for t in out if t]


@torch.no_grad()
def collect(judge, texts, limit):
    """{sae: activations [n, d]} at completion positions, in random order of texts."""
    kept, count = {s: [] for s in HOOKS}, 0
    for _, ids, _, mask in judge.batches(texts):
        points = {}

        def keep(block, x):
            points[block] = x[mask]
            return x

        judge.layers(judge.embed(ids), 0, max(HOOKS.values()) + 1, keep)
        for name, block in HOOKS.items():
            kept[name].append(points[block])
        count += int(mask.sum())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(data.SEED))[:limit]
    return {s: torch.cat(kept[s])[order] for s in HOOKS}


class Trainer:
    """One SAE in units in which activations have mean norm sqrt(d); unit decoder rows; folded when saved."""

    def __init__(self, x, batch_topk, generator):
        d = x.shape[1]
        self.scale = (d ** 0.5 / x.norm(dim=1).mean()).item()
        self.b_dec = torch.nn.Parameter(x.mean(0) * self.scale)
        rows = torch.randn(WIDTH, d, generator=generator)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.W_dec = torch.nn.Parameter(rows.clone())
        self.W_enc = torch.nn.Parameter(rows.T.clone() * 0.5)
        self.b_enc = torch.nn.Parameter(torch.zeros(WIDTH))
        self.batch_topk, self.threshold = batch_topk, 0.0
        self.silent = torch.zeros(WIDTH)

    def parameters(self):
        return [self.b_dec, self.W_dec, self.W_enc, self.b_enc]

    def loss(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            p = (x - self.b_dec) @ self.W_enc + self.b_enc
        p = torch.relu(p.float())
        if self.batch_topk:
            cut = torch.topk(p.detach().flatten()[::4], K * len(x) // 4, sorted=False).values.min()    # a quarter tells the cut
            self.threshold = cut.item() if self.threshold == 0.0 else 0.98 * self.threshold + 0.02 * cut.item()
            f = p * (p > cut)
        else:
            f = p * (p >= torch.topk(p.detach(), K, dim=1).values[:, -1:])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            back = f @ self.W_dec
        error = x - self.b_dec - back.float()
        self.silent = torch.where((f > 0).any(0), torch.zeros_like(self.silent), self.silent + 1)
        loss = error.square().sum(1).mean()
        dead = self.silent > 40
        if dead.any():          # silent features are pulled to what is left of the error
            q = torch.relu(((x - self.b_dec) @ self.W_enc[:, dead]) + self.b_enc[dead])
            q = q * (q >= torch.topk(q.detach(), min(K, int(dead.sum())), dim=1).values[:, -1:])
            loss = loss + (error.detach() - q @ self.W_dec[dead]).square().sum(1).mean() / 32
        return loss

    def train(self, x, steps, name, begin):
        optimizer = torch.optim.Adam(self.parameters(), lr=1.5e-3, betas=(0.9, 0.99))
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 1.5e-3 * min((i + 1) / 50, 1.0, max(0.02, (steps - i) / (0.4 * steps)))
            at = (i * BATCH) % (len(x) - BATCH)
            part = x[at:at + BATCH] * self.scale
            loss = self.loss(part)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            if i % 50 == 0:
                print(f"{name} step {i} error {loss.item() / part.shape[1]:.4f} silent {int((self.silent > 40).sum())} "
                      f"{time.time() - begin:.0f} s", flush=True)

    @torch.no_grad()
    def save(self, directory, hook):
        """Folds the scale, so that activations are read in the model's own units: p = x·s·W_enc + …"""
        metadata = SAEMetadata(model_name="spurion-demo-rm", hook_name=hook, prepend_bos=False, context_size=data.CONTEXT)
        common = dict(d_in=len(self.b_dec), d_sae=WIDTH, dtype="float32", device="cpu", normalize_activations="none", metadata=metadata)
        state = {"W_enc": self.W_enc * self.scale, "b_enc": self.b_enc.clone(), "W_dec": self.W_dec / self.scale,
                 "b_dec": self.b_dec / self.scale}
        if self.batch_topk:     # with the decoder bias folded into the encoder's
            state["b_enc"] = state["b_enc"] - self.b_dec @ self.W_enc
            state["threshold"] = torch.full((WIDTH,), self.threshold)
            sae = JumpReLUSAE(JumpReLUSAEConfig(apply_b_dec_to_input=False, **common))
        else:
            sae = TopKSAE(TopKSAEConfig(k=K, apply_b_dec_to_input=True, **common))
        sae.load_state_dict(state)
        os.makedirs(directory, exist_ok=True)
        weights, _ = sae.save_model(directory)
        os.chmod(weights, 0o644)


@torch.no_grad()
def measure(judge, sae, name, texts, generator):
    """L0, FVE (centred), alive share, and the reward's fidelity with the reconstruction spliced in."""
    x = collect(judge, texts, 100_000)[name]
    f = torch.cat([sae.encode(part) for part in x.split(4096)])
    error = x - torch.cat([sae.decode(part) for part in f.split(4096)])
    density = (f != 0).float().mean(0)
    figures = {"hook": hook_name(HOOKS[name]), "architecture": sae.cfg.architecture(), "width": WIDTH, "tokens": len(x),
               "l0": round((f != 0).sum(1).float().mean().item(), 2),
               "fve": round(1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item(), 4),
               "alive_share": round((density > 0).float().mean().item(), 4),
               "share_firing_over_10_percent": round((density > 0.1).float().mean().item(), 4)}
    clean, spliced = torch.zeros(len(texts)), torch.zeros(len(texts))
    for part, ids, last, mask in judge.batches(texts):
        def splice(block, x):
            return torch.where(mask[..., None], sae.decode(sae.encode(x)), x) if block == HOOKS[name] else x
        clean[part] = judge.head(judge.layers(judge.embed(ids), 0, 5), last)
        spliced[part] = judge.head(judge.layers(judge.embed(ids), 0, 5, splice), last)
    figures["reward_r2_under_splice"] = round(1 - ((spliced - clean).square().mean() / clean.var()).item(), 4)
    figures["reward_mean_abs_error_under_splice"] = round((spliced - clean).abs().mean().item(), 4)
    figures["texts"] = len(texts)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True, help="directory for early/ and late/")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--activations", type=int, default=800_000)
    args = parser.parse_args()
    torch.manual_seed(data.SEED)
    torch.set_num_threads(2)
    begin = time.time()

    judge, every, rng = Judge(args.model), data.pairs(args.data), edits.seeded("saes", data.SEED)
    train = [p for p in every if p["split"] == "train"]
    rng.shuffle(train)
    texts = texts_of(judge, train[:2800], rng, 0.5)
    x = collect(judge, texts, args.activations)
    print(f"{len(texts)} texts, {len(x['early'])} activations, {time.time() - begin:.0f} s", flush=True)
    generator = torch.Generator().manual_seed(data.SEED)
    held = [p for p in every if p["split"] == "test"]
    rng.shuffle(held)
    held = texts_of(judge, held[:250], rng, 0.3)
    figures = {}
    for name, block in HOOKS.items():
        trainer = Trainer(x[name], name == "late", generator)
        trainer.train(x[name], args.steps, name, begin)
        directory = os.path.join(args.out, name)
        trainer.save(directory, hook_name(block))
        sae = SAE.load_from_disk(directory, device="cpu")
        figures[name] = measure(judge, sae, name, held, generator)
        print(name, figures[name], flush=True)
    figures["activations"], figures["steps"] = len(x["early"]), args.steps
    figures["seconds"] = round(time.time() - begin)
    with open(os.path.join(args.work, "figures_saes.json"), "w") as file:
        json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
