"""Files that come while a run is under way: a patient may be asked for who was not there when it was taken up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from splitpeer.daemon import happenings as h
from splitpeer.data.channels import Channels
from splitpeer.data.consent import Consent
from splitpeer.data.files import Found
from splitpeer.data.pseudonym import keyed
from splitpeer.errors import DataError
from splitpeer.site.named import Named


class LateFiles:
    """Those of one run at one site.

    Args:
        channels: of the run; they learn what is new.
        consent: learns of it, too.
        named: whom the coordinator knows.
        salt: the patients'.
        find: the site's images as they are now, by modality.
        report: told what keeps a look from being taken.
    """

    def __init__(
        self,
        channels: Channels,
        consent: Consent,
        named: Named,
        salt: bytes,
        find: Callable[[], Mapping[str, Found]],
        report: h.Reporter,
    ) -> None:
        self._channels, self._consent, self._named = channels, consent, named
        self._salt, self._find, self._report = salt, find, report
        self.keys: set[bytes] = set()
        """Patients who came after this process took up the run; where encoders train, until an inventory lists them."""

    def look(self) -> None:
        """Take in what came. A file that makes the folder unclear to others' patients changes nothing."""
        before = set(self._channels.keys())
        try:
            found = {modality: keyed(self._salt, kind.cases) for modality, kind in self._find().items()}
            for cases in found.values():
                self._consent.learn({key: case for key, case in cases.items() if key not in before})
            # As at the start: who withdrew before the coordinator was told is passed over.
            without = self._consent.withdrawn().difference(self._named.people)
            self._channels.learn(
                {
                    modality: [case for key, case in cases.items() if key not in without]
                    for modality, cases in found.items()
                }
            )
        except DataError as error:
            self._report(h.DataWarning(str(error)))
            return
        self.keys |= set(self._channels.keys()) - before
