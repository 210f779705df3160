#!/usr/bin/env bash
# Prostates: T2 at north, ADC at south, gland and lesion at the coordinator. Every step of README.md, one after the other:
# both hospitals train one network, then each trains alone, with the same patients, steps and seed.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/prostate), which must not exist yet
#   PATIENTS=16 PORT=7443 can be set in the environment.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../common.sh"
patients=${PATIENTS:-16}
address=tcp://127.0.0.1:${PORT:-7443}
begin "${1:-runs/prostate}"

echo "1. images: $patients prostates of nobody, T2 and ADC in folders of their own"
python "$here/phantom.py" data --patients "$patients"

echo "2. certificates: one CA, one certificate per peer"
splitpeer pki init --federation prostate
splitpeer pki issue --role coordinator --site hub --host 127.0.0.1
splitpeer pki issue --role client --site north
splitpeer pki issue --role client --site south

echo "3. settings: one peer.toml per peer; a job for both hospitals, and one for each alone"
mkdir hub north south
splitpeer init --role coordinator --site hub --listen "$address" --labels data/labels --convention task --output hub/peer.toml
splitpeer init --role client --site north --modality t2 --images data/t2 --coordinator "$address" --output north/peer.toml
splitpeer init --role client --site south --modality adc --images data/adc --coordinator "$address" --output south/peer.toml
cp "$here/job.toml" hub/together.toml
alone t2 south adc
alone adc north t2
repeatable north south # salt and initial weights
for peer in hub north south; do splitpeer config check $peer/peer.toml; done

echo "4. both hospitals train one network"
train together north south
echo "5. each trains alone"
train t2 north
train adc south
scores together t2 adc
