"""Checks the Host header against DNS rebinding.

A web page whose domain name is pointed at this machine sends requests with that domain name in the Host header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence


class Hosts:
    """The host names that the service answers to."""

    def __init__(self, bound: str, names: Sequence[str]):
        """Set the accepted names.

        Args:
            bound: the address that the service listens on.
            names: the names that the operator accepts. If empty, a service that is open to the network answers to any
                name, and a service on a loopback address to IP addresses and `localhost`.
        """
        self._names = {name.strip().lower().rstrip(".") for name in names}
        self._any = not names and not is_local(bound)
        self._known: set[bytes] = set()  # cache of accepted headers

    def foreign(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return an error message if the Host header of a request is not accepted, else None."""
        if self._any:
            return None
        host = next((value for name, value in headers if name == b"host"), None)
        if host is None or host in self._known:  # optional in HTTP/1.0; browsers always send it
            return None
        name = _name(host.decode("latin-1"))
        if name in self._names or name == "localhost" or _is_address(name):
            if len(self._known) < 1000:
                self._known.add(host)
            return None
        return (
            f"This service does not answer to the name {name[:80]!r}. Address it as localhost or by its IP address, "
            "or ask the operator to add the name to MODEPATH_HOSTS."
        )


def _name(host: str) -> str:
    """Return the host in lower case, without the port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].strip().lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_local(bound: str) -> bool:
    """Whether an address is reached from this machine only."""
    return bound == "localhost" or (_is_address(bound) and ipaddress.ip_address(bound).is_loopback)
