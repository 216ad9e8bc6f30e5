#!/usr/bin/env python3
"""The peers of the benchmark: PyTorch + transformers on the jobs of the daemon.

    usual    what one writes first: hooks, a graph over the whole model, every position encoded, dense features, dense gradient times decoder
    expert   weights frozen, no graph below the hook, a leaf at the hook over completion positions (IG starts there too, its steps in one
             batch), SDPA, batches of one length, only completions encoded, attribution by gathering the active decoder rows;
             batch size and torch.compile of the blocks: tried, the fastest kept
    saelens  sae_lens' encode and decode spliced into the model with the error term, gradients of the features by autograd
    shared   expert, and the group's prompt runs once: its keys and values (past_key_values) are repeated for the members
    chain    no contestant: the linear layers that `expert` runs, forward and dX, and its SAE encoder, one after another, nothing else

As a program it is a worker: it loads model and SAE once, and answers each line of stdin (a JSON object with `do`) with a JSON line. Prompts of a
group are equal and completions of a workload have one length, so no peer pays for padding. In bf16 the peers' SAE is bfloat16 too.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from sae_lens.saes.sae import SAE  # noqa: E402
from transformers import AutoModelForSequenceClassification, DynamicCache  # noqa: E402

import case as bench_case  # noqa: E402

TOP = 32
ROWS_AT_ONCE = 256
USUAL_BATCH = 8
GEMM = re.compile(r"(^|::)(addmm|mm|bmm|baddbmm|linear|matmul|_linear_pointwise|mkldnn_linear\w*|_addmm_activation|mkldnn_convolution)(\.|$)")


class Case:
    """Model and SAE in one dtype, and what was tried for the expert."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.dtype = dtype
        self.net = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa").eval()
        self.base = self.net.model
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self.sae = SAE.load_from_disk(str(folder / "saes/mid"), device="cpu", dtype=name).eval().requires_grad_(False)
        self.layer = int(self.sae.cfg.metadata.hook_name.split(".")[1])
        self.batch, self.compiled, self._compiled_layers = USUAL_BATCH, False, None

    @property
    def layers(self) -> list:
        if not self.compiled:
            return list(self.base.layers)
        if self._compiled_layers is None:
            self._compiled_layers = [torch.compile(layer, dynamic=False) for layer in self.base.layers]
        return self._compiled_layers


class Job:
    """A batch: prompts (G, P) and completions (G, C); path: fractions of integrated gradients, or None."""

    def __init__(self, rows: list[dict], kind: str):
        self.kind = kind
        self.prompts = torch.tensor([r["prompt_ids"] for r in rows])
        self.completions = torch.tensor([r["completion_ids"] for r in rows])
        self.ids = torch.cat([self.prompts, self.completions], dim=1)
        self.p, self.size = self.prompts.shape[1], len(rows)
        n = bench_case.IG_STEPS
        self.path = [(i + 0.5) / n for i in range(n)] if kind == "ig" else None


def summary(rewards, attribution, error, bias) -> list[dict]:
    """What a verdict holds: reward, sums, and the TOP features of every member. attribution (G, m)."""
    top = attribution.abs().topk(TOP, dim=-1).indices
    return [{"reward": float(rewards[i]), "attribution_sum": float(attribution[i].sum()), "error_attribution": float(error[i]),
             "bias_attribution": float(bias[i]), "features": top[i].tolist()} for i in range(len(rewards))]


def plain(rewards) -> list[dict]:
    return [{"reward": float(r)} for r in rewards]


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _hooked(case: Case, ids, hook):
    """Rewards of a pass whose residual stream at the SAE goes through hook(x)."""
    def call(_module, _args, out):
        x = hook(_first(out))
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = case.base.layers[case.layer].register_forward_hook(call)
    try:
        return case.net(input_ids=ids, use_cache=False).logits[:, 0]
    finally:
        handle.remove()


# --- usual ---


def _dense(case: Case, x):
    """Features (G, T, m) of a TopK SAE, as one writes it, and the reconstruction."""
    sae = case.sae
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.topk(sae.cfg.k, dim=-1)
    f = torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
    return f, f @ sae.W_dec + sae.b_dec


