"""Send a run's figures to dashboards: TensorBoard, Weights & Biases, MLflow.

A dashboard has one curve, or one row, for every federation and every method of a run: rounds are
logged under their federation's name, and the final results of a method's weights under the
method's. The same records in the run's folder serve for a run in progress and for one that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.results.log import mean, rounds_of, rows_of

PROJECT = "pfedgpa"  # the project or experiment that runs are put in, unless the user names one
Figures = Mapping[str, float]


def _identity(folder: Path, name: str) -> str:
    """Return the ID that a run's federation or method keeps on a dashboard if it is sent again."""
    return hashlib.sha256(f"{folder.absolute()}/{name}".encode()).hexdigest()[:16]


class Tracker(Protocol):
    """One curve, and one row of results, on a dashboard."""

    def log(self, figures: Figures, server_round: int) -> None:
        """Log the figures of a round."""

    def close(self, done: bool) -> None:
        """Finish: no more figures will come, as the run is done, or was broken off."""


class TensorBoard:
    """Event files in the run's folder: ``tensorboard --logdir results`` shows every run's."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard" / name
        shutil.rmtree(place, ignore_errors=True)  # a resumed run sends all its figures again
        self.writer = SummaryWriter(str(place))
        lines = "\n".join(f"    {key}={value}" for key, value in settings.items())
        self.writer.add_text("settings", lines)

    def log(self, figures: Figures, server_round: int) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, server_round)
        self.writer.flush()

    def close(self, done: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in a group named after this run; offline without an account."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        known = os.environ.get("WANDB_MODE") or wandb.login(prompt=False)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_identity(folder, name),
            resume="allow",
            name=f"{folder.name}/{name}",
            group=folder.name,
            job_type=name,
            config=dict(settings),
            dir=str(folder),
            mode=None if known else "offline",
            reinit="create_new",  # several can be open at a time, one for each federation
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, figures: Figures, server_round: int) -> None:
        self.run.log(dict(figures), step=server_round)

    def close(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or, by default, in mlflow.db beside the run."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        here = f"sqlite:///{folder.parent.absolute() / 'mlflow.db'}"
        called = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        with FileLock(folder.parent / ".mlflow.lock"):  # a sweep's first runs all create the file
            self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here)
            found = self.client.get_experiment_by_name(called)
            experiment = found.experiment_id if found else self.client.create_experiment(called)
        identity = _identity(folder, name)
        before = f"tags.identity = '{identity}'"
        for old in self.client.search_runs([experiment], before):  # a resumed run sends all again
            self.client.delete_run(old.info.run_id)
        run = self.client.create_run(experiment, run_name=f"{folder.name}/{name}")
        self.id = run.info.run_id
        params = [Param(key, str(value)) for key, value in settings.items()]
        about = {"folder": str(folder.absolute()), "method": name, "identity": identity}
        tags = [RunTag(key, value) for key, value in about.items()]
        self.client.log_batch(self.id, params=params[:100], tags=tags)
        for start in range(100, len(params), 100):  # MLflow takes at most 100 at once
            self.client.log_batch(self.id, params=params[start : start + 100])

    def log(self, figures: Figures, server_round: int) -> None:
        metrics = [self.metric(key, value, 0, server_round) for key, value in figures.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, done: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if done else "FAILED")


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def require_installed(kinds: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: says which, and what installs it.
    """
    for kind in kinds:
        spec = find_spec(kind)
        if spec is None or spec.origin is None:  # no origin: just a folder of that name
            raise ConfigError(f"track = {kind}: needs pip install 'pfedgpa-app[{kind}]'")


def figures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of one round of a federation, from its records, one for each client."""
    honest = [record for record in records if not record.get("malicious")]

    def values(key: str) -> list[float]:
        told = [record[key] for record in honest if record.get(key) is not None]
        return [value for value in told if not math.isnan(value)]  # a client without a step

    accuracies = values("accuracy")
    found = {
        "accuracy/mean": mean(accuracies),
        "accuracy/worst client": min(accuracies, default=math.nan),
        "loss/train": mean(values("train_loss")),
        "loss/test": mean(values("test_loss")),
        "clients/trained": float(sum(record["participated"] for record in records)),
    }
    return finite(found)


def finite(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the row's finite numbers."""
    numbers = {key: value for key, value in row.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


class Tracking:
    """Sends a run's figures to its trackers.

    If one of them fails, the user is warned once, it gets no more figures, and the run goes on.
    """

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[str],
        settings: Mapping[str, Any],
        warn: Callable[[str, str], None],
    ) -> None:
        """Open the trackers and send what the folder of a resumed run already has.

        Args:
            kinds: the trackers' names.
            warn: is called with the tracker's kind and what went wrong with it.
        """
        self.folder, self.settings, self.warn = folder, settings, warn
        self._open: dict[str, dict[str, Tracker]] = {kind: {} for kind in kinds}
        self._failed: set[str] = set()
        for federation, rounds in rounds_of(folder).items() if kinds else ():
            for server_round, records in rounds.items():
                self.round(federation, server_round, records)

    def round(
        self, federation: str, server_round: int, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Send the figures of a round."""
        self._tell(federation, figures_of(records), server_round)

    def results(self) -> None:
        """Send the results of each method's weights, when the run is over."""
        for row in rows_of(self.folder) if self._open else ():
            figures = {f"results/{key}": value for key, value in finite(row).items()}
            self._tell(row["method"], figures, row["rounds"])

    def close(self, done: bool) -> None:
        """Close the trackers; ``done`` is whether the run is."""
        for kind in list(self._open):
            self._close(kind, done)

    def _tell(self, name: str, figures: Figures, server_round: int) -> None:
        for kind, trackers in list(self._open.items()):
            with self._kept_from_harm(kind):
                if name not in trackers:
                    trackers[name] = TRACKERS[kind](self.folder, name, self.settings)
                trackers[name].log(figures, server_round)

    def _close(self, kind: str, done: bool) -> None:
        for tracker in self._open.pop(kind, {}).values():
            with self._kept_from_harm(kind):
                tracker.close(done)

    @contextlib.contextmanager
    def _kept_from_harm(self, kind: str) -> Iterator[None]:
        """Keep a tracker's errors from the run; the tracker is closed, with what it has so far."""
        try:
            yield
        except Exception as error:
            if kind in self._failed:
                return
            self._failed.add(kind)
            self.warn(kind, f"{type(error).__name__}: {error}")
            self._close(kind, done=False)
