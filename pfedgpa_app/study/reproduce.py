"""Show where generation helps: run every method over how much a client has, by one command.

A cell of the map is a federation's size, data and partition, and how many images each client has.
For every data set and partition, two settings are searched on validation images, with a seed of
their own: FedAvg's learning rate, which all methods then use, in the smallest federation; and
FedAvgM's momentum, in each size of federation. pFedGPA keeps its defaults. Then all methods run in
every cell, and each is fine-tuned with the same grid. ``table1.py`` makes the paper's table by the
same machinery.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pfedgpa_app.config.names import without_idle
from pfedgpa_app.config.resolve import resolve, values_of
from pfedgpa_app.core.files import as_json, write_text
from pfedgpa_app.core.sections import Config
from pfedgpa_app.methods import federations
from pfedgpa_app.results.log import finished_in, last_event, rows_of
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.runs.folder import CONFIG, kept_methods, kept_settings
from pfedgpa_app.study import pictures
from pfedgpa_app.study.plan import PlannedRun, Settings, expand, images_trained, require_alike
from pfedgpa_app.study.tune import DEFAULTS, main_settings, search

OURS = "pfedgpa"
KNOWS_GROUPS = "group-mean"  # not compared with: no server knows the groups
METHODS_OF_MAP: tuple[str, ...] = (
    *("fedavg", "fedavg-ft-tuned", "fedavgm", "fedbabu", "fedrep", "fedala", "cfl"),
    *("client-mean", KNOWS_GROUPS, OURS),
)
MOMENTUM = {"fedavgm": ("fedavgm.momentum", (0.5, 0.7, 0.9))}  # {method: (setting, values to try)}
DATA = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "emnist": "EMNIST"}
SIZES = {100: 0.3, 20: 1.0}  # {clients: the share of them that takes part in a round}
TEST_IMAGES = {20: 300, 100: 150}  # {clients: how many images each is tested on}
PARTITIONS = ("dominant", "dirichlet")
IMAGES = (60, 30, 150, 380)  # training images of a client, in the order in which they are run
SMALLEST = 20  # clients
SEARCHED = 60  # images of each client in the cells in which settings are searched
SEEDS = (0, 1, 2)
CLOSE = 1.0  # points; a cell with a smaller gain or loss is run with all seeds
MERIT = "accuracy_after_ft_tuned"  # 0 to 5 epochs, chosen by all validation images
COLUMNS = {
    "tuned FT": MERIT,
    "as sent": "accuracy_before_ft",
    "kept": "accuracy_kept",
    "worst client as sent": "accuracy_worst_client_before_ft",
    "worst client kept": "accuracy_worst_client_kept",
}
_TOLD = ("method", "title", "seed", "rounds", "fine_tuning_tuned", "server_seconds")
RunAll = Callable[[list[PlannedRun]], bool]  # returns whether no run failed
Row = dict[str, Any]
Grids = dict[str, dict[str, tuple[Any, ...]]]  # {method: {setting: values to try}}


@dataclass(frozen=True)
class Cell:
    """One place on the map: a federation, and how many images each of its clients has."""

    data: str
    clients: int
    partition: str
    images: int

    @property
    def settings(self) -> Settings:
        return {
            "conf": f"map-{self.data}",
            "num-clients": self.clients,
            "fraction-train": SIZES[self.clients],
            "partition": self.partition,
            "train-per-client": self.images,
            "test-per-client": TEST_IMAGES[self.clients],
        }

    @property
    def methods(self) -> list[str]:
        """The methods that run here; the one that knows hidden groups only where there are some."""
        return [m for m in METHODS_OF_MAP if m != KNOWS_GROUPS or self.partition == "dominant"]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.clients}-{self.partition}-{self.images}"

    @property
    def searched(self) -> tuple[Cell, Cell]:
        """The cells in which this one's settings are searched: what all methods use, then the rest.

        How much server momentum is good depends on how many clients there are.
        """
        own = replace(self, images=SEARCHED)
        return replace(own, clients=SMALLEST), own


@dataclass(frozen=True)
class Atlas:
    """The map's runs, in one folder.

    Attributes:
        name: the name of its files; ``picture``: that of the figure.
        thing: what messages call it.
        known: the methods that it has.
        own: the settings by which its tables are laid out.
        figures: the figures of a method's row that are kept.
        settings: the user's, for every run that uses them; they are not searched.
        places: {data set: where it lies}, for those that lie elsewhere than their file says.
        only: the methods that run.
        quick: whether it is at a small size.
    """

    name: ClassVar[str] = "map"
    picture: ClassVar[str] = "map"
    thing: ClassVar[str] = "map"
    known: ClassVar[tuple[str, ...]] = METHODS_OF_MAP
    # the user cannot set these
    own: ClassVar[frozenset[str]] = frozenset(
        ("conf", "method", "num-clients", "train-per-client", "partition", "fine-tune-grid-epochs")
    )
    figures: ClassVar[tuple[str, ...]] = tuple(COLUMNS.values())
    out: Path
    settings: Settings
    places: Mapping[str, str]
    run_all: RunAll
    only: tuple[str, ...] = METHODS_OF_MAP
    quick: bool = False

    @property
    def grids(self) -> Grids:
        """{method: {setting: values}} to search after the common learning rate."""
        return {method: dict([MOMENTUM[method]]) for method in MOMENTUM if method in self.only}

    @classmethod
    def cells(cls, quick: bool = False) -> list[Cell]:
        """Return all cells, the most telling first; ``quick``: a few that take minutes."""
        if quick:
            return [Cell("fashion-mnist", 20, "dominant", images) for images in (30, 60)]
        order = itertools.product(PARTITIONS, SIZES, IMAGES, DATA)
        return [Cell(data, clients, part, images) for part, clients, images, data in order]

    def fill(self, cells: Sequence[Cell], seeds: Sequence[int] = SEEDS) -> str:
        """Run what is not done yet, writing the map again after every cell; return its tables.

        A run that failed in an earlier call is tried once more; one that fails keeps no other back.
        """
        found: dict[tuple[Cell, Cell], Settings] = {}
        cells = self.running(cells)
        for cell in cells:
            if cell.searched not in found:
                found[cell.searched] = self._search(cell)
            self._run(cell, seeds[0], found[cell.searched])
            self.write(cells, seeds)
        for cell in cells:
            if self.wants_more_seeds(cell, self.rows([cell], seeds)):
                for seed in seeds[1:]:
                    self._run(cell, seed, found[cell.searched])
                self.write(cells, seeds)
        return self.write(cells, seeds)

    def wants_more_seeds(self, cell: Cell, rows: Sequence[Row]) -> bool:
        """Whether one seed is too few to show what ``cell`` is to show."""
        return abs(gain(rows)) < CLOSE

    def rows(self, cells: Iterable[Cell], seeds: Iterable[int] = SEEDS) -> list[Row]:
        """Return the finished rows of these cells, one for each method and seed.

        A seed of a cell is left out until all methods are done with it, or have failed.
        """
        found = []
        for cell, seed in itertools.product(cells, seeds):
            (rows, failed), wanted = self.ended(cell, seed), self.methods_of(cell)
            if rows and {*rows, *failed} >= set(wanted):
                found += [asdict(cell) | rows[method] for method in wanted if method in rows]
        return found

    def failures(self, cells: Iterable[Cell], seeds: Iterable[int] = SEEDS) -> list[str]:
        """Say of each method whose run was started and has no result why that is."""
        told = []
        for cell, seed in itertools.product(cells, seeds):
            rows, failed = self.ended(cell, seed)
            place = self._at(cell, seed)
            for method in self.methods_of(cell) if place.exists() else ():
                if method not in rows:
                    why = failed.get(method, f"no result; see {place}")
                    told.append(f"{cell.name}, seed {seed}: {method}: {why}")
        return told

    def ended(self, cell: Cell, seed: int) -> tuple[dict[str, Row], dict[str, str]]:
        """Return {method: its row} of the runs that are done; {method: why} of those that failed.

        A method may have been run twice.
        """
        place = self._at(cell, seed)
        rows = {
            row["method"]: row for folder in finished_in(place) for row in self._rows_of(folder)
        }
        return rows, failed_in(place)

    def write(self, cells: Sequence[Cell], seeds: Sequence[int] = SEEDS) -> str:
        """Write the rows, the tables and the figure; return the tables."""
        rows = rows_done(self, cells, seeds)
        text = self.tables(rows)
        write_text(self.out / f"{self.name}.jsonl", "".join(as_json(row) + "\n" for row in rows))
        write_text(self.out / f"{self.name}.md", text)
        if drawn := self.figure(rows):
            write_text(self.out / f"{self.picture}.svg", drawn)
        return text

    def tables(self, rows: Sequence[Row]) -> str:
        """Return the tables of these rows, in Markdown."""
        return tables(rows)

    def figure(self, rows: Sequence[Row]) -> str:
        """Return the figure of these rows as SVG; "" for none."""
        return figure(rows)

    def seconds(self, cells: Sequence[Cell], seed: int = SEEDS[0]) -> float:
        """Estimate how long one core trains for a seed's unfinished cells, without the search."""
        left = [cell for cell in cells if not self.rows([cell], [seed])]
        return sum(
            core_seconds(resolve(own | {"method": group}).config)
            for cell in left
            for group, own in self._federations(cell, {})
        )

    def running(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells in which at least one of the chosen methods runs."""
        return [cell for cell in cells if self.methods_of(cell)]

    def done(self, cells: Sequence[Cell], seed: int = SEEDS[0]) -> list[Cell]:
        """Return the cells in which a seed is complete."""
        return [cell for cell in cells if self.rows([cell], [seed])]

    def methods_of(self, cell: Cell) -> list[str]:
        return [method for method in cell.methods if method in self.only]

    def _at(self, cell: Cell, seed: int) -> Path:
        return self.out / cell.name / f"seed-{seed}"

    def _run(self, cell: Cell, seed: int, found: Settings) -> None:
        """Run all methods of ``cell``, one run a federation, with the settings in ``found``."""
        runs: list[PlannedRun] = []
        for group, own in self._federations(cell, found):
            over: dict[str, list[Any]] = {"method": [group], "seed": [seed]}
            runs += expand(own, over, self._at(cell, seed))
        require_alike(runs, self._at(cell, seed))
        if runs:
            self.run_all(runs)

    def _federations(self, cell: Cell, found: Settings) -> list[tuple[list[str], Settings]]:
        """Return the methods of each federation, and the settings that they use."""
        base = self._settings(cell) | found
        groups = federations(self.methods_of(cell)).values()
        return [(group, without_idle(base, group)) for group in groups]

    def _settings(self, cell: Cell) -> Settings:
        base = cell.settings | {"save-weights": False, "report": False} | self.settings
        place = self.places.get(cell.data)
        return base | ({"dataset": place} if place else {})

    def _searching(self, cell: Cell) -> Settings:
        return self._settings(cell)

    def _search(self, cell: Cell) -> Settings:
        """Return the settings that validation images choose for ``cell``, before any method runs.

        They are FedAvg's learning rate, then what each method has of its own.
        """
        found: Settings = {}
        every = {"fedavg": main_settings("fedavg")}, self.grids
        for there, grids in zip(cell.searched, every, strict=True):
            found |= self._search_in(there, grids, found)
        return found

    def _search_in(self, cell: Cell, grids: Grids, chosen: Settings) -> Settings:
        """Search in ``cell`` what the user does not give, by the settings ``chosen`` before."""
        folder, base = self.out / cell.name / "search", DEFAULTS | self._searching(cell) | chosen
        alike: dict[tuple[str, ...], Grids] = {}  # {settings they read: methods}
        for method, grid in grids.items():
            if wanted := {name: grid[name] for name in grid if name not in self.settings}:
                alike.setdefault(tuple(without_idle(base, [method])), {})[method] = wanted
        found: Settings = {}
        for read, some in alike.items():
            own = {name: base[name] for name in read}
            found |= search(own, some, folder, self.run_all)[0]
        return found

    def _rows_of(self, folder: Path) -> list[Row]:
        """Return, for each method of a run, what the tables show and what was searched for it."""
        kept = values_of(kept_settings(folder))
        found = []
        for row in rows_of(folder):
            names = ("learning-rate", *self.grids.get(row["method"], ()))
            told = {key: row[key] for key in (*_TOLD, *self.figures)}
            found.append(told | {"searched": {name: kept[name] for name in names}})
        return found


def rows_done(atlas: Atlas, cells: Sequence[Cell], seeds: Sequence[int]) -> list[Row]:
    """Return the rows of these cells and seeds as ``Atlas.rows`` does, and all others there are.

    Other commands have made these in the same folder: of other methods, cells or seeds.
    """
    whole, found = replace(atlas, only=atlas.known), list[Row]()
    for cell in dict.fromkeys([*atlas.cells(atlas.quick), *cells]):
        there = (atlas.out / cell.name).glob("seed-*")
        numbers = [place.name.removeprefix("seed-") for place in there]
        for seed in sorted(int(number) for number in numbers if number.isdecimal()):
            if cell in cells and seed in seeds and not atlas.rows([cell], [seed]):
                continue  # it is going on
            rows, _ = whole.ended(cell, seed)
            found += [asdict(cell) | rows[m] for m in whole.methods_of(cell) if m in rows]
    return found


def failed_in(place: Path) -> dict[str, str]:
    """Return {method: why its run failed} of the runs in ``place``."""
    failed: dict[str, str] = {}
    for path in sorted(place.glob(f"*/{CONFIG}")):
        end = last_event(path.parent)
        if end.get("kind") == "failed":
            failed |= dict.fromkeys(kept_methods(path.parent), end["text"])
    return failed


def core_seconds(config: Config) -> float:
    """Estimate how long one core trains for a run, in seconds.

    A step takes 3 ms and each image in it 0.25 ms, as measured on a core of an AMD EPYC with the
    map's networks.
    """
    return images_trained(config) * (0.003 / config.batch_size + 0.00025)


def rows_in(rows: Iterable[Row], cell: Cell) -> list[Row]:
    """Return the rows of ``cell``."""
    return [row for row in rows if asdict(cell).items() <= row.items()]


def gain(rows: Sequence[Row]) -> float:
    """Return pFedGPA's gain over the best contender in one cell, in points; means over its seeds.

    NaN while either is missing. The contender is the best in hindsight, on the same test images.
    """
    means = means_of(rows)
    others = contenders(means).values()
    return means[OURS] - max(others) if OURS in means and others else float("nan")


def contenders(means: Mapping[str, float]) -> dict[str, float]:
    """Return those of ``means``, {method: figure}, whose methods pFedGPA is compared with."""
    return {m: value for m, value in means.items() if m not in (OURS, KNOWS_GROUPS)}


def means_of(rows: Iterable[Row], key: str = MERIT) -> dict[str, float]:
    """Return {method: its figure of merit, or that of ``key``}, means over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row[key])
    return {method: sum(values) / len(values) for method, values in found.items()}


