"""Which Host headers are answered. A web page that a name server sends to this machine calls it by the page's own name."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence


class Hosts:
    """The names under which the service may be addressed."""

    def __init__(self, bound: str, names: Sequence[str]):
        """Decide once.

        Args:
            bound: the address that the service listens on.
            names: those of the operator; where there are none, a service that is open to the network answers to any name,
                and one on a loopback address to IP addresses and `localhost`.
        """
        self._names = {name.strip().lower().rstrip(".") for name in names}
        self._any = not names and not _is_local(bound)
        self._known: set[bytes] = set()  # headers that were found right, bounded by what is right

    def foreign(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """What is wrong with the Host of a request; None where it is right."""
        if self._any:
            return None
        host = next((value for name, value in headers if name == b"host"), None)
        if host is None or host in self._known:  # HTTP/1.0 needs none, and browsers always send one
            return None
        name = _name(host.decode("latin-1"))
        if name in self._names or name == "localhost" or _is_address(name):
            if len(self._known) < 1000:
                self._known.add(host)
            return None
        return (
            f"This service does not answer to the name {name[:80]!r}. Address it as localhost or by its IP address, "
            "or let the operator add the name to MODEPATH_HOSTS."
        )


def _name(host: str) -> str:
    """Without the port; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].strip().lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_local(bound: str) -> bool:
    return bound == "localhost" or (_is_address(bound) and ipaddress.ip_address(bound).is_loopback)
