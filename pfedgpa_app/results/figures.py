"""Draw the figures of a report, as SVG whose text has the page's colour."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported only when a figure is drawn, as it slows a run's start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart, then two of Tableau's
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c564b", "#7f7f7f")
DASHES = ("-", "--", "-.", ":")
INK = "#010203"  # replaced by the page's text colour
Curve = Sequence[tuple[int, float, float]]  # (round, mean, standard deviation)


def colour(i: int) -> str:
    """Return the colour of the i-th of several things."""
    return COLOURS[i % len(COLOURS)]


def canvas(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def one_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one plot; width and height are in inches."""
    figure = canvas(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element of a page.

    Args:
        name: is read out by screen readers, and keeps the element's ids apart from other figures'.
    """
    import matplotlib as mpl

    for axes in figure.axes:
        axes.title.set_color(INK)
        for each in (axes.xaxis.label, axes.yaxis.label):
            each.set_color(INK)
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        if legend := axes.get_legend():
            for text in legend.get_texts():
                text.set_color(INK)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", drawn)  # each figure's first axes are axes_1
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Move ``places`` so that neighbours are at least ``least`` apart, keeping their order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved


def curves(found: Mapping[str, Curve], ends: Mapping[str, float]) -> str:
    """Draw accuracy over rounds, a line for each federation, with its name at its end; SVG.

    Args:
        found: {federation: its curve}.
        ends: {method without rounds of its own: its final accuracy in percent}.
    """
    figure, axes = one_plot(8, 4.2)
    last = max((points[-1][0] for points in found.values() if points), default=1)
    labels: list[tuple[str, float, str]] = []  # name, accuracy, colour
    for i, (name, points) in enumerate(found.items()):
        if not points:
            continue
        rounds, means, spreads = (np.array(column) for column in zip(*points, strict=True))
        style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)]}
        # earlier lines are wider, so that a later one on top does not hide them
        width = max(1.2, 3.0 - 0.6 * i)
        axes.plot(rounds, means, linewidth=width, marker="." if len(points) < 12 else "", **style)
        if spreads.any():
            axes.fill_between(rounds, means - spreads, means + spreads, alpha=0.15, color=colour(i))
        labels.append((name, float(means[-1]), colour(i)))
    for i, (name, value) in enumerate(ends.items(), start=len(found)):
        axes.plot([last], [value], "D", color=colour(i), markersize=5)
        labels.append((name, value, colour(i)))
    low, high = axes.get_ylim()
    places = _apart([y for _, y, _ in labels], 0.055 * (high - low))
    for (name, y, kind), place in zip(labels, places, strict=True):
        axes.annotate(
            name,
            (last, y),
            (last * 1.04 + 0.5, place),
            color=kind,
            va="center",
            fontsize="small",
            annotation_clip=False,
        )
    axes.set(xlabel="round", ylabel="accuracy as sent, mean of clients (%)")
    axes.set_xlim(right=last * 1.02 + 0.3)
    axes.locator_params(axis="x", integer=True)
    return svg(figure, "accuracy over rounds")


def before_and_after(found: Mapping[str, Mapping[int, tuple[float, float]]]) -> str:
    """Draw every client's accuracy before and after fine-tuning, a panel for each method; SVG.

    Args:
        found: {method: {client: (accuracy before, after)}}, in percent.
    """
    clients = max(len(scores) for scores in found.values())
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    height = max(2.0, min(9.0, 1.0 + 0.16 * clients))
    figure = canvas(9.3, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, (name, scores) in zip(grid.flat, found.items(), strict=False):
        order = sorted(scores, key=lambda c: scores[c][0])
        for place, client in enumerate(order):
            before, after = scores[client]
            axes.plot([before, after], [place, place], color="#999999", linewidth=1)
        axes.plot([scores[c][0] for c in order], range(len(order)), "o", color=COLOURS[0], ms=4)
        axes.plot([scores[c][1] for c in order], range(len(order)), "|", color=COLOURS[1], ms=8)
        if len(order) <= 40:
            axes.set_yticks(range(len(order)), [str(c) for c in order], fontsize="x-small")
        axes.set_title(name, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("accuracy (%)", fontsize="small")
    grid[0, 0].set_ylabel("client, from worst to best", fontsize="small")
    return svg(figure, "each client before and after fine-tuning")


def holdings(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Draw how many examples of each class every client holds, [clients, classes]; SVG."""
    return svg(stacked_bars(counts, classes, 8, 3.4), "who holds how many of each class")


def stacked_bars(counts: np.ndarray, classes: Sequence[str], width: float, height: float) -> Figure:
    """Draw a bar for each client: how many examples it has of each class, [clients, classes]."""
    figure, axes = one_plot(width, height)
    bottom = np.zeros(len(counts))
    for c, name in enumerate(classes):
        kind = {"color": class_colour(c, len(classes)), "width": 0.9}
        axes.bar(np.arange(len(counts)), counts[:, c], bottom=bottom, label=name, **kind)
        bottom += counts[:, c]
    axes.set(xlabel="client", ylabel="training examples")
    if len(classes) <= 20:
        figure.legend(loc="outside right upper", fontsize="x-small", frameon=False)
    return figure


def class_colour(c: int, classes: int) -> Any:
    """Return the colour of class ``c``; neighbours look as different as the number allows."""
    import matplotlib as mpl

    if classes <= 10:
        return mpl.colormaps["tab10"](c)
    return mpl.colormaps["turbo"](c / (classes - 1))


def latent_map(found: Mapping[str, Any], mixes: np.ndarray | None) -> str:
    """Draw clients in the first two latent dimensions; SVG.

    Small dots are their uploads, large pies are the weights that were made for them.

    Args:
        found: "uploads" [N, 2] of "clients" [N], and "newest" and "sent" by client, [2] each; and
            "method", which of the run's learned them, where it is known.
        mixes: each client's share of every class, [clients, classes], the slices of its pie; None
            if they are not known.
    """
    figure, axes = one_plot(6.4, 5.2)
    uploads, owners = np.array(found["uploads"]), np.array(found["clients"])
    if mixes is None:
        kinds = np.arange(owners.max() + 1)  # each client has a colour of its own
        number = len(kinds)
    else:
        kinds, number = mixes.argmax(1), mixes.shape[1]
    shades = [class_colour(int(kinds[i]), number) for i in owners]
    axes.scatter(uploads[:, 0], uploads[:, 1], s=5, alpha=0.3, c=shades)
    for client, newest in found["newest"].items():
        sent = found["sent"][client]
        arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.8}
        axes.annotate("", tuple(sent), tuple(newest), arrowprops=arrow)
        _pie(axes, sent, np.ones(1) if mixes is None else mixes[int(client)])
        kind: dict[str, Any] = {"textcoords": "offset points", "fontsize": "x-small", "color": INK}
        axes.annotate(client, tuple(sent), (6, 5), **kind)
    axes.set(xlabel="latent 1", ylabel="latent 2")
    learner = f" of {found['method']}" if "method" in found else ""
    return svg(figure, f"clients in latent space{learner}")


def _pie(axes: Axes, place: Sequence[float], mix: np.ndarray) -> None:
    """Draw a client's mix of classes at its place."""
    from matplotlib.path import Path

    edges = 2 * np.pi * np.concatenate([[0], np.cumsum(mix / mix.sum())])
    for c, (start, end) in enumerate(itertools.pairwise(edges)):
        if end - start < 0.02:
            continue
        angles = np.linspace(start, end, 24)
        slice_of_it = np.column_stack([np.append(np.cos(angles), 0), np.append(np.sin(angles), 0)])
        size = 110 * np.abs(slice_of_it).max() ** 2  # markers are scaled to this
        kind = {"color": class_colour(c, len(mix)), "linewidth": 0}
        axes.scatter([place[0]], [place[1]], size, marker=Path(slice_of_it), **kind)
