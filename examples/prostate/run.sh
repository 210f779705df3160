#!/usr/bin/env bash
# Prostates: T2 at north, ADC at south, gland and lesion at the coordinator. Every step of README.md, one after the other:
# both hospitals train one network, then each trains alone, with the same patients, steps and seed.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/prostate), which must not exist yet
#   PATIENTS=16 PORT=7443 can be set in the environment.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/prostate}
patients=${PATIENTS:-16}
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

train() { # train NAME SITE...: one job of these sites; logs in hub/NAME.log, SITE/NAME.log
    local name=$1 site status=0
    shift
    started=()
    for site in "$@"; do
        splitpeer serve --role client --config "$site/peer.toml" >"$site/$name.log" 2>&1 &
        started+=($!)
    done
    splitpeer serve --role coordinator --config hub/peer.toml --job "hub/$name.toml" >"hub/$name.log" 2>&1 &
    started+=($!)
    for process in "${started[@]}"; do
        wait "$process" || status=$?
    done
    started=()
    [ "$status" -eq 0 ] || { tail -n 3 "hub/$name.log" >&2; exit "$status"; }
}

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
sed -e 's/"together"/"t2"/' -e '/^south =/d' -e '/^adc =/d' hub/together.toml >hub/t2.toml
sed -e 's/"together"/"adc"/' -e '/^north =/d' -e '/^t2 =/d' hub/together.toml >hub/adc.toml
for peer in hub north south; do splitpeer config check $peer/peer.toml; done

echo "4. both hospitals train one network"
train together north south
echo "5. each trains alone"
train t2 north
train adc south

python - <<'PYTHON'
import json
from pathlib import Path

print("\nDice of the patients held out\n            gland  lesion")
for name in ("together", "t2", "adc"):
    dice = json.loads(Path(f"hub/runs/{name}/result.json").read_text())["dice"]
    print(f"{name:<10} {dice['gland']:6.3f}  {dice['lesion']:6.3f}")
PYTHON
