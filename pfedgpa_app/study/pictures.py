"""Draw the figures of studies, as SVG files to be looked at by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pfedgpa_app.results.figures import COLOURS, DASHES, INK, canvas, colour, svg


def gains(found: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """Draw the points of accuracy above the best other method, over images a client.

    Args:
        found: {panel: {line: [(images a client, gain)]}}; NaN is a gap.
    """
    figure = canvas(4.2 * max(1, len(found)) + 1.8, 3.6)
    panels = figure.subplots(1, max(1, len(found)), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(line for lines in found.values() for line in lines))
    for axes, (title, lines) in zip(panels, found.items(), strict=False):
        axes.axhline(0, color=INK, linewidth=0.8)
        for name, points in lines.items():
            i = names.index(name)
            kind = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)], "label": name}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **kind)
        places = sorted({images for points in lines.values() for images, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("images a client")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("points above the best other method")
    drawn: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    place: Any = "outside right center"
    figure.legend(drawn.values(), drawn.keys(), loc=place, fontsize="small", frameon=False)
    return on_white(svg(figure, "gain over images a client"))


def sent_and_tuned(found: Mapping[str, Mapping[str, tuple[float, float]]], ours: str) -> str:
    """Draw the accuracy of what each method's clients are sent, and after tuned fine-tuning.

    Args:
        found: {panel: {method: its two accuracies}}, in percent.
        ours: the method that is drawn bolder.
    """
    figure = canvas(4.2 * max(1, len(found)), 3.4)
    panels = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for axes, (title, methods) in zip(panels, found.items(), strict=False):
        order = sorted(methods, key=lambda name: methods[name][1])
        for row, name in enumerate(order):
            width = 3.0 if name == ours else 1.2
            axes.plot(methods[name], [row, row], color="#999999", linewidth=width, zorder=1)
        sent, tuned = zip(*(methods[name] for name in order), strict=True)
        rows = range(len(order))
        axes.scatter(sent, rows, color=COLOURS[0], s=34, label="as the server sent it")
        kind = {"color": COLOURS[1], "s": 90, "marker": "|", "linewidth": 2}
        axes.scatter(tuned, rows, label="after tuned fine-tuning", **kind)
        axes.set_yticks(rows, order)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() == ours else "normal")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("accuracy, mean of clients (%)")
        axes.spines[["top", "right"]].set_visible(False)
    if found:
        _name_below(figure, panels[0])
    return on_white(svg(figure, "accuracy as sent and after tuned fine-tuning"))


def by_client(found: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> str:
    """Draw every client's accuracy, dashed before and solid after fine-tuning.

    Args:
        found: {panel: {line: accuracies before and after, one for each client}}, in percent.
    """
    figure = canvas(4.2 * max(1, len(found)), 3.4)
    panels = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, found.items(), strict=False):
        for i, (name, (before, after)) in enumerate(lines.items()):
            clients = range(len(before))
            axes.plot(clients, before, "--", color=colour(i), label=f"{name}, as sent")
            axes.plot(clients, after, "-", color=colour(i), label=f"{name}, after FT")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("client")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    if found:
        _name_below(figure, panels[0])
    return on_white(svg(figure, "accuracy of every client"))


def _name_below(figure: Any, axes: Any) -> None:
    """Draw, below all panels, the legend of one of them."""
    handles, labels = axes.get_legend_handles_labels()
    place = "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=2, fontsize="small", frameon=False)


def on_white(drawn: str) -> str:
    """Make a file of a figure's SVG, with dark ink on white."""
    drawn = drawn.replace("<svg ", '<svg style="background:#fff;color:#222" ', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{drawn}\n'
