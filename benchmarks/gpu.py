"""Measure a GPU: first whether batched training agrees with training in turn, then how fast it is.

    python benchmarks/gpu.py [--parts card agreement methods rounds server] [--small]

The data are synthetic, in CIFAR-10's shapes and number, and can be learned. Writes
``results/gpu.json`` after each measurement and ``results/gpu.md`` at the end; a measurement that
fails is a row that says so, and the exit status is 1. ``--small`` is for trying it without a GPU.

    card       the best rates of its memory and its multipliers, to which the figures below compare
    agreement  the batched engine's training (captured, then replayed) against one client after
               another on the same device: how far apart they end, as a share of how far they went
    methods    small federations of every method, batched and in turn: losses and accuracies
    rounds     seconds a round of FedAvg, batched and in turn, and the float32 rate reached
    server     pFedGPA's server step, measured as in ``benchmarks/server_step.py``
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the folder of client_app

import client_app  # noqa: E402
from pfedgpa_app.config.resolve import resolve  # noqa: E402
from pfedgpa_app.core.randomness import torch_generator  # noqa: E402
from pfedgpa_app.data.client import ClientData  # noqa: E402
from pfedgpa_app.data.images import Images  # noqa: E402
from pfedgpa_app.engine.batched import BatchedCohort, BatchedGrid, DeviceData  # noqa: E402
from pfedgpa_app.methods import METHODS  # noqa: E402
from pfedgpa_app.methods.base import Rounds  # noqa: E402
from pfedgpa_app.models import networks  # noqa: E402
from pfedgpa_app.results.log import EVENTS, METRICS  # noqa: E402
from pfedgpa_app.results.tables import markdown  # noqa: E402
from pfedgpa_app.runs.experiment import run  # noqa: E402
from pfedgpa_app.training import sgd  # noqa: E402

Row = dict[str, Any]
SPLITS = 60_000, 10_000  # training and test images, as many as CIFAR-10 has


def images() -> dict[str, Any]:
    """Make ten classes of noisy patterns, as a run's data set: ``dataset=gpu:images``."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(64, 192, (10, 3, 32, 32))
    parts: dict[str, Any] = {"classes": [f"class {i}" for i in range(10)]}
    for split, size in zip(("train", "test"), SPLITS, strict=True):
        labels = np.arange(size) % 10
        noise = rng.integers(0, 256, (size, 3, 32, 32), dtype=np.uint8)
        parts[f"x_{split}"] = (patterns[labels] // 2 + noise // 2).astype(np.uint8)
        parts[f"y_{split}"] = labels
    return parts


def synchronised(device: torch.device) -> float:
    """Return the time, in seconds, at which ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh(device: torch.device) -> None:
    """Free the GPU's memory of what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median seconds of ``work``, after three calls to warm up."""
    taken = []
    for _ in range(3 + repeats):
        started = synchronised(device)
        work()
        taken.append(synchronised(device) - started)
    return statistics.median(taken[3:])


def card(device: torch.device, small: bool) -> Iterator[Row]:
    """Measure the rates of the device's memory and multipliers."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    side = 1024 if small else 8192
    source, target = torch.randn(2, side * side * (1 if small else 8), device=device)
    copying = seconds(device, functools.partial(target.copy_, source))
    row: Row = {"name": gpu, "torch": torch.__version__}
    row["gigabytes_a_second"] = round(2 * source.nbytes / copying / 1e9)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        taken = seconds(device, functools.partial(torch.matmul, a, b), 5)
        row[f"teraflops_{str(dtype).removeprefix('torch.')}"] = round(2 * side**3 / taken / 1e12, 1)
    yield row


def random_clients(shape: tuple[int, ...], n: int, size: int) -> list[ClientData]:
    """Return ``n`` clients that hold ``size`` noise images each."""
    rng = torch.Generator().manual_seed(5)

    def some(images: int) -> Images:
        pixels = torch.randint(0, 256, (images, *shape), generator=rng, dtype=torch.uint8)
        labels = torch.randint(0, 10, (images,), generator=rng)
        return Images(pixels.contiguous(memory_format=torch.channels_last), labels)

    return [ClientData(some(size), some(0), some(size)) for _ in range(n)]


def moved(ends: list[dict[str, Tensor]], start: dict[str, Tensor]) -> Tensor:
    """Return how far clients' weights moved from ``start``, as vectors [C, P] in float64."""
    return torch.stack(
        [torch.cat([(end[n] - start[n]).double().flatten() for n in start]) for end in ends]
    )


def agreement(device: torch.device, small: bool) -> Iterator[Row]:
    """Train three clients, batched and in turn, twice: the second time on replayed steps."""
    torch.backends.cudnn.allow_tf32 = False  # torch multiplies matrices without TF32, too
    for name in networks.NETWORKS:
        shape = next(s for s, n in networks.SHAPES.items() if n == name)
        clients = random_clients(shape, 3, 115)  # the last batch of 50 is short
        model = networks.build(name, 10, 0).to(device).to(memory_format=torch.channels_last)
        start = networks.weights_of(model)
        bank = DeviceData.stacked(clients, device)
        assert bank is not None
        for bfloat16 in (False, True):
            recipe = sgd.Recipe(1, 0.02, 50, augment=shape[0] == 3, bfloat16=bfloat16)
            cohort = BatchedCohort(model, bank, 3)
            cohort.seat([0, 1, 2])
            apart = []
            for purpose in ("first", "second"):
                draws = [torch_generator(0, purpose, i) for i in range(3)]
                cohort.load([start] * 3)
                cohort.train(recipe, draws)
                ends = cohort.trained()
                alone = []
                for i, client in enumerate(clients):
                    networks.load(model, start)
                    sgd.train(model, client.train, recipe, torch_generator(0, purpose, i))
                    alone.append(networks.weights_of(model))
                networks.load(model, start)
                ours, theirs = moved(ends, start), moved(alone, start)
                apart.append(float((ours - theirs).norm() / theirs.norm()))
            kind = "bfloat16" if bfloat16 else "float32"
            limit = 0.2 if bfloat16 else 0.05
            good = max(apart) < limit
            row = {"network": name, "precision": kind, "apart": apart, "limit": limit}
            yield row | ({} if good else {"failed": "further apart than the limit"})


@contextlib.contextmanager
def federation(
    device: torch.device, in_turn: bool = False, **settings: Any
) -> Iterator[tuple[Path, float]]:
    """Run a federation; yield its folder, which then is deleted, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as out:
        chosen = {
            "conf": "cifar10-20",
            "method": "fedavg",
            "dataset": "gpu:images",
            "code-dir": str(HERE),
            "device": device.type,
            "out-dir": out,
            "run-name": "run",
            "save-weights": False,
            "checkpoint-every": 0,
            "fine-tune-epochs": 0,
        } | {name.replace("_", "-"): value for name, value in settings.items()}
        resolved = resolve(chosen)
        grid = BatchedGrid(client_app.app, chosen, resolved.config)
        grid.batches = grid.batches and not in_turn
        started = time.perf_counter()
        folder = run(grid, resolved)
        yield folder, time.perf_counter() - started


def records(folder: Path, file: str) -> list[Row]:
    """Return the records of one of a run's files."""
    return [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]


def methods(device: torch.device, small: bool) -> Iterator[Row]:
    """Compare every round's losses and the last accuracies, for a few clients and rounds."""
    alike: dict[str, Any] = {"num_clients": 6, "fraction_train": 0.5, "train_per_client": 120}
    alike |= {"test_per_client": 40, "num_server_rounds": 3, "seed": 1}
    own = [name for name, kind in METHODS.items() if issubclass(kind, Rounds)]
    for name in own[:3] if small else own:
        runs = []
        for in_turn in (False, True):
            with federation(device, in_turn, method=name, **alike) as (folder, taken):
                rows = records(folder, METRICS)
            loss = [row["train_loss"] for row in rows if row["participated"]]
            correct = [row["accuracy"] for row in rows if row["round"] == 3]
            runs.append((taken, torch.tensor(loss), torch.tensor(correct)))
        (fast, mine, right), (slow, theirs, reference) = runs
        loss_apart = float(((mine - theirs).abs() / theirs).max())
        apart = float((right - reference).abs().mean())
        row = {"method": name, "batched_seconds": round(fast, 2), "in_turn_seconds": round(slow, 2)}
        row |= {"loss_apart": loss_apart, "accuracy_apart": apart}
        good = loss_apart < 0.01 and apart < 3
        yield row | ({} if good else {"failed": "batched and in turn are too far apart"})
    with federation(device, model="torchvision:resnet18", **alike) as (folder, taken):
        loss = [r["train_loss"] for r in records(folder, METRICS) if r["participated"]]
    row = {"method": "fedavg, torchvision:resnet18 (in turn)", "batched_seconds": round(taken, 2)}
    yield row | {"last_loss": loss[-1]}


def flops_of_a_step(batch: int) -> int:
    """Count the operations of one client's training step with CIFAR-10's network."""
    model = networks.build("cifar", 10, 0)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, 3, 32, 32)).sum().backward()
    return int(counter.get_total_flops())


