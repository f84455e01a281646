"""Where Ray runs: on this machine, for one search and with a token of its own, or on a cluster that others started."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

_HERE_ALONE = {
    # With no clusters, whatever the system, Ray's servers are bound to the loopback address alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Where memory runs short, Ray ends the processes of its workers by its own rules, the desk among them. The kernel
    # ends the one that takes most.
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that others started.

    Args:
        address: ``auto`` or ``HOST:PORT`` from one of its machines, ``ray://HOST:PORT`` from another.
        insecure: whether it may be one that asks nobody for a token.
    """

    address: str
    insecure: bool = False


def environment(cluster: Cluster | None) -> dict[str, str]:
    """Return what the process that Ray is reached from has in its environment beside what is there.

    Without a cluster a token is made for this search alone: Ray would leave one in a file of the home folder. For a
    cluster Ray takes it from ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or that file.
    """
    if cluster is None:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **_HERE_ALONE}
    return {} if cluster.insecure else {"RAY_AUTH_MODE": "token"}
