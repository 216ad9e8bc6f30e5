#!/bin/bash
# Passes the tests from a fresh clone: installs what is missing, builds, runs every label, prints minutes per label and the totals.
# Usage: tests/run.sh [--judges] [--preset cpu|asan|tsan] [--label L ...] [--exclude REGEX]
#   --judges   also install PyTorch, transformers, sae-lens, dictionary-learning and tokenizers (several GB) into a virtual environment
#              ($SPURION_VENV, default ~/.cache/spurion/venv) and compare with them; without it those tests are skipped, visibly.
# The data of other projects that some tests read is looked for in $SPURION_SHARED (default ../shared).
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD

judges=0 preset=cpu labels="" exclude="^$"
while [ $# -gt 0 ]; do
    case "$1" in
        --judges) judges=1 ;;
        --preset) preset=$2; shift ;;
        --label) labels="$labels $2"; shift ;;
        --exclude) exclude=$2; shift ;;
        -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "run.sh: unknown option $1 (see --help)" >&2; exit 64 ;;
    esac
    shift
done

deploy/packages.sh test
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
export TSAN_OPTIONS="suppressions=$here/tests/tsan.supp ${TSAN_OPTIONS:-}"
export SPURION_SHARED=${SPURION_SHARED:-$here/../shared}

venv=${SPURION_VENV:-$HOME/.cache/spurion/venv}
if [ $judges = 1 ]; then
    if ! "$venv/bin/python" -c 'import aiohttp, mypy, torch, transformers, sae_lens, dictionary_learning, tokenizers, safetensors, gguf, matplotlib, pytest, yaml' 2>/dev/null; then
        echo "installing the judges into $venv"
        python3 -m venv "$venv"
        "$venv/bin/pip" install -q --disable-pip-version-check -r tests/judges.txt
        "$venv/bin/pip" install -q --disable-pip-version-check --no-deps openrlhf==0.11.0 # only its reward client is called
    fi
    tests/trainers/venvs.sh "$venv" "${SPURION_TRAINERS:-$HOME/.cache/spurion/trainers}"
fi
python=
for p in "$venv/bin/python" python3 /usr/bin/python3; do
    if "$p" -c 'import pytest' 2>/dev/null; then
        python=$(command -v "$p")
        break
    fi
done
[ -n "$python" ] || { echo "run.sh: expected a Python with pytest, found none" >&2; exit 69; }
echo "tests driven by $python"

cmake --preset "$preset" -DSPURION_TESTS=ON -DSPURION_PYTHON="$python" \
    -DSPURION_TRAINERS="${SPURION_TRAINERS:-$HOME/.cache/spurion/trainers}" >/dev/null
cmake --build --preset "$preset" | { grep -E "warning|error|FAILED" || true; }

report=$here/build/$preset/tests.xml
rm -f "$report"
filter=()
if [ -n "$labels" ]; then
    filter=(-L "^($(echo $labels | tr ' ' '|'))\$")
fi
jobs=${SPURION_TEST_JOBS:-2}
status=0
(cd "build/$preset" && ctest -j "$jobs" --output-on-failure --output-junit "$report" -E "$exclude" "${filter[@]}") || status=$?
python3 tests/summary.py "$report" "$preset" || status=1
exit $status
