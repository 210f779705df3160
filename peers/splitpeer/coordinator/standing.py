"""Where a site stands in the run: a table, the single source of the diagram in docs/architecture.md.

A site has one standing at a time; what happens to it moves it from one to the next. What the table does not list
cannot happen: it is a mistake of this program, and an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Standing(Enum):
    """The value is the word that `splitpeer status` shows."""

    AWAITED = "awaited"
    """It has no link and is waited for: at the start, and between two links."""
    JOINING = "joining"
    """It was awaited, and a link of it is asked what the site has."""
    PRESENT = "present"
    """It has joined; the work counts on it."""
    LOST = "lost"
    """It declined the job or failed for good; the run ends, or continues without it."""
    ABSENT = "absent"
    """The run continues without it. It may dial and join again."""
    RETURNED = "returned"
    """It was absent and has joined again; before one of the next steps it catches up."""
    CATCHING_UP = "catching up"
    """It is brought to the step that the others have committed."""

    @property
    def linked(self) -> bool:
        """Whether it has joined over a link that was not seen to end."""
        return self in _LINKED

    @property
    def out(self) -> bool:
        """Whether the run continues without it."""
        return self in _OUT


class Happening(Enum):
    """What moves a site from one standing to another."""

    DIALLED = "dialled"
    """A link of the site is offered the job."""
    TURNED_AWAY = "turned away"
    """The last of the links that were joining was refused, or broke."""
    DECLINED = "declined"
    """The site does not want the job."""
    JOINED = "joined"
    """A link has shown all that is asked, and is the site's link from now on."""
    LINK_ENDED = "link ended"
    """The link over which it had joined is gone; another may follow."""
    FAILED = "failed"
    """It gave up, or broke the protocol, in a way that a new link does not mend."""
    LEFT_OUT = "left out"
    """The run stops counting on it."""
    CATCHES_UP = "catches up"
    """The run makes room for it."""
    CAUGHT_UP = "caught up"
    """It is at the committed step, and the run counts on it again."""


S, H = Standing, Happening

_LINKED = frozenset({S.PRESENT, S.RETURNED, S.CATCHING_UP})
_OUT = frozenset({S.ABSENT, S.RETURNED, S.CATCHING_UP})

TRANSITIONS: Mapping[Standing, Mapping[Happening, Standing]] = MappingProxyType(
    {
        S.AWAITED: {
            H.DIALLED: S.JOINING,
            # One that dialled while the site was present, whose link ended meanwhile: the same for `joined`.
            H.TURNED_AWAY: S.AWAITED,
            H.JOINED: S.PRESENT,
            H.DECLINED: S.LOST,
            H.FAILED: S.LOST,
            H.LEFT_OUT: S.ABSENT,
        },
        S.JOINING: {
            H.DIALLED: S.JOINING,
            H.TURNED_AWAY: S.AWAITED,
            H.JOINED: S.PRESENT,
            H.DECLINED: S.LOST,
            H.FAILED: S.LOST,
            H.LEFT_OUT: S.ABSENT,
        },
        S.PRESENT: {
            # SP-11.14-4: a second link changes nothing until it has joined.
            H.DIALLED: S.PRESENT,
            H.TURNED_AWAY: S.PRESENT,
            H.JOINED: S.PRESENT,
            H.LINK_ENDED: S.AWAITED,
            H.FAILED: S.LOST,
            H.LEFT_OUT: S.ABSENT,
        },
        S.LOST: {
            H.DIALLED: S.LOST,
            H.TURNED_AWAY: S.LOST,
            H.DECLINED: S.LOST,
            H.JOINED: S.PRESENT,
            H.FAILED: S.LOST,
            H.LEFT_OUT: S.ABSENT,
        },
        S.ABSENT: {
            H.DIALLED: S.ABSENT,
            H.TURNED_AWAY: S.ABSENT,
            H.DECLINED: S.ABSENT,
            H.JOINED: S.RETURNED,
            H.FAILED: S.ABSENT,
            H.LEFT_OUT: S.ABSENT,
            # Its link ended with the last answer: it is waited for, as any other.
            H.CAUGHT_UP: S.AWAITED,
        },
        S.RETURNED: {
            H.DIALLED: S.RETURNED,
            H.TURNED_AWAY: S.RETURNED,
            H.JOINED: S.RETURNED,
            H.LINK_ENDED: S.ABSENT,
            H.FAILED: S.ABSENT,
            H.LEFT_OUT: S.ABSENT,
            H.CATCHES_UP: S.CATCHING_UP,
            # Its link ended with the last answer, and it has another already.
            H.CAUGHT_UP: S.PRESENT,
        },
        S.CATCHING_UP: {
            H.DIALLED: S.CATCHING_UP,
            H.TURNED_AWAY: S.CATCHING_UP,
            H.JOINED: S.CATCHING_UP,
            H.LINK_ENDED: S.ABSENT,
            H.FAILED: S.ABSENT,
            H.LEFT_OUT: S.ABSENT,
            H.CAUGHT_UP: S.PRESENT,
        },
    }
)


class ImpossibleHappening(RuntimeError):
    """The table has no such transition: a mistake of this program."""


def after(standing: Standing, happening: Happening) -> Standing:
    """Where a site stands after `happening`.

    Raises:
        ImpossibleHappening: the table does not list it for `standing`.
    """
    try:
        return TRANSITIONS[standing][happening]
    except KeyError:
        raise ImpossibleHappening(f"{happening.value!r} while the site is {standing.value}") from None
