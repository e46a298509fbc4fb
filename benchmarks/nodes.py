"""Real SuperNodes and one SuperLink on this machine: lost uploads, memory, what a round costs.

    python benchmarks/nodes.py --nodes 10 --rounds 20

Starts the processes on loopback, runs FedAvg on digits, and prints figures from the run's own
records: seconds a round (median, range) and how many of these training takes (the same clients'
training, timed in this process), the uploads that were lost, and the memory of each role's
processes over the run (PSS; the largest sample of each fifth of the rounds). A SuperNode starts a
process for every message: the imports of such a process, before it does anything, are timed, too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from pfedgpa_app.client.request import build_model
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.data.client import load_client, load_schema
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.engine.flower import stage
from pfedgpa_app.engine.guard import processes_with
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.training import sgd as training

ROLES = ("flower-superlink", "flwr-serverapp", "flower-supernode", "flwr-clientapp")


class Crowd(Deployment):
    """A deployment whose nodes leave the cores to the server, as nodes on other machines would.

    Otherwise the server is not heard from in time, and Flower gives it up.
    """

    def spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        process = super().spawn(command, log)
        if command[0] == "flower-supernode":
            with contextlib.suppress(OSError):  # only Linux with autogroups has it
                Path(f"/proc/{process.pid}/autogroup").write_text("19", encoding="ascii")
        return process


def memory(home: Path) -> dict[str, int]:
    """Return the bytes of each role's processes together (PSS: shared pages are divided)."""
    found: dict[str, int] = defaultdict(int)
    for process in processes_with("FLWR_HOME", str(home)):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            command = " ".join(process.cmdline())
            for role in ROLES:
                if role in command:
                    found[role] += process.memory_full_info().pss
    return found


def bare_seconds(settings: dict[str, Any]) -> float:
    """Time a round's training, one client after the other in this process."""
    torch.set_num_threads(1)
    config = resolve(settings).config
    recipe = training.recipe(config, config.local_epochs, config.learning_rate)
    clients = [load_client(config, client) for client in range(config.num_clients)]
    model = build_model(config, load_schema(config))
    started = time.perf_counter()
    for client, data in enumerate(clients):
        training.train(model, data.train, recipe, torch_generator(0, client))
    return time.perf_counter() - started


def import_seconds() -> dict[str, float]:
    """Time the imports of a client's process, with every method, in seconds for each package.

    Each is the shortest of three.
    """
    how: dict[str, Any] = {"cwd": APP_DIR, "capture_output": True, "text": True, "check": True}
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    cumulative = [
        min(
            float(subprocess.run([sys.executable, "-c", code.format(modules)], **how).stdout)
            for _ in range(3)
        )
        for modules in (
            "torch",
            "torch, flwr.clientapp",
            "torch, flwr.clientapp, client_app, pfedgpa_app.config as c; c.resolve({})",
        )
    ]
    own = [b - a for a, b in itertools.pairwise([0.0, *cumulative])]
    return dict(zip(("torch", "Flower", "the app"), own, strict=True))


def main() -> None:
    """Run the federation and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # also stops the processes
    nodes = options.nodes
    settings: dict[str, Any] = {"num-clients": nodes, "num-server-rounds": options.rounds}
    settings |= {"method": "fedavg", "dataset": "digits", "evaluate-every": 0, "run-name": "run"}
    sizes = min(60, 1200 // nodes), min(40, 500 // nodes)  # as many as the data set allows
    settings |= {"train-per-client": sizes[0], "test-per-client": sizes[1]}
    settings |= {"timeout": max(300.0, 20.0 * nodes)}
    samples: list[tuple[float, dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as out, Crowd() as deployment:
        settings["out-dir"] = out
        deployment.wait_until_ready()
        for node in range(options.nodes):
            deployment.start_node(node)
        deployment.await_nodes()
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(1.0):
                samples.append((time.time(), memory(deployment.home)))

        run_id = deployment.run(stage(APP_DIR, deployment.home / "app"), settings)
        watcher = threading.Thread(target=watch)
        watcher.start()
        failure = deployment.wait(run_id, Path(out) / "log")
        stop.set()
        watcher.join()
        if failure:
            raise SystemExit(failure)
        folder = Path(out) / "run"
        events = [
            json.loads(line)
            for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        rounds = [event["time"] for event in events if event["kind"] == "round"]
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        uploads = sum(json.loads(line)["participated"] for line in lines)
    wanted = options.nodes * options.rounds
    print(f"{options.nodes} SuperNodes, {options.rounds} rounds")
    print(f"uploads: {uploads} of {wanted}")
    spans = [b - a for a, b in itertools.pairwise(rounds)]
    bare = bare_seconds(settings)
    print(
        f"a round: {statistics.median(spans):.1f} s ({min(spans):.1f} to {max(spans):.1f}), "
        f"of which training: {bare:.2f} s"
    )
    said = ", ".join(f"{whose} {seconds:.2f} s" for whose, seconds in import_seconds().items())
    print(f"imports of a client's process: {said}")
    first, last = rounds[0], rounds[-1]
    rows = []
    for role in ROLES:
        cells = [role]
        for i in range(5):
            start, end = (first + (last - first) * (i + k) / 5 for k in (0, 1))
            values = [found.get(role, 0) for when, found in samples if start <= when <= end]
            cells.append(f"{max(values, default=0) / 2**20:.0f}")
        rows.append(cells)
    print(markdown(["memory, MiB", *(f"fifth {i + 1}" for i in range(5))], rows))


if __name__ == "__main__":
    main()
