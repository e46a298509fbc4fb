"""A Ray cluster of two machines, one core each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil

from benchmarks import networks
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.engine.flower import free_port
from pfedgpa_app.engine.guard import processes_of, processes_with


class Cluster:
    """Two nodes; in network namespaces of their own, if the machine allows them.

    Attributes:
        home: the folder of Ray's files; it marks the cluster's processes.
        env: the environment of whoever uses the cluster.
        head, other: the words before a command that make it run on either machine.
    """

    def __init__(self, home: Path, prefix: str | None) -> None:
        self.home, self.prefix = home, prefix
        self.head = self._on(networks.SERVER)
        self.other = self._on("0")
        self.env = os.environ | {
            "FLWR_HOME": str(home),
            "PYTHONPATH": str(APP_DIR),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self) -> None:
        first, second = ("10.77.0.1", "10.77.0.2") if self.prefix else ("127.0.0.1", "127.0.0.1")
        port = free_port()
        begins = ["--head", f"--port={port}", "--include-dashboard=false"]
        self._start(self.head, first, *begins, f"--temp-dir={self.home}")
        self._start(self.other, second, f"--address={first}:{port}")
        self.env["RAY_ADDRESS"] = f"{first}:{port}"

    def _on(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self.prefix + name] if self.prefix else []

    def _start(self, where: list[str], address: str, *options: str) -> None:
        ray = str(Path(sys.executable).parent / "ray")
        alike = ["--num-cpus=1", f"--node-ip-address={address}"]
        command = [*where, ray, "start", *alike, *options]
        subprocess.run(command, env=self.env, check=True, capture_output=True)

    def lose_the_other(self) -> None:
        """Make the other machine leave without a word, as if its power were gone."""
        if not self.prefix:
            max(self.running("raylet/raylet"), key=lambda node: node.create_time()).kill()
            return
        name = f"{self.prefix}0"
        networks.plug(name, "down")
        inside = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True)
        for pid in inside.stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def running(self, word: str) -> list[psutil.Process]:
        """Return the cluster's processes that have ``word`` in their command."""
        found = []
        for process in processes_with("FLWR_HOME", str(self.home)):
            with contextlib.suppress(psutil.Error):  # the process has just ended
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def close(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_of(self.home):
                os.kill(pid, sign)
            time.sleep(2)


@contextmanager
def two_machines() -> Iterator[Cluster]:
    """Start a cluster, and stop it afterwards."""
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets need a short path
    prefix = None if networks.missing() else f"pfedgpa-ray-{os.getpid()}-"
    try:
        with networks.namespaces(prefix, 1) if prefix else nullcontext():
            cluster = Cluster(home, prefix)
            try:
                cluster.start()
                yield cluster
            finally:
                cluster.close()
    finally:
        shutil.rmtree(home, ignore_errors=True)
