"""What can be said of the CUDA kernels without a GPU: registers, spills, shared memory and occupancy on sm_90a, the instructions they hold, and
the bytes and FLOPs of every op at two models' shapes against the floors of an H200. Nothing here was measured.

    python3 tests/tools/kernels_report.py > docs/benchmarks/cuda-static.md

Compiles kernels/cuda/*.cu (nvcc; cuobjdump for the instructions): minutes. tests/kernels/test_cuda_build.py uses the same readers.
"""
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import NormalDist

SOURCE = Path(__file__).resolve().parents[2]
PEAK, BANDWIDTH = 790e12, 4.3e12  # assumed ceilings of an H200: bf16 FLOP/s, byte/s
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 228 << 10, 64, 32  # of a multiprocessor of sm_90; each block takes 1 KiB of shared memory more
INSTRUCTIONS = {"mma": r"\bHMMA\.16816\.F32\.BF16\b", "ldmatrix": r"\bLDSM\b", "cp.async": r"\bLDGSTS\b", "16-byte": r"\b(LDG|STG)\.\S*128\b",
                "local": r"\b(STL|LDL)\b"}


def tool(name):
    """Path of a program of the toolkit: in PATH, in its usual place, or in a Python package that brings it."""
    places = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    places += [str(Path(p) / "triton" / "backends" / "nvidia" / "bin" / name) for p in sys.path]
    return next((p for p in places if p and os.path.exists(p)), None)


