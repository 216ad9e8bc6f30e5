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
sys.path.insert(0, str(SOURCE / "tests" / "tools"))

from kernels_report import instructions, resources, tool  # noqa: E402

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
    found = {k: v[:2] for k, v in resources(built[1]).items()}
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


@pytest.mark.parametrize("file", TENSOR)
def test_cuda_attention_holds_tensor_core_instructions(built, file):
    """Products on tensor cores from fragments that ldmatrix brings, keys and queries by copies that run along, nothing in local memory."""
    if tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump and nvdisasm")
    objects = list(built[0].rglob(f"{file}.o"))
    assert len(objects) == 1, objects
    counts = instructions(objects[0])
    assert not [k for k, c in counts.items() if c["local"] > 0], counts
    for kernel in TENSOR[file]:
        for hd in HEAD_DIMS:
            here = [c for k, c in counts.items() if f"{kernel}ILi{hd}E" in k]
            # 16 queries by 32 keys at least: per warp hd / 16 steps of 4 tiles, and 2 steps of hd / 8 tiles; one ldmatrix for at most 4 mma
            assert here and all(c["mma"] >= hd // 2 and c["ldmatrix"] >= c["mma"] // 4 and c["cp.async"] >= 4 for c in here), f"{kernel}<{hd}>: {here}"
