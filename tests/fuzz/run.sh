#!/bin/bash
# Long fuzzing: tests/fuzz/run.sh TARGET RUNS [SECONDS]. Builds nothing (cmake --preset fuzz && cmake --build build/fuzz first); works on
# a copy of the corpus under build/fuzz/corpus, which keeps what is found from run to run. Prints one row for LOG.md and exits 1 when a
# run crashed, leaked, or took more than 512 MiB; the input that did it lies in build/fuzz/corpus/TARGET.found.
set -uo pipefail
cd "$(dirname "$0")/../.."
target=$1 runs=$2 seconds=${3:-0}
place=build/fuzz/corpus/$target
mkdir -p "$place" "$place.found"
case $target in safetensors | index) length=256 ;; labels | sae_cfg) length=512 ;; npz | config | tokenizer) length=1024 ;; codec) length=2048 ;; *) length=4096 ;; esac
[ -f "tests/fuzz/$target.dict" ] && words="-dict=tests/fuzz/$target.dict" || words=
# A small quarantine: the inputs are small, and freed memory that is kept costs more than it finds.
export ASAN_OPTIONS=detect_leaks=1:quarantine_size_mb=1:malloc_context_size=0 UBSAN_OPTIONS=halt_on_error=1 OMP_WAIT_POLICY=passive
nice -n 19 "build/fuzz/bin/fuzz_$target" -runs="$runs" -max_total_time="$seconds" -max_len="$length" $words -rss_limit_mb=512 -timeout=30 -print_final_stats=1 \
    -artifact_prefix="$place.found/" "$place" "tests/fuzz/corpus/$target" > "$place.log" 2>&1
status=$?
done=$(sed -n 's/^stat::number_of_executed_units: //p' "$place.log")
rss=$(sed -n 's/^stat::peak_rss_mb: *//p' "$place.log")
edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$place.log" | tail -n 1)
echo "| $(date -u +%Y-%m-%d) | $target | ${done:-?} | ${edges:-?} | ${rss:-?} | $([ $status -eq 0 ] && echo "nothing found" || echo "FOUND: $(ls "$place.found" | tail -n 1)") |"
exit $((status != 0))
