"""The commented `peer.toml` and `job.toml` that `splitpeer init` writes; they load as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitpeer.models.registry import DEFAULT, NETWORKS
from splitpeer.settings.loading import to_toml
from splitpeer.settings.peer import PRIVATE_NOISE, PRIVATE_RATE

_PEER = """\
# peer.toml: this file belongs to {owner}. Relative paths count from this file's folder.
# Any key can be overridden: SPLITPEER_SECTION__KEY in the environment, --set section.key=value on the command line.
# Check it with: splitpeer config check

[peer]
role = {role}
{site}  # as in the certificate
{federation}
{modality}state = "state"  # weights and checkpoints; back this folder up

[tls]
# The certificate says who we are; only peers with a certificate of this CA are accepted (TLS 1.3, both sides).
ca = {ca}
certificate = {certificate}
key = {key}  # mode 0600
{crl}  # revoked certificates; with an outdated list every peer is refused: fetch a new one from the CA in time

[network]
{network}
rotate_mib = 262144  # MiB sent after which a link is replaced by a new one with a new key
rotate_s = 86400  # the same after so many seconds
recheck_s = 30  # seconds between two checks of certificates and revocation list while a link is open

[data]
{data}layout = "folder"  # "folder": <patient>.nii.gz; others ("bids", "brats", "msd", "csv" ...): docs/data.md
# files = "{{patient}}/T1*.nii.gz"  # instead of a layout, if files have other names
salt = {salt}  # turns patient ids into keys; the same file at every site, mode 0600
cache_mib = 1024  # memory for loaded volumes
max_voxels = 134217728  # of one volume (512 x 512 x 512), as stored and as resampled for a job; larger ones are refused
unknown_orientation = "warn"  # a file that does not say which side is which: "warn" takes it as LAS, or "refuse"
{policy}{bank}
[capture]
# For splitpeer serve --curious FILE, which records what this peer sends and receives, for an audit, and announces
# that to the other peers.
# key = "capture.key"  # encrypts it; make one with: (umask 077; openssl rand -out capture.key 32)
max_mib = 65536  # then the capture ends; the job continues
rotate_mib = 4096  # then FILE.1 begins, and so on
every = 1  # keep the tensors of every Nth step
keys = []  # keep only batches with these patients: first digits of their keys, hexadecimal; none: all

[runtime]
device = "cpu"  # "cpu", "cuda", "cuda:1" or "auto"
threads = 1
# "private": start from this machine's own entropy, which nobody else knows. {seed}
initial_weights = "private"

[log]
format = "text"  # or "json"
level = "info"  # debug, info, warning, error
"""

_CLIENT_NETWORK = """\
coordinator = {coordinator}  # dialled from here; this peer opens no port
reconnect_s = 300  # how long to keep trying if the coordinator is gone"""

_COORDINATOR_NETWORK = """\
listen = {listen}  # "tcp://*:7443" for all interfaces; the certificate must name the host that clients dial"""

_CLIENT_DATA = """\
images = {images}  # never leave this machine; their activations do
# withdrawn = "withdrawn.txt"  # patients who withdrew consent, one id a line; it may grow while the daemon runs
# max_withdrawn_at_once = 0.1  # if it withdraws more of a run's patients at once, the site stops and asks you
"""

_COORDINATOR_DATA = """\
labels = {labels}
# What 1, 2, 3, 4 in the masks mean: "msd", "brats" (2017 to 2021), "brats2023" or "nnunet"; "task": as
# [task] of the job says. Never guessed.
{convention}
"""

