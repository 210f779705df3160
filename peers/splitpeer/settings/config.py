"""``peer.toml``, which belongs to the hospital, and ``job.toml``, which belongs to the coordinator.

A job can ask; only ``peer.toml`` decides what leaves a site. Secrets are named by file, never written here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from splitpeer.data.layouts import canonical_modality
from splitpeer.data.rules import MAX_VOXELS, Rules
from splitpeer.errors import ConfigError, DataError
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.loading import Section, Settings
from splitproto.connection import Timing
from splitproto.constants import BYTE_BUDGET, LINK_LIFETIME, RECHECK_INTERVAL
from splitproto.errors import IdentityError
from splitproto.hosts import split_address
from splitproto.identity import AllowList, Credentials, check_name

__all__ = ["JobConfig", "PeerConfig", "endpoint", "find_peer_toml"]

STRIDE = 16
"""Four poolings halve every axis of a window."""
BOTTLENECK = 4
MAX_SEED = 2**63 - 1


# --------------------------------------------------------------------------------------------------------
# Kinds of value


def _name(value: str) -> str:
    try:
        return check_name("name", value)
    except IdentityError as error:
        raise ValueError(error.reason) from None


def _modality(value: str) -> str:
    try:
        return canonical_modality(value)
    except DataError as error:
        raise ValueError(str(error)) from None


def endpoint(url: str) -> tuple[str, int]:
    """Host and port of ``tcp://host:port``: `split_address`, and a port that can be dialled. Raises ValueError."""
    host, port = split_address(url)
    if port == 0:
        raise ValueError(f"{url!r} is not an address, nobody can dial port 0: write tcp://host:port")
    return host, port


def _address(value: str) -> str:
    """The same address with the host's ASCII form."""
    host, port = endpoint(value)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _remote_address(value: str) -> str:
    if endpoint(value)[0] == "*":
        raise ValueError("nobody can dial '*': write the coordinator's host name")
    return _address(value)


def _levels(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) != len(value) or BOTTLENECK not in value:
        raise ValueError(f"must be distinct levels of 0 to 4, with {BOTTLENECK} (the bottleneck) among them")
    return tuple(sorted(value))


