"""The README's comparison: two data sets, several seeds, every method on the same federation.

    python benchmarks/first_light.py --data-dir DATA [--cifar10 imagefolder:cifar10]

Runs that are complete are skipped, so it can be stopped and started again. Writes
``first_light.md`` and ``first_light.json`` beside this file's results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.results.log import is_done, rows_of
from pfedgpa_app.results.tables import seeds_table

HERE = Path(__file__).resolve().parent
COLUMNS = {
    "before FT": "accuracy_before_ft",
    "FT as in training": "accuracy_after_ft_as_in_training",
    "kept by validation": "accuracy_kept",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client before FT": "accuracy_worst_client_before_ft",
    "worst client kept": "accuracy_worst_client_kept",
}


# FedAvg's rounds are run once; generation starts from the uploads that they left, and can be
# repeated without them (delete the folder ending in -generated).
STEPS = {
    "": "method=local,fedavg,fedavg-ft,fedavg-ft-tuned,last-upload,client-mean,group-mean",
    "-generated": "method=pfedgpa-once,pfedgpa-inverted,pfedgpa-sampled",
}
PRINCIPAL = "method=pfedgpa-once pfedgpa.directions=principal"  # the ablation, with --principal


def run(
    conf: str, dataset: str, seed: int, data_dir: Path, out: Path, steps: dict[str, str]
) -> list[dict[str, Any]]:
    """One seed's rows, in the order of the experiment's methods; run now unless they are there."""
    rows: dict[str, dict[str, Any]] = {}
    federated = out / f"{conf}-s{seed}"
    for step, settings in steps.items():
        folder = out / f"{conf}-s{seed}{step}"
        if not is_done(folder):
            if folder.exists():
                folder.rename(folder.with_name(f"{folder.name}-broken-{time.time_ns()}"))
            command = [sys.executable, "-m", "pfedgpa_app", "run", "--conf", conf]
            command += ["--app", str(HERE.parent), f"dataset={dataset}", f"seed={seed}"]
            command += [f"data-dir={data_dir}", f"out-dir={out}", f"run-name={folder.name}"]
            command += [settings]
            command += [
                f"uploads={federated / 'uploads.safetensors'}" if step else "save-uploads=true"
            ]
            subprocess.run(command, check=True)
        summary = rows_of(folder)
        if step == "-principal":
            summary[0] |= {"method": "principal", "title": "pFedGPA on principal directions"}
        rows |= {row["method"]: row for row in summary}
    order = [*resolve({"conf": conf}).config.method, "principal"]
    return [rows[name] for name in order if name in rows]


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--cifar10", default="cifar10", help="or imagefolder:PATH")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "runs")
    parser.add_argument("--principal", action="store_true", help="the ablation of directions, too")
    options = parser.parse_args()
    steps = STEPS | ({"-principal": PRINCIPAL} if options.principal else {})
    sets = {"first-light-cifar10": options.cifar10, "first-light-fashion-mnist": "fashion-mnist"}
    collected: dict[str, list[list[dict[str, Any]]]] = {conf: [] for conf in sets}
    for seed in options.seeds:
        for conf, dataset in sets.items():
            data_dir, out = options.data_dir.absolute(), options.out.absolute()
            collected[conf].append(run(conf, dataset, seed, data_dir, out, steps))
            _write(collected, sets)


def _write(collected: dict[str, list[list[dict[str, Any]]]], sets: dict[str, str]) -> None:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "first_light.json").write_text(
        json.dumps(collected, indent=1) + "\n", encoding="utf-8"
    )
    parts = []
    for conf, summaries in collected.items():
        if summaries:
            chosen = ", ".join(
                f"seed {row['seed']}: rank {row['rank']}, t0 {row['strength']}"
                for rows in summaries
                for row in rows
                if row["method"] == "pfedgpa-once"
            )
            title = f"### {conf} ({sets[conf]}), {len(summaries)} seeds"
            table = seeds_table(summaries, COLUMNS)
            parts.append(f"{title}\n\n{table}\n\nChosen without labels: {chosen}.\n")
    (results / "first_light.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