_CLIENT_POLICY = """
[policy]
# What may leave, whatever a job asks; a job that asks for more is declined.
coordinators = {coordinators}  # who may coordinate us
levels = [0, 1, 2, 3, 4]  # 0 is full resolution and shows most of the image; a network's coarsest is required
{images}
max_message_mib = 1024
# What is done to activations before they leave, in training and evaluation, in this order; see: splitpeer defences
{defences}  # name:value,parameter=value@levels
# On the images themselves, the same noise every time; then a job may ask for zscore-nonzero only:
# image_defences = ["voxel-noise:0.5"]
# A privacy budget for every patient: sending stops when it is spent. Needs dp-gaussian among the defences; the
# noise that a study needs: splitpeer privacy --help
# epsilon = 8.0
# delta = 1e-5
{joining}may_record = true  # false: this peer never writes a capture
# Segmentations of single patients by a job with [inference] (docs/clinical.md); without "own" or "listed" this site
# neither asks nor answers.
# inference = "own"  # it asks, and takes part in what it asks for; "listed": also in what these ask for:
# inference_for = ["south"]  # with "listed" only
# max_inferences_per_day = 200

# [model]  # an encoder of this site's own, instead of the one that a job names: it must yield the job's cut
# network = "residual-unet"  # settings as in job.toml
# features = [32, 32, 64, 128, 256]
# weights = "encoder.safetensors"  # of splitpeer pretrain: {weights}; by seat: {{ t2 = "t2.safetensors" }}
"""

_ANY_IMAGES = """\
precision = ["f32", "bf16", "f16", "int8", "int4"]  # how activations and gradients may travel
normalisation = ["zscore-nonzero", "zscore", "percentile", "window", "none"]  # that a job may ask for"""

_ANY_DEFENCES = '# defences = ["dropout:0.5", "gaussian:1.0@0,1"]'

_PRIVATE_DEFENCES = f"""\
# At least the noise that our encoder learned behind ([pretraining] noise of its recipe).
defences = ["gaussian:{PRIVATE_NOISE}"]"""

_PRIVATE_IMAGES = """\
precision = ["f32"]
normalisation = ["zscore-nonzero", "zscore"]  # that a job may ask for; a sum takes no others"""

_ANY_JOB = """\
partners = {partners}  # sites that may be in a secure sum with this one; none: no such job is accepted
min_partners = 2  # a secure sum with fewer others is refused
encoders = "any"  # "frozen": only jobs that leave our encoder as it is and send no gradient (docs/feature-bank.md)
fusion = "any"  # "secure-sum": only jobs whose coordinator reads a sum over sites, never our own values
releases = "any"  # "once": only frozen jobs; an encoder shows a patient in one run only, each window in one answer
share_encoder = false  # true: accept jobs that average encoders; the coordinator then has our weights (docs/privacy.md)
# join_encoder = false  # our encoder becomes part of no joined network, whatever is asked here (docs/export.md)
recorded_by_coordinator = true  # false: decline a coordinator that records, or does not say whether it does
"""

_PRIVATE_JOBS = """\
# Only jobs that leave our encoder as it is (no gradient comes down), whose coordinator reads a sum over sites, never
# our own values, records nothing, and asks for each window once. The preset stands for encoders = "frozen",
# fusion = "secure-sum", releases = "once", share_encoder = false, recorded_by_coordinator = false and
# min_partners = 2. Such keys may be added here to be stricter, never to be weaker.
preset = "private"
partners = {partners}  # {fill}sites that may be in the sum with us; all of them together with the coordinator undo it
# min_partners = 3  # a sum with fewer others is declined; 2 or more
# join_encoder = true  # splitpeer export --agree may give our encoder away (docs/export.md)
# max_runs_per_patient = 1  # may be raised: each run more is another view of a patient (docs/private.md)
# min_encoder_noise = {noise}  # noise behind which our encoder must have learned; may be lowered, then a sum shows more
# min_encoder_rate = {rate}  # the same for the price of what got through it ([pretraining] rate of its recipe)
"""

