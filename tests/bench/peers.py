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
--device cuda:0 runs all of it on a GPU: times end when the device has finished. GPT-J's own attention in transformers is eager; the expert puts
torch's fused one in its place. Without sae_lens the dictionary is read as it lies in the file, and the contestant `saelens` is not there.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import MethodType, SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, DynamicCache  # noqa: E402
from transformers import __version__ as transformers_version  # noqa: E402

import case as bench_case  # noqa: E402

TOP = 32
ROWS_AT_ONCE = {"cpu": 256, "cuda": 2048}
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (4, 8, 16)}
USUAL_BATCH = 8
KERNEL = re.compile(r"^(?!.*(flash|fmha|attention|softmax)).*(gemm|gemv|nvjet|xmma|cublas|splitk)", re.IGNORECASE)
GEMM = re.compile(r"(^|::)(addmm|mm|bmm|baddbmm|linear|matmul|_linear_pointwise|mkldnn_linear\w*|_addmm_activation|mkldnn_convolution)(\.|$)")


class Lens:
    """A TopK dictionary of SAELens' form, where sae_lens is not installed: the same names, no methods."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        from safetensors.torch import load_file

        config = json.loads((folder / "cfg.json").read_text())
        self.cfg = SimpleNamespace(k=config["k"], metadata=SimpleNamespace(hook_name=config["metadata"]["hook_name"]))
        for name, value in load_file(folder / "sae_weights.safetensors", device=device).items():
            setattr(self, name, value.to(dtype))


def load_lens(folder: Path, device: str, dtype: torch.dtype):
    try:
        from sae_lens.saes.sae import SAE
    except ImportError:
        return Lens(folder, device, dtype)
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    return SAE.load_from_disk(str(folder), device=device, dtype=name).eval().requires_grad_(False)


class LlamaParts:
    """What the hand-written passes need of a family: its parts, and a block's call."""

    def __init__(self, net):
        self.base, self.layers, self.embed, self.norm = net.model, net.model.layers, net.model.embed_tokens, net.model.norm

    def fused_attention(self, on: bool) -> None:
        pass  # attn_implementation="sdpa" says it

    def shared(self, x, position) -> dict:
        return {"position_embeddings": self.base.rotary_emb(x, position)}

    @staticmethod
    def call(layer, x, position, cache, mask, shared):
        return _first(layer(x, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=cache is not None, **shared))


class GptjParts:
    def __init__(self, net):
        base = net.transformer
        self.base, self.layers, self.embed, self.norm = base, base.h, base.wte, base.ln_f
        for layer in self.layers:
            layer.attn.fused, layer.attn._attn = False, MethodType(_either, layer.attn)

    def fused_attention(self, on: bool) -> None:
        for layer in self.layers:
            layer.attn.fused = on

    def shared(self, _x, _position) -> dict:
        return {}

    @staticmethod
    def call(layer, x, position, cache, mask, _shared):
        return _first(layer(x, attention_mask=mask, position_ids=position, layer_past=cache, use_cache=cache is not None))


def _either(attention, query, key, value, attention_mask=None):
    """GPT-J's own eager attention, or torch's fused one: a flag, so that a compiled block stays valid when others take their turn."""
    if not attention.fused:
        return type(attention)._attn(attention, query, key, value, attention_mask)
    out = torch.nn.functional.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, attn_mask=attention_mask,
                                                           is_causal=attention_mask is None, scale=1.0 / attention.scale_attn)
    return out, None


class Case:
    """Model and SAE in one dtype on one device, and what was tried for the expert."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        kind = json.loads((folder / "model/config.json").read_text())["model_type"]
        straight = device != "cpu" and importlib.util.find_spec("accelerate") is not None  # from the file to the device
        self.net = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=dtype, device_map=device if straight else None,
                                                                      attn_implementation="eager" if kind == "gptj" else "sdpa").to(device).eval()
        self.parts = {"llama": LlamaParts, "gptj": GptjParts}[kind](self.net)
        self.base = self.parts.base
        self.sae = load_lens(folder / "saes/mid", device, dtype)
        self.layer = int(self.sae.cfg.metadata.hook_name.split(".")[1])
        self.rows_at_once = ROWS_AT_ONCE[torch.device(device).type]
        self.batch, self.compiled, self._compiled_call, self._rows = USUAL_BATCH, False, None, {}

    @property
    def layers(self) -> list:
        return list(self.parts.layers)

    def random_rows(self, count: int, width: int):
        """The same rows at every call: making them is nobody's time but the first one's."""
        if (count, width) not in self._rows:
            self._rows[count, width] = torch.randn(count, width, device=self.device).to(self.dtype)
        return self._rows[count, width]

    @property
    def call(self):
        """A block's forward; compiled once for all blocks, whose weights are inputs of the graph."""
        if not self.compiled:
            return self.parts.call
        if self._compiled_call is None:
            torch._dynamo.config.recompile_limit = 64
            self._compiled_call = torch.compile(self.parts.call, dynamic=False)
        return self._compiled_call


