# What the run.sh of the examples share: a new folder, daemons that end with the script, jobs one after the other.
# shellcheck shell=bash
set -euo pipefail
export OMP_NUM_THREADS=1 # all daemons share the cores of this machine

started=()
stop() { # whatever ends the script ends what it started
    local status=$?
    trap - EXIT
    [ ${#started[@]} -eq 0 ] || kill "${started[@]}" 2>/dev/null || true
    wait
    exit "$status"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

begin() { # begin FOLDER: work in a new folder
    command -v splitpeer >/dev/null || { echo "run.sh: splitpeer is not on PATH: activate its environment" >&2; exit 4; }
    [ ! -e "$1" ] || { echo "run.sh: $1 exists: remove it, or name another folder" >&2; exit 4; }
    mkdir -p "$1"
    cd "$1"
}

repeatable() { # repeatable SITE...: each run of an example holds out the same patients and gives the same figures
    local site
    # Only because these patients are invented: a real federation keeps the random salt that pki init made (with it,
    # patient keys can be turned back into ids), and each site keeps its initial weights private.
    printf '%s\n' 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef >pki/federation.salt
    for site in "$@"; do
        sed 's/^initial_weights = "private"/initial_weights = 7/' "$site/peer.toml" >"$site/seeded.toml"
        mv "$site/seeded.toml" "$site/peer.toml"
    done
}

alone() { # alone NAME KEY...: the job hub/NAME.toml is hub/together.toml without the lines of these sites and modalities
    local name=$1 keys
    shift
    keys=$(printf '%s\n' "$@" | paste -sd'|')
    sed -E -e "s/\"together\"/\"$name\"/" -e "/^($keys) =/d" hub/together.toml >"hub/$name.toml"
}

finish() { # finish LOG: wait for all that was started; where one failed, show the end of LOG
    local process status=0
    for process in "${started[@]}"; do
        wait "$process" || status=$?
    done
    started=()
    [ "$status" -eq 0 ] || { tail -n 3 "$1" >&2; exit "$status"; }
}

launch() { # launch NAME SITE...: start the job hub/NAME.toml with these sites; logs in hub/NAME.log, SITE/NAME.log
    local name=$1 site
    shift
    for site in "$@"; do
        splitpeer serve --role client --config "$site/peer.toml" >"$site/$name.log" 2>&1 &
        started+=($!)
    done
    splitpeer serve --role coordinator --config hub/peer.toml --job "hub/$name.toml" >"hub/$name.log" 2>&1 &
    started+=($!)
}

train() { # train NAME SITE...: the same, to the end
    launch "$@"
    finish "hub/$1.log"
}

scores() { # scores NAME...: Dice of the patients held out in each of these jobs
    python - "$@" <<'PYTHON'
import json
import sys
from pathlib import Path

runs = {name: json.loads(Path(f"hub/runs/{name}/result.json").read_text())["dice"] for name in sys.argv[1:]}
regions = [region for region in next(iter(runs.values())) if region != "mean"]
print("\nDice of the patients held out\n" + " " * 10 + "".join(f"{region:>8}" for region in regions))
for name, dice in runs.items():
    print(f"{name:<10}" + "".join(f"{dice[region]:8.3f}" for region in regions))
PYTHON
}
