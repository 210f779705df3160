"""The addresses of a name that a ZeroMQ dialler tries in turn, and the cause if none answers."""

from __future__ import annotations

import asyncio
import socket
from functools import partial

from splitproto.errors import DeadlineExceeded, LinkLost, SplitprotoError

from .addresses import dialled_address, format_address
from .base import Attempt
from .zeromq import Context, Dealer

DIAGNOSIS_S = 3.0
"""How long plain TCP may take to show what is wrong."""


class TcpDestination:
    """A coordinator's port.

    Args:
        address: `tcp://host:port`.
        context: ZeroMQ's, if not the process's own.

    Raises:
        AddressError: `address` cannot be dialled.
    """

    def __init__(self, address: str, context: Context | None = None) -> None:
        self.host, self._port = dialled_address(address)
        self._context = context

    async def attempts(self, timeout: float) -> list[Attempt]:
        """One per address of the host. Raises SplitprotoError: it has none, or none is known within `timeout` s."""
        # libzmq tries only the first address of a name; a coordinator often serves just one of IPv6 and IPv4.
        found = await self._resolve(timeout)
        return [Attempt(address, partial(Dealer, address, self._context)) for address in found]

    async def _resolve(self, timeout: float) -> list[str]:
        """ZeroMQ endpoints of every address of the host, in the system's order of preference."""
        try:
            async with asyncio.timeout(timeout):
                found = await asyncio.get_running_loop().getaddrinfo(
                    self.host, self._port, type=socket.SOCK_STREAM
                )
        except TimeoutError:
            raise DeadlineExceeded(f"the name {self.host} was not resolved within {timeout:g} s") from None
        except (OSError, UnicodeError) as error:
            raise LinkLost(
                f"the name {self.host} is unknown: check [network] coordinator and DNS", detail=str(error)
            ) from None
        hosts = []
        for _, _, _, _, at in found:
            scope = f"%{at[3]}" if len(at) == 4 and at[3] else ""
            hosts.append(f"{at[0]}{scope}")
        return [format_address(one, self._port) for one in dict.fromkeys(hosts)]

    async def diagnose(self, error: SplitprotoError) -> SplitprotoError:
        """Name the cause of a failed connection by trying plain TCP once."""
        if not isinstance(error, LinkLost | DeadlineExceeded):
            return error
        where = f"{self.host} port {self._port}"
        try:
            async with asyncio.timeout(DIAGNOSIS_S):
                _, writer = await asyncio.open_connection(self.host, self._port)
            writer.close()
        except TimeoutError:
            return LinkLost(f"no answer from {where}: a firewall, or the wrong address")
        except ConnectionRefusedError:
            return LinkLost(f"nothing listens at {where}: is the coordinator running?")
        except OSError as cause:
            return LinkLost(f"cannot reach {where}: {cause.strerror or cause}")
        if isinstance(error, DeadlineExceeded):
            return DeadlineExceeded(f"{where} accepts connections but does not answer as a coordinator")
        return LinkLost(
            f"{where} closes the connection at once: what listens there is not a coordinator, "
            "or something in between ends it"
        )