def usual(case: Case, job: Job) -> list[dict]:
    if job.kind == "reward":
        with torch.no_grad():
            return plain(case.net(input_ids=job.ids, use_cache=False).logits[:, 0])
    kept = {}

    def keep(x):
        kept["x"] = x
        return x

    rewards, gradient = _hooked(case, job.ids, keep), 0
    c = slice(job.p, None)
    for a in job.path or ():
        with torch.no_grad():
            x = kept["x"].detach().clone()
            x[:, c] = (1 - a) * (x[:, c] - case.sae.b_dec) + case.sae.b_dec
        x.requires_grad_(True)
        (g,) = torch.autograd.grad(_hooked(case, job.ids, lambda _x, x=x: x).sum(), x)
        gradient = gradient + g / len(job.path)
    if not job.path:
        (gradient,) = torch.autograd.grad(rewards.sum(), kept["x"])
    with torch.no_grad():
        x, g = kept["x"], gradient
        f, x_hat = _dense(case, x)
        attribution = f * (g @ case.sae.W_dec.T)
        return summary(rewards, attribution[:, c].float().sum(1), ((x - x_hat) * g)[:, c].float().sum((1, 2)),
                       (g[:, c] @ case.sae.b_dec).float().sum(1))


# --- sae_lens + autograd ---


def saelens(case: Case, job: Job) -> list[dict]:
    sae, kept, c = case.sae, {}, slice(job.p, None)

    def splice(x):
        f = sae.encode(x)
        x_hat = sae.decode(f)
        error = (x - x_hat).detach().requires_grad_(True)
        kept.update(f=f, error=error)
        return x_hat + error

    def scaled(a):
        f = ((1 - a) * kept["f"].detach()).requires_grad_(True)
        error = ((1 - a) * kept["error"].detach()).requires_grad_(True)

        def hook(x):
            return torch.cat([x[:, : job.p], (sae.decode(f) + error)[:, c]], dim=1)

        return f, error, hook

    rewards = _hooked(case, job.ids, splice)
    if job.path:
        df, de = 0, 0
        for a in job.path:
            f, error, hook = scaled(a)
            one, two = torch.autograd.grad(_hooked(case, job.ids, hook).sum(), [f, error])
            df, de = df + one / len(job.path), de + two / len(job.path)
    else:
        df, de = torch.autograd.grad(rewards.sum(), [kept["f"], kept["error"]])
    with torch.no_grad():
        return summary(rewards, (kept["f"] * df)[:, c].float().sum(1), (kept["error"] * de)[:, c].float().sum((1, 2)),
                       (de[:, c] @ sae.b_dec).float().sum(1))


# --- expert ---


def _layers(case: Case, x, layers, position, cache=None, mask=None):
    rope = case.base.rotary_emb(x, position)
    for layer in layers:
        x = _first(layer(x, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=cache is not None,
                         position_embeddings=rope))
    return x


def _head(case: Case, last):
    return case.net.score(case.base.norm(last[:, -1]))[:, 0]


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
    with torch.no_grad():
        parts = [_sparse(case, x[i], g[i]) for i in range(len(x))]
        return summary(rewards, *(torch.stack(column) for column in zip(*parts)))


def _path_gradient(case: Case, job: Job, below, position):
    """Mean gradient at the completion over the path; the steps of a member stand in one batch."""
    layers, out = case.layers[case.layer + 1 :], []
    a = torch.tensor(job.path, dtype=case.dtype)[:, None, None]
    at_once = max(1, 2 * case.batch)
    for i in range(job.size):
        total = torch.zeros_like(below[i, job.p :])
        for start in range(0, len(job.path), at_once):
            fraction = a[start : start + at_once]
            b = case.sae.b_dec
            leaf = ((1 - fraction) * (below[i, job.p :] - b) + b).requires_grad_(True)
            prompt = below[i, : job.p].expand(len(leaf), -1, -1)
            last = _layers(case, torch.cat([prompt, leaf], dim=1), layers, position)
            total += torch.autograd.grad(_head(case, last).sum(), leaf)[0].sum(0) / len(job.path)
        out.append(total)
    return torch.stack(out)


