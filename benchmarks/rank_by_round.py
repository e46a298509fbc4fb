"""Which rank each rule chooses after so many rounds, by the 20 before.

    python benchmarks/rank_by_round.py results/RUN [results/RUN …]

For runs that kept the uploads of all their rounds: `pfedgpa run method=pfedgpa-once` with
``save-uploads=true pfedgpa.buffer-rounds=100``, and, as docs/algorithm.md has them, ``--conf
map-fashion-mnist num-clients=20 train-per-client=60 learning-rate=0.05``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file

from pfedgpa_app.core.weights import Layout
from pfedgpa_app.diffusion.autoencoder import remove_drift
from pfedgpa_app.diffusion.rank import choose_rank
from pfedgpa_app.methods.generation import generated
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.results.uploads import FILE

RULES, WINDOW, AFTER = ("widest-gap", "shrinkage", "likelihood"), 20, (20, 40, 60, 80, 92)


def main() -> None:
    """Print a table a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs' folders, with all uploads")
    for run in parser.parse_args().runs:
        tensors = load_file(run / FILE)
        shared = {name.removeprefix("global/"): t for name, t in tensors.items() if "/" in name}
        head = Layout.of({name: shared[name] for name in generated(list(shared))}).head()
        ranks: dict[str, list[str]] = {rule: [] for rule in RULES}
        for last in AFTER:
            here = (tensors["rounds"] <= last) & (tensors["rounds"] > last - WINDOW)
            vectors, rounds, clients = (
                tensors[name][here] for name in ("vectors", "rounds", "clients")
            )
            deltas = remove_drift(vectors, rounds, clients)
            gram = deltas.gram(head)
            for rule in RULES:
                ranks[rule].append(str(choose_rank(rule, deltas, head, gram, clients, seed=0)))
        table = markdown(["rule", *map(str, AFTER)], [[rule, *ranks[rule]] for rule in RULES])
        print(f"{run.name}\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
