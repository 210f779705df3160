"""A site's part in secure fusion (SP-11.18): its key for the run, its partners, and what leaves in place of values."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from splitpeer.daemon import happenings as h
from splitpeer.errors import DataError
from splitpeer.site.answers import answers_of
from splitpeer.site.mask_keys import MaskKeys
from splitpeer.site.range_refusals import RangeRefusals
from splitpeer.site.run_folders import write_file
from splitpeer.storage import reading
from splitpeer.training.split_step import Arrays
from splitpeer.training.sums import over_seats
from splitproto import Credentials, fusion, partners
from splitproto.errors import IdentityError, PolicyRefused
from splitproto.identity import OWN_UNUSABLE
from splitproto.messages import Forward, FusionKeys, JobOffer
from splitproto.partners import Keys, Trust
from splitproto.records import Fusion, KeyOffer

TRIES, PAUSE_S = 4, 0.25
"""CA and revocation list that cannot be read are read again, so often and after so many seconds."""
PARTNERS = "partners.json"
"""In the folder of a run."""
MOST_CLIPPED = 0.5
"""Share of the values of a first release that may be beyond the sum's range."""
HISTORY = "history"
"""In the metadata of a checkpoint."""


@dataclass(frozen=True)
class Allowed:
    """Who may be in a sum with this site, and what proves them."""

    credentials: Credentials
    federation: str
    partners: Collection[str]
    least: int

    def trust(self) -> Trust:
        """With CA and revocation list as they are now; one that is just being replaced is read again. Raises
        IdentityError."""
        for _ in range(TRIES):
            with suppress(IdentityError):
                return self._trust()
            time.sleep(PAUSE_S)
        return self._trust()

    def _trust(self) -> Trust:
        return Trust.of(self.credentials, self.federation, self.partners, self.least)


