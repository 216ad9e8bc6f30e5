#!/bin/bash
# Measures everything about speed on one GPU in one run of under ten minutes (gpu.py says what): ceilings, GPT-J-6B and Llama-3-8B shapes against
# PyTorch on the same GPU, op classes against their floors, curves. Random weights are made on the machine; nothing is downloaded.
# Usage: tests/bench/gpu.sh [--no-build | --pack PACK] [--tiny] [--work FOLDER] [--seconds 580] [OUTPUT] [-- OPTIONS OF gpu.py]
#   OUTPUT         folder of report.md, report.json, run.txt and the pictures; default docs/benchmarks/gpu
#   --no-build     take build/cuda as it is; --pack PACK: the programs and libraries that deploy/pack.sh packed elsewhere, a folder or an archive
#   --tiny         no GPU: small shapes on the CPU engine, to see that every step works; measures nothing
#   --work FOLDER  20 GB for models and SAEs; default: memory (/dev/shm) where it has room, else /tmp
#   --seconds N    for everything, building included
# In two calls, where one is too short: -- --parts ceilings gptj, then -- --parts llama cut (parts of earlier runs are kept in OUTPUT).
# Status: 0; 1 where a part failed, overran or disagreed in float32.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 70
# shellcheck source=tests/gpu_setup.sh
. tests/gpu_setup.sh
build=1 pack="" tiny=0 work="" seconds=580
while [ $# -gt 0 ]; do
    case $1 in
        --no-build) build=0 ;;
        --pack) build=0 pack=${2:?--pack needs a folder or an archive}; shift ;;
        --tiny) tiny=1 build=0 ;;
        --work) work=${2:?--work needs a folder}; shift ;;
        --seconds) seconds=${2:?--seconds needs a number}; shift ;;
        --) break ;;
        -*) echo "gpu.sh: unknown option $1" >&2; exit 64 ;;
        *) break ;;
    esac
    shift
done
out=docs/benchmarks/gpu
if [ $# -gt 0 ] && [ "$1" != -- ]; then
    out=$1
    shift
fi
[ "${1:-}" != -- ] || shift
mkdir -p "$out"
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
started=$(date +%s)
device=${SPURION_TEST_DEVICE:-cuda:0} folder=build/cuda options=()
if [ $tiny = 1 ]; then
    device=cpu folder=${SPURION_BUILD:-build/cpu} options=(--tiny)
fi

free_kib() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print $4 }'; }

main() {
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(uname -sr), $(nproc) cores"
    if [ $tiny = 0 ]; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,clocks.max.sm,power.limit --format=csv || return 69
    fi
    if [ $build = 1 ]; then
        if ! { deploy/packages.sh test && cmake --preset cuda && cmake --build --preset cuda; } >"$out/build.log" 2>&1; then
            tail -n 20 "$out/build.log"
            return 70
        fi
        rm -f "$out/build.log"
    fi
    gpu_setup "$folder" "$pack"
    if [ -z "$work" ]; then
        work=$gpu_scratch/work
        if [ "$(free_kib /dev/shm)" -gt $((24 << 20)) ]; then
            work=$(mktemp -d /dev/shm/spurion-bench.XXXXXX)
            trap 'rm -rf "$gpu_scratch" "$work"' EXIT
        fi
    fi
    echo "models in $work, $(($(free_kib "$(dirname "$work")") >> 20)) GiB free"
    "$python" tests/bench/gpu.py --bin "$bin" --work "$work" --out "$out" --device "$device" --seconds $((seconds - ($(date +%s) - started))) \
        "${options[@]}" "$@"
}

main "$@" 2>&1 | tee "$out/run.txt"
exit "${PIPESTATUS[0]}"
