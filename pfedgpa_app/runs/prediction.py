"""Predict with a client's network, measure its accuracy, and export it to a file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.files import replacing
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.schema import Schema, column_places
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data.client import forget, schema_of
from pfedgpa_app.data.client import load_client as load_data
from pfedgpa_app.data.datasets import load as load_dataset
from pfedgpa_app.data.pictures import recoloured
from pfedgpa_app.runs.about import About, warn_of_changes
from pfedgpa_app.runs.folder import check_data, client_called, kept_config, kept_settings
from pfedgpa_app.runs.personal import ClientModel, load_client


def as_records(probabilities: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Describe each row [classes]: its most probable class, and every class's probability."""
    return [
        {
            "class": classes[int(row.argmax())],
            "probability": round(float(row.max()), 6),
            "probabilities": {c: round(float(p), 6) for c, p in zip(classes, row, strict=True)},
        }
        for row in probabilities
    ]


def evaluate(
    run: str | Path, client: int | str, method: str = "", dataset: str = "", data_dir: str = ""
) -> dict[str, Any]:
    """Count how many examples a client's network classifies correctly, in all and by class.

    Args:
        client: as in ``load_client``.
        dataset: as the setting names it, all of its examples; "" for the client's own test data in
            the run.

    Returns:
        ``correct``, ``examples``, ``accuracy`` in percent, and ``classes``, {class: (correct,
        examples)} of the classes that have any.

    Raises:
        ConfigError, DataError: there is no such network, or the data do not fit it.
    """
    forget()
    model = load_client(run, client, method)
    about = model.about
    if dataset:
        if _is_same(dataset, values_of(kept_settings(user_path(run)))["dataset"]):
            warn_once(
                f"dataset {dataset}: the run's clients were trained on a part of it; without "
                "one, the client's own test examples are taken"
            )
        inputs, labels = _labelled(about, dataset, data_dir)
    else:
        folder = user_path(run)
        inputs, labels = _tested(about, folder, client_called(folder, client))
    predicted = model.probabilities(inputs).argmax(1)
    right = predicted == labels
    counts = {
        name: (int(right[labels == i].sum()), int((labels == i).sum()))
        for i, name in enumerate(model.classes)
    }
    return {
        "correct": int(right.sum()),
        "examples": len(labels),
        "accuracy": 100 * float(right.mean()),
        "classes": {name: pair for name, pair in counts.items() if pair[1]},
    }


def _is_same(one: str, other: str) -> bool:
    """Whether two data sets, as the setting names them, are one, or of one file."""
    paths = [user_path(name.partition(":")[2] or name) for name in (one, other)]
    if not all(path.exists() for path in paths):
        return one == other
    return paths[0].samefile(paths[1])


def _labelled(about: About, dataset: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all examples of a data set, and their labels as indices of the run's classes."""
    found = load_dataset(dataset, data_dir, image_size=about.image_size, test_share=0.0)
    shape = about.schema.shape
    examples = np.concatenate([found.train_images, found.test_images])
    inputs = recoloured(examples, shape[0]) if found.pixels else examples
    if inputs.shape[1:] != shape:
        what = "resize the images" if found.pixels else "give examples of that shape"
        raise DataError(
            f"dataset {dataset}: has examples of shape {list(found.shape)}, but the network takes "
            f"{list(shape)}: {what}"
        )
    theirs = schema_of(found)
    # a network for images takes floats, too
    if theirs.tokens != about.schema.tokens or (theirs.pixels and not about.schema.pixels):
        raise DataError(
            f"dataset {dataset}: has examples of another kind than the run's: "
            f"{_kind(theirs)}, but the network takes {_kind(about.schema)}"
        )
    if unknown := [name for name in found.classes if name not in about.schema.classes]:
        raise DataError(
            f"dataset {dataset}: has the class {unknown[0]!r}, which the run did not have; it had "
            f"{', '.join(about.schema.classes)}"
        )
    place = np.array([about.schema.classes.index(name) for name in found.classes])
    if (columns := about.schema.columns) and found.columns:
        inputs = inputs[:, column_places(f"dataset {dataset}", found.columns, columns)]
    return inputs, place[np.concatenate([found.train_labels, found.test_labels])]


def _kind(schema: Schema) -> str:
    return "whole numbers" if schema.tokens else "images" if schema.pixels else "numbers"


def _tested(about: About, folder: Path, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples that ``client`` was tested on in the run, and their labels."""
    if values_of(kept_settings(folder))["dataset"] == NODES:
        raise ConfigError(f"{folder}: its clients' data are on their nodes: name a data set")
    config = kept_config(folder)
    check_data(folder, config)
    data = load_data(config, client).test
    warn_of_changes(folder, about, config.dataset)
    return data.pixels.numpy(), data.labels.numpy()


def export(model: ClientModel, to: str, path: Path) -> Path:
    """Write a client's network, with its normalisation, as ONNX or by torch.export.

    The exported network takes a batch of any size: images as floats from 0 to 1. Beside it, the
    file has the classes' names, a list in JSON: as "classes" of ONNX's metadata, or of the extra
    files of torch.export.

    Raises:
        ConfigError: a package that ONNX needs is not installed, or the network cannot be exported.
        OSError: the file cannot be written.
    """
    kind = torch.int64 if model.about.schema.tokens else torch.float32
    example = torch.zeros(2, *model.shape, dtype=kind)
    batch = ({0: torch.export.Dim("batch")},)
    classes = json.dumps(model.classes, ensure_ascii=False)
    try:
        traced = _traced(model, example, batch)
        if to == "onnx":
            program = torch.onnx.export(
                traced,
                input_names=["examples"],
                output_names=["logits"],
                dynamic_shapes=batch,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            made = program.model_proto
            made.metadata_props.add(key="classes", value=classes)
            written = made.SerializeToString()
        else:
            torch.export.save(traced, file := BytesIO(), extra_files={"classes": classes})
            written = file.getvalue()
    except ImportError as error:
        raise ConfigError(f"--to onnx: {error}: pip install 'pfedgpa-app[onnx]'") from error
    except Exception as error:  # torch raises errors of any type on networks that it cannot trace
        raise ConfigError(
            f"--to {to}: the network {model.about.model!r} cannot be exported: {error}"
        ) from error
    with replacing(path) as new:
        new.write_bytes(written)
    return path


def _traced(model: ClientModel, example: torch.Tensor, batch: Any) -> torch.export.ExportedProgram:
    """Trace the network for batches of any size, by both of torch's ways if need be."""
    with warnings.catch_warnings():  # torch's recurrent layers list their weights anew
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
        try:
            return torch.export.export(model, (example,), dynamic_shapes=batch)
        except Exception:  # a network that asks for len(x), say, is tied to one size this way
            return torch.export.export(model, (example,), dynamic_shapes=batch, strict=True)
