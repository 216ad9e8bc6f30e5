#!/bin/bash
# From a fresh clone to the first alerts: installs what is missing (Debian 12), builds, starts the daemon on the demo reward model, lets a
# policy that drifts into a hack publish its rollouts, and shows what came of it. Usage: deploy/demo/run.sh [--keep]
#   --keep   leave the daemon running at the end, to try the command line on it
set -euo pipefail
cd "$(dirname "$0")/../.."
keep=0
[ "${1:-}" = "--keep" ] && keep=1

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. packages and build"
deploy/packages.sh build
command -v python3 >/dev/null || { echo "run.sh: python3 is needed for the demo's policy" >&2; exit 69; }
cmake --preset cpu -DSPURION_TESTS=OFF >/dev/null
cmake --build --preset cpu --target spuriond spurion-cli | tail -n 1
bin=$PWD/build/cpu/bin
config=deploy/demo/spurion.yaml
place=$(mktemp -d "${TMPDIR:-/tmp}/spurion-demo.XXXXXX")
export OMP_WAIT_POLICY=passive
export SPURION_RPC=ipc://$place/rpc.sock SPURION_ROLLOUTS=ipc://$place/rollouts.sock SPURION_ALERTS=ipc://$place/alerts.sock
places=(--set "store.path=$place/store" --set "listen.rpc=[$SPURION_RPC]" --set "listen.rollouts=[$SPURION_ROLLOUTS]"
        --set "listen.alerts=[$SPURION_ALERTS]")

say "2. what the daemon will run: spuriond check"
"$bin/spuriond" check --config "$config"

say "3. the daemon, and someone who listens for alerts"
"$bin/spuriond" run --config "$config" "${places[@]}" 2>"$place/spuriond.log" &
daemon=$!
cleanup() {
    [ $keep = 1 ] || { kill "$daemon" 2>/dev/null && wait "$daemon" 2>/dev/null || true; rm -rf "$place"; }
}
trap cleanup EXIT
for _ in $(seq 300); do
    "$bin/spurion" status --json >/dev/null 2>&1 && break
    kill -0 "$daemon" 2>/dev/null || { cat "$place/spuriond.log" >&2; exit 70; }
    sleep 0.1
done
"$bin/spurion" watch 2>/dev/null &
watcher=$!

say "4. a policy trains for twelve steps and drifts into a hack; alerts come as the steps close"
python3 deploy/demo/make_drift.py | "$bin/spurion" publish --run drift --rate 48
sleep 1
kill "$watcher" 2>/dev/null || true
wait "$watcher" 2>/dev/null || true

say "5. afterwards: what moved the reward most?   spurion query drift --rule thanks-raises --order effect --limit 5"
"$bin/spurion" query drift --rule thanks-raises --order effect --limit 5

say "6. one of them, token by token (blue raised the reward, orange lowered it)"
key=$("$bin/spurion" query drift --rule thanks-raises --order effect --limit 1 --jsonl |
    python3 -c 'import json, sys; r = json.loads(sys.stdin.readline()); print("/".join([r["run"], str(r["step"]), r["group"], r["id"]]))')
echo "spurion show $key"
"$bin/spurion" show "$key"

if [ $keep = 1 ]; then
    say "the daemon goes on (pid $daemon); its addresses:"
    echo "export SPURION_RPC=$SPURION_RPC SPURION_ROLLOUTS=$SPURION_ROLLOUTS SPURION_ALERTS=$SPURION_ALERTS PATH=$bin:\$PATH"
fi
