"""The standing of a site in the run: a table, from which the diagram in docs/architecture.md is generated. A
site has one standing at a time, and events move it from one to the next. A change that the table does not
list is a bug of this program, and an error.
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


class Change(Enum):
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


S, C = Standing, Change

_LINKED = frozenset({S.PRESENT, S.RETURNED, S.CATCHING_UP})
_OUT = frozenset({S.ABSENT, S.RETURNED, S.CATCHING_UP})

TRANSITIONS: Mapping[Standing, Mapping[Change, Standing]] = MappingProxyType(
    {
        S.AWAITED: {
            C.DIALLED: S.JOINING,
            # One that dialled while the site was present, whose link ended meanwhile: the same for `joined`.
            C.TURNED_AWAY: S.AWAITED,
            C.JOINED: S.PRESENT,
            C.DECLINED: S.LOST,
            C.FAILED: S.LOST,
            C.LEFT_OUT: S.ABSENT,
        },
        S.JOINING: {
            C.DIALLED: S.JOINING,
            C.TURNED_AWAY: S.AWAITED,
            C.JOINED: S.PRESENT,
            C.DECLINED: S.LOST,
            C.FAILED: S.LOST,
            C.LEFT_OUT: S.ABSENT,
        },
        S.PRESENT: {
            # SP-11.14-4: a second link changes nothing until it has joined.
            C.DIALLED: S.PRESENT,
            C.TURNED_AWAY: S.PRESENT,
            C.JOINED: S.PRESENT,
            C.LINK_ENDED: S.AWAITED,
            C.FAILED: S.LOST,
            C.LEFT_OUT: S.ABSENT,
        },
        S.LOST: {
            C.DIALLED: S.LOST,
            C.TURNED_AWAY: S.LOST,
            C.DECLINED: S.LOST,
            C.JOINED: S.PRESENT,
            C.FAILED: S.LOST,
            C.LEFT_OUT: S.ABSENT,
        },
        S.ABSENT: {
            C.DIALLED: S.ABSENT,
            C.TURNED_AWAY: S.ABSENT,
            C.DECLINED: S.ABSENT,
            C.JOINED: S.RETURNED,
            C.FAILED: S.ABSENT,
            C.LEFT_OUT: S.ABSENT,
            # Its link ended with the last answer: it is waited for, as any other.
            C.CAUGHT_UP: S.AWAITED,
        },
        S.RETURNED: {
            C.DIALLED: S.RETURNED,
            C.TURNED_AWAY: S.RETURNED,
            C.JOINED: S.RETURNED,
            C.LINK_ENDED: S.ABSENT,
            C.FAILED: S.ABSENT,
            C.LEFT_OUT: S.ABSENT,
            C.CATCHES_UP: S.CATCHING_UP,
            # Its link ended with the last answer, and it has another already.
            C.CAUGHT_UP: S.PRESENT,
        },
        S.CATCHING_UP: {
            C.DIALLED: S.CATCHING_UP,
            C.TURNED_AWAY: S.CATCHING_UP,
            C.JOINED: S.CATCHING_UP,
            C.LINK_ENDED: S.ABSENT,
            C.FAILED: S.ABSENT,
            C.LEFT_OUT: S.ABSENT,
            C.CAUGHT_UP: S.PRESENT,
        },
    }
)


class ImpossibleChange(RuntimeError):
    """The table has no such transition: a mistake of this program."""


def after(standing: Standing, change: Change) -> Standing:
    """The standing of a site after `change`.

    Raises:
        ImpossibleChange: the table does not list it for `standing`.
    """
    try:
        return TRANSITIONS[standing][change]
    except KeyError:
        raise ImpossibleChange(f"{change.value!r} while the site is {standing.value}") from None
