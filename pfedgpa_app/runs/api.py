"""Start runs from Python and read their results, for notebooks and scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfedgpa_app.config.parse import argument
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.engine import LaunchError
from pfedgpa_app.results.figures import canvas
from pfedgpa_app.results.log import CLIENTS, SUMMARY, Records, accuracies_of, mean, rows_of
from pfedgpa_app.results.tables import text_table
from pfedgpa_app.runs.folder import unfinished
from pfedgpa_app.runs.personal import ClientModel, load_client

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
_DONE = re.compile(r"results are in (.+)")
_REFUSED, _STOPPED = 2, 130  # exit statuses


@dataclass(frozen=True)
class Result:
    """The results of a run.

    Attributes:
        folder: the run's folder, which holds all of its results.
        table: a record for each method, accuracies in percent: ``method``, ``accuracy_kept``,
            ``accuracy_before_ft``, ….
        clients: a record for each method and client: ``before_ft``, ``after_ft``, ``kept``;
            and, where clients are users, ``users``, their names.
        curves: a record for each federation and evaluated round: ``accuracy``, the mean of its
            clients.
    """

    folder: Path
    table: list[Record] = field(repr=False)
    clients: list[Record] = field(repr=False)
    curves: list[Record] = field(repr=False)

    @classmethod
    def of(cls, folder: str | Path) -> Result:
        """Read the results of a run; if it is not done, those it has so far, with a warning.

        Raises:
            ConfigError: ``folder`` holds no results.
        """
        place = user_path(folder)
        if not (place / SUMMARY).is_file():
            raise ConfigError(f"{place}: holds no results of a run")
        if text := unfinished(place):
            warn_once(text)
        clients = list(Records(place / CLIENTS).new())
        return cls(place, rows_of(place), clients, _curves(place))

    def model(self, client: int | str, method: str = "") -> ClientModel:
        """Return the network that ``client`` was given, ready to predict; see ``load_client``."""
        return load_client(self.folder, client, method)

    def frame(self, what: str = "table") -> Any:
        """Return ``table``, ``clients`` or ``curves`` as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError(
                f"frame: needs pandas: pip install pandas; then Result.of({str(self.folder)!r}) "
                "reads this run's results again"
            ) from error
        return pandas.DataFrame(getattr(self, what))

    def plot(self) -> Figure:
        """Draw each federation's accuracy over its rounds."""
        figure = canvas(7, 4.2)
        axes = figure.subplots()
        for name in dict.fromkeys(point["federation"] for point in self.curves):
            points = [point for point in self.curves if point["federation"] == name]
            axes.plot([p["round"] for p in points], [p["accuracy"] for p in points], label=name)
        axes.set(xlabel="round", ylabel="accuracy as sent, mean of clients (%)")
        axes.legend(frameon=False)
        return figure

    def __str__(self) -> str:
        return f"{self.folder}\n\n{text_table(self.table)}"

    def _repr_markdown_(self) -> str:
        return text_table(self.table)


def run(
    method: str | Sequence[str] | None = None, *, quiet: bool = True, **settings: Any
) -> Result:
    """Run an experiment and wait for its end.

    The run has processes of its own, so that scripts and notebooks need no precautions.

    Args:
        method: one method or several; None: those that ``conf`` names.
        quiet: whether to hide the run's progress; if False, it is printed.
        settings: any that ``pfedgpa settings`` lists, with _ for -; a method's own as a dict, as in
            ``pfedgpa={"rank": 3}``. The user's own code is given by its import path,
            ``model="nets:build"``, or as a function of a module that can be imported.

    Raises:
        ConfigError: the run was refused before anything started; the text says what and why.
        LaunchError: the run failed.
    """
    given = settings if method is None else {"method": method} | settings
    command = [sys.executable, "-m", "pfedgpa_app", "run", *_words(given)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line.rstrip("\n"))
            if not quiet:
                print(said[-1], flush=True)
        status = process.wait()
    except BaseException:  # Ctrl-C, as a rule
        process.terminate()
        process.wait()
        raise
    text = "\n".join(said[-20:]).rpartition("pfedgpa: ")[2]
    if status == _REFUSED:
        raise ConfigError(text)
    if status == _STOPPED:
        raise KeyboardInterrupt
    if status:
        raise LaunchError(text)
    folders = [found[1] for line in said if (found := _DONE.search(line))]
    return Result.of(folders[-1])


def _words(settings: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield the settings as arguments of the command line."""
    for name, value in settings.items():
        key = section + name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _words(value, f"{key}.")
        else:
            text = _text(key, value)
            yield f"{key}={json.dumps(text, ensure_ascii=False) if ' ' in text else text}"


def _text(key: str, value: Any) -> str:
    if key == "dataset" and not callable(value) and not isinstance(value, (str, Path)):
        raise ConfigError(
            f"dataset: cannot be of type {type(value).__name__}; give data in memory by a "
            'function in a file, as in dataset="my_file:load"'
        )
    if callable(value):
        name, module = (getattr(value, of, "") for of in ("__qualname__", "__module__"))
        if module == "__main__" or not name.replace(".", "_").isidentifier():
            raise ConfigError(
                f"{key}: {name or type(value).__name__} is defined here, where other processes "
                'cannot import it: put it in a file and name it, as in "my_file:build"'
            )
        return f"{module}:{name}"
    if hasattr(value, "tolist"):  # an array of NumPy or a tensor of torch
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(_text(key, each) for each in value)
    return argument(value)


def _curves(folder: Path) -> list[Record]:
    """Return the mean accuracy of all evaluated clients, by federation and round."""
    return [
        {"federation": name, "round": number, "accuracy": mean(values), "clients": len(values)}
        for name, rounds in accuracies_of(folder).items()
        for number, values in rounds.items()
    ]
