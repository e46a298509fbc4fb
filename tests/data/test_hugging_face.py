"""``dataset=hf:NAME``, on folders in the Hub's form; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.data import pictures
from pfedgpa_app.data.datasets import load
from tests.support.federations import federate, records

datasets = pytest.importorskip("datasets", reason="needs the extra hf")
ROWS = 60


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of images with two columns of classes, beside a table's."""
    from PIL import Image

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    kinds = datasets.ClassLabel(names=["one", "two", "three"])
    pixels = rng.integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    images = {
        "picture": [Image.fromarray(each) for each in pixels],
        "kind": [i % 3 for i in range(ROWS)],
        "hand": [i % 2 for i in range(ROWS)],
        "writer": [f"writer {i % 4}" for i in range(ROWS)],
    }
    features = datasets.Features(
        picture=datasets.Image(),
        kind=kinds,
        hand=datasets.ClassLabel(names=["left", "right"]),
        writer=datasets.Value("string"),
    )
    _write(tmp_path / "people" / "letters", images, features)
    table = {"a": rng.random(ROWS), "b": rng.random(ROWS), "label": [i % 2 for i in range(ROWS)]}
    _write(tmp_path / "table", table, None)
    return tmp_path


def _write(folder: Path, rows: dict[str, Any], features: Any) -> None:
    folder.mkdir(parents=True)
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.select(range(40)).to_parquet(folder / "train-00000-of-00001.parquet")
    whole.select(range(40, ROWS)).to_parquet(folder / "test-00000-of-00001.parquet")


def test_images_labels_and_users(hub: Path) -> None:
    found = load("hf:people/letters?label=kind&user=writer", "")
    assert found.train_images.shape == (40, 3, 8, 8)
    assert found.test_images.shape == (20, 3, 8, 8)
    assert found.classes == ("one", "two", "three")
    assert found.train_labels.tolist() == [i % 3 for i in range(40)]
    assert set(found.train_users) == {f"writer {i}" for i in range(4)}
    # PNG loses nothing
    first = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)[0]
    assert np.array_equal(found.train_images[0].transpose(1, 2, 0), first)
    assert load("hf:people/letters?label=hand", "", image_size=4).train_images.shape[2:] == (4, 4)


def test_images_are_decoded_anew_by_another_pillow(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(hub / "xdg"))
    for version in ("98.0", "99.0", "99.0"):
        monkeypatch.setattr(pictures, "version", lambda _, version=version: version)
        load("hf:people/letters?label=kind", "")
        load.cache_clear()
    assert len(list((hub / "xdg" / "pfedgpa").iterdir())) == 2


def test_a_table(hub: Path) -> None:
    found = load("hf:table", "")
    assert found.train_images.shape == (40, 2)
    assert found.columns == ("a", "b")
    assert found.train_images.dtype == np.float32
    assert load("hf:table?input=b", "").train_images.shape == (40, 1)


@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_what_save_to_disk_makes(hub: Path, splits: tuple[str, ...]) -> None:
    rows = datasets.Dataset.from_dict({"a": [0.5] * 20, "label": [0, 1] * 10})
    whole = rows if splits == ("train",) else datasets.DatasetDict(dict.fromkeys(splits, rows))
    whole.save_to_disk("saved")
    found = load("hf:saved", "")
    assert found.own_test == (len(splits) == 2)
    assert len(found.train_images) + len(found.test_images) == 20 * len(splits)
    with pytest.raises(DataError, match="makes has no subsets: leave it out"):
        load("hf:saved?subset=one", "")


def test_a_tables_texts_and_times_are_no_numbers(hub: Path) -> None:
    rows = {"a": [0.5] * ROWS, "name": ["x"] * ROWS, "when": [0] * ROWS, "b": [True] * ROWS}
    kinds = {"a": "float64", "name": "large_string", "when": "timestamp[s]", "b": "bool"}
    rows, kinds = rows | {"label": [0, 1] * 30}, kinds | {"label": "int64"}
    features = datasets.Features({c: datasets.Value(kind) for c, kind in kinds.items()})
    _write(hub / "visits", rows, features)
    assert load("hf:visits", "").columns == ("a", "b")


def test_splits_that_count_their_classes_each_in_its_own_way(hub: Path) -> None:
    """As class_encode_column does where it encodes one split after the other."""

    def coded(*names: str) -> Any:
        rows = {
            "a": [float(len(n)) for n in names] * 4,
            "wheels": [*names] * 4,
            "kind": [*names] * 4,
        }
        made = datasets.Dataset.from_dict(rows)
        for column in ("wheels", "kind"):
            made = made.class_encode_column(column)
        return made

    def found(*names: str) -> Any:
        whole = {"train": coded("bus", "car", "tram"), "test": coded(*names)}
        datasets.DatasetDict(whole).save_to_disk("-".join(names))
        return load(f"hf:{'-'.join(names)}?label=kind", "")

    here = found("tram", "bus")
    assert here.classes == ("bus", "car", "tram")
    assert here.test_labels.tolist() == [2, 0] * 4
    assert here.test_images.tolist() == [[4.0, 2.0], [3.0, 0.0]] * 4
    with pytest.raises(DataError, match=r"column kind has a class 'trams' that .* mean tram"):
        found("trams", "bus")


def test_a_run_by_its_users(hub: Path) -> None:
    folder, _ = federate(
        hub / "out",
        dataset="hf:people/letters?label=kind&user=writer",
        partition="natural",
        method="fedavg",
        num_server_rounds=1,
        train_per_client="auto",
        test_per_client="auto",
    )
    assert [row["client"] for row in records(folder, "clients.jsonl")] == [0, 1, 2, 3]


def test_rows_without_a_user_are_refused(hub: Path) -> None:
    rows = {"a": [0.5] * 20, "label": [0, 1] * 10, "who": [*["ann", "bob"] * 9, None, "bob"]}
    datasets.Dataset.from_dict(rows).save_to_disk("saved")
    with pytest.raises(DataError, match="users_train names no user in row 18: fill it in"):
        load("hf:saved?user=who", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:people/letters", "which column is the label.*picture, kind, hand, writer"),
        ("hf:people/letters?label=kin", "no column kin.*kind"),
        ("hf:people/letters?label=kind&input=pictur", "no column pictur.*picture"),
        ("hf:people/letters?label=kind&train=trai", "no split trai; there are train, test"),
        ("hf:nobody/nothing", "to ask the Hub, set download=true"),
    ],
)
def test_refusals(hub: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(name, "")


def test_the_hub_is_asked_only_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it may be is said anew each time, as in a notebook."""
    asked: list[str] = []

    def ask(*_: Any, repo_id: str, **__: Any) -> None:
        asked.append(repo_id)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", ask)
    for download in (False, True, False):
        with pytest.raises(DataError, match="nothing"):
            load("hf:nobody/nothing", "", download=download)
    assert asked == ["nobody/nothing"]


def test_an_unknown_choice(hub: Path) -> None:
    with pytest.raises(ConfigError, match=r"no option 'lable'.*label"):
        load("hf:people/letters?lable=kind", "")


def test_no_split_is_both_trained_and_tested_on(hub: Path) -> None:
    found = load("hf:table?train=test", "")
    assert (len(found.train_labels), len(found.test_labels)) == (16, 4)
    assert not found.own_test
    assert found.unused == ("train",)
    for same in ("test=train", "train=test&test=test"):
        with pytest.raises(ConfigError, match="train on the split that it is tested on: name ano"):
            load(f"hf:table?{same}", "")
