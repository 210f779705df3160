"""``peer.toml``, which belongs to the hospital: only this file decides what leaves a site.

Secrets are named by file, never written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from splitpeer.data.rules import MAX_VOXELS, Rules
from splitpeer.errors import ConfigError
from splitpeer.models.registry import DEFAULT, NETWORKS
from splitpeer.settings.bounds import Bounds
from splitpeer.settings.loading import Section, Settings
from splitpeer.settings.network import SETTINGS, NetworkSettings
from splitpeer.settings.prepare import PrepareSection
from splitpeer.settings.results import ResultsSection
from splitpeer.settings.values import (
    Address,
    Count,
    CountOrFraction,
    Defences,
    Distinct,
    FilePattern,
    GradientDefences,
    ImageDefences,
    InitialWeights,
    Layout,
    LevelForm,
    Levels,
    Location,
    Modalities,
    Name,
    NormalisationKind,
    PositiveInt,
    RemoteAddress,
    Seconds,
    WeightFiles,
)
from splitproto.connection import Timing
from splitproto.constants import BYTE_BUDGET, LINK_LIFETIME, RECHECK_INTERVAL
from splitproto.errors import IdentityError
from splitproto.identity import AllowList, Credentials

__all__ = ["PeerConfig", "find_peer_toml"]


LEVELS = (0, 1, 2, 3, 4)
"""A policy without one of these levels limits what may leave."""


class Peer(Section):
    """Who this peer is."""

    role: Literal["client", "coordinator"]
    site: Name
    federation: Name
    modality: Modalities | None = None
    """Clients only: what the images show, such as t1, adc, ct or pet; a list where this site holds several."""
    state: Location
    """Folder for weights and checkpoints; default ``state``."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that this site holds, as written; () at a coordinator."""
        return self.modality or ()

    @property
    def held(self) -> str | None:
        """The same in words, such as "t1" or "t2, flair"; None at a coordinator."""
        return ", ".join(self.modalities) or None


class Tls(Section):
    """The files of `splitproto.identity.Credentials`."""

    ca: Location
    certificate: Location
    key: Location
    crl: Location | None = None


class NetworkSection(Section):
    """Clients dial, coordinators listen."""

    coordinator: RemoteAddress | None = None
    listen: Address | None = None
    reconnect_s: Seconds = 300.0
    """How long a client that lost the coordinator keeps trying, in seconds."""
    rotate_mib: Annotated[int, Field(ge=1, le=BYTE_BUDGET >> 20)] = BYTE_BUDGET >> 20
    """A link that has sent this many MiB is replaced by a new one with a new key."""
    rotate_s: Seconds = LINK_LIFETIME
    """The same after this many seconds."""
    recheck_s: Seconds = RECHECK_INTERVAL
    """How often certificates and revocation list are checked while a link is open, in seconds."""

    def timing(self) -> Timing:
        """For `dial` and `Listener`."""
        return Timing(byte_budget=self.rotate_mib << 20, lifetime=self.rotate_s, recheck=self.recheck_s)


FEW_LEAVING = 3
"""So many persons may withdraw consent at once in a run of any size."""


Figure = Literal["loss", "dice", "hd95", "volume"]


