#!/bin/bash
# Packs a build for a machine without network or packages: the programs, every shared library that they load and that no machine is bound to
# have, and what tests/gpu.sh reads. The programs find their libraries beside them ($ORIGIN/../lib, set by the presets); nothing is installed.
# Usage: deploy/pack.sh [--build build/cuda] [--data FOLDER] [--wheels FOLDER] [--archive] OUT
#   --data FOLDER    example cases of the contract (FOLDER/data/example_cases), for tests/gpu.sh
#   --wheels FOLDER  Python wheels that the other machine lacks; tests/gpu.sh and tests/bench/gpu.sh install them into a folder of their own
#   --archive        OUT.tar.xz instead of the folder OUT
# Not packed: glibc (the other machine's must be as new as this one's), the driver, and CUDA's libraries, of which cuBLASLt is loaded: the
# other machine's toolkit or PyTorch has it. Needs binutils and Python 3. Status: 0; 65 something is missing; 64 usage.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/cuda data="" wheels="" archive=0
usage() { sed -n '4p' "$0" | cut -c3- >&2; exit 64; }
while [ $# -gt 1 ]; do
    case $1 in
        --build) build=$2; shift 2 ;;
        --data) data=$2; shift 2 ;;
        --wheels) wheels=$2; shift 2 ;;
        --archive) archive=1; shift ;;
        *) usage ;;
    esac
done
if [ $# != 1 ] || [ "${1#-}" != "$1" ]; then usage; fi
out=$1
fail() { echo "pack.sh: $*" >&2; exit 65; }

programs="spuriond spurion spurion-probe test_table test_rows test_norm test_rope test_activation test_matrix test_fused test_attention test_sae test_twin"
# Of every Linux, or of the driver and the toolkit: not ours to bring.
theirs='^(linux-vdso|ld-linux.*|libc|libm|libdl|librt|libpthread|libresolv|libutil|libnss_.*|libcuda|libcublas.*|libcudart|libcudnn.*|libnv.*)\.so'

rm -rf "$out" "$out.tar.xz"
mkdir -p "$out/bin" "$out/lib"
for p in $programs; do
    [ -x "$build/bin/$p" ] || fail "expected $build/bin/$p, found none (build with -DSPURION_TESTS=ON)"
    readelf -d "$build/bin/$p" | grep RPATH | grep -qF "\$ORIGIN/../lib" || fail "$p: expected the run path \$ORIGIN/../lib, found none; configure by a preset"
    strip -o "$out/bin/$p" "$build/bin/$p"
done
for p in $programs; do
    ldd "$build/bin/$p"
done | awk '$2 == "=>" && $3 ~ /^\// { print $1, $3 }' | sort -u | while read -r name path; do
    echo "$name" | grep -qE "$theirs" || cp -L "$path" "$out/lib/$name"
done
if [ -n "$data" ]; then
    mkdir -p "$out/shared/data"
    cp -rL "$data/data/example_cases" "$out/shared/data/"
fi
if [ -n "$wheels" ]; then
    mkdir -p "$out/wheels"
    cp "$wheels"/*.whl "$out/wheels/"
fi

# Every library must now come from the pack, or be one of theirs.
for p in $programs; do
    ldd "$out/bin/$p"
done | awk '{ print $1, $3 }' | sort -u | while read -r name path; do
    case $path in
        "$(cd "$out" && pwd)"/*) ;;
        *) echo "${name##*/}" | grep -qE "$theirs" || fail "$name would come from ${path:-nowhere}, not from the pack" ;;
    esac
done
if [ $archive = 1 ]; then
    python3 - "$out" <<'PYTHON'
import sys
import tarfile

with tarfile.open(sys.argv[1] + ".tar.xz", "w:xz", preset=6) as tar:
    tar.add(sys.argv[1], arcname="pack")
PYTHON
    rm -rf "$out"
    out=$out.tar.xz
fi
echo "$out: $(du -sk --apparent-size "$out" | cut -f1) KiB, $(echo "$programs" | wc -w) programs"
