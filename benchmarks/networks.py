"""A deployment over networks of its own, slow and lossy, whose cables may be cut.

    python benchmarks/networks.py

Runs two nodes and three rounds of SCAFFOLD on digits, over TLS. For each cable and cut it prints
how long that took, whether the figures are the same as in one process, and the run's warnings.

Each SuperNode and the SuperLink live in a network namespace of their own, with a cable from each
node to the SuperLink. A cable is two TUN devices, between which a thread of this process carries
the packets: late, out of order, or not at all. Netem would do so, too, but not every kernel has it.
Needs Linux, root and iproute2.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
INSIDE = "--inside"  # marks the call of this file in the server's namespace
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
PACKET = 1500  # bytes of the largest packet, TUN's default


@dataclass(frozen=True)
class Cable:
    """What happens to the packets of one cable, each way by itself.

    Attributes:
        rate: bits a second.
        delay: seconds that a packet is on its way.
        lost: share of packets that never arrive.
        overtaking: share of packets without delay, which overtake others that left earlier.
        queue: bytes that can wait to be sent; packets beyond that are lost.
    """

    rate: float = 100e6
    delay: float = 0.0
    lost: float = 0.0
    overtaking: float = 0.0
    queue: int = 15_000

    def __str__(self) -> str:
        words = [f"{self.rate / 1e6:g} Mbit/s"]
        words += [f"{1e3 * self.delay:g} ms"] * bool(self.delay)
        words += [f"{self.lost:.0%} lost"] * bool(self.lost)
        words += [f"{self.overtaking:.0%} overtake"] * bool(self.overtaking)
        return ", ".join(words)


@dataclass
class Way:
    """One way of a cable: packets from one device to the other."""

    source: int
    target: int
    cable: Cable
    chance: random.Random
    free: float = 0.0  # the time from which the cable is free

    def carry(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take one packet; it arrives later, or never."""
        packet, now = os.read(self.source, PACKET), loop.time()
        waiting = max(self.free - now, 0.0)
        full = waiting * self.cable.rate / 8 + len(packet) > self.cable.queue
        if full or self.chance.random() < self.cable.lost:
            return
        self.free = now + waiting + 8 * len(packet) / self.cable.rate
        ahead = self.chance.random() < self.cable.overtaking
        loop.call_at(self.free + (0.0 if ahead else self.cable.delay), self._arrive, packet)

    def _arrive(self, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the cable is cut
            os.write(self.target, packet)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def plug(namespace: str, state: str) -> None:
    """Set a node's end of its cable ``up`` or ``down``."""
    _ip("-n", namespace, "link", "set", CABLE, state)


def missing() -> str:
    """Say why there can be no such networks here; "" if there can."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        return "needs Linux, root and iproute2"
    try:
        with namespaces("pfedgpa-probe-", 1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"the kernel refuses: {error.stderr.decode().strip()}"
    except OSError as error:
        return f"the kernel refuses TUN devices: {error}"


def _device(namespace: str, name: str, address: str) -> int:
    """Make a TUN device in a namespace; return the file descriptor through which its packets go."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    wanted = struct.pack("16sH22x", b"pfedgpa%d", IFF_TUN | IFF_NO_PI)
    made = fcntl.ioctl(end, TUNSETIFF, wanted)[:16].rstrip(b"\0").decode()
    _ip("link", "set", made, "netns", namespace, "name", name)
    _ip("-n", namespace, "address", "add", address, "dev", name)
    _ip("-n", namespace, "link", "set", name, "up")
    return end


@contextmanager
def namespaces(prefix: str, nodes: int, cable: Cable | None = None) -> Iterator[None]:
    """Make namespaces for the server and ``nodes`` nodes, and a cable to each node."""
    server = prefix + SERVER
    ends: list[int] = []
    made = [server, *(f"{prefix}{node}" for node in range(nodes))]
    loop, chance = asyncio.new_event_loop(), random.Random(0)
    carrier = threading.Thread(target=loop.run_forever, daemon=True)
    try:
        for name in made:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for node in range(nodes):
            near = _device(server, f"node{node}", f"10.77.{node}.1/24")
            far = _device(f"{prefix}{node}", CABLE, f"10.77.{node}.2/24")
            ends += [near, far]
            for source, target in ((near, far), (far, near)):
                way = Way(source, target, cable or Cable(), chance)
                loop.add_reader(source, way.carry, loop)
        carrier.start()
        yield
    finally:
        if carrier.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            carrier.join()
        loop.close()
        for end in ends:
            os.close(end)
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class Networked(Deployment):
    """A deployment in such namespaces; make it inside the server's."""

    host = "0.0.0.0"  # all addresses of the namespace

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
        """Cut a node's cable now, and mend it after so many seconds."""
        far = f"{self.prefix}{number}"
        plug(far, "down")

        def mend() -> None:
            time.sleep(seconds)
            plug(far, "up")

        threading.Thread(target=mend, daemon=True).start()


def federate(folder: Path, prefix: str, cut: float, settings: dict[str, Any]) -> str:
    """Run the app with ``settings`` in the namespaces, cutting the last node's cable in round 2.

    Args:
        cut: for how many seconds; 0: not at all.

    Returns:
        why the run did not complete, or "".
    """
    nodes = settings["num-clients"]
    keys.make(folder / "keys", [f"10.77.{node}.1" for node in range(nodes)], nodes)
    events = folder / settings["run-name"] / "events.jsonl"
    with Networked(folder / "keys", prefix) as deployment:
        deployment.wait_until_ready()
        for node in range(nodes):
            deployment.register(node)
            deployment.start_node(node)
        deployment.await_nodes()
        run_id = deployment.run(stage(APP_DIR, deployment.home / "app"), settings)
        cuts = [cut] if cut else []

        def cut_in_round_2() -> None:
            if cuts and events.exists() and " round 1/" in events.read_text(encoding="utf-8"):
                deployment.cut(nodes - 1, cuts.pop())

        return deployment.wait(run_id, folder / "log", cut_in_round_2)


def over_networks(
    folder: Path, prefix: str, settings: dict[str, Any], cable: Cable, cut: float
) -> tuple[Path, str]:
    """Call ``federate`` in namespaces with such cables.

    Returns:
        the run's folder, and why the run did not complete, or "".
    """
    settings = settings | {"out-dir": str(folder), "run-name": "run"}
    inside = ["ip", "netns", "exec", prefix + SERVER, sys.executable, "-m", "benchmarks.networks"]
    with namespaces(prefix, settings["num-clients"], cable):
        done = subprocess.run(
            [*inside, INSIDE, str(folder), prefix, str(cut), json.dumps(settings)],
            cwd=APP_DIR,
            env=os.environ | {"PYTHONPATH": str(APP_DIR)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    said: str = json.loads(done.stdout.splitlines()[-1])
    return folder / "run", said


def main() -> None:
    """Measure every cable and print the table."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    if why := missing():
        raise SystemExit(why)
    settings = PLAIN | {"num-clients": 2, "num-server-rounds": 3, "evaluate-every": 0}
    settings |= {"method": "scaffold", "timeout": 300.0}
    print("| cable | cut, s | s | the same numbers | said |\n| --- | --- | --- | --- | --- |")
    slow = Cable(rate=1e6)
    bad = Cable(rate=1e6, delay=0.1, lost=0.05, overtaking=0.02)
    for cable, cut in ((Cable(), 0.0), (slow, 0.0), (bad, 0.0), (slow, 20.0), (slow, 60.0)):
        with tempfile.TemporaryDirectory() as place:
            reference = settings | {"out-dir": place, "run-name": "reference"}
            undisturbed = run(InProcessGrid(reference, 2), resolve(reference))
            started = time.monotonic()
            folder, failure = over_networks(Path(place), "pfedgpa-bench-", settings, cable, cut)
            took = time.monotonic() - started
            same = records(folder) == records(undisturbed)
            events = records(folder, "events.jsonl")
            said = [e["text"] for e in events if e["kind"] == "warning"] + [failure] * bool(failure)
        print(f"| {cable} | {cut:.0f} | {took:.0f} | {same} | {'; '.join(said)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        where, named, seconds, chosen = sys.argv[2:]
        print(json.dumps(federate(Path(where), named, float(seconds), json.loads(chosen))))
    else:
        main()
