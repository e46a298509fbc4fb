"""A run's model.json: what is needed to build its networks again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pfedgpa_app.core.files import write_json, write_tensors
from pfedgpa_app.core.own_code import sources, still_there
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import Config, TrainingSettings
from pfedgpa_app.core.settings import ConfigError, listed
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data.images import normalisation
from pfedgpa_app.methods.own import reference_of
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import fixed_of

MODEL, WEIGHTS = "model.json", "weights"
REST = "network.safetensors"  # the network's tensors that clients do not share, such as frozen ones
FORMAT = "pfedgpa-model-1"


@dataclass(frozen=True)
class About:
    """What is needed to build a run's networks again.

    Attributes:
        image_size: the side, in pixels, of the square that images were resized to; 0: they were
            not.
        code: {import path: {file: its SHA-256}} of the user's own code in the run.
    """

    schema: Schema
    model: str
    head: str
    seed: int
    code_dir: str
    image_size: int
    code: dict[str, dict[str, str]] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """Return it as a dict that JSON can hold."""
        mean, std = normalisation(self.schema.shape[0]) if self.schema.pixels else ((), ())
        return {
            "format": FORMAT,
            "dataset": self.schema.name,
            **self.schema.as_dict(),
            "normalisation": {"mean": mean, "std": std},  # of pixels divided by 255
            "image_size": self.image_size,
            "model": self.model,
            "head": self.head,
            "seed": self.seed,
            "code_dir": self.code_dir,
            "code": self.code,
        }

    def network(self) -> nn.Module:
        """Build the network as the run's seed initialises it."""
        settings = TrainingSettings(
            model=self.model, head=self.head, seed=self.seed, code_dir=self.code_dir
        )
        return network_of(settings, self.schema)


def write_about(folder: Path, config: Config, schema: Schema) -> None:
    """Write to a run's ``folder`` what is needed to use its weights."""
    about = About(
        schema,
        config.model,
        config.head,
        config.seed,
        str(user_path(config.code_dir or ".").absolute()),
        config.image_size,
        _own_code(config),
    )
    write_json(folder / MODEL, about.as_dict(), indent=2)
    network = network_of(config, schema)
    # the seed alone does not restore weights that a client was never sent
    rest = network.state_dict() if config.model_weights else fixed_of(network)
    if rest and config.save_weights:
        (folder / WEIGHTS).mkdir(exist_ok=True)
        write_tensors(folder / WEIGHTS / REST, rest)


def _own_code(config: Config) -> dict[str, dict[str, str]]:
    """Return ``About.code``, of the files that this process has imported."""
    every = [config.model, config.dataset, *map(reference_of, config.method)]
    found = {name: {file.name: now for file, now in sources(name).items()} for name in every}
    return {name: files for name, files in found.items() if files}


def changed_code(folder: Path, about: About, *references: str) -> Iterator[str]:
    """Yield a warning for each of the user's own files that changed since the run in ``folder``.

    Args:
        references: import paths, as in ``about.code``; by default all that it has. Only files that
            this process has imported are looked at.
    """
    for reference in references or about.code:
        kept = about.code.get(reference, {})  # runs of earlier versions have none
        for file, now in sources(reference).items():
            before = kept.get(file.name, now)
            if before != now:
                yield (
                    f"{file}: {folder} was trained with another version of it; unless only "
                    "comments differ, its results no longer hold: restore that version, or run anew"
                )


def warn_of_changes(folder: Path, about: About, reference: str) -> None:
    """Log the warnings of ``changed_code``, each once a process."""
    for text in changed_code(folder, about, reference):
        warn_once(text)


def runs_below(folder: Path) -> str:
    """Say that ``folder`` is not a run's, but holds those of some; "" if it does not."""
    runs = sorted(path.parent.name for path in folder.glob(f"*/{MODEL}"))
    return f"is not a run's folder, but holds runs: name one of {listed(runs)}" if runs else ""


def read_about(folder: Path) -> About:
    """Read what ``write_about`` wrote for the run in ``folder``.

    Raises:
        ConfigError: it is no run's folder, or one of an earlier version, or damaged.
    """
    path = folder / MODEL
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"is of format {found['format']!r}, not {FORMAT}")
        schema = Schema.of(found["dataset"], found)
        names = ("model", "head", "seed", "code_dir", "image_size")
        code = found.get("code", {})
        found["code_dir"] = still_there(found["code_dir"], found["model"])
        return About(schema, **{name: found[name] for name in names}, code=code)
    except FileNotFoundError as error:
        own = (
            runs_below(folder)
            or f"is not a run's folder, or is from a version that kept no {MODEL}"
        )
        raise ConfigError(f"{folder}: {own}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}: put it back, or run anew") from error