class Job:
    """A batch: prompts (G, P) and completions (G, C); path: fractions of integrated gradients, or None."""

    def __init__(self, rows: list[dict], kind: str, device: str):
        self.kind = kind
        self.prompts = torch.tensor([r["prompt_ids"] for r in rows], device=device)
        self.completions = torch.tensor([r["completion_ids"] for r in rows], device=device)
        self.ids = torch.cat([self.prompts, self.completions], dim=1)
        self.p, self.size = self.prompts.shape[1], len(rows)
        n = bench_case.IG_STEPS
        self.path = [(i + 0.5) / n for i in range(n)] if kind == "ig" else None


def summary(rewards, attribution, error, bias) -> list[dict]:
    """What a verdict holds: reward, sums, and the TOP features of every member. attribution (G, m)."""
    top = attribution.abs().topk(TOP, dim=-1).indices.cpu()
    rewards, attribution, error, bias = rewards.detach().cpu(), attribution.sum(-1).cpu(), error.cpu(), bias.cpu()
    return [{"reward": float(rewards[i]), "attribution_sum": float(attribution[i]), "error_attribution": float(error[i]),
             "bias_attribution": float(bias[i]), "features": top[i].tolist()} for i in range(len(rewards))]


def plain(rewards) -> list[dict]:
    return [{"reward": float(r)} for r in rewards.cpu()]


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def _hooked(case: Case, ids, hook):
    """Rewards of a pass whose residual stream at the SAE goes through hook(x)."""
    def call(_module, _args, out):
        x = hook(_first(out))
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = case.layers[case.layer].register_forward_hook(call)
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
    shared, call = case.parts.shared(x, position), case.call
    for layer in layers:
        x = call(layer, x, position, cache, mask, shared)
    return x


def _head(case: Case, last):
    return case.net.score(case.parts.norm(last[:, -1]))[:, 0]


def _sparse(case: Case, x, g) -> tuple:
    """Attribution (m), error and bias of one member from x and g (|C|, d), by the active rows only."""
    sae = case.sae
    top = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).topk(sae.cfg.k, dim=-1, sorted=False)
    f, index = top.values.relu(), top.indices
    attribution = torch.zeros(sae.W_dec.shape[0], device=case.device)
    error = torch.zeros((), device=case.device)
    for start in range(0, len(x), case.rows_at_once):
        part = slice(start, start + case.rows_at_once)
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
    a = torch.tensor(job.path, dtype=case.dtype, device=case.device)[:, None, None]
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
    position = torch.arange(job.ids.shape[1], device=case.device)[None]
    if job.kind == "reward":
        with torch.no_grad():
            return plain(_head(case, _layers(case, case.parts.embed(job.ids), case.layers, position)))
    with torch.no_grad():
        below = _layers(case, case.parts.embed(job.ids), case.layers[: case.layer + 1], position)
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
    position = torch.arange(p, p + n, device=case.device)[None]
    mask = torch.ones(n, p + n, dtype=torch.bool, device=case.device).tril(p)[None, None].expand(size, 1, -1, -1)
    layers = case.layers
    with torch.no_grad():
        _layers(case, case.parts.embed(job.prompts[:1]), layers, torch.arange(p, device=case.device)[None], cache)
        cache.batch_repeat_interleave(size)
        below = _layers(case, case.parts.embed(job.completions), layers[: case.layer + 1], position, cache, mask)
        if job.kind == "reward":
            return plain(_head(case, _layers(case, below, layers[case.layer + 1 :], position, cache, mask)))
    leaf = below.clone().requires_grad_(True)
    rewards = _head(case, _layers(case, leaf, layers[case.layer + 1 :], position, cache, mask))
    (g,) = torch.autograd.grad(rewards.sum(), leaf)
    return _finish(case, rewards, leaf.detach(), g)


# --- the bare chain ---


def _block(layer, buffers: dict, gradient: bool) -> None:
    """The block's linears: forward, or dX = dY W. buffers: rows of random numbers by width."""
    for w in layer.modules():
        if isinstance(w, torch.nn.Linear):
            if gradient:
                torch.mm(buffers[w.weight.shape[0]], w.weight)
            else:
                torch.nn.functional.linear(buffers[w.weight.shape[1]], w.weight)