def _distinct(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        raise ValueError(f"the same twice in {list(value)}: name each once")
    return value


def _even_inner(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(width % 2 for width in value[2:5]):
        raise ValueError(f"widths of levels 2 to 4 must be even, the decoder halves them: {list(value)}")
    return value


def _count_or_fraction(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{value!r} is neither a number of patients nor a fraction of them")
    if isinstance(value, float) and not value < 1:
        raise ValueError(f"the fraction {value} leaves nobody to train on: write a whole number of patients")
    return value


def _weights(value: Any) -> Any:
    if value == "private":
        return value
    try:
        seed = -1 if isinstance(value, bool) else int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(
            f'{value!r} is neither "private" nor a seed (a whole number, for demonstrations only)'
        )
    return seed


def _location(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty: name a file or folder, or remove the key")
    name = str(value)
    if any(c in "\b\t\n\f\r" for c in name):
        raise ValueError(
            f"{name!r} holds a control character: in double quotes a backslash starts an escape such as \\t or \\n: "
            "write the path with / or in single quotes"
        )
    if _WINDOWS.search(name):
        raise ValueError(
            f"{name!r} is a Windows path, but this program runs on Linux: write it as Linux sees it "
            "(under WSL, C:\\data is /mnt/c/data)"
        )
    return value


def _defences(place: Literal["activations", "image", "gradients"]) -> AfterValidator:
    """Defences that can be written, each checked; torch is imported only where there is one."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            try:
                from splitpeer.defences.base import parse_all

                parse_all(value, place)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            except ModuleNotFoundError as error:
                raise ValueError(f"needs the package {error.name}: pip install 'splitproto[peer]'") from None
        return value

    return AfterValidator(check)


_WINDOWS = re.compile(r"(^|/)[A-Za-z]:[\\/]|(^|/)\\\\[^\\]+\\")
"""``C:\\`` or ``\\\\server\\``, also where it was taken for a relative path."""
MAX_COUNT = 2**31 - 1
"""Of whole numbers without a bound of their own."""
MAX_STEPS = 99_999_999
"""Checkpoints are named by step, in eight digits."""
Name = Annotated[str, AfterValidator(_name)]
Modality = Annotated[str, AfterValidator(_modality)]
Location = Annotated[Path, BeforeValidator(_location)]
Levels = Annotated[tuple[Annotated[int, Field(ge=0, le=4)], ...], AfterValidator(_levels)]
Defences = Annotated[tuple[str, ...], _defences("activations")]
ImageDefences = Annotated[tuple[str, ...], _defences("image")]
GradientDefences = Annotated[tuple[str, ...], _defences("gradients")]
Precision = Literal["f32", "bf16"]
Seconds = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Width = Annotated[int, Field(ge=1, le=4096)]


# --------------------------------------------------------------------------------------------------------
# peer.toml


class Peer(Section):
    """Who this peer is."""

    role: Literal["client", "coordinator"]
    site: Name
    federation: Name
    modality: Modality | None = None
    """Clients only: flair, t1, t1ce or t2."""
    state: Location
    """Folder for weights and checkpoints; default ``state``."""


class Tls(Section):
    """The files of `splitproto.identity.Credentials`."""

    ca: Location
    certificate: Location
    key: Location
    crl: Location | None = None


class Network(Section):
    """Clients dial, coordinators listen."""

    coordinator: Annotated[str, AfterValidator(_remote_address)] | None = None
    listen: Annotated[str, AfterValidator(_address)] | None = None
    reconnect_s: Seconds = 300.0
    """How long a client that lost the coordinator keeps trying, in seconds."""
    rotate_mib: Annotated[int, Field(ge=1, le=BYTE_BUDGET >> 20)] = BYTE_BUDGET >> 20
    """A link that has sent so much makes way for a new one with a new key, MiB."""
    rotate_s: Seconds = LINK_LIFETIME
    """The same after so many seconds."""
    recheck_s: Seconds = RECHECK_INTERVAL
    """How often certificates and revocation list are looked at while a link is open, in seconds."""

    def timing(self) -> Timing:
        """For `dial` and `Listener`."""
        return Timing(byte_budget=self.rotate_mib << 20, lifetime=self.rotate_s, recheck=self.recheck_s)


class PeerData(Section):
    """Where this peer's volumes are."""

    images: Location | None = None
    labels: Location | None = None
    layout: Literal["folder", "patient-folders", "bids", "brats", "msd", "csv"] = "folder"
    """How files are named; of "csv", `images` or `labels` is a list with the columns patient,path."""
    convention: Literal["msd", "brats", "brats2023", "nnunet"] | None = None
    """What the integers in the masks mean; never guessed."""
    salt: Location | None = None
    """The federation's secret from which patient keys are made."""
    cache_mib: Count = 1024
    """Memory for loaded volumes, MiB."""
    max_voxels: PositiveInt = MAX_VOXELS
    """Largest volume taken, as stored and as resampled to the job's spacing; 4 bytes each in memory, 24 while it is
    resampled."""
    unknown_orientation: Literal["warn", "refuse"] = "warn"
    """Of files whose header does not say which side is which (qform and sform codes 0); taken as LAS."""

    def rules(self) -> Rules:
        """For reading."""
        return Rules(self.max_voxels, self.unknown_orientation)


class Policy(Bounds):
    """What this hospital allows, whatever a job asks."""

    coordinators: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_distinct)]
    """Sites that may be this client's coordinator."""
    levels: Levels = (0, 1, 2, 3, 4)
    """U-Net levels whose activations may leave."""
    precision: Annotated[tuple[Precision, ...], Field(min_length=1), AfterValidator(_distinct)] = (
        "f32",
        "bf16",
    )
    max_message_mib: PositiveInt = 1024
    """Largest message taken, MiB."""
    defences: Defences = ()
    """What is done to activations before they leave, in order: ``dropout:0.5``, ``gaussian:1@0,1``."""
    image_defences: ImageDefences = ()
    """What is done to images before the encoder sees them: ``voxel-noise:0.5``."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Privacy budget of every patient for all that ever leaves, beside ``delta``; when it is spent, sending stops."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Chance by which the budget may fail: well below one in the number of patients."""
    may_record: bool = True
    """Whether this peer may write captures (``serve --curious``)."""
    recorded_by_coordinator: bool = True
    """Whether a coordinator that records may have us; false also declines one that does not say."""

    @property
    def max_message_bytes(self) -> int:
        """`max_message_mib` in octets."""
        return self.max_message_mib * 2**20

    @model_validator(mode="after")
    def _budget_can_be_kept(self) -> Self:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta are one budget: write both, or neither")
        named = {re.split("[:@]", written, maxsplit=1)[0] for written in self.defences}
        if self.epsilon is not None and "dp-gaussian" not in named:
            raise ValueError(
                "epsilon is a promise that only dp-gaussian among the defences can keep: "
                "add it, or remove epsilon and delta"
            )
        return self


class Capture(Section):
    """What ``serve --curious FILE`` writes."""

    key: Location | None = None
    """File of 32 octets, mode 0600: encrypts the capture. Without it, the capture lies in the clear."""
    max_mib: PositiveInt = 65536
    """The capture ends when it has this size, all parts together; the job goes on."""
    rotate_mib: PositiveInt = 4096
    """A new part begins at this size."""
    every: PositiveInt = 1
    """Keep the tensors of every Nth step."""
    keys: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}$")], ...], AfterValidator(_distinct)
    ] = ()
    """Keep only batches with these patients: keys, or their beginnings, in hexadecimal; none: all."""


