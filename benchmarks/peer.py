"""This app's process engine beside what a researcher would write: the plainest correct loop.

    python benchmarks/peer.py --data-dir DATA [--cifar10 imagefolder:cifar10]

The plain loop is one process with torch's own threads: for each client a copy of the network,
``torch.optim.SGD``, a ``DataLoader``; then the mean of all weights. It is measured with images as a
torchvision data set has them, which its transforms make tensors of one by one (*images*), and with
tensors made beforehand (*tensors*). App and loop do the same as FedAvg's rounds here: CIFAR-10, 20
clients, 600 images × 2 epochs each, batches of 50, no evaluation; on one core and on two, the app
before and after the loops. Prints the table and writes ``results/peer.{md,json}``.

    round     median, after the first
    faster    the loop's round over the mean of the app's two
    memory    peak of all the run's processes, shared pages counted once (PSS)
    accuracy  of the mean weights on all clients' test images, after the last round, in percent
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from engine import HERE, run, settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.sections import Config
from pfedgpa_app.data.client import load_client
from pfedgpa_app.data.images import normalisation
from pfedgpa_app.results.log import rows_of
from pfedgpa_app.results.tables import markdown

LOOPS = ("images", "tensors")


class Pictures(Dataset[tuple[Tensor, int]]):
    """A client's images as torchvision's data sets have them: PIL images, made tensors on call."""

    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalisation(3))]
    )

    def __init__(self, pixels: np.ndarray, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(v2.functional.to_pil_image(self.pixels[index])), self.labels[index]


def network() -> nn.Module:
    """Return the paper's network for CIFAR-10; it has 107,690 weights."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(576, 128), nn.LeakyReLU(), nn.Linear(128, 10)),
    )


def data_of(config: Config, client: int, loop: str) -> tuple[Dataset[Any], TensorDataset]:
    """Return a client's training data as ``loop`` needs them, and its test data as tensors."""
    data = load_client(config, client)
    pixels, labels = data.train.pixels, data.train.labels
    test = TensorDataset(data.test.floats(), data.test.labels)
    if loop == "tensors":
        return TensorDataset(data.train.floats(), labels), test
    return Pictures(pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()), test


def train(model: nn.Module, data: Dataset[Any], config: Config) -> None:
    """Train by local SGD."""
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    for _ in range(config.local_epochs):
        for images, labels in DataLoader(data, config.batch_size, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def mean_of(models: list[nn.Module]) -> dict[str, Tensor]:
    """Return the mean of all models' weights; clients have equally many images."""
    states = [model.state_dict() for model in models]
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def accuracy_of(model: nn.Module, tests: list[TensorDataset]) -> float:
    """Return the accuracy on all clients' test images, in percent."""
    right, total = 0, 0
    with torch.no_grad():
        for test in tests:
            images, labels = test.tensors
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def plain_loop(chosen: dict[str, Any], loop: str, cores: int, to: Connection) -> None:
    """Run federated averaging; send each round's seconds and the final accuracy to ``to``."""
    torch.set_num_threads(cores)
    torch.manual_seed(0)
    config = resolve(chosen).config
    clients = [data_of(config, client, loop) for client in range(config.num_clients)]
    shared, seconds = network(), []
    for _ in range(config.num_server_rounds):
        started = time.perf_counter()
        models = []
        for data, _ in clients:
            models.append(copy.deepcopy(shared))
            train(models[-1], data, config)
        shared.load_state_dict(mean_of(models))
        seconds.append(time.perf_counter() - started)
    to.send((seconds, accuracy_of(shared, [test for _, test in clients])))


def run_loop(chosen: dict[str, Any], loop: str, cores: int) -> dict[str, Any]:
    """Run the plain loop in a process of its own and return its figures."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=plain_loop, args=(chosen, loop, cores, there))
    process.start()
    peak, done = [0], threading.Event()

    def watch() -> None:
        measured = psutil.Process(process.pid)
        while not done.wait(5.0):
            peak[0] = max(peak[0], measured.memory_full_info().pss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    there.close()
    try:
        seconds, accuracy = here.recv()
    finally:
        done.set()
        watcher.join()
        process.join()
    return {
        "what": f"plain loop, {loop}",
        "round_seconds": round(statistics.median(seconds[1:]), 3),
        "peak_pss_bytes": peak[0],
        "accuracy": round(accuracy, 1),
    }


def run_app(chosen: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run the app's process engine, as a user would, and return its figures."""
    found = run("process", chosen, out)
    [row] = rows_of(max(out.iterdir(), key=lambda path: path.stat().st_mtime))
    kept = {key: found[key] for key in ("round_seconds", "peak_pss_bytes")}
    return {"what": "pfedgpa run"} | kept | {"accuracy": round(row["accuracy_before_ft"], 1)}


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    rows = []
    for part in results:
        ours = [r["round_seconds"] for r in part["runs"] if r["what"] == "pfedgpa run"]
        for row in part["runs"]:
            seconds, memory = row["round_seconds"], row["peak_pss_bytes"] / 2**30
            faster = seconds / statistics.mean(ours) if row["what"] != "pfedgpa run" else 1
            cells = [str(part["cores"]), row["what"], f"{seconds:.2f} s", f"{faster:.2f}"]
            rows.append([*cells, f"{memory:.2f} GiB", f"{row['accuracy']:.1f}"])
    return markdown(["cores", "what", "round", "faster", "memory", "accuracy"], rows)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--cifar10", default="cifar10", help="or imagefolder:PATH")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.device = "cpu"
    chosen = settings(options, 20, 1.0) | {"method": "fedavg"}
    load_client(resolve(chosen).config, 0)  # builds this machine's cache, if there is none
    everyone = os.sched_getaffinity(0)
    results = []
    for cores in options.cores:
        os.sched_setaffinity(0, sorted(everyone)[:cores])
        with tempfile.TemporaryDirectory() as out:
            runs = [run_app(chosen, Path(out))]
            runs += [run_loop(chosen, loop, cores) for loop in LOOPS]
            runs.append(run_app(chosen, Path(out)))
        results.append({"cores": cores, "runs": runs})
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "peer.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "peer.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
