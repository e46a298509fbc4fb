"""What each engine adds to the bare training: ratios measured together.

    python benchmarks/engine.py --data-dir DATA [--cifar10 imagefolder:cifar10] [--engines ...]

The bare loop trains the round's clients (build the network, local SGD) with as many
single-threaded workers as the machine has cores, in processes of its own. It is timed before,
between and after the engines' runs; with ``--device cuda`` it trains clients one after another on
the GPU. Every run is FedAvg on CIFAR-10, 600 images × 2 epochs a client and round, with pFedGPA's
server step at the end. Prints the table and writes ``results/engine.{md,json}``.

    start-up     from the command to the first client's training: end of round 1 less a round
    round        median over the rounds without evaluation, after the first
    ratio        round over the bare loop's median
    evaluation   what evaluating every client adds to a round
    memory       peak of all the run's processes, the server step included: with shared pages
                 counted once (PSS), and in every process that maps them (RSS)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import psutil
import torch
from joblib import cpu_count

from pfedgpa_app.client.request import build_model
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.data.client import load_client, load_schema
from pfedgpa_app.engine import gpu_for
from pfedgpa_app.engine.guard import processes_with
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.results.log import EVENTS, METRICS
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.training import sgd as training

HERE = Path(__file__).resolve().parent
MARK = "PFEDGPA_BENCHMARK"  # the environment variable that marks a run's processes
LAST_EVALUATED = 5
FEDERATIONS = {"20 clients": (20, 1.0), "100 clients at 30 %": (100, 0.3)}


def settings(options: argparse.Namespace, clients: int, fraction: float) -> dict[str, Any]:
    """Return the federation's settings; only the first and the last five rounds are evaluated."""
    return {
        "conf": "cifar10-20",
        "method": "fedavg,pfedgpa-once",
        "dataset": options.cifar10,
        "data-dir": str(options.data_dir.absolute()),
        "device": options.device,
        "num-clients": clients,
        "fraction-train": fraction,
        "train-per-client": 600,
        "validation-share": 0.0,
        "augment": False,
        "num-server-rounds": options.rounds,
        "evaluate-every": 1000,
        "fine-tune-epochs": 0,
    }


def _train_one(config: Config, client: int) -> None:
    torch.set_num_threads(1)
    model, data = build_model(config, load_schema(config)), load_client(config, client)
    way = training.recipe(config, config.local_epochs, config.learning_rate)
    training.train(model, data.train, way, torch_generator(0, client))
    weights_of(model)


class Bare:
    """The bare loop, in workers that have the data and do nothing else."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.config, self.pool = config, pool
        self.clients = round(config.num_clients * config.fraction_train)
        self.seconds: list[float] = []
        self.measure(1)
        self.seconds = []

    def measure(self, rounds: int) -> None:
        """Time this many rounds."""
        for _ in range(rounds):
            started = time.perf_counter()
            work = [(self.config, client) for client in range(self.clients)]
            self.pool.starmap(_train_one, work, chunksize=1)
            self.seconds.append(time.perf_counter() - started)


def _resident(mark: str) -> tuple[int, int]:
    """Return PSS and RSS, in bytes, of the processes whose environment holds ``mark``."""
    totals = [0, 0]
    for process in processes_with(MARK, mark):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            used = process.memory_full_info()
            totals = [totals[0] + used.pss, totals[1] + used.rss]
    return totals[0], totals[1]


def run(engine: str, chosen: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run once through the command line, as a user would, and return the figures."""
    mark = f"{engine}-{time.time_ns()}"
    command = [sys.executable, "-m", "pfedgpa_app", "run", "--app", str(HERE.parent)]
    command += ["--engine", engine, f"out-dir={out}", f"run-name={mark}"]
    command += [f"{key}={json.dumps(v) if v in (True, False) else v}" for key, v in chosen.items()]
    seen, done = [(0, 0)], threading.Event()

    def watch() -> None:
        while not done.wait(5.0):
            if (out / mark / METRICS).exists():  # counting pages would slow the start
                seen.append(_resident(mark))

    started = time.time()
    watcher = threading.Thread(target=watch)
    watcher.start()
    finished = subprocess.run(
        command, env=os.environ | {MARK: mark}, capture_output=True, text=True
    )
    done.set()
    watcher.join()
    if finished.returncode:
        raise SystemExit(f"{engine}: {finished.stdout}{finished.stderr}")
    events = [
        json.loads(line) for line in (out / mark / EVENTS).read_text(encoding="utf-8").splitlines()
    ]
    ends = [event["time"] for event in events if event["kind"] == "round"]
    lengths = [b - a for a, b in pairwise(ends)]  # rounds 2, 3, …
    plain, evaluated = lengths[:-LAST_EVALUATED], lengths[-LAST_EVALUATED:]
    return {
        "engine": engine,
        "startup_seconds": round(ends[0] - started - statistics.median(evaluated), 2),
        "round_seconds": round(statistics.median(plain), 3),
        "rounds": [round(s, 3) for s in plain],
        "evaluation_seconds": round(statistics.median(evaluated) - statistics.median(plain), 3),
        "peak_pss_bytes": max(pss for pss, _ in seen),
        "peak_rss_bytes": max(rss for _, rss in seen),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    header = ["federation", "engine", "start-up", "round", "ratio to the bare loop", "evaluation"]
    rows = []
    for part in results:
        bare = part["bare_seconds"]
        low, high = min(part["bare"]), max(part["bare"])
        loop = f"bare loop, {part['workers']} workers"
        spans = f"{bare:.2f} s ({low:.2f}–{high:.2f})"
        rows.append([part["federation"], loop, "", spans, "1", "", ""])
        for row in part["runs"]:
            pss, rss = (row[f"peak_{kind}_bytes"] / 2**30 for kind in ("pss", "rss"))
            cells = [part["federation"], row["engine"], f"{row['startup_seconds']:.1f} s"]
            cells += [f"{row['round_seconds']:.2f} s", f"{row['round_seconds'] / bare:.3g}"]
            cells.append(f"{row['evaluation_seconds']:.2f} s ({row['images']} images)")
            rows.append([*cells, f"{pss:.2f} ({rss:.2f}) GiB"])
    return markdown([*header, "memory: PSS (RSS)"], rows)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--cifar10", default="cifar10", help="or imagefolder:PATH")
    parser.add_argument("--engines", nargs="+", default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each engine")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    gpu = gpu_for(options.device)
    engines = options.engines or (["batched"] if gpu else ["process", "ray"])
    results = []
    for federation, (clients, fraction) in FEDERATIONS.items():
        chosen = settings(options, clients, fraction)
        config = resolve(chosen).config
        load_client(config, 0)  # builds this machine's cache, if there is none
        workers = 1 if gpu else int(cpu_count())
        rows = []
        with (
            multiprocessing.get_context("spawn").Pool(workers) as pool,
            tempfile.TemporaryDirectory() as out,
        ):
            bare = Bare(config, pool)
            for _ in range(options.repeats):
                for engine in engines:
                    bare.measure(4)
                    row = run(engine, chosen, Path(out))
                    rows.append(row | {"images": clients * (config.test_per_client or 0)})
            bare.measure(4)
        results.append(
            {
                "federation": federation,
                "workers": workers,
                "bare_seconds": round(statistics.median(bare.seconds), 3),
                "bare": [round(s, 3) for s in bare.seconds],
                "runs": rows,
            }
        )
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "engine.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
        (options.out / "engine.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
