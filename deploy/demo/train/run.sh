#!/bin/sh
# The whole recipe, from the data to the configuration: run.sh DATA WORK [OUT]. Needs torch, transformers, tokenizers,
# sae-lens. OMP_WAIT_POLICY: spinning barriers stall a run on a shared machine.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
data=$1 work=$2 out=${3:-$here/..}
python=${PYTHON:-python3}
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
"$python" "$here/pretrain.py" --data "$data" --out "$work" --compile
"$python" "$here/train_reward.py" --data "$data" --work "$work" --out "$out/model" --compile
"$python" "$here/train_saes.py" --data "$data" --model "$out/model" --work "$work" --out "$out/saes"
"$python" "$here/find_catalogue.py" --data "$data" --model "$out/model" --saes "$out/saes" --work "$work" --out "$out/catalogue.jsonl"
"$python" "$here/widen_catalogue.py" --demo "$out" --out "$out/catalogue_wide.jsonl"
"$python" "$here/finish.py" --work "$work" --out "$out"
