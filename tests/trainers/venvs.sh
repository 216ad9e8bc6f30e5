#!/bin/bash
# Installs the trainers at pinned versions, one virtual environment each (their pins of transformers differ), on top of the judges' environment,
# which brings torch. Usage: tests/trainers/venvs.sh JUDGES_VENV FOLDER; what is there already is left.
set -euo pipefail
judges=$1 folder=$2
site=$("$judges/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$folder"

make() { # NAME IMPORT STEP... : each step is one pip install
    local name=$1 test=$2 python=$folder/$1/bin/python
    shift 2
    [ -x "$python" ] && "$python" -c "$test" 2>/dev/null && return 0
    echo "installing $name into $folder/$name"
    "$judges/bin/python" -m venv "$folder/$name"
    echo "$site" >"$("$python" -c 'import site; print(site.getsitepackages()[0])')/judges.pth"
    for step in "$@"; do
        # shellcheck disable=SC2086
        "$python" -m pip install -q --disable-pip-version-check $step 2>&1 | grep -v -e "dependency resolver" -e "requires" || true
    done
    "$python" -c "$test"
}

make trl 'import trl' 'trl==1.16.0'
make trl_ppo 'import trl.experimental.ppo' 'trl==1.12.0' # the last one that has PPO
make openrlhf 'from openrlhf.utils.agent import SingleTurnAgentExecutor' '--no-deps openrlhf==0.11.0' \
    'transformers==5.15.0 aiohttp ray==2.55.0 pylatexenc peft optree'
make verl 'from verl.experimental.reward_loop.reward_loop import RewardLoopWorker' '--no-deps verl==0.9.0' \
    'transformers==5.10.2 tensordict==0.10.0 ray==2.55.0 hydra-core codetiming aiohttp'
# what SkyRL's generator imports; the rest of its dependencies are its trainer's
make skyrl 'import skyrl_gym, loguru, omegaconf, hydra' '--no-deps skyrl==0.3.0 skyrl-gym==0.4.0' 'loguru hydra-core'
