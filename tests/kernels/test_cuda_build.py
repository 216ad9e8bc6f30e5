"""The CUDA preset, where nvcc is: it compiles and links, its table has no hole, its kernels hold tensor-core instructions and do not spill.

Needs no GPU and shows nothing about one.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(os.environ.get("SPURION_SOURCE", Path(__file__).resolve().parents[2]))
SPILL_BYTES_MAX = 0     # stores and loads, of every kernel but those below
SPILLS_ALLOWED = {"attention_f32": 128}  # plain f32 attention: exactness, not speed
REGISTERS_MAX = 255     # what the hardware can give one thread
TENSOR = {"attention.cu": ("forward_kernel",), "attention_backward.cu": ("keys_kernel", "queries_kernel")}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, build log): a fresh build, so that the log holds every kernel's registers and spills."""
    if shutil.which("nvcc") is None and not os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("cuda")
    env = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/local/cuda/bin"}
    done = subprocess.run(["cmake", "--preset", "cuda", "-B", str(folder)], cwd=SOURCE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "building the CPU and CUDA engines" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    done = subprocess.run(["cmake", "--build", str(folder), "--target", "spuriond", "test_table"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    return folder, done.stdout


def kernels(log):
    """(mangled name, target): (registers, spill bytes) of every kernel in a build log with -res-usage."""
    found, name, spills = {}, None, 0
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, spills = m.groups(), 0
        elif (m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and name:
            spills = int(m[1]) + int(m[2])
        elif (m := re.search(r"Used (\d+) registers", line)) and name:
            found[name] = (int(m[1]), spills)
            name = None
    return found


def test_cuda_links_and_the_daemon_holds_both_engines(built):
    folder, _ = built
    done = subprocess.run([folder / "bin" / "spuriond", "version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linked = subprocess.run(["ldd", folder / "bin" / "spuriond"], capture_output=True, text=True).stdout
    assert "libcublasLt" in linked, linked


def test_cuda_table_has_no_hole(built):
    folder, _ = built
    done = subprocess.run([folder / "bin" / "test_table"], cwd=SOURCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_kernels_do_not_spill(built):
    found = kernels(built[1])
    targets = {target for _, target in found}
    assert {"sm_80", "sm_90a"} <= targets, targets
    for name in ("forward_kernel", "keys_kernel", "queries_kernel"):
        for hd in HEAD_DIMS:
            assert sum(f"{name}ILi{hd}E" in k for k, _ in found) >= 2, f"{name}<{hd}> is not in the build log"
    for (name, target), (registers, spills) in sorted(found.items()):
        print(f"{target} {registers:4d} registers {spills:4d} bytes spilled  {name}")
    plain = [k for k in found if re.search(r"\d(forward|keys|queries)_kernel22", k[0])]  # not templates: attention_f32.cu
    assert len(plain) >= 6, plain
    allowed = {k: SPILLS_ALLOWED["attention_f32"] if k in plain else SPILL_BYTES_MAX for k in found}
    bad = {k: v for k, v in found.items() if v[1] > allowed[k] or v[0] > REGISTERS_MAX}
    assert not bad, bad


def disassembler():
    places = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    places += [str(Path(p) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump") for p in sys.path]
    return next((p for p in places if p and os.path.exists(p)), None)


@pytest.mark.parametrize("file", TENSOR)
def test_cuda_attention_holds_tensor_core_instructions(built, file):
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    objects = list(built[0].rglob(f"{file}.o"))
    assert len(objects) == 1, objects
    env = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    text = subprocess.run([tool, "-sass", str(objects[0])], capture_output=True, text=True, env=env)
    assert text.returncode == 0, text.stderr
    counts, name = {}, None
    for line in text.stdout.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            name = m[1]
        elif name and re.search(r"\bHMMA\.16816\.F32\.BF16\b", line):
            counts[name] = counts.get(name, 0) + 1
        elif name and re.search(r"\b(STL|LDL)\b", line):
            counts[name + " local"] = counts.get(name + " local", 0) + 1
    for kernel in TENSOR[file]:
        for hd in HEAD_DIMS:
            here = [n for k, n in counts.items() if f"{kernel}ILi{hd}E" in k and not k.endswith(" local")]
            # 64 x 64 scores and their product with 64 rows: per warp hd / 16 steps of 8 tiles, and 4 steps of hd / 8 tiles
            assert here and min(here) >= hd // 16 * 4, f"{kernel}<{hd}>: {here} tensor-core instructions"
    assert not [k for k in counts if k.endswith(" local")], "local memory in " + ", ".join(k for k in counts if k.endswith(" local"))