class Runtime(Section):
    """The machine."""

    device: Annotated[str, Field(pattern=r"^(cpu|auto|cuda(:\d+)?)$")] = "cpu"
    threads: PositiveInt = 1
    initial_weights: Annotated[Literal["private"] | int, BeforeValidator(_weights)] = "private"
    """``private``: from this machine's entropy, known to nobody. A seed makes runs repeat, and the weights
    guessable: for demonstrations and tests."""


class Log(Section):
    """How the log is written."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class PeerConfig(Settings):
    """``peer.toml``."""

    PATHS: ClassVar[frozenset[str]] = frozenset(
        {
            "peer.state",
            "tls.ca",
            "tls.certificate",
            "tls.key",
            "tls.crl",
            "data.images",
            "data.labels",
            "data.salt",
            "capture.key",
        }
    )

    peer: Peer
    tls: Tls
    network: Network
    data: PeerData = PeerData()
    policy: Policy | None = None
    capture: Capture = Capture()
    runtime: Runtime = Runtime()
    log: Log = Log()

    @classmethod
    def load(
        cls, path: Path, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> Self:
        """Read ``peer.toml``; `environ` defaults to the process's. Raises ConfigError: `Settings.read`."""
        return cls.read(path, overrides, os.environ if environ is None else environ)

    @classmethod
    def path_defaults(cls, raw: Mapping[str, Any]) -> dict[str, str]:
        return {"peer.state": "state"}

    @model_validator(mode="after")
    def _role_has_what_it_needs(self) -> Self:
        client = self.peer.role == "client"
        needed = {
            "[peer] modality": (self.peer.modality, client, 'add modality = "t1" or what this site holds'),
            "[network] coordinator": (
                self.network.coordinator,
                client,
                'add coordinator = "tcp://host:7443"',
            ),
            "[data] images": (self.data.images, client, "name the folder of images"),
            "[policy]": (self.policy, client, 'add the section with coordinators = ["hub"]'),
            "[network] listen": (self.network.listen, not client, 'add listen = "tcp://127.0.0.1:7443"'),
            "[data] labels": (self.data.labels, not client, "name the folder of masks"),
        }
        problems = []
        for key, (value, wanted, fix) in needed.items():
            if wanted and value is None:
                problems.append(f"a {self.peer.role} needs {key}: {fix}")
            elif not wanted and value is not None:
                problems.append(f"{key} is not for a {self.peer.role}: remove it")
        if self.data.labels is not None and self.data.convention is None:
            problems.append(
                '[data] convention is missing: say what the masks follow, "msd" or "brats" or ...'
            )
        if self.policy and self.policy.epsilon is not None and self.runtime.initial_weights != "private":
            problems.append(
                "[policy] epsilon with a seed for [runtime] initial_weights: whoever knows the seed computes the "
                'noise; write initial_weights = "private"'
            )
        if self.data.salt is None:
            problems.append('[data] salt is missing: add salt = "pki/federation.salt"')
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def credentials(self) -> Credentials:
        """The files of [tls], checked, and that they speak for [peer]. Raises ConfigError."""
        try:
            own = Credentials(self.tls.ca, self.tls.certificate, self.tls.key, self.tls.crl)
            identity = own.identity
        except IdentityError as error:
            raise ConfigError(f"{self.source}: [tls]: {error}") from error
        for key in ("federation", "role", "site"):
            said, certified = getattr(self.peer, key), getattr(identity, key)
            if said != certified:
                raise ConfigError(
                    f"{self.source}: [peer] {key} is {said!r} but {self.tls.certificate} was issued for "
                    f"{certified!r}: correct the one that is wrong"
                )
        return own

    def allow_list(self) -> AllowList:
        """A client's: the coordinators of [policy]. (A coordinator's comes from its job.)"""
        if self.policy is None:
            raise ConfigError(
                f"{self.source}: a {self.peer.role} has no [policy]: its job.toml lists the sites"
            )
        return AllowList({"coordinator": self.policy.coordinators}, f"{self.source} [policy] coordinators")