class PeerData(Section):
    """Where this peer's volumes are."""

    images: Location | None = None
    labels: Location | None = None
    """The masks: a coordinator's, or those of a client that ``[labels]`` of a job names."""
    layout: Layout = "folder"
    """How files are named; of "csv", `images` or `labels` is a list with the columns patient,path."""
    labels_layout: Layout | None = None
    """How a client's masks are named, if not like its images."""
    files: FilePattern | None = None
    """Instead of a layout's name: where a patient's file is, such as ``{patient}/T1*.nii.gz``."""
    withdrawn: Location | None = None
    """Clients only: list of the patients who have withdrawn consent, an id a line; it may appear or grow at any time,
    and counts from the next batch on."""
    max_withdrawn_at_once: CountOrFraction = 0.1
    """Clients only: persons of a run whom the list may withdraw at once, a whole number or a fraction (then at least
    `FEW_LEAVING`); with more, nothing is sent until the list is corrected or this is raised."""
    convention: Literal["msd", "brats", "brats2023", "nnunet", "task"] | None = None
    """What the integers in the masks mean, never guessed; "task": what ``[task]`` of the job says."""
    salt: Location | None = None
    """The federation's secret from which patient keys are made."""
    cache_mib: Count = 1024
    """Memory for loaded volumes, MiB."""
    max_voxels: PositiveInt = MAX_VOXELS
    """Largest volume taken, as stored and as resampled to the job's spacing; 4 bytes each in memory, 24 while it is
    resampled."""
    unknown_orientation: Literal["warn", "refuse"] = "warn"
    """For files whose header does not say which side is which (qform and sform codes 0): accept as LAS, or refuse."""

    @model_validator(mode="before")
    @classmethod
    def _pattern_is_layout(cls, raw: Any) -> Any:
        pattern = raw.get("files") if isinstance(raw, dict) else None
        if pattern is not None and raw.setdefault("layout", pattern) != pattern:
            raise ValueError("layout and files both say how files are named: remove one of them")
        return raw

    def most_leaving(self, persons: int) -> int:
        """`max_withdrawn_at_once` of so many persons."""
        most = self.max_withdrawn_at_once
        return max(FEW_LEAVING, int(most * persons)) if isinstance(most, float) else most

    def rules(self) -> Rules:
        """For reading."""
        return Rules(self.max_voxels, self.unknown_orientation)


PRIVATE: Mapping[str, Any] = {
    "encoders": "frozen",
    "fusion": "secure-sum",
    "releases": "once",
    "share_encoder": False,
    "recorded_by_coordinator": False,
    "min_partners": 2,
}
"""``preset = "private"``; what is written in addition may only be stricter."""
AT_LEAST = frozenset({"min_partners"})
"""A larger number of these is stricter; any other value of the rest is weaker."""
PRIVATE_RUNS = 1
"""``max_runs_per_patient`` of the preset, which may be raised: a run that failed after it began costs a view."""
PRIVATE_NOISE, PRIVATE_RATE = 0.2, 1.0
"""``min_encoder_noise`` and ``min_encoder_rate`` of the preset: the recipe that ``init job --private`` writes. They may
be lowered, in writing: what they cost in accuracy depends on the task."""
PRIVATE_DEFAULTS: Mapping[str, Any] = {
    "max_runs_per_patient": PRIVATE_RUNS,
    "min_encoder_noise": PRIVATE_NOISE,
    "min_encoder_rate": PRIVATE_RATE,
}
"""What the preset sets where nothing is written."""


