"""One capture on the bench: opened, granted knowledge, judged, attacked. What `splitpeer attack` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from splitpeer.attacks.base import Knowledge, Progress, View, silent
from splitpeer.attacks.view import coordinator_view, one_per_patient, site_view
from splitpeer.audit.book import Book, network_of, sha256_of
from splitpeer.audit.campaign import Judge, Outcome, first_views, make_judge, parse_order, redefended, run
from splitpeer.audit.cohort import Cohort, Samples, cut, most_tumour, shadow
from splitpeer.audit.knowledge import parse_knows, with_decoder, with_model, with_models, with_shadow
from splitpeer.captures.reader import Capture, open_capture
from splitpeer.captures.recorder import read_key
from splitpeer.data.layouts import canonical_modality
from splitpeer.data.pseudonym import load_salt
from splitpeer.data.volumes import Triple, Volumes
from splitpeer.errors import AttackImpossible, ConfigError, DataError
from splitpeer.report.model import Source
from splitproto.messages import Inventory, Sample

SHADOW_SALT = bytes(32)
"""The adversary's own patients need names of no federation."""


class Bench:
    """See `splitpeer attack --help` for the arguments.

    Raises:
        AttackImpossible: the capture does not hold what is asked for.
        ConfigError, DataError: a file or setting that cannot be used.
    """

    def __init__(
        self, capture: Path, *, key_file: Path | None = None, modality: str | None = None,
        knows: Sequence[str] = (), queries: bool = False, shadow_images: int = 600, truth: Path | None = None,
        salt: Path | None = None, layout: str = "folder", convention: str | None = None, defence: str | None = None,
        views: int | None = None, samples: int = 24, step: int | None = None, seed: int = 0, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.path, self._seed, self._device = capture, seed, device
        self.refused = ""
        self._capture: Capture = open_capture(capture, read_key(key_file) if key_file else None)
        self._verdict = self._capture.verify()
        # What a crash cut off is attacked up to its last whole record; what was changed is not attacked at all.
        if self._verdict.problem is not None and not self._verdict.cut_off:
            raise DataError(f"{capture}: {self._verdict.problem}")
        header = self._capture.header
        if header.job is None:
            raise AttackImpossible(f"{capture}: ended before a job began, there is nothing to attack")
        self._files = parse_knows(knows)
        self._offline = bool(defence)
        window: Triple = (*header.job.window, 1)[:3]  # type: ignore[assignment]
        if modality is None:
            modality = header.modality or next(p.modality for p in header.peers if p.modality)
        modality = canonical_modality(modality)
        cohort = None
        if truth is not None and salt is not None:
            wanted = [modality]
            cohort = Cohort.read(
                truth, wanted, salt=load_salt(salt), layout=layout, convention=convention,
                spacing=header.job.spacing or None,
            )  # fmt: skip
        self.view = self._view(header.role, modality, samples, step, cohort, window)
        if defence:
            self.view = redefended(self.view, defence.split("+"), seed=seed, views=views or 1)
        elif views is not None:
            self.view = first_views(self.view, views)
        chosen = [target.sample for target in self.view.targets]
        if cohort is not None:
            self._same_grid(cohort.images[modality])
        self.truth = cut(cohort, chosen, window) if cohort is not None else None
        self.others = self._others(convention, layout, window, shadow_images)
        self.knowledge = self._knowledge(queries)
        self.judge: Judge = make_judge(modality, self.truth, self.others)
        self._book: Book | None = None

    def _view(
        self, role: str, modality: str, samples: int, step: int | None, cohort: Cohort | None, window: Triple
    ) -> View:
        if role == "client":
            steps = None if step is None else (step,)
            return site_view(self._capture, steps=steps, limit=samples)

        def choose(recorded: Sequence[Sample]) -> list[Sample]:
            # Whoever scores may choose: the slice with most tumour is the one that matters.
            if cohort is None or cohort.labels is None:
                return one_per_patient(recorded)
            held = set(cohort.keys())
            keys = list(dict.fromkeys(s.key for s in recorded if s.key in held))
            there = set(recorded)
            best = [s for s in most_tumour(cohort, keys, window) if s in there]
            return best or one_per_patient(recorded)

        mode = "train" if step == 1 else None
        view = coordinator_view(self._capture, modality, mode=mode, step=step, choose=choose, limit=samples,
                                every_step=len(self._files.get("weights", ())) > 1)  # fmt: skip
        return replace(view, source=self._verdict.last_chain.hex())

    def _same_grid(self, truth: Volumes) -> None:
        """Raise DataError where the truth's volumes are not those that the site listed when it joined."""
        listed = {
            patient.key: patient.shape
            for record in self._capture.records()
            if isinstance(record.head, Inventory) and record.peer in (self.view.site, "")
            for patient in record.head.patients
        }
        held = set(truth.keys())
        for target in self.view.targets:
            key = target.sample.key
            if key in held and key in listed and truth.geometry(key).shape != listed[key]:
                shape = "x".join(map(str, truth.geometry(key).shape))
                raise DataError(
                    f"the truth has volumes of {shape} voxels where the site listed "
                    f"{'x'.join(map(str, listed[key]))}: give the site's own images, in its own resolution"
                )

    def _others(self, convention: str | None, layout: str, window: Triple, count: int) -> Samples | None:
        if "shadow" not in self._files:
            return None
        (folder,) = self._files["shadow"]
        # Attacks through the coordinator's decoder need all contrasts of the same people.
        modalities = self.view.modalities
        with_labels = convention if (folder / "labels").is_dir() or layout != "folder" else None
        present = [m for m in modalities if layout != "folder" or (folder / m).is_dir()]
        cohort = Cohort.read(
            folder, present or [self.view.modality], salt=SHADOW_SALT, layout=layout, convention=with_labels
        )
        return shadow(cohort, window, count, self._seed)

    def _knowledge(self, queries: bool) -> Knowledge:
        knowledge = Knowledge(queries=queries)
        for kind, paths in self._files.items():
            path = paths[-1]
            if kind == "weights":
                knowledge = with_model(knowledge, self.view, path)
                if len(paths) > 1:
                    knowledge = with_models(knowledge, self.view, paths)
            elif kind == "initial":
                knowledge = with_model(knowledge, self.view, path, initial=True)
            elif kind == "decoder":
                knowledge = with_decoder(knowledge, self.view, path)
        if self.others is not None:
            knowledge = with_shadow(knowledge, self.others)
        return knowledge

    @property
    def notice(self) -> str:
        """What whoever runs it should know of the capture; empty: nothing."""
        if self._verdict.cut_off or self._verdict.ended is False:
            return f"{self.path}: cut off; attacked up to its last whole record"
        return ""

    def open(self, out: Path, commands: tuple[str, ...] = ()) -> Book:
        """The run folder."""
        header, view = self._capture.header, self.view
        job = header.job
        if job is None:
            raise AttackImpossible("a capture without a job")
        sites = {p.site: p.modality for p in header.peers if p.modality}
        source = Source(
            file=self.path.name, digest=self._verdict.last_chain.hex(), role=view.role,
            site=header.site, federation=header.federation, run=(header.run or b"").hex(), job=job.name,
            created=header.created, records=self._verdict.records, complete=bool(self._verdict.ended),
            samples=len(view.targets),
        )  # fmt: skip
        digests = {kind: sha256_of(paths[-1]) for kind, paths in self._files.items() if paths[-1].is_file()}
        self._book = Book(
            out, source, network_of(view, sites, job.precision), commands=commands, digests=digests,
            trained=not self._offline,
        )  # fmt: skip
        self._book.truth(self.judge)
        return self._book

    def run(
        self, attacks: Sequence[str], *, naive: bool = True, progress: Progress = silent
    ) -> Iterator[Outcome]:
        """Each attack, entered in the book as soon as it is done. One that is impossible is entered as such.

        Raises:
            KeyboardInterrupt: what was done is kept.
        """
        book = self._book
        if book is None:
            raise ConfigError("open a run folder first")
        for written in attacks:
            order = parse_order(written)
            try:
                for outcome in run(
                    self.view, self.knowledge, [order], self.judge, seed=self._seed, device=self._device,
                    naive=naive, progress=progress,
                ):  # fmt: skip
                    book.enter(outcome)
                    yield outcome
            except AttackImpossible as error:
                self.refused = f"{order.attack}: {error}"
                book.could_not(order.attack, self.view, str(error))
            except KeyboardInterrupt:
                book.could_not(order.attack, self.view, "interrupted from the keyboard", status="interrupted")
                raise
