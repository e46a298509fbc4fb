"""Plan a study's runs: every combination of the settings it varies, each run in its own folder."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedgpa_app.config import yaml_file
from pfedgpa_app.config.names import known, without_idle
from pfedgpa_app.config.parse import flat
from pfedgpa_app.config.resolve import (
    Resolved,
    differences,
    know_methods,
    resolve,
    with_absolute_files,
)
from pfedgpa_app.core.sections import OF_PARTITION, Config
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.methods import federations
from pfedgpa_app.methods.own import own_name, reference_of
from pfedgpa_app.results.log import SUMMARY, finished_in, is_done, last_event
from pfedgpa_app.runs.about import changed_code, read_about
from pfedgpa_app.runs.checkpoint import has_checkpoint
from pfedgpa_app.runs.folder import (
    check_data,
    check_files,
    is_foreign,
    kept_methods,
    kept_settings,
)

Settings = dict[str, Any]


class TakenError(DataError):
    """The folder that a run is to work in holds something else."""


def read(path: Path) -> tuple[Settings, dict[str, list[Any]]]:
    """Read a sweep's file: ``settings:`` that all runs share, and ``over:`` with lists to combine.

    Raises:
        ConfigError: there is no such file, or it has another form.
    """
    loaded = yaml_file.read(path)
    settings, over = loaded.get("settings") or {}, loaded.get("over") or {}
    if loaded.keys() - {"settings", "over"}:
        raise ConfigError(f"{path}: may have settings: and over:, and nothing else")
    if not isinstance(settings, dict) or not isinstance(over, dict):
        raise ConfigError(f"{path}: settings: and over: must map settings to values")
    settings, over = flat(settings, f"{path}: settings"), flat(over, f"{path}: over")
    for key, values in over.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: over: {key}: must be a list of values")
    know_varied(settings, over)
    for key in over:
        known(key, f"{path}: over")
    return settings, over


def know_varied(settings: Settings, over: Mapping[str, Sequence[Any]]) -> None:
    """Register the methods of a sweep, so that the settings of the user's own are known.

    Raises:
        ConfigError: one cannot be imported, or is no method.
    """
    varied = [name for value in over.get("method", ()) for name in _names(value)]
    for conf in over.get("conf", [settings.get("conf", "")]):
        know_methods(settings | {"conf": conf}, varied)


def images_trained(config: Config) -> float:
    """Estimate how many images the clients of a run train on in all."""
    a_round = config.round_clients * (config.train_per_client or 600) * config.local_epochs
    return len(federations(config.method)) * config.num_server_rounds * a_round


@dataclass
class PlannedRun:
    """One run of a sweep."""

    name: str
    settings: Settings
    varied: Settings
    resolved: Resolved
    folder: Path

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def work(self) -> float:
        """About how long it takes, as a number of images trained on."""
        return images_trained(self.config)

    def differences(self) -> list[str]:
        """Return the settings in which the run in its folder differs from this one."""
        return differences(kept_settings(self.folder), self.resolved)

    def has_results(self) -> bool:
        """Whether its folder holds results or a checkpoint that must not be overwritten."""
        return is_done(self.folder) or (self.folder / SUMMARY).exists() or self._is_resumable()

    def require_same_data(self) -> None:
        """Refuse data that have changed since the results in its folder were made of them.

        The user is warned of own code that has.

        Raises:
            TakenError: they have.
        """
        if self.has_results():
            _require_same_data(self.folder, self.config)

    def _is_resumable(self) -> bool:
        end = last_event(self.folder)
        may_go_on = end.get("kind") != "failed" or bool(end.get("no_room"))
        return has_checkpoint(self.folder) and may_go_on

    def can_go_on(self) -> bool:
        """Whether its folder holds a checkpoint of this very run, which was killed, not failed.

        A run that failed does not go on, unless its disk was full: what made it fail may lie in
        its checkpoint.
        """
        return self._is_resumable() and not self.differences()


def expand(settings: Settings, over: Mapping[str, Sequence[Any]], out: Path) -> list[PlannedRun]:
    """Return a run for every combination of ``over`` on top of ``settings``.

    The last key varies fastest. Where methods or partitions vary, a run has none of ``settings``
    that only the others use.

    Raises:
        ConfigError: a combination that cannot run.
        TakenError: a folder with another run's results.
    """
    runs = []
    know_varied(settings, over)
    every = [own_name(name) for value in over.get("method", ()) for name in _names(value)]
    for values in itertools.product(*over.values()):
        varied = dict(zip(over, values, strict=True))
        named = [own_name(name) for name in _names(varied.get("method", ()))]
        own = settings_of(settings, named, every)
        own = _dealt(own, varied.get("partition"), over.get("partition", ()))
        config = resolve(own | varied).config
        chosen = with_absolute_files(own | varied, config)  # as runs keep them
        name = _name(config.conf, varied)
        folder = (out / name).absolute()
        chosen |= {"out-dir": str(folder.parent), "run-name": name}
        run = PlannedRun(name, chosen, varied, resolve(chosen), folder)
        if run.has_results() and (differences := run.differences()):
            raise TakenError(
                f"{folder} holds a run with other settings ({'; '.join(differences)}): "
                "choose another --out, or delete it"
            )
        if is_foreign(folder):
            raise TakenError(f"{folder} exists and is not a run's folder: choose another --out")
        runs.append(run)
    if twice := [name for name, n in Counter(run.name for run in runs).items() if n > 1]:
        raise ConfigError(f"over: makes the same run twice: {', '.join(sorted(twice))}")
    return runs


def require_alike(runs: Sequence[PlannedRun], out: Path) -> None:
    """Refuse an ``out`` whose tables would mix ``runs`` with runs that have other settings.

    ``expand`` does not see them: a method's run in another group of methods has another folder.

    Raises:
        TakenError: a finished run of the same experiment and method has other settings or data.
    """
    for folder in finished_in(out):
        there, gone = kept_settings(folder), False
        try:
            methods = kept_methods(folder)
        except ConfigError:  # code of the user's own is gone
            methods, gone = [own_name(name) for name in there["method"]["value"]], True
        experiment = Path(there["conf"]["value"]).stem
        for run in runs:
            both = [name for name in methods if name in run.config.method]
            if not both or Path(run.config.conf).stem != experiment:
                continue
            named = [reference_of(name) for name in both]
            kept = [name for name in there["method"]["value"] if own_name(name) in both]
            same = {"method": named, "seed": there["seed"]["value"]}
            here = resolve(without_idle(run.settings, both) | same)
            if found := differences(there | {"method": {"value": kept if gone else named}}, here):
                raise TakenError(
                    f"{folder} holds {', '.join(both)} with other settings ({'; '.join(found)}): "
                    "choose another --out, or delete it"
                )
            _require_same_data(folder, here.config)


def _require_same_data(folder: Path, config: Config) -> None:
    """Also warn of the user's own code that was edited since."""
    try:
        check_data(folder, config)
        check_files(folder, config)
    except DataError as error:
        raise TakenError(
            f"{folder} holds a run with other data: choose another --out, or delete it ({error})"
        ) from error
    with suppress(ConfigError):  # runs of earlier versions kept no record of it
        for text in changed_code(folder, read_about(folder)):
            warn_once(text)


def settings_of(settings: Settings, methods: Sequence[str], every: Sequence[str]) -> Settings:
    """Return ``settings`` without those that only methods of ``every`` outside ``methods`` use."""
    others = without_idle(settings, every).keys() - without_idle(settings, methods).keys()
    return {name: value for name, value in settings.items() if name not in others}


def _dealt(settings: Settings, partition: str | None, every: Sequence[str]) -> Settings:
    """Return ``settings`` without those that only the other partitions of ``every`` use."""
    others = set(every) - {partition}
    return {name: v for name, v in settings.items() if OF_PARTITION.get(name) not in others}


def _names(value: Any) -> list[str]:
    """Return the methods' names from a setting, which is a list or a text with commas."""
    return [n.strip() for n in value.split(",")] if isinstance(value, str) else list(value)


def _name(conf: str, varied: Settings) -> str:
    def text(value: Any) -> str:
        whole = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        return "".join(c if c.isalnum() or c in "-.+" else "-" for c in whole)

    parts = [text(Path(conf).stem)]
    parts += [f"{key}={text(value)}" for key, value in varied.items() if key != "conf"]
    return "_".join(parts)