class Summing:
    """Of one run. What must survive this process lies in the run's folder.

    Args:
        offer: of a job with secure fusion, which was judged.
        folder: of the run.
        allowed: what this site's policy says.
        site: this site's name.
        report: told of partners, and of values out of range.
        most_mib: of its answers, see `Bounds.max_record_mib`.
        refusals: of ranges, in all runs of this site.
        key_days: [policy] max_key_days.

    Raises:
        PolicyRefused: the run is complete, or too many ranges were refused.
        DataError: a file in the folder is missing, or cannot be read or written.
    """

    def __init__(
        self,
        offer: JobOffer,
        folder: Path,
        allowed: Allowed,
        site: str,
        report: h.Reporter,
        most_mib: int,
        refusals: RangeRefusals,
        key_days: float,
    ) -> None:
        if offer.job.fusion is None:
            raise ValueError("the job has no secure fusion")
        self.terms: Fusion = offer.job.fusion
        self._run, self._digest, self._site = offer.run, partners.terms_digest(offer.job), site
        self._allowed, self._report = allowed, report
        self._folder, self._refusals = folder, refusals
        refusals.check()
        self.keys = MaskKeys(folder, key_days, report)
        self._kept = _partners(folder / PARTNERS)
        self._answers = answers_of(folder, most_mib)
        # Of releases, `Released` keeps them (SP-11.17-5).
        given: dict[str, str] = {}
        if not offer.job.frozen:
            self._answers.read(lambda said: given.update({str(said["asked"]): str(said["answer"])}))
        self._given = fusion.Given(given)
        self._proven = False
        self._offer: KeyOffer | None = None
        self.history = fusion.BEGINNING
        """SP-11.18-12: of the step that was applied last."""
        self._clipped = self._told = 0

    # --- keys ------------------------------------------------------------------------------------------

    def offer(self) -> KeyOffer:
        """SP-11.18-6: for a new link, signed with the certificate that is in place now. Raises IdentityError."""
        self._proven = False
        self.keys.begin_link()
        own = self._allowed.credentials
        try:
            key, chain = own.key.read_bytes(), own.certificate.read_bytes()
        except OSError as error:
            raise IdentityError(OWN_UNUSABLE, "certificate or key cannot be read") from error
        self._offer = partners.sign(key, chain, self._run, self._digest, self.keys.public)
        return self._offer

    def accept(self, keys: FusionKeys, now: datetime) -> None:
        """SP-11.18-8, SP-11.18-9: nothing leaves before the partners have proven themselves.

        Args:
            now: with its time zone.

        Raises:
            FusionMismatch, PolicyRefused: they have not.
            DataError: they cannot be kept.
        """
        trust = self._allowed.trust()
        found = partners.accept(
            keys.partners,
            self._offer or self.offer(),
            self._run,
            self._digest,
            self.terms.parties,
            trust,
            now,
        )
        if self._kept:
            partners.check_unchanged(self._kept, found)
        if not self._kept:
            written = json.dumps({name: keys.written() for name, keys in found.items()}, indent=1) + "\n"
            write_file(self._folder / PARTNERS, written.encode())
            self._kept = found
        self.keys.agree(self._run, self._site, found)
        self._proven = True
        self._report(h.PartnersProven(self._run.hex(), sorted(found), self._allowed.least))

    @property
    def ready(self) -> bool:
        """Whether the partners have proven themselves."""
        return self._proven

    # --- answers ---------------------------------------------------------------------------------------

    def rounded(self, forward: Forward, sent: Mapping[str, Arrays]) -> Arrays:
        """This site's part of the sum for a batch, as integers by level; see `answer`.

        Args:
            sent: float32 [B, width, *spatial], by seat and level; the weights are those of `history`.

        Raises:
            TensorError: a value is not finite.
        """
        own = over_seats(sent)
        words, clipped = fusion.rounded(own, self.terms)
        self._tell(forward, clipped, sum(array.size for array in own.values()))
        return words

    def answer(self, forward: Forward, words: Arrays) -> Arrays:
        """What leaves for a batch (SP-11.18-2).

        Args:
            words: see `rounded`.

        Raises:
            PolicyRefused: the key that the masks are made with was deleted.
            SiteFailed: the same question got another answer before (SP-11.18-13).
            DataError: that it is given cannot be written down.
        """
        if not self._proven:
            raise ValueError("values would leave before the partners have proven themselves")
        masking = self.keys.masking(forward.mode)
        asked = fusion.Asked(
            forward.mode, forward.step, forward.batch, forward.digest, self._history(forward)
        )
        tensors = fusion.masked(masking, asked, words)
        if forward.mode != "release":
            # SP-11.18-18: in a later epoch the same answer has other masks, but the same words.
            self._given.record(asked, words if forward.mode == "infer" else tensors, self._keep)
        return tensors

    def check_range(self, sent: Mapping[str, Arrays]) -> None:
        """Whether the sum's range suits values that are about to be released, and can be only once.

        Args:
            sent: as `answer` takes it, of the first batch of a run.

        Raises:
            PolicyRefused: the sum would show little of them, or too many ranges were refused to look at them. What the
                coordinator is told is the same whether the range is too large or too small.
            DataError: the refusal cannot be written down.
            TensorError: a value is not finite.
        """
        # SP-11.18-15: before a value is looked at.
        self._refusals.check()
        own = [*over_seats(sent).values()]
        found = [fusion.quantise(values, self.terms) for values in own]
        clipped = sum(outside for _, outside in found)
        if clipped > MOST_CLIPPED * sum(values.size for values in own):
            self._refuse_range(
                f"more than {MOST_CLIPPED:.0%} of them are beyond it, so little but their signs would be summed: a "
                "larger sum_range is needed"
            )
        if any(values.any() for values in own) and not any(words.any() for words, _ in found):
            self._refuse_range(
                "all of them become 0 in it: a smaller sum_range, or more sum_bits, are needed"
            )

    def _refuse_range(self, detail: str) -> NoReturn:
        """Raises PolicyRefused, with a detail that does not leave this site."""
        self._refusals.note(self._run, self.terms.range)
        raise PolicyRefused(
            f"the sum's range of {self.terms.range:g} does not suit the values of this site's first batch; this is "
            f"refusal {self._refusals.count}, and after a few this site declines sums: agree on a range first",
            detail,
        )

    def follow(self, step: int, batch: bytes, gradients: Mapping[str, np.ndarray]) -> None:
        """SP-11.18-12: `step`, of the batch with this digest, was applied with these gradients, as they arrived."""
        self.history = fusion.follow(self.history, step, batch, gradients)

    def saved(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata of a checkpoint, and the history."""
        return {**meta, HISTORY: self.history.hex()}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """The history of a checkpoint. Raises DataError."""
        try:
            history = bytes.fromhex(meta[HISTORY])
        except (KeyError, ValueError, TypeError):
            history = b""
        if len(history) != len(fusion.BEGINNING):
            raise DataError("the checkpoint holds no history of its run: take one that secure fusion wrote")
        self.history = history

    # --- inside ----------------------------------------------------------------------------------------

    def _history(self, forward: Forward) -> bytes:
        # SP-11.18-12: a release is made with weights that no step has changed.
        return fusion.BEGINNING if forward.mode == "release" else self.history

    def _keep(self, asked: str, answer: str) -> None:
        self._answers.add(asked=asked, answer=answer)

    def _tell(self, forward: Forward, clipped: int, values: int) -> None:
        """SP-11.18-3: "reports them to its operator": the first, and then whenever there are twice as many."""
        self._clipped += clipped
        if clipped and self._clipped >= 2 * self._told:
            self._told = self._clipped
            self._report(h.ValuesClipped(forward.step, clipped, values, self._clipped, self.terms.range))


# --- files ----------------------------------------------------------------------------------------------


def _partners(path: Path) -> dict[str, Keys]:
    """SP-11.18-9: those that were accepted; none at first."""
    try:
        return {str(name): Keys.read(keys) for name, keys in reading.document(path).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise DataError(f"{path}: cannot be read: restore it, or begin a new run") from None
