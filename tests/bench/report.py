"""From the raw numbers: the tables (Markdown that stands in docs/benchmarks.md as it is) and the pictures."""

import statistics
from pathlib import Path

import case

NAMES = {"spurion": "Spurion", "usual": "p1 usual", "expert": "p2 expert", "saelens": "p3 sae_lens + autograd", "shared": "p2, prompt shared",
         "chain": "bare linear layers", "reward only": "Spurion, reward only", "apart": "Spurion, nothing shared"}


def line(*cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(*cells) -> list[str]:
    return [line(*cells), "|" + "---|" * len(cells)]


def spread(times: list[float]) -> str:
    return f"{(max(times) - min(times)) / statistics.median(times):.0%}"


def seconds(t: float) -> str:
    return f"{t:.3f} s" if t >= 0.1 else f"{t * 1e3:.2f} ms"


def sentence_of(machine: dict) -> str:
    return (f"{machine['cpu']}, {machine['cores']} cores; load {machine['load']:.1f} at the start; {machine['when']}; "
            f"PyTorch {machine['torch']}, transformers {machine['transformers']}, sae-lens {machine['sae_lens']}; Spurion {machine['commit']}.")


# --- contest ---


def contest_table(works: dict, results: dict) -> list[str]:
    out = head("workload", "contestant", "median", "spread", "tokens/s", "Spurion is faster by", "goal", "in products")
    for name, result in results.items():
        work, ours = works[name], statistics.median(result["times"]["spurion"])
        for peer, times in result["times"].items():
            middle = statistics.median(times)
            part = f" ({result['members'][peer]} of {work.group})" if result["members"][peer] < work.group else ""
            factor = "" if peer == "spurion" else f"{middle / ours:.2f}x"
            goal = f"≥ {work.goals[peer]}x" if peer in work.goals and peer != "reward only" else ""
            if peer == "spurion" and "tokens" in work.goals:
                goal = f"≥ {work.goals['tokens']:,} tokens/s"
            if peer == "reward only":
                factor, goal = f"flagging costs {ours / middle:.3f}x", f"≤ {work.goals[peer]}x"
            share = result.get("gemm", {}).get(peer, {}).get("gemm_share")
            if peer == "spurion":
                profile = result["profile"]
                share = sum(profile["ops"][c]["seconds"] for c in ("gemm", "sae_encode")) / profile["engine_s"]
            out.append(line(work.title() if peer == "spurion" else "", NAMES[peer] + part, seconds(middle), spread(times),
                            f"{work.tokens / middle:,.0f}", factor, goal, "" if share is None else f"{share:.0%}"))
    return out


def contest_words(works: dict, results: dict, batches: str = "1 to 8") -> list[str]:
    stamped = {n: r["machine"] for n, r in results.items() if "machine" in r}  # a device's part stamps itself
    newest = max((m["when_s"] for m in stamped.values()), default=0)
    older = [f"{works[n].title()}: {m['when']}, Spurion {m['commit']}, load {m['load']:.1f}" for n, m in stamped.items() if m["when_s"] < newest]
    out = ["", "In runs of their own: " + "; ".join(older) + "."] if older else []
    out += ["", "Shapes are (prompt, completion, group) in tokens; tokens/s counts the prompt with every completion. *in products*: share of matrix "
           "products in the contestant's own time (PyTorch's profiler; `--profile`, with the SAE's encoder). *bare linear layers*: the linear layers "
           "that the expert runs, forward and dX, and its encoder, in PyTorch, with nothing between them. *(n of m)*: n of each group's m members "
           "were run in a round and the time scaled; these contestants share nothing between members."]
    tuned = [f"{works[n].title()}: {r['tuned']['batch']} at once, {'compiled' if r['tuned']['compiled'] else 'eager'}"
             for n, r in results.items() if "tuned" in r]
    if tuned:
        out += ["", f"The expert chose (batch sizes {batches}, then torch.compile of the blocks; the fastest kept): " + "; ".join(tuned) + "."]
    far = [(r["agreement"][d]["spurion"], d, n) for n, r in results.items() for d in r.get("agreement", {})]
    for dtype in ("f32", "bf16"):
        mine = [a for a, d, _ in far if d == dtype]
        if mine:
            out += ["", f"Results before any time was taken, {dtype}, Spurion against the expert: rewards within {max(a['reward_sd'] for a in mine):.1e} sd, "
                    f"attribution sums within {max(a.get('attribution_sum', 0) for a in mine):.1e} (relative to sd + |sum|)."]
    for name, r in results.items():
        if "flagged" in r:
            out += ["", f"{works[name].title()}: {r['watched']} watched features of 3 families, one of them active in {r['active_share']:.1%} of "
                    f"{r['rollouts']} rollouts; {r['flagged']} flagged, ablated and explained; rewards bit-equal to those of *reward only*."]
    return out


def contest_picture(path: Path, works: dict, results: dict, plot) -> None:
    figure, axes = plot.subplots(1, len(results), figsize=(3.1 * len(results), 3.6), squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items()):
        for i, (peer, times) in enumerate(result["times"].items()):
            middle = statistics.median(times)
            axis.bar(i, middle, color="#2166ac" if peer == "spurion" else "#bbbbbb",
                     yerr=[[middle - min(times)], [max(times) - middle]], capsize=3, ecolor="#444444")
            axis.text(i, middle, f"{middle:.2g}", ha="center", va="bottom", fontsize=7)
        axis.set_xticks(range(len(result["times"])), [NAMES[p].replace(" + ", "\n+ ") for p in result["times"]], rotation=60, ha="right", fontsize=7)
        axis.set_title(works[name].title() if name == works[name].name else f"{name.split()[0]}: {works[name].title()}", fontsize=8)
        axis.set_ylabel("s" if axis is axes[0, 0] else "")
    save(figure, path, plot)


# --- roofline ---


def roofline_table(data: dict) -> list[str]:
    out = [f"Copy {data['copy_gbs']:.1f} GB/s (read + written), read {data['read_gbs']:.1f} GB/s. oneDNN's best rates in a tight loop:", ""]
    out += head("M", "N", "K", "dtype", "GFLOP/s", "median")
    out += [line(g["m"], g["n"], g["k"], g["dtype"], f"{g['gflops']:,.0f}", f"{g['gflops_median']:,.0f}") for g in data["gemm"] if g["m"] > 64]
    for work in data["works"].values():
        out += ["", f"{work['title']}: {seconds(work['engine_s'])} in the engine.", ""]
        out += head("class", "ms", "share", "GFLOP/s", "GB/s", "share of ceiling", "ceiling")
        for c in work["classes"]:
            s = c["seconds"]
            rates = (f"{c['flops'] * 1e-9 / s:,.1f}", f"{c['bytes'] * 1e-9 / s:,.1f}") if s > 0 else ("", "")
            out.append(line(c["class"], f"{s * 1e3:.2f}", f"{c['share']:.1%}", *rates, "" if c["ceiling"] is None else f"{c['ceiling']:.2f}", c["by"]))
        products = sum(c["seconds"] for c in work["classes"] if c["class"] in ("gemm", "sae_encode"))
        out += ["", f"Everything that is no product: {1 - products / work['engine_s']:.1%} of the time."]
    out += ["", "*share of ceiling*: products against oneDNN's own best time at the same shapes, FLOPs as counted by the engine; other classes against "
            "the larger of FLOPs over the best product rate and bytes over copy bandwidth (above 1: the operands were still in cache)."]
    return out


def roofline_picture(path: Path, data: dict, plot) -> None:
    figure, axis = plot.subplots(figsize=(7, 4.5))
    peak = {t: max(g["gflops"] for g in data["gemm"] if g["dtype"] == t) for t in ("bf16", "f32")}
    x = [2.0**i for i in range(-5, 13)]
    for dtype, style in (("bf16", "-"), ("f32", "--")):
        axis.plot(x, [min(peak[dtype], v * data["copy_gbs"]) for v in x], style, color="#444444", label=f"{data.get('by', 'oneDNN')} {dtype} {peak[dtype]:,.0f} GFLOP/s, copy {data['copy_gbs']:.0f} GB/s")
    for marker, work in zip("osD^v", data["works"].values()):
        points = [c for c in work["classes"] if c["seconds"] > 0 and c["flops"] > 0 and c["bytes"] > 0]
        axis.scatter([c["flops"] / c["bytes"] for c in points], [c["flops"] * 1e-9 / c["seconds"] for c in points], marker=marker,
                     s=[20 + 300 * c["share"] for c in points], alpha=0.7, label=work["title"])
        for c in points:
            if marker == "o":
                axis.annotate(c["class"], (c["flops"] / c["bytes"], c["flops"] * 1e-9 / c["seconds"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axis.set_title("Op classes of the engine (area: share of time)", fontsize=9)
    axis.legend(fontsize=7)
    save(figure, path, plot)


# --- curves ---

CURVES = {"T": "tokens of a sequence (half prompt, group of 1)", "width": "features of the SAE", "saes": "SAEs of 24k features", "group": "members of a group"}


DEVICE_CURVES = {"T": "tokens of a sequence", "width": "features of the SAE", "saes": "SAEs at one hook", "group": "members of a group"}


def curves_table(data: dict) -> list[str]:
    out = head("against", "value", "(prompt, completion, group)", "µs per completion token", "spread")
    for name, points in data.items():
        for p in points:
            if "skipped" in p:
                out.append(line(name, f"{p['x']:,}", "", f"left out: {p['skipped']}", ""))
            else:
                out.append(line(name, f"{p['x']:,}", f"({p['prompt']}, {p['completion']}, {p['group']})", f"{statistics.median(p['us']):,.1f}", spread(p["us"])))
    return out


def curves_picture(path: Path, data: dict, plot) -> None:
    figure, axes = plot.subplots(1, len(data), figsize=(3.4 * len(data), 3.2), squeeze=False)
    axes = axes[0]
    for axis, (name, points) in zip(axes, data.items()):
        points = [p for p in points if "us" in p]
        middle = [statistics.median(p["us"]) for p in points]
        bars = [[m - min(p["us"]) for m, p in zip(middle, points)], [max(p["us"]) - m for m, p in zip(middle, points)]]
        axis.errorbar([p["x"] for p in points], middle, yerr=bars, marker="o", color="#2166ac", capsize=3)
        axis.set_xlabel(CURVES[name] if name in CURVES else f"{name.split()[0]}: {DEVICE_CURVES[name.split()[1]]}", fontsize=8)
        axis.set_ylim(bottom=0)
        if name.endswith("group"):
            axis.set_xscale("log", base=2)
    axes[0].set_ylabel("µs per completion token", fontsize=8)
    save(figure, path, plot)


# --- load ---


def load_table(data: dict) -> list[str]:
    out = head("model", "(prompt, completion, group)", "engine alone, rollouts/s", "daemon at full load", "share")
    for name, d in data.items():
        engine, daemon = statistics.median(d["engine"]), statistics.median(d["daemon"])
        out.append(line(name, f"({d['prompt']}, {d['completion']}, {d['group']})", f"{engine:,.1f} ({spread(d['engine'])})",
                        f"{daemon:,.1f} ({spread(d['daemon'])})",
                        f"{statistics.median(d['share']):.1%} ({min(d['share']):.1%} to {max(d['share']):.1%})"))
    out += ["", *head("model", "load", "groups/s", "groups", "p50", "p99", "largest")]
    for name, d in data.items():
        for share, v in d["latency"].items():
            out.append(line(name, f"{float(share):.0%}", f"{v['rate']:.2f}", v["groups"], *(f"{v[k]:,.1f} ms" for k in ("p50_ms", "p99_ms", "max_ms"))))
    out += ["", f"Full load: connections that each send a group when they have the last one's verdicts; engine alone: `judge` on rollouts of the same "
            "shape, by its own clock around the engine; both with micro-batches of at most 4,096 tokens, in turns; share: median of "
            "the rounds' shares. Latency: from a group's Poisson arrival to its verdicts at the client, the wait for a "
            "connection, the batch's wait, store and sockets included."]
    return out


def load_picture(path: Path, data: dict, plot) -> None:
    figure, axis = plot.subplots(figsize=(5, 3.2))
    labels, i = [], 0
    for name, d in data.items():
        for share, v in d["latency"].items():
            axis.bar(i - 0.2, v["p50_ms"], 0.4, color="#2166ac", label=None if i else "p50")
            axis.bar(i + 0.2, v["p99_ms"], 0.4, color="#e66101", label=None if i else "p99")
            labels.append(f"{name}\n{float(share):.0%}")
            i += 1
    axis.set_xticks(range(i), labels, fontsize=8)
    axis.set(yscale="log", ylabel="ms")
    axis.legend(fontsize=8)
    save(figure, path, plot)


# --- a device: gpu.py ---


def disagreements(part: dict) -> list[str]:
    """Contestants whose results in float32 were another job's than the expert's. In bf16 the peers' SAE and residual stream are bfloat16, so the
    features they select differ from Spurion's: the tables show it, and nothing fails."""
    return [f"{family} {name}: {NAMES[peer]} does another job than the expert" for family, works in part.get("agreement", {}).items()
            for name, found in works.items() if name.endswith(" f32") for peer, d in found.items() if isinstance(d, dict) and not d["agrees"]]


def agreement_table(found: dict) -> list[str]:
    out = head("results against the expert", "contestant", "worst reward, sd", "worst attribution sum", "top features shared", "within limits")
    for name, contestants in found.items():
        out += [line(name, NAMES[peer], f"{d['reward_sd']:.1e}", f"{d['attribution_sum']:.1e}" if "attribution_sum" in d else "",
                     f"{d['top_features_shared']:.0%}" if "top_features_shared" in d else "", "yes" if d["agrees"] else "**no**")
                for peer, d in contestants.items() if isinstance(d, dict) and peer != "expert"]
    return out


def floors_table(work: dict) -> list[str]:
    """Op classes of one workload against their floors on this device."""
    out = head("class", "ms", "share", "TFLOP/s", "GB/s", "floor, ms", "share of it reached", "floor by")
    for c in work["classes"]:
        s = c["seconds"]
        rates = (f"{c['flops'] * 1e-12 / s:,.1f}", f"{c['bytes'] * 1e-9 / s:,.0f}") if s > 0 else ("", "")
        floor = ("", "") if c["ceiling"] is None else (f"{c['ceiling'] * s * 1e3:.2f}", f"{c['ceiling']:.0%}")
        out.append(line(c["class"], f"{s * 1e3:.2f}", f"{c['share']:.1%}", *rates, *floor, c["by"]))
    return out


def device_model(name: str, part: dict, tiny: bool) -> list[str]:
    import shapes

    works = {w.name: w for w in shapes.workloads(name, tiny)}
    shape = part["shape"]
    out = [f"{shape['num_hidden_layers']} blocks, width {shape['hidden_size']}, {shape['num_attention_heads']} heads ({shape['num_key_value_heads']} "
           f"key/value) of {shape['head_dim']}, random weights, bf16; a {shape['features']:,}-feature TopK({shape['k']}) SAE at half depth, encoded in "
           f"float32 by Spurion; passes of at most {part['tokens_max']:,} tokens; loading ({part.get('load_s') or 0:.1f} s) not counted.", ""]
    results = {n: part["works"][n] for n in works if n in part["works"]}
    if results:
        out += contest_table(works, results) + contest_words(works, results, "4 to 16")
    out += ["", *agreement_table(part["agreement"])] if part["agreement"] else []
    for floor in part["floors"].values():
        out += ["", f"{floor['title']}: {seconds(floor['wall_s'])} from the first byte to the last verdict, {seconds(floor['engine_s'])} of it in the engine. "
                f"Copy {floor['copy_gbs']:,.0f} GB/s.", "", *floors_table(floor)]
    return out


def device_picture(folder: Path, data: dict, plot) -> list[str]:
    """contest.png, roofline.png, curves.png of what is there. Returns the names."""
    import shapes

    parts, made = data["parts"], []
    found = [(name, n, r) for name in shapes.TITLES for n, r in parts.get(name, {}).get("works", {}).items()]
    if found:
        works = {f"{name} {w.name}": w for name in shapes.TITLES for w in shapes.workloads(name, data["tiny"])}
        contest_picture(folder / "contest.png", works, {f"{name} {n}": r for name, n, r in found}, plot)
        made.append("contest")
    floors = {f"{name}: {f['title']}": {"title": f"{shapes.TITLES[name]}, {f['title']}", "classes": f["classes"]} for name in shapes.TITLES
              for f in parts.get(name, {}).get("floors", {}).values()}
    if floors:
        last = next(f for name in reversed(shapes.TITLES) for f in parts.get(name, {}).get("floors", {}).values())
        roofline_picture(folder / "roofline.png", {"gemm": last["gemm"], "copy_gbs": last["copy_gbs"], "works": floors, "by": "torch.mm"}, plot)
        made.append("roofline")
    lines = device_curves(parts)
    if lines:
        curves_picture(folder / "curves.png", lines, plot)
        made.append("curves")
    return made


def device_curves(parts: dict) -> dict:
    return {f"{name} {curve}": points for name, part in parts.items() for curve, points in part.get("curves", {}).items() if points}


def write_device(folder: Path, data: dict) -> Path:
    """Tables and pictures of a run of gpu.py. Returns the Markdown file; its links are those of a page in docs/."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot
    import shapes

    parts, place = data["parts"], folder.name
    made = device_picture(folder, data, plot)
    out = ["Medians of rounds in turns, spread = (slowest − fastest) / median; lengths of a workload are equal, so nobody pays for padding; wall times end "
           "when the last verdict, or PyTorch's last number, is on the host.", ""]
    out += head("part", "took", "budget", "when", "device", "versions", "Spurion", "left out or failed")
    for name, p in parts.items():
        m = p.get("machine", {})
        out.append(line(name, f"{p['took_s']:.0f} s", f"{p['budget_s']:.0f} s", p["when"], f"{m.get('device', data['device'])}, driver {p['driver'] or 'none'}",
                        f"PyTorch {m.get('torch', '?')}, CUDA {m.get('cuda', 'none')}, cuDNN {m.get('cudnn', 'none')}, transformers {m.get('transformers', '?')}",
                        p["commit"], "; ".join(p["cut"] + p.get("failed", []) + disagreements(p) + [p["ended"]] * bool(p["ended"])) or "nothing"))
    if "limits" in parts.get("ceilings", {}):
        limits = parts["ceilings"]["limits"]
        out += ["", "## Ceilings of the device", "", f"Copy {limits['copy_gbs']:,.0f} GB/s (read and written), read {limits['read_gbs']:,.0f} GB/s.", ""]
        out += head("product", "dtype", "TFLOP/s, best", "median")
        out += [line(f"{g['m']} x {g['n']} x {g['k']}", g["dtype"], f"{g['gflops'] * 1e-3:,.1f}", f"{g['gflops_median'] * 1e-3:,.1f}") for g in limits["gemm"]]
    for name, title in shapes.TITLES.items():
        if "works" in parts.get(name, {}):
            out += ["", f"## {title}", "", *device_model(name, parts[name], data["tiny"])]
    if "blocks" in parts.get("cut", {}):
        out += ["", f"## {parts['cut']['blocks']} blocks of the same widths", ""]
        out += agreement_table({f"{family} {n}": d for family, found in parts["cut"]["agreement"].items() for n, d in found.items()})
    if device_curves(parts):
        out += ["", "## How cost grows", "", f"Width and number of SAEs on {parts.get('cut', {}).get('blocks', '?')} blocks of GPT-J's widths: the dictionaries' own cost "
                "does not depend on how many blocks there are.", "", *curves_table(device_curves(parts))]
    for name in made:
        out += ["", f"![{name}](benchmarks/{place}/{name}.png)"]
    path = folder / "report.md"
    path.write_text("\n".join(out) + "\n")
    return path


# --- the whole ---


def save(figure, path: Path, plot) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plot.close(figure)


def write(folder: Path, data: dict) -> Path:
    """Tables and pictures of every part that data holds. Returns the Markdown file; its links are those of a page in docs/."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    works = {w.name: w for w in case.workloads(data["tiny"])}
    parts = {
        "contest": ("Against PyTorch", lambda d: contest_table(works, d) + contest_words(works, d), lambda p, d: contest_picture(p, works, d, plot)),
        "roofline": ("Where the time goes", roofline_table, lambda p, d: roofline_picture(p, d, plot)),
        "curves": ("How cost grows", curves_table, lambda p, d: curves_picture(p, d, plot)),
        "load": ("The daemon under load", load_table, lambda p, d: load_picture(p, d, plot)),
    }
    shape = data["shape"]
    out = [f"{shape['num_hidden_layers']} blocks, width {shape['hidden_size']}, {shape['num_attention_heads']} heads ({shape['num_key_value_heads']} key/value), "
           f"random weights, bf16; a {shape['features']:,}-feature TopK({shape['k']}) SAE at half depth, which Spurion encodes in float32; 2 threads each; "
           "loading not counted; medians of rounds in turns, spread = (slowest − fastest) / median."]
    for name, (title, table, picture) in parts.items():
        if name in data["parts"]:
            picture(folder / f"{name}.png", data["parts"][name])
            out += ["", f"## {title}", "", sentence_of(data["machines"][name]), "", f"![{title}](benchmarks/{name}.png)", "", *table(data["parts"][name])]
    path = folder / "report.md"
    path.write_text("\n".join(out) + "\n")
    return path