class Policy(Bounds):
    """What this hospital allows, whatever a job asks."""

    preset: Literal["private"] | None = None
    """private: only jobs that leave the encoder as it is, read nothing but a sum over sites, and ask for each window
    once, of a coordinator that does not record (`PRIVATE`). Goes with weights that nobody else can compute only."""

    coordinators: Annotated[tuple[Name, ...], Field(min_length=1), Distinct]
    """Sites that may be this client's coordinator."""
    levels: Levels = LEVELS
    """Levels whose activations may leave. Where one of 0 to 4 is missing, or a defence names its levels, level k must
    be at least 2**k times coarser than the image on every axis."""
    precision: Annotated[tuple[LevelForm, ...], Field(min_length=1), Distinct] = get_args(LevelForm)
    """How activations and gradients may travel."""
    normalisation: Annotated[tuple[NormalisationKind, ...], Field(min_length=1), Distinct] = get_args(
        NormalisationKind
    )
    """What may be done to intensities before the encoder sees them: a job's window shows the intensities
    within it in full contrast. With ``image_defences`` only zscore-nonzero is accepted, whatever is set
    here."""
    max_message_mib: PositiveInt = 1024
    """Largest message accepted, MiB."""
    defences: Defences = ()
    """What is done to activations before they leave, in order: ``dropout:0.5``, ``gaussian:1@0,1``."""
    image_defences: ImageDefences = ()
    """What is done to images before the encoder sees them: ``voxel-noise:0.5``."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Privacy budget of every patient for everything that ever leaves, with ``delta``; once it is spent, sending
    stops."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability that the budget does not hold: well below one in the number of patients."""
    encoders: Literal["any", "frozen"] = "any"
    """frozen: only jobs that keep this site's encoder as it is: no gradient is ever taken, each window leaves once."""
    fusion: Literal["any", "secure-sum"] = "any"
    """secure-sum: only jobs in which the coordinator reads a sum over sites and no site's own values."""
    share_encoder: bool = False
    """Whether the coordinator may have our encoders' weights, to average those of one seat: with them it can compute
    images from all activations that it recorded. Not with ``epsilon``, whose promise does not cover weights."""
    join_encoder: bool | None = None
    """Whether ``splitpeer export --agree`` may sign that this site's encoder becomes part of one joined network, whose
    holders can invert what the encoder sent. By default it may, but not with ``preset = "private"`` or ``epsilon``."""
    partners: Annotated[tuple[Name, ...], Distinct] = ()
    """Sites that may be in a secure sum with this one; without any, no job with secure fusion is accepted."""
    min_partners: Annotated[int, Field(ge=1, le=63)] = 2
    """A secure sum of fewer others is refused. With one, that one can subtract its own values from the sum."""
    inference: Literal["none", "own", "listed"] = "none"
    """Whether this site takes part in segmentations of single patients. own: in those that it asks for itself. listed:
    also in those that the sites of ``inference_for`` ask for, by the coordinator's word. What the site releases for a
    run with frozen encoders is the coordinator's to use, whoever asks for a patient of the run."""
    inference_for: Annotated[tuple[Name, ...], Distinct] = ()
    """Sites that may ask for segmentations of patients of whom this site has images."""
    labels: bool = False
    """Whether a job may train with this site's masks ([data] labels): the coordinator gets the loss's gradient by what
    the network says, from which it can read them."""
    label_defences: GradientDefences = ()
    """What is done to those gradients before they leave, in order: ``gaussian:1``. Not with ``figures`` that tell the
    loss."""
    figures: Annotated[tuple[Figure, ...], Distinct] = ()
    """What the coordinator is told of what is computed with this site's masks: ``loss`` (of every step), ``dice``,
    ``hd95``, ``volume``. The rounded loss of logits that a coordinator chose for the purpose tells the mask voxel by
    voxel, without the gradient: rounding does not help, as the logits set the loss's scale."""
    round_to: Annotated[float, Field(gt=0, le=100)] = 0.01
    """Step to which figures are rounded."""
    min_scored: PositiveInt = 2
    """Figures of evaluations of fewer persons are not told. They are means over what the coordinator chose to send:
    with empty masks for all others, a mean tells of one patient what rounding leaves."""
    may_record: bool = True
    """Whether this peer may write captures (``serve --curious``)."""
    recorded_by_coordinator: bool = True
    """Whether a coordinator that records is accepted; false also declines one that does not say."""

    min_encoder_noise: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Only encoders that learned behind so much noise, in root mean squares of a level, and with ``defences`` that add
    as much as they learned behind; above 0 a site needs ``[model] weights``."""
    min_encoder_rate: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Only encoders that paid so much for what got through that noise (``[pretraining] rate``)."""

    @property
    def joins(self) -> bool:
        """Whether this site's encoder may become part of a joined network."""
        if self.join_encoder is None:
            return self.preset is None and self.epsilon is None
        return self.join_encoder

    @property
    def max_message_bytes(self) -> int:
        """`max_message_mib` in octets."""
        return self.max_message_mib * 2**20

    @model_validator(mode="before")
    @classmethod
    def _preset_stands_for(cls, raw: Any) -> Any:
        private = isinstance(raw, dict) and raw.get("preset") == "private"
        return {**PRIVATE_DEFAULTS, **PRIVATE, **raw} if private else raw

    @model_validator(mode="after")
    def _preset_is_a_floor(self) -> Self:
        # Afterwards: "3" from the environment is the number by now.
        for key, wanted in PRIVATE.items() if self.preset == "private" else ():
            given, more = getattr(self, key), key in AT_LEAST
            if given < wanted if more else given != wanted:
                least = " or more" if more else ""
                raise ValueError(
                    f'{key} = {json.dumps(given)} weakens preset = "private", which has {json.dumps(wanted)}{least}'
                )
        return self

    @model_validator(mode="after")
    def _inference_is_for_somebody(self) -> Self:
        if (self.inference == "listed") != bool(self.inference_for):
            raise ValueError(
                'inference = "listed" and inference_for = ["site", ...] go together: write both, or neither'
            )
        return self

    @model_validator(mode="after")
    def _loss_is_no_way_round_the_noise(self) -> Self:
        # SP-11.20-10.
        if self.label_defences and "loss" in self.figures:
            raise ValueError(
                'figures with "loss" tell the masks that label_defences hide, however it is rounded: remove one of them'
            )
        return self

    @model_validator(mode="after")
    def _kept_noise_meets_one_question(self) -> Self:
        if self.releases != "once" and (kept := [spec.brief for spec in self.defences if spec.kept]):
            raise ValueError(
                f'{kept[0]} is undone by a second view of a window (a pose, other weights): write releases = "once", '
                "or use image_defences"
            )
        return self

    @model_validator(mode="after")
    def _budget_can_be_kept(self) -> Self:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta are one budget: write both, or neither")
        if self.epsilon is not None and not any(spec.kind.private for spec in self.defences):
            raise ValueError(
                "epsilon is a promise that only dp-gaussian among the defences can keep: "
                "add it, or remove epsilon and delta"
            )
        if self.epsilon is not None and self.share_encoder:
            raise ValueError("epsilon promises nothing about a shared encoder: remove one of the two")
        if self.epsilon is not None and self.join_encoder:
            raise ValueError("epsilon promises nothing about a joined encoder: remove one of the two")
        return self