def rounds(device: torch.device, small: bool) -> Iterator[Row]:
    """Time FedAvg with the experiment's settings, in rounds without evaluation."""
    sizes = {"20 clients": (20, 1.0, 600, 300, 4), "100 clients at 30 %": (100, 0.3, 600, 60, 4)}
    sizes["500 clients at 10 %"] = 500, 0.1, 120, 40, 3
    for name, (clients, share, each, many, few) in sizes.items():
        for in_turn, count in ((False, 12 if small else many), (True, 8 if small else few + 5)):
            fresh(device)
            work = {"num_clients": clients, "fraction_train": share, "num_server_rounds": count}
            work |= {"train_per_client": 60 if small else each, "evaluate_every": 1000}
            work |= {"test_per_client": 20 if small else 100}
            with federation(device, in_turn, **work) as (folder, taken):
                ends = [e["time"] for e in records(folder, EVENTS) if e["kind"] == "round"]
            lengths = [after - before for before, after in pairwise(ends)]
            plain, evaluated = lengths[:-5], lengths[-5:]
            steps = 2 * -(-work["train_per_client"] // 50)
            round_seconds = statistics.median(plain)
            row: Row = {"federation": name, "engine": "in turn" if in_turn else "batched"}
            row |= {"rounds": count, "seconds": round(taken, 1)}
            row |= {"round_seconds": round(round_seconds, 4), "steps": steps}
            row["evaluation_seconds"] = round(statistics.median(evaluated) - round_seconds, 4)
            work_done = clients * share * steps * flops_of_a_step(50)
            row["teraflops"] = round(work_done / round_seconds / 1e12, 3)
            if device.type == "cuda":
                row["peak_mib"] = torch.cuda.max_memory_reserved() >> 20
            yield row


def server(device: torch.device, small: bool) -> Iterator[Row]:
    """Measure the server step on synthetic uploads."""
    from server_step import measure

    sizes = [(20, 20, 107_690), (100, 20, 1_000_000)]
    for clients, count, weights in [(4, 5, 20_000)] if small else sizes:
        fresh(device)
        row = measure(clients, count, weights, device)
        if device.type == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_reserved() >> 20
        yield row


PARTS = {
    "card": card,
    "agreement": agreement,
    "server": server,
    "rounds": rounds,
    "methods": methods,
}


def main() -> None:
    """Measure every part and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    for name in ("flwr", "pfedgpa"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    for part in options.parts:
        found[part] = []
        try:
            for row in PARTS[part](device, options.small):
                found[part].append(row)
                print(part, json.dumps(row), flush=True)
                text = json.dumps(found, indent=1) + "\n"
                (options.out / "gpu.json").write_text(text, encoding="utf-8")
        except Exception as error:
            found[part].append({"failed": f"{type(error).__name__}: {error}"[:500]})
            print(part, found[part][-1], flush=True)
    tables = []
    for part, rows in found.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        tables.append(f"## {part}\n\n")
        tables[-1] += markdown(names, [[str(row.get(name, "")) for name in names] for row in rows])
    (options.out / "gpu.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    raise SystemExit(any("failed" in row for rows in found.values() for row in rows))


if __name__ == "__main__":
    main()
