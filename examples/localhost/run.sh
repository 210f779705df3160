#!/usr/bin/env bash
# Two hospitals and a coordinator on this machine: every step of README.md, one after the other.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/localhost), which must not exist yet
#   PATIENTS=8 PORT=7443 can be set in the environment.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../common.sh"
folder=${1:-runs/localhost}
patients=${PATIENTS:-8}
address=tcp://127.0.0.1:${PORT:-7443}
begin "$folder"

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
started+=($!)
splitpeer serve --role client --modality t1ce --config south/peer.toml >south/log 2>&1 &
started+=($!)
splitpeer serve --role coordinator --config hub/peer.toml --job hub/job.toml >hub/log 2>&1 &
started+=($!)
finish hub/log

tail -n 1 hub/log
echo "   results: $folder/hub/runs/localhost/result.json, metrics.jsonl, predictions/"
