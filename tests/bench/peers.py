#!/usr/bin/env python3
"""The peers of the benchmark: PyTorch + transformers + SAELens on the job `reward and attributions of groups of rollouts`.

    usual   what one writes first: hooks, a graph over the whole model, every position encoded, dense gradient times decoder
    expert  weights frozen, no graph below the hook, a leaf at the hook over completion positions, SDPA, only completions
            encoded, attribution by gathering the active decoder rows
    shared  expert, and the group's prompt runs once: its keys and values are kept and repeated for the members

In bf16 the peers' SAE is bfloat16 too, the cheaper way; the daemon encodes in float32.

As a program it is a worker: it loads the case, then answers each line `run` on stdin with one JSON line of its time and results.
Prompts of a group are equal and all completions have one length, so no peer pays for padding.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from sae_lens.saes.sae import SAE  # noqa: E402
from transformers import AutoModelForSequenceClassification, DynamicCache  # noqa: E402

TOP = 32
ROWS_AT_ONCE = 256


class Case:
    """Model, SAE and rollouts of one benchmark case, in one dtype."""

    def __init__(self, folder: Path, dtype: torch.dtype, frozen: bool):
        self.dtype = dtype
        self.net = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype,
                                                                     attn_implementation="sdpa").eval()
        self.net.requires_grad_(not frozen)
        self.base = self.net.model
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self.sae = SAE.load_from_disk(str(folder / "saes/mid"), device="cpu", dtype=name).eval().requires_grad_(False)
        self.layer = int(self.sae.cfg.metadata.hook_name.split(".")[1])
        self.groups = []
        rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
        for name in dict.fromkeys(r["group"] for r in rows):
            members = [r for r in rows if r["group"] == name]
            self.groups.append((torch.tensor(members[0]["prompt_ids"]),
                                torch.tensor([r["completion_ids"] for r in members])))


def summary(rewards, attribution, error, bias) -> list[dict]:
    """What a verdict holds: reward, sums, and the TOP features of every member. attribution (G, m)."""
    top = attribution.abs().topk(TOP, dim=-1).indices
    return [{"reward": float(rewards[i]), "attribution_sum": float(attribution[i].sum()), "error_attribution": float(error[i]),
             "bias_attribution": float(bias[i]), "features": top[i].tolist()} for i in range(len(rewards))]


def usual(case: Case, prompt, completions) -> list[dict]:
    ids = torch.cat([prompt.expand(len(completions), -1), completions], dim=1)
    kept = {}

    def hook(_module, _args, out):
        kept["x"] = out[0] if isinstance(out, tuple) else out

    handle = case.base.layers[case.layer].register_forward_hook(hook)
    rewards = case.net(input_ids=ids, use_cache=False).logits[:, 0]
    handle.remove()
    (g,) = torch.autograd.grad(rewards.sum(), kept["x"])
    with torch.no_grad():
        x = kept["x"]
        f = case.sae.encode(x)
        x_hat = case.sae.decode(f)
        attribution = f * (g @ case.sae.W_dec.T)
        c = slice(len(prompt), None)
        return summary(rewards, attribution[:, c].float().sum(1), ((x - x_hat) * g)[:, c].float().sum((1, 2)),
                       (g[:, c] @ case.sae.b_dec).float().sum(1))


def _layers(case: Case, x, layers, position, cache=None, mask=None):
    rope = case.base.rotary_emb(x, position)
    for layer in layers:
        x = layer(x, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=cache is not None,
                  position_embeddings=rope)
        x = x[0] if isinstance(x, tuple) else x
    return x


def _sparse(case: Case, x, g) -> tuple:
    """Attribution (m), error and bias of one member from x and g (|C|, d), by the active rows only."""
    sae = case.sae
    top = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.cfg.k, dim=-1, sorted=False)
    f, index = top.values.relu(), top.indices
    attribution = torch.zeros(sae.W_dec.shape[0])
    error = torch.zeros(())
    for start in range(0, len(x), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = sae.W_dec[index[part]]
        share = f[part] * torch.einsum("tkd,td->tk", rows, g[part])
        attribution.index_add_(0, index[part].flatten(), share.float().flatten())
        rest = x[part] - sae.b_dec - torch.einsum("tk,tkd->td", f[part], rows)
        error += (rest.float() * g[part].float()).sum()
    return attribution, error, (g @ sae.b_dec).float().sum()


def _finish(case: Case, rewards, x, g) -> list[dict]:
    parts = [_sparse(case, x[i], g[i]) for i in range(len(x))]
    return summary(rewards, *(torch.stack(column) for column in zip(*parts)))


def expert(case: Case, prompt, completions) -> list[dict]:
    ids, p = torch.cat([prompt.expand(len(completions), -1), completions], dim=1), len(prompt)
    position = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        below = _layers(case, case.base.embed_tokens(ids), case.base.layers[: case.layer + 1], position)
    leaf = below[:, p:].clone().requires_grad_(True)
    last = _layers(case, torch.cat([below[:, :p], leaf], dim=1), case.base.layers[case.layer + 1 :], position)
    rewards = case.net.score(case.base.norm(last[:, -1]))[:, 0]
    (g,) = torch.autograd.grad(rewards.sum(), leaf)
    with torch.no_grad():
        return _finish(case, rewards, leaf.detach(), g)


def shared(case: Case, prompt, completions) -> list[dict]:
    size, p, n = len(completions), len(prompt), completions.shape[1]
    cache = DynamicCache(config=case.net.config)
    position = torch.arange(p, p + n)[None]
    mask = torch.ones(n, p + n, dtype=torch.bool).tril(p)[None, None].expand(size, 1, -1, -1)
    with torch.no_grad():
        _layers(case, case.base.embed_tokens(prompt[None]), case.base.layers, torch.arange(p)[None], cache)
        cache.batch_repeat_interleave(size)
        below = _layers(case, case.base.embed_tokens(completions), case.base.layers[: case.layer + 1], position, cache, mask)
    leaf = below.clone().requires_grad_(True)
    last = _layers(case, leaf, case.base.layers[case.layer + 1 :], position, cache, mask)
    rewards = case.net.score(case.base.norm(last[:, -1]))[:, 0]
    (g,) = torch.autograd.grad(rewards.sum(), leaf)
    with torch.no_grad():
        return _finish(case, rewards, leaf.detach(), g)


PEERS = {"usual": usual, "expert": expert, "shared": shared}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--peer", choices=sorted(PEERS), required=True)
    parser.add_argument("--dtype", choices=("f32", "bf16"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = Case(args.case, {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype], frozen=args.peer != "usual")
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the answers stay clean
    print(json.dumps({"ready": True, "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() != "run":
            break
        begin = time.perf_counter()
        found = [row for prompt, completions in case.groups for row in PEERS[args.peer](case, prompt, completions)]
        took = time.perf_counter() - begin
        print(json.dumps({"seconds": took, "rows": found}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