def expert(case: Case, job: Job) -> list[dict]:
    position = torch.arange(job.ids.shape[1])[None]
    if job.kind == "reward":
        with torch.no_grad():
            return plain(_head(case, _layers(case, case.base.embed_tokens(job.ids), case.layers, position)))
    with torch.no_grad():
        below = _layers(case, case.base.embed_tokens(job.ids), case.layers[: case.layer + 1], position)
    if job.path:
        with torch.no_grad():
            rewards = _head(case, _layers(case, below, case.layers[case.layer + 1 :], position))
        return _finish(case, rewards, below[:, job.p :], _path_gradient(case, job, below, position))
    leaf = below[:, job.p :].clone().requires_grad_(True)
    last = _layers(case, torch.cat([below[:, : job.p], leaf], dim=1), case.layers[case.layer + 1 :], position)
    rewards = _head(case, last)
    (g,) = torch.autograd.grad(rewards.sum(), leaf)
    return _finish(case, rewards, leaf.detach(), g)


def shared(case: Case, job: Job) -> list[dict]:
    """All members of one group: their prompts are equal."""
    size, p, n = job.size, job.p, job.completions.shape[1]
    cache = DynamicCache(config=case.net.config)
    position = torch.arange(p, p + n)[None]
    mask = torch.ones(n, p + n, dtype=torch.bool).tril(p)[None, None].expand(size, 1, -1, -1)
    layers = list(case.base.layers)
    with torch.no_grad():
        _layers(case, case.base.embed_tokens(job.prompts[:1]), layers, torch.arange(p)[None], cache)
        cache.batch_repeat_interleave(size)
        below = _layers(case, case.base.embed_tokens(job.completions), layers[: case.layer + 1], position, cache, mask)
        if job.kind == "reward":
            return plain(_head(case, _layers(case, below, layers[case.layer + 1 :], position, cache, mask)))
    leaf = below.clone().requires_grad_(True)
    rewards = _head(case, _layers(case, leaf, layers[case.layer + 1 :], position, cache, mask))
    (g,) = torch.autograd.grad(rewards.sum(), leaf)
    return _finish(case, rewards, leaf.detach(), g)


# --- the bare chain ---


def _block(layer, x, gradient: bool) -> None:
    """The block's linears on rows x (T, d): forward, or dX = dY W."""
    a, m = layer.self_attn, layer.mlp
    wide = x.new_zeros(len(x), m.gate_proj.weight.shape[0])
    heads = x.new_zeros(len(x), a.o_proj.weight.shape[1])
    narrow = x.new_zeros(len(x), a.k_proj.weight.shape[0])
    for w, into, outof in ((a.q_proj, x, heads), (a.k_proj, x, narrow), (a.v_proj, x, narrow), (a.o_proj, heads, x), (m.gate_proj, x, wide),
                           (m.up_proj, x, wide), (m.down_proj, wide, x)):
        if gradient:
            torch.mm(outof, w.weight)
        else:
            torch.nn.functional.linear(into, w.weight)


@torch.no_grad()
def chain(case: Case, job: Job) -> list[dict]:
    length, c, d = job.ids.shape[1], job.completions.shape[1], case.base.config.hidden_size
    x = torch.randn(job.size * length, d).to(case.dtype)
    for layer in case.base.layers:
        _block(layer, x, False)
    if job.kind != "reward":
        for _ in job.path or (None,):
            for layer in case.base.layers[case.layer + 1 :]:
                if job.path:
                    _block(layer, x, False)
                _block(layer, x, True)
        torch.mm(x[: job.size * c], case.sae.W_enc)
    return []


PEERS = {"usual": usual, "expert": expert, "saelens": saelens, "shared": shared, "chain": chain}


# --- the worker ---


