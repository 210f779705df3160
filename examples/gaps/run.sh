#!/usr/bin/env bash
# Heads: T1 at north and at east, FLAIR at south, masks at the coordinator; some patients lack T1, some FLAIR. Every step of
# README.md, one after the other: the three hospitals train one network, then each trains alone with the patients it has.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/gaps), which must not exist yet
#   PATIENTS=32 PORT=7443 can be set in the environment.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../common.sh"
patients=${PATIENTS:-32}
address=tcp://127.0.0.1:${PORT:-7443}
begin "${1:-runs/gaps}"

echo "1. images: $patients heads of nobody; each hospital has those that it took"
python "$here/phantom.py" data --patients "$patients"

echo "2. certificates: one CA, one certificate per peer"
splitpeer pki init --federation gaps
splitpeer pki issue --role coordinator --site hub --host 127.0.0.1
splitpeer pki issue --role client --site north
splitpeer pki issue --role client --site east
splitpeer pki issue --role client --site south

echo "3. settings: one peer.toml per peer; a job for all hospitals, and one for each alone"
mkdir hub north east south
splitpeer init --role coordinator --site hub --listen "$address" --labels data/labels --convention task --output hub/peer.toml
splitpeer init --role client --site north --modality t1 --images data/north --coordinator "$address" --output north/peer.toml
splitpeer init --role client --site east --modality t1 --images data/east --coordinator "$address" --output east/peer.toml
splitpeer init --role client --site south --modality flair --images data/south --coordinator "$address" --output south/peer.toml
cp "$here/job.toml" hub/together.toml
alone north east south
alone east north south
alone south north east
repeatable north east south # salt and initial weights
for peer in hub north east south; do splitpeer config check $peer/peer.toml; done

echo "4. all hospitals train one network; splitpeer status shows who fills which seat"
launch together north east south
until grep -qs "filled by" status.txt || ! kill -0 "${started[-1]}" 2>/dev/null; do
    sleep 1
    splitpeer status hub/peer.toml >status.txt || true # until all are here, there is no table
done
cat status.txt
finish hub/together.log
echo "5. each trains alone"
for site in north east south; do train "$site" "$site"; done
scores together north east south
