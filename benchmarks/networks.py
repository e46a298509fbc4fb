"""A deployment over networks of its own, slow and lossy, whose cables may be cut.

    python benchmarks/networks.py

Two nodes and three rounds of SCAFFOLD on digits, over TLS; for each rate and cut: how long it took,
whether it came to the same numbers as in one process, and what was said of it.

Each SuperNode and the SuperLink live in a network namespace of their own, with a cable from each
node to the SuperLink. Wants root, iproute2 and a kernel with veth and tbf; delays and reordering
would want netem, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.deployment import keys
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.engine.flower import stage
from pfedgpa_app.runs.experiment import run
from tests.support.federations import PLAIN, records
from tests.support.local_grid import InProcessGrid

SERVER, CABLE = "server", "cable"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def missing() -> str:
    """Why there can be no such networks here, or ""."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("tc"):
        return "needs Linux, root and iproute2"
    try:
        with namespaces("pfedgpa-probe-", 1, "1mbit"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"the kernel refuses: {error.stderr.decode().strip()}"


@contextmanager
def namespaces(prefix: str, nodes: int, rate: str) -> Iterator[None]:
    """Namespaces for the server and so many nodes, and cables that carry ``rate``.

    Their queues are short: packets of whoever sends faster are lost.
    """
    made = [prefix + SERVER, *(f"{prefix}{node}" for node in range(nodes))]
    try:
        for name in made:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for node in range(nodes):
            far = f"{prefix}{node}"
            ends = ["type", "veth", "peer", "name", CABLE, "netns", far]
            _ip("-n", made[0], "link", "add", f"node{node}", *ends)
            for name, device, last in ((made[0], f"node{node}", 1), (far, CABLE, 2)):
                _ip("-n", name, "address", "add", f"10.77.{node}.{last}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
                shape = ["tbf", "rate", rate, "burst", "5kb", "limit", "15kb"]
                command = ["tc", "-n", name, "qdisc", "add", "dev", device, "root", *shape]
                subprocess.run(command, check=True, capture_output=True)
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Networked(Deployment):
    """A deployment in such namespaces; it is made in the server's."""

    host = "0.0.0.0"  # of the namespace

    def __init__(self, certificates: Path, prefix: str) -> None:
        super().__init__(certificates)
        self.prefix = prefix

    def reached_at(self, number: int) -> str:
        return f"10.77.{number}.1"

    def spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        if command[0] == "flower-supernode":
            number = log.stem.partition("-")[2]
            command = ["ip", "netns", "exec", f"{self.prefix}{number}", *command]
        return super().spawn(command, log)

    def cut(self, number: int, seconds: float) -> None:
        """Cut a node's cable for so long, from now on."""
        far = f"{self.prefix}{number}"
        _ip("-n", far, "link", "set", CABLE, "down")

        def mend() -> None:
            time.sleep(seconds)
            _ip("-n", far, "link", "set", CABLE, "up")

        threading.Thread(target=mend, daemon=True).start()


def federate(folder: Path, prefix: str, cut: float, settings: dict[str, Any]) -> str:
    """Run the app with ``settings`` in the namespaces; the last node's cable is cut in round 2.

    Returns:
        why the run did not complete, or "".
    """
    nodes = settings["num-clients"]
    hosts = ["localhost", "127.0.0.1", *(f"10.77.{node}.1" for node in range(nodes))]
    keys.make(folder / "keys", hosts, nodes)
    events = folder / settings["run-name"] / "events.jsonl"
    with Networked(folder / "keys", prefix) as deployment:
        deployment.wait_until_ready()
        for node in range(nodes):
            deployment.register(node)
            deployment.start_node(node)
        deployment.await_nodes()
        run_id = deployment.run(stage(APP_DIR, deployment.home / "app"), settings)
        if cut:
            while not (events.exists() and " round 1/" in events.read_text()):
                time.sleep(0.05)
            deployment.cut(nodes - 1, cut)
        return deployment.wait(run_id, folder / "log")


def over_networks(
    folder: Path, prefix: str, settings: dict[str, Any], rate: str, cut: float
) -> tuple[Path, str]:
    """``federate`` in namespaces whose cables carry ``rate``.

    Returns:
        the run's folder, and why it did not complete, or "".
    """
    settings = settings | {"out-dir": str(folder), "run-name": "run"}
    inside = ["ip", "netns", "exec", prefix + SERVER, sys.executable, "-m", "benchmarks.networks"]
    with namespaces(prefix, settings["num-clients"], rate):
        done = subprocess.run(
            [*inside, str(folder), prefix, str(cut), json.dumps(settings)],
            cwd=APP_DIR,
            env=os.environ | {"PYTHONPATH": str(APP_DIR)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    said: str = json.loads(done.stdout.splitlines()[-1])
    return folder / "run", said


def main() -> None:
    """Measure."""
    if why := missing():
        raise SystemExit(why)
    settings = PLAIN | {"num-clients": 2, "num-server-rounds": 3, "evaluate-every": 0}
    settings |= {"method": "scaffold", "timeout": 300.0}
    print("| rate | cut, s | s | the same numbers | said |\n| --- | --- | --- | --- | --- |")
    for rate, cut in (("100mbit", 0.0), ("1mbit", 0.0), ("1mbit", 20.0), ("1mbit", 60.0)):
        with tempfile.TemporaryDirectory() as place:
            reference = settings | {"out-dir": place, "run-name": "reference"}
            undisturbed = run(InProcessGrid(reference, 2), resolve(reference))
            started = time.monotonic()
            folder, failure = over_networks(Path(place), "pfedgpa-bench-", settings, rate, cut)
            took = time.monotonic() - started
            same = records(folder) == records(undisturbed)
            events = records(folder, "events.jsonl")
            said = [e["text"] for e in events if e["kind"] == "warning"] + [failure] * bool(failure)
        print(f"| {rate} | {cut:.0f} | {took:.0f} | {same} | {'; '.join(said)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:  # in the server's namespace
        where, named, seconds, chosen = sys.argv[1:]
        print(json.dumps(federate(Path(where), named, float(seconds), json.loads(chosen))))
    else:
        main()