class Worker:
    def __init__(self, folder: Path):
        self.folder, self.case = folder, None
        self.kept = {}  # workload -> (batch, compiled)

    def answer(self, q: dict) -> dict:
        """q: do, dtype, peer, and what the method takes."""
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[q["dtype"]]
        if self.case is None or self.case.dtype != dtype:
            self.case = None  # frees the other one first
            self.case = Case(self.folder, dtype)
        self.case.net.requires_grad_(q["peer"] in ("usual", "saelens"))
        return {"run": self.run, "tune": self.tune, "profile": self.profile, "rare": self.rare}[q["do"]](q)

    def rows(self, q: dict) -> list[dict]:
        rows = [json.loads(line) for line in (self.folder / f"{q['work']}.jsonl").read_text().splitlines()]
        return bench_case.some(rows, q["members"])

    def batches(self, q: dict, rows: list[dict]) -> list[list[int]]:
        """Places in rows, of one group for `shared`, else of one length (the shapes are sorted), at most a batch each."""
        def key(i):
            r = rows[i]
            return (r["group"],) if q["peer"] == "shared" else (len(r["prompt_ids"]), len(r["completion_ids"]))

        size = len(rows) if q["peer"] == "shared" else self.case.batch
        order, out = sorted(range(len(rows)), key=key), []
        for i in order:
            if out and key(out[-1][0]) == key(i) and len(out[-1]) < size:
                out[-1].append(i)
            else:
                out.append([i])
        return out

    def run(self, q: dict) -> dict:
        if q["peer"] in ("expert", "chain"):
            self.case.batch, compiled = self.kept.get(q["work"], (USUAL_BATCH, False))
            self.case.compiled = compiled and q["peer"] == "expert"
        else:
            self.case.batch, self.case.compiled = USUAL_BATCH, False
        return self.timed(q)

    def timed(self, q: dict) -> dict:
        rows, found = self.rows(q), {}
        begin = time.perf_counter()
        for places in self.batches(q, rows):
            answers = PEERS[q["peer"]](self.case, Job([rows[i] for i in places], q["kind"]))
            found.update(zip(places, answers))
        took = time.perf_counter() - begin
        return {"seconds": took, "rows": [found[i] for i in sorted(found)]}

    def tune(self, q: dict) -> dict:
        """Times the expert's choices on some members; keeps the fastest. A choice that fails (no C++ compiler) is told, and dropped."""
        tried, members = {}, q["members"]
        sizes = [b for b in (1, 2, 4, 8) if b <= max(1, len(self.rows(q)))]
        for compiled in (False, True) if q["compile"] else (False,):
            if compiled:
                sizes = [min((v, k) for k, v in tried.items())[1][0]]
            for size in sizes:
                self.case.batch, self.case.compiled = size, compiled
                try:
                    self.timed({**q, "members": members})
                    tried[size, compiled] = min(self.timed({**q, "members": members})["seconds"] for _ in range(2))
                except Exception as e:  # noqa: BLE001  the compiler's own errors are of many kinds
                    if not compiled:
                        raise
                    print(f"torch.compile: {type(e).__name__}: {str(e)[:300]}", file=sys.stderr)
        self.kept[q["work"]] = min((v, k) for k, v in tried.items())[1]
        size, compiled = self.kept[q["work"]]
        return {"batch": size, "compiled": compiled,
                "tried": [{"batch": b, "compiled": c, "seconds": s} for (b, c), s in tried.items()]}

    def profile(self, q: dict) -> dict:
        """Share of the products in the time of all operators."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            self.run(q)
        times = {e.key: e.self_cpu_time_total for e in p.key_averages()}
        total = sum(times.values())
        return {"gemm_share": sum(t for k, t in times.items() if GEMM.search(k)) / total,
                "top": [[k, t / total] for k, t in sorted(times.items(), key=lambda e: -e[1])[:12]]}

    @torch.no_grad()
    def rare(self, q: dict) -> dict:
        """Rollouts (places) and features active in them alone: `targets` rollouts with the most such features, of different groups."""
        rows, sae, active = self.rows(q), self.case.sae, []
        for start in range(0, len(rows), 4):
            job = Job(rows[start : start + 4], "reward")
            x = _layers(self.case, self.case.base.embed_tokens(job.ids), list(self.case.base.layers[: self.case.layer + 1]),
                        torch.arange(job.ids.shape[1])[None])[:, job.p :]
            for one in x:
                top = ((one - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.cfg.k, dim=-1)
                active.append(set(top.indices[top.values > 0].tolist()))
        times = torch.zeros(sae.W_dec.shape[0], dtype=torch.int32)
        for s in active:
            times[list(s)] += 1
        alone = [sorted(i for i in s if times[i] == 1) for s in active]
        places = []
        for i in sorted(range(len(rows)), key=lambda i: -len(alone[i])):
            if len(places) < q["targets"] and rows[i]["group"] not in {rows[j]["group"] for j in places}:
                places.append(i)
        return {"places": places, "features": [alone[i] for i in places], "silent": (times == 0).nonzero()[:, 0].tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    worker = Worker(args.case)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the answers stay clean
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
