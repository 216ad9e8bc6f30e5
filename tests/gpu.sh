#!/bin/bash
# Builds, tests and prints everything about the CUDA engine on a machine with a GPU, in one call of under ten minutes: the op tests against
# doubles and against the CPU, the sweep over M at real shapes, compute-sanitizer on the op tests, the stored and the contract's example cases
# on the GPU. Fails on any skip. Writes its raw output beside printing it.
# Usage: tests/gpu.sh [OUTPUT]      default OUTPUT: docs/benchmarks/gpu-tests.txt
# Needs: a GPU of compute capability 8.0 or later, the CUDA toolkit (nvcc, cuBLASLt, compute-sanitizer), Debian 12's packages
# (deploy/packages.sh test). Data of the example cases: $SPURION_SHARED (default ../shared).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks/gpu-tests.txt}
mkdir -p "$(dirname "$out")"
export PATH="$PATH:/usr/local/cuda/bin" OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
export SPURION_SHARED=${SPURION_SHARED:-$PWD/../shared}
device=${SPURION_TEST_DEVICE:-cuda:0}
started=$(date +%s)
failures=0

step() { echo; echo "=== $* ($(($(date +%s) - started)) s in)"; }
# Runs a command; a status other than 0, or a line that says skip, is a failure.
must() {
    local log status=0
    log=$(mktemp)
    echo "\$ $*"
    "$@" >"$log" 2>&1 || status=$?
    tail -n "${LINES_KEPT:-60}" "$log"
    if [ $status -ne 0 ]; then
        echo "FAILED: status $status: $*"
        failures=$((failures + 1))
    elif grep -qiE "\bskip(ped)?\b" "$log"; then
        echo "FAILED: something was skipped: $*"
        grep -iE "\bskip(ped)?\b" "$log" | head -5
        failures=$((failures + 1))
    fi
    rm -f "$log"
}

main() {
    step "the machine, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    must nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,compute_cap,clocks.max.sm --format=csv
    must nvcc --version
    deploy/packages.sh test || failures=$((failures + 1))

    step "build"
    LINES_KEPT=15 must cmake --preset cuda
    LINES_KEPT=5 must cmake --build --preset cuda
    grep -q "SPURION_CUBLASLT:FILEPATH=.*NOTFOUND" build/cuda/CMakeCache.txt && { echo "FAILED: the build holds no CUDA engine"; return 1; }

    step "op tests on $device, against doubles"
    for t in table rows norm rope activation matrix attention sae; do
        LINES_KEPT=14 must env SPURION_TEST_DEVICE="$device" build/cuda/bin/test_$t
    done
    step "op tests on $device, against the CPU; a row's bits for every M at real shapes"
    LINES_KEPT=40 must env SPURION_TEST_DEVICE="$device" SPURION_TEST_SHAPES=real build/cuda/bin/test_twin

    step "compute-sanitizer"
    for t in rows norm rope activation sae attention; do
        LINES_KEPT=4 must timeout 150 env SPURION_TEST_DEVICE="$device" SPURION_TEST_SHORT=1 compute-sanitizer --tool memcheck --error-exitcode 9 build/cuda/bin/test_$t
        LINES_KEPT=4 must timeout 150 env SPURION_TEST_DEVICE="$device" SPURION_TEST_SHORT=1 compute-sanitizer --tool racecheck --error-exitcode 9 build/cuda/bin/test_$t
    done

    step "whole models on $device: stored cases, the contract's example cases"
    local python=${SPURION_PYTHON:-python3}
    export SPURIOND=$PWD/build/cuda/bin/spuriond SPURION_PROBE=$PWD/build/cuda/bin/spurion-probe SPURION_TOKENIZE=$PWD/build/cuda/bin/spurion-tokenize
    export SPURION_ENGINE_DEVICE=$device SPURION_SOURCE=$PWD SPURION_BUILD=$PWD/build/cuda SPURION_REQUIRE_ALL=1
    must "$python" tests/golden/test_stored.py
    must "$python" tests/golden/example_cases.py "$SPURION_SHARED/data/example_cases" gptj llama refused qwen3
    must build/cuda/bin/spuriond check --config tests/golden/stored/small-llama/config.yaml

    step "done: $failures failures, $(($(date +%s) - started)) s"
    return $((failures > 0))
}

main 2>&1 | tee "$out"
exit "${PIPESTATUS[0]}"
