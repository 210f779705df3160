#!/usr/bin/env bash
# Chests: CT at north, PET at south, tumours at the coordinator. Every step of README.md, one after the other:
# both hospitals train one network, then each trains alone, with the same patients, steps and seed.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/petct), which must not exist yet
#   PATIENTS=16 PORT=7443 can be set in the environment.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../common.sh"
patients=${PATIENTS:-16}
address=tcp://127.0.0.1:${PORT:-7443}
begin "${1:-runs/petct}"

echo "1. images: $patients chests of nobody, CT and PET in folders of their own"
python "$here/phantom.py" data --patients "$patients"

echo "2. certificates: one CA, one certificate per peer"
splitpeer pki init --federation petct
splitpeer pki issue --role coordinator --site hub --host 127.0.0.1
splitpeer pki issue --role client --site north
splitpeer pki issue --role client --site south

echo "3. settings: one peer.toml per peer; a job for both hospitals, and one for each alone"
mkdir hub north south
splitpeer init --role coordinator --site hub --listen "$address" --labels data/labels --convention task --output hub/peer.toml
splitpeer init --role client --site north --modality ct --images data/ct --coordinator "$address" --output north/peer.toml
splitpeer init --role client --site south --modality pet --images data/pet --coordinator "$address" --output south/peer.toml
cp "$here/job.toml" hub/together.toml
alone ct south pet
alone pet north ct
repeatable north south # salt and initial weights
for peer in hub north south; do splitpeer config check $peer/peer.toml; done

echo "4. both hospitals train one network"
train together north south
echo "5. each trains alone"
train ct north
train pet south
scores together ct pet