def resources(log):
    """(mangled name, target): (registers, spill bytes, static shared bytes) of every kernel in the output of nvcc -res-usage."""
    found, name, spills = {}, None, 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, spills = m.groups(), 0
        elif (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and name:
            spills = int(m[1]) + int(m[2])
        elif (m := re.search(r"Used (\d+) registers", line)) and name:
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = (int(m[1]), spills, int(shared[1]) if shared else 0)
            name = None
    return found


def instructions(path):
    """{mangled name: {instruction: number in the code}} of an object, all targets together: the least of them."""
    program = tool("cuobjdump")
    env = {**os.environ, "PATH": f"{Path(program).parent}:{os.environ['PATH']}"}
    text = subprocess.run([program, "-sass", str(path)], capture_output=True, text=True, env=env, check=True).stdout
    found, counts = {}, None
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            counts = dict.fromkeys(INSTRUCTIONS, 0)
            found.setdefault(m[1], []).append(counts)
        elif counts is not None:
            for name, pattern in INSTRUCTIONS.items():
                counts[name] += bool(re.search(pattern, line))
    return {k: {n: (max if n == "local" else min)(c[n] for c in v) for n in INSTRUCTIONS} for k, v in found.items()}


def launch(name):
    """(threads of a block, dynamic shared bytes, note) as the host code of kernels/cuda asks for them; name is demangled."""
    m = re.match(r"(?:void )?(\w+)<(\d+)(?:, (\d+))?>", name)
    if m and m[1] == "forward_kernel":
        hd = int(m[2])
        queries, keys = 128 if hd <= 128 else 64, 64 if hd <= 80 else 32
        return 128, (queries + 4 * keys) * (hd + 8) * 2
    if m and m[1] == "keys_kernel":
        hd, stages = int(m[2]), int(m[3])
        keys = 128 if hd <= 128 else 64
        return 256, (2 * keys + stages * 128) * (hd + 8) * 2 + 2 * 64 * (keys + 8) * 2 + stages * 512
    if m and m[1] == "queries_kernel":
        hd, warps = int(m[2]), int(m[3])
        rows = warps * (32 if hd <= 128 else 16)
        return 32 * warps, (2 * rows + 128) * (hd + 8) * 2 + 8 * rows
    return (128, 0) if name.startswith("rope_kernel") else (256, 0)


def occupancy(registers, threads, shared):
    """Blocks of a multiprocessor: registers go to warps in steps of 8 a thread."""
    warps = threads // 32
    by = {"registers": REGISTERS // (-(-registers // 8) * 8 * 32) // warps, "shared memory": SHARED // (shared + 1024), "warps": WARPS // warps,
          "blocks": BLOCKS}
    limit = min(by, key=by.get)
    return by[limit], by[limit] * warps, limit


def compile_all(folder):
    """(log, objects) of kernels/cuda for sm_90a."""
    log, objects = "", []
    for source in sorted((SOURCE / "kernels/cuda").glob("*.cu")):
        out = Path(folder) / (source.name + ".o")
        command = [tool("nvcc"), "-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "-Xcompiler=-Wno-format-truncation", "-res-usage", "-I.",
                   "-Ikernels/include", "-Iproto/include", "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr[-3000:])
        log += done.stdout + done.stderr
        objects.append(out)
    return log, objects


def kernel_table(log, objects):
    found = {name: r for (name, _), r in resources(log).items()}
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True).stdout.splitlines()
    counts = {k: v for o in objects for k, v in instructions(o).items()}
    rows = []
    for mangled, name in sorted(zip(found, names), key=lambda p: p[1].replace("void ", "")):
        registers, spills, static = found[mangled]
        plain = re.match(r"(?:void )?(.*?)\(", name)[1]
        threads, dynamic = launch(plain)
        blocks, warps, limit = occupancy(registers, threads, static + dynamic)
        if "forward_kernel" == plain or plain in ("keys_kernel", "queries_kernel"):
            plain, blocks, warps, limit = plain + " (f32)", "–", "–", "head dim"  # shared memory follows the head dim
        c = counts[mangled]
        cells = [f"`{plain}`", threads, registers, spills, static + dynamic, blocks, warps, limit] + [c[n] for n in ("mma", "ldmatrix", "cp.async", "16-byte")]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


SHAPES = {"GPT-J-6B": dict(d=4096, heads=16, kv=16, hd=256, ff=16384, gated=False, norms=1, layers=28),
          "Llama-3-8B": dict(d=4096, heads=32, kv=8, hd=128, ff=14336, gated=True, norms=2, layers=32)}


def candidates(d, F, k):
    """Features of a row whose exact product is computed, were products distributed normally: those within a bound of the k-th largest (sae.cuh;
    1.53e-3 is what rounding to bf16 takes of a row's length, where mantissas are spread evenly on a logarithmic scale)."""
    bound = (2.06 * 1.53e-3 + 1.3e-7 * d + 1e-6) * math.sqrt(d)  # in units of the products' standard deviation |u| |w| / sqrt(d)
    normal = NormalDist()
    return F * (1 - normal.cdf(normal.inv_cdf(1 - k / F) - bound))


def op_rows(m, T=1024, F=65536, k=64):
    """(op, FLOP, bytes moved, bytes of the floor) per token of a forward pass in bf16, all layers; the floor keeps the ops and their types but fuses
    what a product's epilogue could do. GELU stands behind its product already, and what it reads is not kept here; gates have a pass of their own."""
    d, q, kv, ff, n = m["d"], m["heads"] * m["hd"], m["kv"] * m["hd"], m["ff"], m["layers"]
    wide = 2 * ff if m["gated"] else ff
    weights = d * q + 2 * d * kv + q * d + d * wide + ff * d
    outputs = n * (2 * (q + 2 * kv + wide) + 2 * 8 * d)
    rows = [("products: FLOPs; outputs bf16, residual f32 read and written", 2 * weights * n, outputs, outputs),
            ("norms", 0, n * m["norms"] * 6 * d, n * m["norms"] * 6 * d),
            ("rotary of q and k, v to its place", 0, n * 4 * (q + 2 * kv), 0),
            ("activation", 0, *2 * (n * (0 if not m["gated"] else 2 * wide + 2 * ff),)),
            ("attention, causal triangle", 2 * T * q * n, n * (2 * (q + q) + 2 * 2 * kv), n * (2 * (q + q) + 2 * 2 * kv)),
            (f"SAE encode, {F} features, bf16 screen", 2 * d * F, 2 * 4 * F + 4 * d + 2 * d, 4 * d),
            (f"SAE exact products of {candidates(d, F, k):.0f} candidates ({k} at least)", 0, candidates(d, F, k) * 4 * d, k * 4 * d),
            (f"SAE attribution, {k} rows of W_dec", 0, (k + 1) * 4 * d, (k + 1) * 4 * d)]
    return rows


def back_rows(m, T=1024):
    """The same of a backward pass through one block, f32 gradients of the residual stream; the floor with every rounding and rotation in what stands
    before it, and dq, dk, dv in bf16. What GELU reads is kept besides; what gates read is
    written anyway."""
    d, q, kv, ff = m["d"], m["heads"] * m["hd"], m["kv"] * m["hd"], m["ff"]
    wide = 2 * ff if m["gated"] else ff
    weights = d * q + 2 * d * kv + q * d + d * wide + ff * d
    mlp = 2 * ff if m["gated"] else 4 * ff  # dout, or with GELU's slope: its input read, its gradient written
    return [("kept by the forward pass", 0, *2 * ((0 if m["gated"] else 2 * ff) + m["norms"] * 8 * d,)),
            ("products: FLOPs; outputs bf16 but towards the residual", 2 * weights, *2 * (mlp + 2 * q + 4 * d + 4 * d + 8 * d,)),
            ("activation", 0, *2 * (0 if not m["gated"] else 4 * wide + 2 * ff,)),
            ("rounding of the residual's gradient, twice", 0, 2 * 6 * d, 2 * 2 * d),
            ("attention: dout, out, q, k, v; dq, dk, dv f32", 5 * T * q, 3 * 2 * q + 2 * 2 * kv + 4 * (q + 2 * kv), 3 * 2 * q + 2 * 2 * kv + 2 * (q + 2 * kv)),
            ("rotary of dq and dk, rounding of dv", 0, 6 * (q + 2 * kv), 0),
            ("norms", 0, *2 * (2 * 16 * d,))]


def op_table(name, m, rows, pass_):
    out = [f"### {name}, {pass_}", "", f"| op, per token, {pass_} | GFLOP | µs at 790 TFLOP/s | KB moved | µs at 4.3 TB/s | floor KB | µs |", "|---|---|---|---|---|---|---|"]
    for op, flop, moved, floor in rows(m):
        out.append(f"| {op} | {flop / 1e9:.3f} | {flop / PEAK * 1e6:.2f} | {moved / 1e3:.0f} | {moved / BANDWIDTH * 1e6:.3f} | {floor / 1e3:.0f} | {floor / BANDWIDTH * 1e6:.3f} |")
    return out + [""]


def main():
    with tempfile.TemporaryDirectory() as folder:
        rows = kernel_table(*compile_all(folder))
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout.split("release ")[1].split(",")[0]
    print(f"""# The CUDA kernels, read from their objects

Made by `python3 tests/tools/kernels_report.py` with nvcc {version}. **Nothing here was measured, and no GPU was at hand**: registers, spills and instructions
are those of the compiled objects, occupancy is computed from them, times are bytes and FLOPs divided by two assumed ceilings.

## Kernels on sm_90a

Blocks and warps of one multiprocessor, and what limits them; numbers of instructions in the code (loops are partly unrolled).

| kernel | threads | registers | spilled bytes | shared bytes | blocks | warps | limit | mma | ldmatrix | cp.async | 16-byte |
|---|---|---|---|---|---|---|---|---|---|---|---|""")
    print("\n".join(rows))
    print("""
Shared memory without bank conflicts: a tile's rows are HD + 8 elements apart, an odd number of runs of 16 bytes (asserted at compile time), so the eight
rows of an ldmatrix, and the copies of a row, begin in different banks. A warp of 32 queries uses each key that it reads twice: 512 bytes of
shared memory for every 4 mma, where 16 queries read 1 KiB.

## Bytes and FLOPs of the passes

In bf16. The floor keeps each op's types and fuses what a product's epilogue could do (bf16 outputs, rotary, GELU). Products write bf16 where nothing else
is read, and GELU stands behind its product: what is left to gain forward is the rotary pass, which cuBLASLt has no epilogue for; backward, float32 dq, dk
and dv and the roundings before and behind them. With a norm of queries and keys (Qwen3) their products stay float32, which is not in these tables.
Candidates of the screen are counted for normally distributed products; rows that many tokens share come from the second-level cache, which is not counted.
Attribution gathers rows of W_dec: they are float32, and a dense product in float32 without tensor cores (67 TFLOP/s) costs less only above F / 31 active
features of a row, which no dictionary has; F / 184 would hold for a decoder in bf16.
""")
    for name, m in SHAPES.items():
        print("\n".join(op_table(name, m, op_rows, "forward")))
        print("\n".join(op_table(name, m, back_rows, "backward through one block")))


if __name__ == "__main__":
    main()
