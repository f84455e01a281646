"""A Ray cluster of nodes on this machine, one of which can be lost like a machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_START_S, _TRIES = 60.0, 3


class Nodes:
    """A cluster of nodes of one core each, all on the loopback address.

    Args:
        token: without which nobody is let in; None lets in anybody.
        unseen: a folder that nothing of it sees, in whose place they find an empty one; as on other machines.
        environment: that all nodes see, beside this one.
    """

    def __init__(
        self, token: str | None, *, unseen: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._unseen = unseen
        self._everywhere = dict(environment or {})
        self.address = f"127.0.0.1:{free_port()}"
        self.client_address = f"ray://127.0.0.1:{free_port()}"
        self.token = token
        self._folder = tempfile.mkdtemp(prefix="ray")  # of a short name: sockets stand in it
        self._nodes: list[subprocess.Popen[bytes]] = []
        client = self.client_address.rpartition(":")[2]
        self._start("--head", f"--port={self.address.partition(':')[2]}", f"--ray-client-server-port={client}",
                    "--include-dashboard=false", f"--temp-dir={self._folder}")  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        auth = {"RAY_AUTH_MODE": "disabled"} if self.token is None else {"RAY_AUTH_MODE": "token"}
        return auth if self.token is None else {**auth, "RAY_AUTH_TOKEN": self.token}

    def grow(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Add a node, and wait until it is there: two that start at once may choose the same ports.

        Args:
            arguments: of ``ray start`` beside what all nodes have.
            environment: that the node and all that runs there see, beside this one.
        """
        there = self.alive()
        for _ in range(_TRIES):
            self._start(f"--address={self.address}", *arguments, environment=environment)
            if self._joined(there + 1):
                return
            self._nodes.pop()
        raise RuntimeError("the node did not start")

    def _joined(self, nodes: int) -> bool:
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self._nodes[-1].poll() is None:
            if self.alive() >= nodes:
                return True
        if self._nodes[-1].poll() is None:
            self.lose(-1)
        return False

    def _start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        ray = Path(sys.executable).with_name("ray")
        self._nodes.append(
            subprocess.Popen(
                [*self._elsewhere(), str(ray), "start", "--node-ip-address=127.0.0.1", "--num-cpus=1",
                 "--disable-usage-stats", "--block", "--object-store-memory=100000000", *arguments],
                env={**os.environ, **self.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
                     **self._everywhere, **(environment or {})},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip

    def _elsewhere(self) -> list[str]:
        """Return what runs a command that does not see the folder."""
        if self._unseen is None:
            return []
        return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(self._unseen)]

    def lose(self, number: int) -> None:
        """End a node and all that it runs at once."""
        os.killpg(self._nodes[number].pid, signal.SIGKILL)
        self._nodes[number].wait()

    def alive(self) -> int:
        """Return how many nodes are there."""
        code = (
            "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); "
            "print('alive:', sum(node['Alive'] for node in ray.nodes()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.address],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        # Ray may say something in between, such as that a node was lost.
        found = re.search(r"^alive: (\d+)$", done.stdout, re.MULTILINE)
        return int(found[1]) if done.returncode == 0 and found is not None else 0

    def wait(self) -> None:
        """Wait until the head is there."""
        if not self._joined(1):
            raise RuntimeError("the cluster did not start")

    def stop(self) -> None:
        for node in reversed(self._nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
