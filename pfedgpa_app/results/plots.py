"""Draw a run's own plots, as image files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.results.figures import canvas, one_plot, stacked_bars
from pfedgpa_app.results.log import RunLog
from pfedgpa_app.results.tables import Outcome

LATENTS = "latents.png"


def accuracy_over_rounds(path: Path, log: RunLog, results: dict[str, Outcome]) -> None:
    """Draw each federation's mean accuracy, and where each method ended, as sent."""
    figure, axes = one_plot(7, 4.2)
    for name, points in log.curves.items():
        axes.plot(*zip(*points, strict=True), label=f"{name} (all rounds)")
    for i, (name, result) in enumerate(results.items()):
        if name not in log.curves:
            axes.plot(log.rounds, result.before.mean(), "o^sDvP*X<>"[i % 10], label=name)
    axes.set(xlabel="round", ylabel="accuracy as sent, mean of clients (%)")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def before_and_after(path: Path, results: dict[str, Outcome]) -> None:
    """Draw every client as sent and after fine-tuning, method by method (as the paper's Fig. 4)."""
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure = canvas(3.6 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (name, result) in zip(grid.flat, results.items(), strict=False):
        x = np.array(result.clients)
        axes.bar(x - 0.2, result.before, 0.4, label="as sent")
        axes.bar(x + 0.2, result.after, 0.4, label="after fine-tuning")
        axes.set_title(name, fontsize="medium")
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(results) :]:
        axes.set_visible(False)
    lowest = min(min(r.before.min(), r.after.min()) for r in results.values())
    grid[0, 0].set_ylim(max(0, lowest - 5), 100)
    grid[0, 0].legend(fontsize="x-small", frameon=False)
    figure.supxlabel("client", fontsize="medium")
    figure.supylabel("accuracy (%)", fontsize="medium")
    figure.savefig(path, dpi=150)


def latent_places(fitted: WeightDistribution) -> dict[str, Any]:
    """Return, in the first two latent dimensions, all uploads and what each client was sent.

    {} if there are fewer than two latent dimensions.
    """
    if fitted.rank < 2:
        return {}
    sent = fitted.generate_latents("tweedie", draws=64)
    places = {
        "newest": dict(zip(fitted.newest, fitted.newest_latents, strict=True)),
        "sent": dict(zip(fitted.newest, sent, strict=True)),
    }
    rounded = {
        kind: {str(client): _rounded(place[:2]) for client, place in of.items()}
        for kind, of in places.items()
    }
    uploads = [_rounded(place) for place in fitted.latents[:, :2]]
    return {"uploads": uploads, "clients": fitted.clients.tolist(), **rounded}


def _rounded(place: Tensor) -> list[float]:
    return [round(float(x), 4) for x in place]


def latents(path: Path, places: Mapping[str, Any], groups: list[int]) -> None:
    """Draw uploads, each client's newest, and what it was sent, in two latent dimensions.

    Colours show the hidden groups, which server and methods never see.

    Args:
        places: what ``latent_places`` returned.
        groups: every client's hidden group.
    """
    figure, axes = one_plot(6, 5)
    everything, clients = np.array(places["uploads"]), np.array(places["clients"])
    colours = np.array([f"C{g % 10}" for g in groups])
    axes.scatter(everything[:, 0], everything[:, 1], s=6, alpha=0.25, c=colours[clients])
    newest, sent = (np.array(list(places[kind].values())) for kind in ("newest", "sent"))
    for row, client in enumerate(places["newest"]):
        axes.annotate(
            "",
            tuple(sent[row]),
            tuple(newest[row]),
            arrowprops={"arrowstyle": "->", "color": "0.6", "linewidth": 0.8},
        )
        axes.annotate(client, tuple(newest[row]), fontsize="x-small")
    own = colours[[int(client) for client in places["newest"]]]
    axes.scatter(newest[:, 0], newest[:, 1], s=22, c=own, label="newest upload")
    axes.scatter(sent[:, 0], sent[:, 1], s=40, marker="x", c=own, label="generated")
    axes.set(xlabel="latent 1", ylabel="latent 2", title="Clients' weights in latent space")
    axes.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


def partition(path: Path, counts: np.ndarray, classes: tuple[str, ...]) -> None:
    """Draw class counts [clients, classes] as stacked bars."""
    figure = stacked_bars(counts, classes, max(6, 0.25 * len(counts)), 4)
    figure.savefig(path, dpi=150)