def find_peer_toml(flag: Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The first of: `flag`, $SPLITPEER_CONFIG, ./peer.toml, $XDG_CONFIG_HOME/splitpeer/peer.toml (~/.config).

    The first two need not exist (reading them then says so). Raises ConfigError if none of the others does.
    """
    environ = os.environ if environ is None else environ
    if flag is not None:
        return flag
    if named := environ.get("SPLITPEER_CONFIG"):
        return Path(named)
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".config")
    candidates = (Path("peer.toml"), home / "splitpeer" / "peer.toml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"no peer.toml (looked for {' and '.join(map(str, candidates))}): "
        "make one with splitpeer init, or name it with --config or SPLITPEER_CONFIG"
    )


# --------------------------------------------------------------------------------------------------------
# job.toml


class JobHead(Section):
    """Which job this is."""

    name: Name
    seed: Seed = 0
    """Seeds the order of batches, the augmentation and the decoder; known to all."""


class Model(Section):
    """The U-Net."""

    dimensions: Literal[2, 3] = 2
    features: Annotated[tuple[Width, ...], Field(min_length=6, max_length=6), AfterValidator(_even_inner)] = (
        32,
        32,
        64,
        128,
        256,
        32,
    )
    """Widths of levels 0 to 4 and of the decoder's last block."""
    levels: Levels = (0, 1, 2, 3, 4)
    """Levels whose activations the sites send."""
    fusion: Literal["concat", "mean"] = "concat"


class JobData(Section):
    """What a sample is, and who is held out."""

    window: Annotated[
        tuple[Annotated[int, Field(ge=STRIDE, le=4096)], ...], Field(min_length=2, max_length=3)
    ]
    """Voxels; default 96 x 96, or 128 x 128 x 128."""
    spacing: (
        Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=3, max_length=3)] | None
    ) = None
    """Millimetres to resample to; without it, as stored."""
    positive_fraction: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of windows centred on tumour."""
    augment: bool = True
    validation: Annotated[int | float, BeforeValidator(_count_or_fraction)] = 0.2
    """Patients held out: a whole number, or a fraction."""
    min_patients: PositiveInt = 2
    """Fewer patients common to all sites fail the job."""
    max_withdrawn: Annotated[int | float, BeforeValidator(_count_or_fraction)] = 0.1
    """Patients that one site may withdraw in the middle of a run: a whole number, or a fraction (then at least one)."""

    def most_withdrawn(self, patients: int) -> int:
        """`max_withdrawn` of so many patients."""
        most = self.max_withdrawn
        return max(1, int(most * patients)) if isinstance(most, float) else most


class Training(Section):
    """The optimisation, the same at all parties."""

    steps: Annotated[int, Field(gt=0, le=MAX_STEPS)] = 1000
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    precision: Precision = "f32"
    """Of activations and gradients on the wire."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    ahead: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches announced before they are needed, so that sites prefetch."""
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: Annotated[int, Field(ge=1, le=64)] = 2
    """The newest so many stay, at all parties."""
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of each modality to be left out of a step, so that the network learns to do without one."""


class JobDefences(Section):
    """What the coordinator, who holds the labels, does to what it sends."""

    gradients: GradientDefences = ()
    """In order: ``marvell:0.3``, ``max-norm``; to each site's gradients on their own."""


