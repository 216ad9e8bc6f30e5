#!/bin/bash
# Builds, tests and prints everything about the CUDA engine on a machine with a GPU, in one call of under ten minutes: the op tests against
# doubles and against the CPU, the sweep over M at real shapes, compute-sanitizer on the op tests, the stored and the contract's example cases
# on the GPU. Fails on any skip. Writes its raw output beside printing it.
# Usage: tests/gpu.sh [--no-build] [OUTPUT]      default OUTPUT: docs/benchmarks/gpu-tests.txt
#   --no-build   take build/cuda as it is (built elsewhere with the preset cuda and brought here with its libraries), for a machine without network
# Needs: a GPU of compute capability 8.0 or later, the CUDA toolkit (nvcc, cuBLASLt, compute-sanitizer), Debian 12's packages
# (deploy/packages.sh test). Data of the example cases: $SPURION_SHARED (default ../shared); their two pickled dictionaries need PyTorch in
# $SPURION_PYTHON (default python3), or their converted twins (ae.safetensors) beside them.
set -uo pipefail
cd "$(dirname "$0")/.."
build=1
[ "${1:-}" = --no-build ] && { build=0; shift; }
out=${1:-docs/benchmarks/gpu-tests.txt}
mkdir -p "$(dirname "$out")"
export PATH="$PATH:/usr/local/cuda/bin" OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
export SPURION_SHARED=${SPURION_SHARED:-$PWD/../shared}
device=${SPURION_TEST_DEVICE:-cuda:0}
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

ops="table rows norm rope activation matrix attention sae"
main() {
    step "the machine, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    must 5 nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm --format=csv
    if [ $build = 1 ]; then
        step "build"
        must 5 deploy/packages.sh test
        must 4 nvcc --version
        must 15 cmake --preset cuda
        must 5 cmake --build --preset cuda
    else
        echo "not built here: build/cuda as it was brought"
    fi

    step "op tests on $device, against doubles"
    for t in $ops; do
        must 12 env SPURION_TEST_DEVICE="$device" build/cuda/bin/test_$t
    done
    step "op tests on $device, against the CPU; a row's bits for every M at real shapes"
    must 40 env SPURION_TEST_DEVICE="$device" SPURION_TEST_SHAPES=real build/cuda/bin/test_twin

    step "compute-sanitizer, all at once"
    for tool in memcheck racecheck; do
        for t in $ops; do
            must 4 timeout 240 env SPURION_TEST_DEVICE="$device" compute-sanitizer --tool $tool --error-exitcode 9 build/cuda/bin/test_$t &
        done
    done
    wait

    step "whole models on $device: stored cases, the contract's example cases"
    local python=${SPURION_PYTHON:-python3}
    export SPURIOND=$PWD/build/cuda/bin/spuriond SPURION_ENGINE_DEVICE=$device
    must 80 "$python" tests/golden/test_stored.py
    must 120 "$python" tests/golden/example_cases.py "$SPURION_SHARED/data/example_cases" gptj llama refused qwen3
    must 30 build/cuda/bin/spuriond check --config tests/golden/stored/small-llama/config.yaml

    step "done: $(wc -l <"$failed") failures"
    cat "$failed"
    return $(($(wc -l <"$failed") > 0))
}

main 2>&1 | tee "$out"
status=${PIPESTATUS[0]}
rm -f "$failed"
exit "$status"
