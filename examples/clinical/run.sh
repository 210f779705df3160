#!/usr/bin/env bash
# From the scanner to the mask: both hospitals have DICOM of the same patients, each in its own pose, slices and export. They prepare
# their images, train one network, and north segments patients of whom nobody has a mask. Every step of README.md, one after the other.
#   run.sh [FOLDER]     everything is written below FOLDER (default runs/clinical), which must not exist yet
#   PATIENTS=24 NEW=4 STEPS=400 PORT=7443 can be set in the environment; ALIGNED=1: the same people on one grid, nothing to prepare.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../common.sh"
patients=${PATIENTS:-24} new=${NEW:-4}
held=$((patients > 12 ? 4 : 1)) # held out of the training
address=tcp://127.0.0.1:${PORT:-7443}
enough() { # enough NUMBER WHAT: whether the new, those held out and at least one to train on can be among them
    [ "$new" -ge 1 ] && [ "$1" -gt $((new + held)) ] && return
    echo "run.sh: $1 $2 are too few for $new new (1 or more), $held held out and one to train on: change PATIENTS or NEW" >&2
    exit 4
}
enough "$patients" patients
begin "${1:-runs/clinical}"

if [ -z "${ALIGNED:-}" ]; then
    echo "1. images: $patients patients as two hospitals scan them, DICOM, and masks on the slices of north's scans"
    splitpeer data phantom pacs --patients "$patients" --dicom --modality t1ce --modality flair >/dev/null
    dicom=(--dicom pacs/t1ce/dicom --dicom-seg seg)
    truth=pacs/labels
    echo "2. each hospital prepares its own: on the grid of a common atlas, at 2 mm; north's masks come along"
    splitpeer data prepare --from pacs/t1ce/dicom --modality t1ce --spacing 2 2 2 --masks pacs/labels --workers 2 --out north/images >north.txt || [ $? -eq 4 ]
    splitpeer data prepare --from pacs/flair/dicom --modality flair --spacing 2 2 2 --workers 2 --out south/images >south.txt || [ $? -eq 4 ]
    tail -n 1 north.txt south.txt # code 4: somebody was held back, and takes no part
    mkdir hub
    cp -r north/images/labels hub/labels
else
    echo "1. images: $patients patients on one grid"
    splitpeer data phantom aligned --patients "$patients" --shape 100 100 40 --spacing 2 2 4 >/dev/null
    dicom=()
    truth=aligned/labels
    mkdir hub north south
    cp -r aligned/t1ce north/images
    cp -r aligned/flair south/images
    cp -r aligned/labels hub/labels
fi
people=()
for mask in hub/labels/*.nii.gz; do
    patient=$(basename "$mask" .nii.gz)
    if [ -e "north/images/$patient.nii.gz" ] && [ -e "south/images/$patient.nii.gz" ]; then people+=("$patient"); fi
done
enough ${#people[@]} "patients with both images and a mask"
people=("${people[@]: -$new}")
for patient in "${people[@]}"; do rm "hub/labels/$patient.nii.gz"; done
echo "   $new of them are new: the coordinator has no mask of ${people[*]}"

echo "3. certificates: one CA, one certificate per peer"
splitpeer pki init --federation clinical
splitpeer pki issue --role coordinator --site hub --host 127.0.0.1
splitpeer pki issue --role client --site north
splitpeer pki issue --role client --site south

echo "4. settings: one peer.toml per peer; north may ask for segmentations of its patients, and south answers north"
splitpeer init --role coordinator --site hub --listen "$address" --labels hub/labels --convention msd --output hub/peer.toml
splitpeer init --role client --site north --modality t1ce --images north/images --coordinator "$address" --output north/peer.toml
splitpeer init --role client --site south --modality flair --images south/images --coordinator "$address" --output south/peer.toml
sed -i.bak 's/^\[policy\]$/[policy]\ninference = "own"/' north/peer.toml
sed -i.bak 's/^\[policy\]$/[policy]\ninference = "listed"\ninference_for = ["north"]/' south/peer.toml
sed "s/^steps = .*/steps = ${STEPS:-400}/; s/^validation = .*/validation = $held/" "$here/job.toml" >hub/glioma.toml
repeatable north south # salt and initial weights
for peer in hub north south; do splitpeer config check $peer/peer.toml; done

echo "5. both hospitals train one network; the coordinator stays"
launch glioma north south
until grep -q " inference.ready" hub/glioma.log; do
    for process in "${started[@]}"; do
        kill -0 "$process" 2>/dev/null || { tail -n 3 hub/glioma.log north/glioma.log south/glioma.log >&2; exit 1; }
    done
    sleep 0.5
done

echo "6. north asks for its new patients: the masks lie on its own scans, and go to its PACS as DICOM SEG"
splitpeer segment "${people[@]}" --config north/peer.toml --require all --out masks --report pages "${dicom[@]}"

echo "7. compared with the masks of these patients, which nobody has used"
splitpeer evaluate "${people[@]}" --config north/peer.toml --labels "$truth" --convention msd --masks masks --out study