class OwnEncoder(NetworkSettings):
    """What this site's encoder is, and what it starts from, if not what a job says."""

    network: str | None = None
    """Instead of the network that a job names: one that yields the job's cut."""
    weights: WeightFiles | None = None
    """File of ``splitpeer pretrain`` that a run's encoder starts from; several seats: ``{ t2 = "t2.safetensors" }``."""

    @model_validator(mode="before")
    @classmethod
    def _settings_are_of_a_network(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and any(name in raw for name in SETTINGS):
            return {"network": DEFAULT, **raw}
        return raw

    @model_validator(mode="after")
    def _has_its_settings(self) -> Self:
        if self.network is None:
            return self
        if self.network not in NETWORKS:
            raise ValueError(f"network {self.network!r} is unknown; known are {', '.join(NETWORKS)}")
        if strange := sorted(self.given.keys() - NETWORKS[self.network].defaults.keys()):
            raise ValueError(
                f"{self.network} has no setting {strange[0]!r}; it has {', '.join(NETWORKS[self.network].defaults)}"
            )
        return self

    def weights_of(self, seat: str) -> Path | None:
        """The file that the encoder of a seat starts from."""
        return self.weights.get(seat) if isinstance(self.weights, dict) else self.weights


class CaptureSection(Section):
    """What ``serve --curious FILE`` writes."""

    key: Location | None = None
    """File of 32 bytes, mode 0600, that encrypts the capture; without it the capture is not encrypted."""
    max_mib: PositiveInt = 65536
    """The capture ends at this size, all parts together; the job continues."""
    rotate_mib: PositiveInt = 4096
    """A new part begins at this size."""
    every: PositiveInt = 1
    """Keep the tensors of every Nth step."""
    keys: Annotated[tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}$")], ...], Distinct] = ()
    """Keep only batches with these patients: keys, or their beginnings, in hexadecimal; none: all."""


class BankSection(Section):
    """A coordinator's feature bank, where its job keeps encoders frozen."""

    key: Location | None = None
    """File of 32 bytes, mode 0600, that encrypts what the sites released; without it, it is not encrypted."""


class Runtime(Section):
    """The machine."""

    device: Annotated[str, Field(pattern=r"^(cpu|auto|cuda(:\d+)?)$")] = "cpu"
    threads: PositiveInt = 1
    initial_weights: InitialWeights = "private"
    """``private``: from this machine's entropy, which nobody knows. A seed makes runs repeatable and the
    weights guessable: for demonstrations and tests."""


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
            "data.withdrawn",
            "capture.key",
            "model.weights",
            "bank.key",
            "prepare.ids",
        }
    )

    peer: Peer
    tls: Tls
    network: NetworkSection
    data: PeerData = PeerData()
    prepare: PrepareSection = PrepareSection()
    policy: Policy | None = None
    model: OwnEncoder | None = None
    capture: CaptureSection = CaptureSection()
    bank: BankSection = BankSection()
    results: ResultsSection = ResultsSection()
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
        # A site may hold masks and nothing else.
        images = client and (self.data.labels is None or self.data.images is not None)
        needed = {
            "[peer] modality": (
                self.peer.modality,
                images,
                'add modality = "t1" or what this site holds',
            ),
            "[network] coordinator": (
                self.network.coordinator,
                client,
                'add coordinator = "tcp://host:7443"',
            ),
            "[data] images": (self.data.images, images, "name the folder of images"),
            "[policy]": (self.policy, client, 'add the section with coordinators = ["hub"]'),
            "[network] listen": (self.network.listen, not client, 'add listen = "tcp://127.0.0.1:7443"'),
        }
        problems = []
        for key, (value, wanted, fix) in needed.items():
            if wanted and value is None:
                problems.append(f"a {self.peer.role} needs {key}: {fix}")
            elif not wanted and value is not None:
                bare = client and key == "[peer] modality"
                where = "a client without [data] images" if bare else f"a {self.peer.role}"
                problems.append(f"{key} is not for {where}: remove it")
        if not client and self.data.withdrawn is not None:
            problems.append("[data] withdrawn is not for a coordinator: remove it")
        if client and self.bank.key is not None:
            problems.append("[bank] is not for a client: remove it")
        if not client and self.model is not None:
            problems.append("[model] is not for a coordinator's peer.toml: its job.toml has one")
        if self.data.labels is not None and self.data.convention is None:
            problems.append(
                '[data] convention is missing: say what the masks follow, "msd" or "brats" or ..., or "task"'
            )
        if client and not images and self.policy is not None and not self.policy.labels:
            problems.append(
                "a client without [data] images is there for its masks: write [policy] labels = true"
            )
        if self.policy is not None and self.policy.labels and self.data.labels is None:
            problems.append("[policy] labels without [data] labels: name the folder of masks")
        problems += self._problems_of_a_seed()
        if self.policy and self.peer.site in self.policy.partners:
            problems.append(
                f"[policy] partners names {self.peer.site}, which is this site: list the others only"
            )
        if self.data.salt is None:
            problems.append('[data] salt is missing: add salt = "pki/federation.salt"')
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_a_seed(self) -> list[str]:
        """SP-14-3: what [policy] promises needs weights, or noise, that nobody else can compute."""
        if self.policy is None or self.runtime.initial_weights == "private":
            return []
        computed = {
            "epsilon": ("the noise", self.policy.epsilon is not None),
            'preset = "private"': ("the encoder", self.policy.preset == "private"),
        }
        return [
            f"[policy] {key} with a seed for [runtime] initial_weights: anyone who knows the seed computes {what}: "
            'write initial_weights = "private"'
            for key, (what, holds) in computed.items()
            if holds
        ]

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
        """A client's: the coordinators of [policy]. A coordinator's comes from its job."""
        if self.policy is None:
            raise ConfigError(
                f"{self.source}: a {self.peer.role} has no [policy]: its job.toml lists the sites"
            )
        return AllowList({"coordinator": self.policy.coordinators}, f"{self.source} [policy] coordinators")


def find_peer_toml(flag: Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The first of: `flag`, $SPLITPEER_CONFIG, ./peer.toml, $XDG_CONFIG_HOME/splitpeer/peer.toml (~/.config).

    The first two need not exist (reading them then fails). Raises ConfigError if none of the others does.
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