class Evaluation(Section):
    """Sliding windows over the patients held out."""

    every: Count = 0
    """Steps; 0: only at the end."""
    sample: Count = 0
    """Of the patients held out, how many the evaluations before the last score; 0: all."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    missing: bool = False
    """Score the patients held out once more without each modality."""


class Deadlines(Section):
    """How long the coordinator waits, in seconds. What then happens, `Absence` says."""

    join_s: Seconds = 600.0
    step_s: Seconds = 120.0
    return_s: Seconds = 60.0


class Absence(Section):
    """What happens when a site is waited for in vain."""

    mode: Literal["pause", "skip", "drop"] = "pause"
    """pause: nothing goes on, then the job fails. skip: the step is made without it, and the next waits again.
    drop: steps are made without it until it is back."""
    least_sites: PositiveInt = 1
    """With fewer it ends (exit code 3)."""
    per_site_s: dict[Name, Seconds] = Field(default_factory=dict)
    """How long a certain site may be away; the others: [deadlines] return_s."""


class Output(Section):
    """Where results go."""

    folder: Location
    """Default ``runs/<name>``."""


class JobConfig(Settings):
    """``job.toml``."""

    PATHS: ClassVar[frozenset[str]] = frozenset({"output.folder"})

    job: JobHead
    sites: Annotated[dict[Name, Modality], Field(min_length=1)]
    """Site to modality: who takes part, and the coordinator's allow-list."""
    model: Model = Model()
    data: JobData
    training: Training = Training()
    defences: JobDefences = JobDefences()
    evaluation: Evaluation = Evaluation()
    deadlines: Deadlines = Deadlines()
    absence: Absence = Absence()
    output: Output

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read ``job.toml``. Raises ConfigError, see `Settings.read`. The environment has no say in a job."""
        return cls.read(path, overrides)

    @classmethod
    def path_defaults(cls, raw: Mapping[str, Any]) -> dict[str, str]:
        job = raw.get("job")
        name = job.get("name") if isinstance(job, dict) else None
        return {"output.folder": f"runs/{name}"}

    @model_validator(mode="before")
    @classmethod
    def _window_by_dimensions(cls, raw: Any) -> Any:
        model, data = raw.get("model", {}), raw.setdefault("data", {})
        if isinstance(model, dict) and isinstance(data, dict):
            data.setdefault("window", (128,) * 3 if model.get("dimensions") == 3 else (96,) * 2)
        return raw

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = []
        for modality, times in Counter(self.sites.values()).items():
            if times > 1:
                sites = " and ".join(repr(site) for site, held in self.sites.items() if held == modality)
                problems.append(f"[sites] {modality} is at {sites}: one site per modality")
        strangers = [site for site in self.absence.per_site_s if site not in self.sites]
        problems += [f"[absence] per_site_s: {site!r} is not one of [sites]" for site in strangers]
        if self.absence.least_sites > len(self.sites):
            problems.append(
                f"[absence] least_sites = {self.absence.least_sites}, but [sites] names {len(self.sites)}"
            )
        window, dimensions = self.data.window, self.model.dimensions
        if len(window) != dimensions:
            problems.append(f"[data] window has {len(window)} sizes but [model] dimensions is {dimensions}")
        if any(size % STRIDE for size in window):
            problems.append(f"[data] window {list(window)}: each size must be divisible by {STRIDE}")
        elif prod(size // STRIDE for size in window) < 2:
            problems.append(f"[data] window {list(window)} leaves one value at level 4: use 32 or more")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def allow_list(self) -> AllowList:
        """The coordinator's: the clients of [sites]."""
        return AllowList({"client": tuple(self.sites)}, f"{self.source} [sites]")