@torch.no_grad()
def chain(case: Case, job: Job) -> list[dict]:
    length, c = job.ids.shape[1], job.completions.shape[1]
    widths = {n for w in case.layers[0].modules() if isinstance(w, torch.nn.Linear) for n in w.weight.shape} | {case.base.config.hidden_size}
    buffers = {n: case.random_rows(job.size * length, n) for n in widths}
    for layer in case.layers:
        _block(layer, buffers, False)
    if job.kind != "reward":
        for _ in job.path or (None,):
            for layer in case.layers[case.layer + 1 :]:
                if job.path:
                    _block(layer, buffers, False)
                _block(layer, buffers, True)
        torch.mm(buffers[case.base.config.hidden_size][: job.size * c], case.sae.W_enc)
    return []


PEERS = {"usual": usual, "expert": expert, "saelens": saelens, "shared": shared, "chain": chain}


# --- the worker ---


class Worker:
    def __init__(self, folder: Path, device: str):
        self.folder, self.device, self.case = folder, device, None
        self.kept, self.usual = {}, {}  # (batch, compiled) of the expert by workload; batch by workload and peer

    def answer(self, q: dict) -> dict:
        """q: do, dtype, peer, and what the method takes."""
        if q["do"] == "ceilings":
            return ceilings(self.device, q["shapes"], q["copy_bytes"], q["seconds"])
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[q["dtype"]]
        if self.case is None or self.case.dtype != dtype:
            self.case = None  # frees the other one first
            self.case = Case(self.folder, dtype, self.device)
        self.case.net.requires_grad_(q["peer"] in ("usual", "saelens"))
        self.case.parts.fused_attention(q["peer"] not in ("usual", "saelens"))
        return {"run": self.run, "tune": self.tune, "profile": self.profile, "rare": self.rare, "load": lambda _: {}}[q["do"]](q)

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
            self.case.batch, self.case.compiled = self.usual.get((q["work"], q["peer"]), USUAL_BATCH), False
        found = self.usual_batch(q)
        if q["peer"] not in ("expert", "chain"):
            self.usual[q["work"], q["peer"]] = self.case.batch
        return found

    def timed(self, q: dict) -> dict:
        rows, found = self.rows(q), {}
        wait(self.device)
        begin = time.perf_counter()
        for places in self.batches(q, rows):
            answers = PEERS[q["peer"]](self.case, Job([rows[i] for i in places], q["kind"], self.device))
            found.update(zip(places, answers))
        wait(self.device)
        took = time.perf_counter() - begin
        return {"seconds": took, "rows": [found[i] for i in sorted(found)], "batch": self.case.batch}

    def usual_batch(self, q: dict) -> dict:
        """What one writes first runs out of memory first: its batch is halved until it fits."""
        while True:
            try:
                return self.timed(q)
            except torch.OutOfMemoryError:
                if self.case.batch == 1:
                    raise
                self.case.batch //= 2
                torch.cuda.empty_cache()
                print(f"{q['peer']}: out of memory, batches of {self.case.batch}", file=sys.stderr)

    def tune(self, q: dict) -> dict:
        """Times the expert's choices on some members; keeps the fastest. A choice that fails (no C++ compiler) is told, and dropped."""
        tried, members = {}, q["members"]
        sizes = [b for b in BATCHES[torch.device(self.device).type] if b <= max(1, len(self.rows(q)))] or [1]
        for compiled in (False, True) if q["compile"] else (False,):
            if compiled:
                sizes = [min((v, k) for k, v in tried.items())[1][0]]
            for size in sizes:
                self.case.batch, self.case.compiled = size, compiled
                if q.get("until"):
                    signal.alarm(max(1, int(q["until"] - time.time())))
                try:
                    self.timed({**q, "members": members})
                    tried[size, compiled] = min(self.timed({**q, "members": members})["seconds"] for _ in range(2))
                except Exception as e:  # noqa: BLE001  the compiler's own errors are of many kinds
                    if not compiled and not (isinstance(e, (torch.OutOfMemoryError, TimeoutError)) and tried):
                        raise
                    print(f"expert, batches of {size}, {'compiled' if compiled else 'eager'}: {type(e).__name__}: {str(e)[:300]}", file=sys.stderr)
                finally:
                    signal.alarm(0)
                if q.get("until") and time.time() > q["until"]:
                    print(f"{q['work']}: the expert's trials end here: the time for them is over", file=sys.stderr)
                    break
        self.kept[q["work"]] = min((v, k) for k, v in tried.items())[1]
        size, compiled = self.kept[q["work"]]
        return {"batch": size, "compiled": compiled,
                "tried": [{"batch": b, "compiled": c, "seconds": s} for (b, c), s in tried.items()]}

    def profile(self, q: dict) -> dict:
        """Share of the products in the time of all operators; of all kernels, on a GPU."""
        kinds, gpu = torch.profiler.ProfilerActivity, self.device != "cpu"
        with torch.profiler.profile(activities=[kinds.CUDA] if gpu else [kinds.CPU]) as p:
            self.run(q)
        times = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in p.key_averages()}
        total, name = sum(times.values()) or 1.0, KERNEL if gpu else GEMM
        return {"gemm_share": sum(t for k, t in times.items() if name.search(k)) / total,
                "top": [[k[:120], t / total] for k, t in sorted(times.items(), key=lambda e: -e[1])[:12]]}

    @torch.no_grad()
    def rare(self, q: dict) -> dict:
        """Rollouts (places) and features active in them alone: `targets` rollouts with the most such features, of different groups.

        margin: active by so much of the k-th largest value at least, and elsewhere missing it by so much; 0: active or not.
        """
        rows, sae, best, edge = self.rows(q), self.case.sae, [], 0.0
        for start in range(0, len(rows), 4):
            job = Job(rows[start : start + 4], "reward", self.device)
            x = _layers(self.case, self.case.parts.embed(job.ids), self.case.layers[: self.case.layer + 1],
                        torch.arange(job.ids.shape[1], device=self.device)[None])[:, job.p :]
            for one in x:
                pre = ((one - sae.b_dec) @ sae.W_enc + sae.b_enc).float()
                least = pre.topk(sae.cfg.k, dim=-1).values[:, -1:]
                best.append(torch.where(pre > 0, pre - least, -torch.inf).amax(0).cpu())
                edge += float(least.mean()) * q.get("margin", 0.0) / len(rows)
        best = torch.stack(best)  # (rollouts, features): how far above the k-th largest, at best
        active, near = best >= edge, best >= -edge
        alone = [(active[i] & (near.sum(0) == 1)).nonzero()[:, 0].tolist() for i in range(len(rows))]
        places = []
        for i in sorted(range(len(rows)), key=lambda i: -len(alone[i])):
            if len(places) < q["targets"] and rows[i]["group"] not in {rows[j]["group"] for j in places}:
                places.append(i)
        return {"places": places, "features": [alone[i] for i in places], "silent": (near.sum(0) == 0).nonzero()[:, 0].tolist()}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _rates(call, seconds: float, device: str, work: float) -> tuple[float, float]:
    """Best and median rate (work per second) of calls timed one by one for so long, after two unmeasured ones."""
    took, end = [], time.perf_counter() + seconds
    for n in range(1000):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        took.append(time.perf_counter() - begin)
        if n >= 4 and time.perf_counter() > end:
            break
    took = sorted(took[2:])
    return work / took[0], work / took[len(took) // 2]


@torch.no_grad()
def ceilings(device: str, shapes: list, copy_bytes: int, seconds: float) -> dict:
    """What torch reaches on this device: a large copy (bytes read and written), and x (M, K) w (N, K)^T on random numbers, as bench_ceilings.c says it."""
    block = torch.empty(copy_bytes // 4, dtype=torch.float32, device=device).uniform_()
    other = torch.empty_like(block)
    copied, _ = _rates(lambda: other.copy_(block), seconds, device, 2e-9 * copy_bytes)
    read, _ = _rates(lambda: torch.sum(block), seconds, device, 1e-9 * copy_bytes)
    del block, other
    out = []
    for m, n, k, name in shapes:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[name]
        x, w = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
        best, middle = _rates(lambda: torch.mm(x, w.T), seconds, device, 2e-9 * m * n * k)
        out.append({"m": m, "n": n, "k": k, "dtype": name, "gflops": best, "gflops_median": middle})
    if device != "cpu":
        torch.cuda.empty_cache()
    return {"copy_gbs": copied, "read_gbs": read, "gemm": out}


def machine_of(device: str) -> dict:
    """Versions, and what the device says of itself."""
    found = {"torch": torch.__version__, "transformers": transformers_version}
    if device != "cpu":
        p = torch.cuda.get_device_properties(device)
        found |= {"device": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count,
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def out_of_time(_signal, _frame):
    raise TimeoutError("the time for the expert's trials is over")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    worker = Worker(args.case, args.device)
    signal.signal(signal.SIGALRM, out_of_time)
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the answers stay clean
    print(json.dumps(machine_of(args.device)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
