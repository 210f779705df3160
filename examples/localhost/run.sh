#!/usr/bin/env bash
# Two hospitals and a coordinator on this machine: every step of README.md, one after the other.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/localhost), which must not exist yet
#   PATIENTS=8 PORT=7443 can be set in the environment.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/localhost}
patients=${PATIENTS:-8}
address=tcp://127.0.0.1:${PORT:-7443}
export OMP_NUM_THREADS=1 # three processes share the cores

command -v splitpeer >/dev/null || { echo "run.sh: splitpeer is not on PATH: activate its environment" >&2; exit 4; }
[ ! -e "$folder" ] || { echo "run.sh: $folder exists: remove it, or name another folder" >&2; exit 4; }
mkdir -p "$folder"
cd "$folder"

started=()
stop() { # whatever ends this script ends what it started
    local status=$?
    trap - EXIT
    [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true
    wait
    exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "1. images: $patients phantom patients, each contrast in a folder of its own"
splitpeer data phantom data --patients "$patients"

echo "2. certificates: one CA, one certificate per peer"
splitpeer pki init --federation localhost
splitpeer pki issue --role coordinator --site hub --host 127.0.0.1
splitpeer pki issue --role client --site north
splitpeer pki issue --role client --site south

echo "3. settings: one peer.toml per peer, one job.toml"
mkdir hub north south
splitpeer init --role coordinator --site hub --listen "$address" --labels data/labels --convention msd --output hub/peer.toml
splitpeer init --role client --site north --modality flair --images data/flair --coordinator "$address" --output north/peer.toml
splitpeer init --role client --site south --modality t1ce --images data/t1ce --coordinator "$address" --output south/peer.toml
cp "$here/job.toml" hub/job.toml
for peer in hub north south; do splitpeer config check $peer/peer.toml; done

echo "4. the hospitals dial and wait, the coordinator starts the job; logs in north/log, south/log, hub/log"
splitpeer serve --role client --modality flair --config north/peer.toml >north/log 2>&1 &
north=$!
splitpeer serve --role client --modality t1ce --config south/peer.toml >south/log 2>&1 &
south=$!
splitpeer serve --role coordinator --config hub/peer.toml --job hub/job.toml >hub/log 2>&1 &
hub=$!
started=("$north" "$south" "$hub")

status=0
for peer in hub north south; do
    wait "${!peer}" || { status=$?; echo "run.sh: $peer left with exit code $status:" >&2; tail -n 3 "$peer/log" >&2; }
done
started=()
[ "$status" -eq 0 ] || exit "$status"

tail -n 1 hub/log
echo "   results: $folder/hub/runs/localhost/result.json, metrics.jsonl, predictions/"