_CLIENT_RESULTS = """
# [prepare]  # how splitpeer data prepare makes images from DICOM; all keys: docs/clinical.md
# skull_strip = "/opt/hd-bet/bin/hd-bet -i {in} -o {out} -device cpu --disable_tta"  # heads: not without one
# deadline_s = 3600  # for each run of such a program
# ids = "ids.csv"  # list with the columns hospital,study

[results]
# What a PACS calls a region of a DICOM SEG, as scheme:value:meaning; regions of gliomas have their codes already,
# others are "Lesion" or "Tissue", by their names.
# codes = { prostate = { type = "SCT:41216001:Prostate", category = "SCT:123037004:Anatomical Structure" } }
"""

_COORDINATOR_BANK = """
[bank]
# What sites with frozen encoders released, in the state folder (docs/feature-bank.md).
# key = "bank.key"  # encrypts it; make one with: (umask 077; openssl rand -out bank.key 32)
"""

_JOB = """\
# job.toml: this file belongs to the coordinator. Check it with: splitpeer config check job.toml

[job]
{name}
seed = 0  # order of batches and augmentation; not secret

[sites]
# Site = modality: any name, such as t1, adc or pet. Only these sites are admitted.{enough}
{sites}

[task]
preset = "glioma"  # WT, TC and ET; or instead a task of your own:
# values = {{ liver = 1, lesion = 2 }}  # of the masks; 0 is background. peer.toml then says convention = "task"
# regions = {{ organ = ["liver", "lesion"], lesion = ["lesion"] }}  # without them each value is one
# exclusive = false  # true: a voxel is of one region at most, and the regions may not share values
{normalisation}

[model]
network = "{network}"  # or {others}; settings of each: docs/networks.md
dimensions = 2  # 2: slices, 3: volumes
features = [32, 32, 64, 128, 256, 32]  # channels of U-Net levels 0 to 4, and of the last decoder block
levels = [0, 1, 2, 3, 4]  # levels that the sites send; a site's policy may allow fewer
{fusion}

[data]
window = [96, 96]  # voxels, each divisible by 16; three numbers for volumes
# spacing = [1.0, 1.0, 1.0]  # millimetres to resample to; without it, as stored
positive_fraction = 0.75  # of the windows are centred on tumour
{augment}
validation = 0.2  # patients held out: a fraction, or a whole number
{patients}
max_withdrawn = 0.1  # fraction or number of patients whose files at one site may become unusable during a run

[training]
steps = 1000
batch = 4
{precision}optimiser = "adam"  # adam, adamw or sgd
learning_rate = 0.005
weight_decay = 0.0
schedule = "one-cycle"  # one-cycle, cosine or constant
ahead = 4  # batches announced early, so that sites load them in time
checkpoint_every = 100
keep_checkpoints = 2
{encoders}
{wire}
{pretraining}
{defences}
[evaluation]
every = 0  # steps; 0: only at the end
sample = 0  # how many of the held-out patients all evaluations but the last score; 0: all
{overlap}
batch = 4
{missing}
[deadlines]  # seconds
join_s = 600  # until all sites must have joined
step_s = 120  # for one answer
return_s = 60  # for a lost site to come back

{absence}
# [inference]  # afterwards the coordinator stays, and sites may ask for segmentations of single patients
# serve = "after"  # the run is complete{always}{kept}

[output]
# folder = "runs/..."  # default: runs/ and the job's name
"""


_ANY_SEED = """\
A whole number makes runs
# repeatable and the weights guessable: for demonstrations only."""
_PRIVATE_SEED = "The preset takes no seed."