def _cells_in(rows: Iterable[Row]) -> list[Cell]:
    return list(dict.fromkeys(Cell(**{k: row[k] for k in Cell.__annotations__}) for row in rows))


def figure(rows: Sequence[Row]) -> str:
    """Draw the gain over images a client: a line a federation, a panel a partition; SVG."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for cell in sorted(_cells_in(rows), key=lambda cell: cell.images):
        name = f"{DATA[cell.data]}, {cell.clients} clients"
        points = panels.setdefault(cell.partition, {}).setdefault(name, [])
        points.append((cell.images, gain(rows_in(rows, cell))))
    return pictures.gains(panels)


def methods_figure(rows: Sequence[Row], images: int = 60) -> str:
    """Draw what every method's clients are sent and have after tuned fine-tuning; SVG.

    A panel for each of the first two federations, the largest ones, in which the partition is
    dominant and each client has ``images`` images.
    """
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for cell in _cells_in(rows):
        here = [row for row in rows_in(rows, cell) if row["method"] != KNOWS_GROUPS]
        if cell.images == images and cell.partition == PARTITIONS[0]:
            sent, tuned = means_of(here, "accuracy_before_ft"), means_of(here)
            titles = {row["method"]: row["title"] for row in here}
            panels[f"{DATA[cell.data]}, {cell.clients} clients, {images} images each"] = {
                titles[method]: (sent[method], tuned[method])
                for method in tuned
                if method != "fedavg-ft-tuned"  # FedAvg's second figure
            }
    return pictures.sent_and_tuned(dict(list(panels.items())[:2]), "pFedGPA")


def overview(rows: Sequence[Row]) -> str:
    """Return pFedGPA's accuracy in every cell, in brackets its gain and over whom; Markdown."""
    found = {cell: rows_in(rows, cell) for cell in _cells_in(rows)}
    images = sorted({cell.images for cell in found})
    places = dict.fromkeys((cell.data, cell.clients, cell.partition) for cell in found)
    lines = []
    for data, clients, partition in places:
        cells = [_in_brief(found.get(Cell(data, clients, partition, n), [])) for n in images]
        lines.append([DATA[data], str(clients), partition, *cells])
    heads = [f"{n} images a client" for n in images]
    return markdown(["data", "clients", "partition", *heads], lines)


def _in_brief(rows: Sequence[Row]) -> str:
    means = means_of(rows)
    others = contenders(means)
    if OURS not in means or not others:
        return "–"
    best = max(others, key=lambda method: others[method])
    title = next(row["title"] for row in rows if row["method"] == best)
    return f"{means[OURS]:.1f} ({gain(rows):+.1f} over {title})"


def tables(rows: Sequence[Row]) -> str:
    """Return the overview, and a table for each cell; Markdown."""
    parts = [overview(rows) + "\n"]
    for cell in _cells_in(rows):
        where = f"{DATA[cell.data]}, {cell.clients} clients, {cell.partition}"
        table = _table(rows_in(rows, cell))
        parts.append(f"### {where}, {cell.images} images a client\n\n{table}\n")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    """Return a table with a row for each method: means ± standard deviations over seeds."""
    lines = []
    for method in METHODS_OF_MAP:
        if own := [row for row in rows if row["method"] == method]:
            cells = [over_seeds([row[key] for row in own], digits=1) for key in COLUMNS.values()]
            lines.append([own[0]["title"], str(len(own)), *cells])
    return markdown(["method", "seeds", *COLUMNS], lines)
