"""Ask a Ray cluster something without a token: ``python -m autocompress.knock ADDRESS``, with tokens disabled.

A process of its own, since Ray reads once whether it uses tokens. Prints ``open`` if it was answered, ``closed`` if it
was asked for a token, and else the reason why there was no answer.
"""

from __future__ import annotations

import sys

_ANSWER_S = 10.0


def at_its_head(address: str) -> str:
    """Ask the service that knows a cluster's nodes; ``address`` is ``auto`` or ``HOST:PORT``."""
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        found = canonicalize_bootstrap_address_or_die(address)
        GcsClient(address=found).get_all_node_info(timeout=_ANSWER_S)
    except AuthenticationError:
        return "closed"
    return "open"


def at_its_client_server(address: str) -> str:
    """Ask the server for clients from other machines; ``address`` is ``HOST:PORT``."""
    import grpc
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

    with grpc.insecure_channel(address) as channel:
        try:
            ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)  # type: ignore[attr-defined]
            server = RayletDriverStub(channel)  # type: ignore[no-untyped-call]
            server.ClusterInfo(ping, timeout=_ANSWER_S, metadata=(("client_id", "knock"),))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return "closed"
            raise
    return "open"


def main() -> None:
    """Print what the cluster at the address that is the only argument said."""
    address = sys.argv[1]
    _, client, host = address.rpartition("ray://")
    try:
        said = at_its_client_server(host) if client else at_its_head(address)
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        said = next((line.partition("details = ")[2] for line in lines if "details = " in line), lines[0])
    sys.stdout.write(said + "\n")


if __name__ == "__main__":
    main()