_OPEN = {
    "always": '; or "always": between two steps, too (not with frozen encoders)',
    "kept": "",
    "enough": "",
    "normalisation": """\
# How images are normalised, by modality: "zscore-nonzero" (of those not named), "zscore", "percentile:0.5,99.5",
# "window:-100,300" (CT, in Hounsfield units) or "none".
# normalisation = { ct = "window:-100,300" }""",
    "fusion": 'fusion = "concat"  # or "mean"; "secure-sum": only the sum over sites can be read',
    "augment": "augment = true",
    "patients": "min_patients = 2  # with masks and at least min_seats seats (default: all)",
    "precision": 'precision = "f32"  # of activations and gradients on the wire: f32 or bf16\n',
    "encoders": """\
encoders = "joint"  # "frozen": sites keep theirs and release each window once (docs/feature-bank.md)
# bank = "state/NAME-RUN/bank"  # with frozen: from what an earlier run collected, and no site is asked
average_every = 0  # steps after which sites with the same modality average their encoders; 0: never
seat_dropout = 0.0  # probability that a seat is left out of a step, so that the network can do without it""",
    "wire": """
# [wire]  # fewer bytes than [training] precision, at a loss of accuracy (docs/performance.md)
# activations = "int8"  # f16, int8 or int4; a list: one for each level; "auto": the coordinator measures the links
# gradients = "int8"
# auto_s = 0.1  # with "auto", seconds that a step's tensors may take in one direction
# gradients_in_turns = "auto"  # to one site after the other, where that is found to be faster; "always" or "never"
""",
    "pretraining": """\
# [pretraining]  # a recipe for first weights, which each site follows by itself: splitpeer pretrain --recipe
# data = "phantom"  # rendered by the command; or the name of a public data set that every site has
# labels = "regions"  # with its masks; or "none"
# encoders = "apart"  # "together": as one network of all seats; frozen encoders need it
# steps = 2000
# seed = 1  # all sites of one modality start alike, and anybody can compute it; without it, from private entropy
# own_steps = 0  # then so many steps on the site's own images, without masks""",
    "defences": """
[defences]
# gradients = ["marvell:0.3"]  # gradients show each site where the tumour is; see: splitpeer defences
""",
    "overlap": "overlap = 0.5  # of neighbouring windows",
    "missing": "missing = false  # true: score once more without each seat\n",
    "absence": """\
[absence]  # when a site does not return in time
mode = "pause"  # pause: the job fails and names it; skip: this step is made without it; drop: until it is back
least_sites = 1  # with fewer the job fails
# per_site_s = { north = 30 }  # instead of return_s
""",
}
_PRIVATE = {
    "always": "",
    "kept": """
# keep_s = 604800  # what was released for requests is removed when nobody has asked about the patient for so long""",
    "enough": """
# Three sites or more, each modality at one of them: of two, each could subtract its own part from the sum.""",
    "normalisation": """\
# How images are normalised, by modality: "zscore-nonzero" (of those not named) or "zscore".
# normalisation = { t1 = "zscore" }""",
    "fusion": """\
fusion = "secure-sum"  # sites mask what they send; only the sum over all of them can be read
widths = [1, 1, 2, 4, 8]  # channels of each level of the sum: the fewer, the less it shows""",
    "augment": "augment = true  # the coordinator flips and turns sums; what the sites release is never augmented",
    "patients": "min_patients = 2  # with masks, and images at all sites",
    "precision": "",
    "encoders": 'encoders = "frozen"  # sites keep theirs and release each window once (docs/feature-bank.md)',
    "wire": "",
    "pretraining": """\
[pretraining]  # the recipe of the encoders. One hospital follows it: splitpeer pretrain --recipe --for-partners DIR
data = "phantom"  # for a trial; better the name of a public data set with all these modalities and masks
encoders = "together"  # as one network of all sites: trained alone, they fit each other badly
noise = NOISE  # behind which they learn; each site adds it too: [policy] defences = ["gaussian:NOISE"]
rate = RATE  # price of what gets through the noise besides the task: the more, the less a sum shows
steps = 6000""".replace("NOISE", str(PRIVATE_NOISE)).replace("RATE", str(PRIVATE_RATE)),
    "defences": "",
    "overlap": "overlap = 0.0  # of neighbouring windows: where they overlap, a voxel is shown several times",
    "missing": "",
    "absence": """\
[absence]  # when a site does not return in time, the job fails and names it
# per_site_s = { north = 30 }  # instead of return_s
""",
}


