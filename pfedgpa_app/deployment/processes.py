"""A deployment on this machine: a SuperLink and SuperNodes as real processes on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from pfedgpa_app.config.parse import in_toml
from pfedgpa_app.deployment import keys
from pfedgpa_app.engine import LaunchError
from pfedgpa_app.engine.flower import CONNECTION, Flower, free_port


class Deployment(Flower):
    """A SuperLink, and the SuperNodes that are started, while the ``with`` block lasts.

    Attributes:
        nodes: {number: its SuperNode's process}.
    """

    def __init__(self, certificates: Path | None = None) -> None:
        """Prepare it, encrypted and with authenticated nodes if ``certificates`` has their keys."""
        super().__init__()
        self.certificates = certificates
        self.ca = certificates / keys.CA if certificates else None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._ports: dict[int, int] = {}
        self.env["OMP_NUM_THREADS"] = "1"  # clients share the cores; more threads only contend

    def superlink_options(self) -> list[str]:
        database = ["--database", str(self.home / "state.db")]
        if self.certificates is None:
            return ["--insecure", *database]
        folder = self.certificates
        return [
            *("--ssl-ca-certfile", str(folder / keys.CA)),
            *("--ssl-certfile", str(folder / keys.SERVER)),
            *("--ssl-keyfile", str(folder / keys.SERVER_KEY)),
            *("--enable-supernode-auth", *database),
        ]

    def register(self, number: int) -> None:
        """Have the SuperLink accept a node's key."""
        assert self.certificates is not None
        self.flwr(
            "supernode", "register", str(self.certificates / f"node-{number}.pub"), CONNECTION
        )

    def reached_at(self, number: int) -> str:
        """Return the SuperLink's host as a node sees it."""
        return self.host

    def start_node(self, number: int, **config: Any) -> None:
        """Start a SuperNode, or start it again, with the given node config."""
        command = ["flower-supernode", "--superlink", f"{self.reached_at(number)}:{self.port}"]
        port = self._ports.setdefault(number, free_port())
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if self.certificates is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self.certificates / keys.CA)]
            key = self.certificates / f"node-{number}"
            command += ["--auth-supernode-private-key", str(key)]
        named = {name.replace("_", "-"): value for name, value in config.items()}
        command += ["--node-config", in_toml({"partition-id": number} | named)]
        self.nodes[number] = self.spawn(command, self.node_log(number))

    def await_nodes(self) -> None:
        """Wait until every node that was started is connected.

        Raises:
            LaunchError: that took more than two minutes.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            listed = self.flwr("supernode", "list", CONNECTION)["nodes"]
            if sum(node["status"] == "online" for node in listed) >= len(self.nodes):
                return
        raise LaunchError(f"not all {len(self.nodes)} SuperNodes have connected")

    def node_log(self, number: int) -> Path:
        """Return the file to which a node's SuperNode and clients write."""
        return self.home / f"node-{number}.log"

    def kill_node(self, number: int) -> None:
        """Kill a node's SuperNode and the processes that it started."""
        os.killpg(self.nodes[number].pid, signal.SIGKILL)
        self.nodes.pop(number).wait()
