#!/bin/bash
# Builds, tests and prints everything about the CUDA engine on a machine with a GPU, in one call of under ten minutes: the op tests against
# doubles and against the CPU, the sweep over M at real shapes, compute-sanitizer on the op tests, whole models on the GPU: the stored cases,
# the contract's example cases, every family against transformers on the same GPU, and bit by bit alone, batched and sent again. Fails on any
# skip. Writes its raw output beside printing it.
# Usage: tests/gpu.sh [--no-build | --pack PACK] [--rehearse] [OUTPUT]      default OUTPUT: docs/benchmarks/gpu-tests.txt
#   --no-build   take build/cuda as it is
#   --pack PACK  take the programs and libraries that deploy/pack.sh packed elsewhere, a folder or an archive: for a machine without network
#   --rehearse   no GPU: the same steps on the CPU engine with small models, to see that the script works; says so in its first and last line
# Needs: a GPU of compute capability 8.0 or later; the toolkit's compute-sanitizer and cuBLASLt; Python with PyTorch, transformers, safetensors
# and tokenizers ($SPURION_PYTHON, default python3); for building, nvcc and Debian 12's packages (deploy/packages.sh test). Data of the
# example cases: the pack's, else $SPURION_SHARED (default ../shared).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 70
# shellcheck source=tests/gpu_setup.sh
. tests/gpu_setup.sh
build=1 pack="" rehearse=0
while [ $# -gt 0 ]; do
    case $1 in
        --no-build) build=0 ;;
        --pack) build=0 pack=${2:?--pack needs a folder or an archive}; shift ;;
        --rehearse) rehearse=1 build=0 ;;
        -*) echo "gpu.sh: unknown option $1" >&2; exit 64 ;;
        *) break ;;
    esac
    shift
done
out=${1:-docs/benchmarks/gpu-tests.txt}
mkdir -p "$(dirname "$out")"
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
device=${SPURION_TEST_DEVICE:-cuda:0} folder=build/cuda
[ $rehearse = 1 ] && device=cpu folder=${SPURION_BUILD:-build/cpu}
started=$(date +%s)
failed=$(mktemp)

step() { echo; echo "=== $* ($(($(date +%s) - started)) s in)"; }

# Runs a command; a status other than 0, or a line that says skip, is a failure. Prints the last $keep lines.
must() {
    local keep=$1 log status=0
    shift
    log=$(mktemp)
    "$@" >"$log" 2>&1 || status=$?
    {
        echo "\$ $*"
        tail -n "$keep" "$log"
        if [ $status -ne 0 ]; then
            echo "FAILED: status $status: $*" | tee -a "$failed"
        elif grep -qiE "\bskip(ped)?\b" "$log"; then
            echo "FAILED: something was skipped: $*" | tee -a "$failed"
            grep -iE "\bskip(ped)?\b" "$log" | head -5
        fi
    } >"$log.out"
    cat "$log.out"
    rm -f "$log" "$log.out"
}

# A step that only a GPU can take.
on_gpu() {
    if [ $rehearse = 1 ]; then
        shift
        echo "rehearsal, not run: $*"
    else
        must "$@"
    fi
}

sanitize() {
    local tool t jobs=0
    for tool in memcheck racecheck; do
        for t in $ops; do
            on_gpu 4 timeout 240 env SPURION_TEST_DEVICE="$device" compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/test_$t" &
            jobs=$((jobs + 1))
            [ $jobs -lt 8 ] || { wait -n; jobs=$((jobs - 1)); }
        done
    done
    wait
}

ops="table rows norm rope activation matrix fused attention sae"
main() {
    local tiny=() t
    [ $rehearse = 0 ] || { echo "REHEARSAL on the CPU: nothing here is a result of a GPU"; tiny=(--tiny); }
    step "the machine, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    on_gpu 5 nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm --format=csv
    if [ $build = 1 ]; then
        step "build"
        must 5 deploy/packages.sh test
        must 4 nvcc --version
        must 15 cmake --preset cuda
        must 5 cmake --build --preset cuda
    else
        echo "not built here: ${pack:-$folder}"
    fi
    gpu_setup "$folder" "$pack"

    step "op tests on $device, against doubles"
    for t in $ops; do
        must 12 env SPURION_TEST_DEVICE="$device" "$bin/test_$t"
    done
    step "op tests on $device, against the CPU; a row's bits for every M at real shapes"
    on_gpu 40 env SPURION_TEST_DEVICE="$device" SPURION_TEST_SHAPES=real "$bin/test_twin"

    step "whole models on $device: stored cases, the contract's example cases"
    export SPURIOND=$bin/spuriond SPURION_PROBE=$bin/spurion-probe SPURION_ENGINE_DEVICE=$device
    must 80 "$python" tests/golden/test_stored.py
    must 120 "$python" tests/golden/example_cases.py "$SPURION_SHARED/data/example_cases" gptj llama refused qwen3
    must 30 "$bin/spuriond" check --config tests/golden/stored/small-llama/config.yaml
    step "whole models of every family on $device against transformers on $device, and against themselves in other company"
    must 60 env TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 "$python" tests/golden/device_parity.py --device "$device" "${tiny[@]}"

    step "compute-sanitizer"
    sanitize

    step "done: $(wc -l <"$failed") failures$([ $rehearse = 0 ] || echo "; a REHEARSAL on the CPU")"
    cat "$failed"
    return $(($(wc -l <"$failed") > 0))
}

main 2>&1 | tee "$out"
status=${PIPESTATUS[0]}
rm -f "$failed"
exit "$status"