def _pair(key: str, value: object) -> str:
    return to_toml({"x": {key: value}}).partition("\n")[2].strip()


def _quoted(value: object) -> str:
    return _pair("x", value).removeprefix("x = ")


def peer_toml(
    *,
    role: str,
    site: str,
    federation: str,
    modality: str | Sequence[str] | None = None,
    pki: str = "pki",
    coordinator: str = "tcp://coordinator.example.org:7443",
    listen: str = "tcp://127.0.0.1:7443",
    images: str = "images",
    labels: str = "labels",
    convention: str | None = None,
    coordinators: Sequence[str] = ("hub",),
    crl: bool = False,
    private: bool = False,
    partners: Sequence[str] = (),
) -> str:
    """Text of a `peer.toml` for a client (then with `modality`, one or several) or a coordinator.

    `pki` holds the certificates.

    With `private`, a client accepts private jobs only; `partners` may be in a secure sum with it.

    Without `crl`, because the federation's CA keeps no list, revocation is not checked.
    """
    client = role == "client"
    return _PEER.format(
        owner="the hospital, not to the coordinator" if client else "the coordinator",
        role=_quoted(role),
        site=_pair("site", site),
        federation=_pair("federation", federation),
        modality=f"{_pair('modality', modality)}  # or a list: all that this site holds\n" if client else "",
        ca=_quoted(f"{pki}/ca.crt"),
        certificate=_quoted(f"{pki}/{site}.crt"),
        key=_quoted(f"{pki}/{site}.key"),
        crl=("" if crl else "# ") + _pair("crl", f"{pki}/ca.crl"),
        salt=_quoted(f"{pki}/federation.salt"),
        network=(
            _CLIENT_NETWORK.format(coordinator=_quoted(coordinator))
            if client
            else _COORDINATOR_NETWORK.format(listen=_quoted(listen))
        ),
        data=(
            _CLIENT_DATA.format(images=_quoted(images))
            if client
            else _COORDINATOR_DATA.format(
                labels=_quoted(labels),
                convention=_pair("convention", convention)
                if convention
                else '# convention = "..."  # fill in',
            )
        ),
        policy=_policy(coordinators, partners, private=private) if client else "",
        seed=_PRIVATE_SEED if client and private else _ANY_SEED,
        bank=_CLIENT_RESULTS if client else _COORDINATOR_BANK,
    )


def _policy(coordinators: Sequence[str], partners: Sequence[str], *, private: bool) -> str:
    jobs = (_PRIVATE_JOBS if private else _ANY_JOB).format(
        partners=_quoted(list(partners)),
        fill="" if partners else "fill in: ",
        noise=PRIVATE_NOISE,
        rate=PRIVATE_RATE,
    )
    return _CLIENT_POLICY.format(
        coordinators=_quoted(list(coordinators)),
        images=_PRIVATE_IMAGES if private else _ANY_IMAGES,
        defences=_PRIVATE_DEFENCES if private else _ANY_DEFENCES,
        joining=jobs,
        weights="else each run has a new encoder" if private else "what it starts from",
    )


def job_toml(name: str, sites: Mapping[str, Sequence[str]], *, private: bool = False) -> str:
    """Text of a `job.toml` for `sites` and the modalities of each; with `private`, one that private sites accept.

    Without `sites` its [sites] is empty and must be filled in before it loads.
    """
    listed = [_pair(site, held[0] if len(held) == 1 else list(held)) for site, held in sites.items()]
    return _JOB.format(
        name=_pair("name", name),
        sites="\n".join(listed) or '# north = "t1"',
        network=DEFAULT,
        **(_PRIVATE if private else _OPEN),
        others=", ".join(_quoted(network) for network in NETWORKS if network != DEFAULT),
    )
