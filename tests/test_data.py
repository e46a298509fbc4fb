"""Partitions by exact counts; data sets, ours and the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pfedgpa_app.config import resolve
from pfedgpa_app.data import datasets
from pfedgpa_app.data.client import load_partition
from pfedgpa_app.data.datasets import load
from pfedgpa_app.data.partition import (
    class_shares,
    deal,
    dominant_groups,
    partition,
    round_counts,
)
from pfedgpa_app.settings import DataError

LABELS = np.repeat(np.arange(10), 5000)
TEST_LABELS = np.repeat(np.arange(10), 1000)
CLASSES = tuple("abcdefghij")


def counts(labels: np.ndarray, indices: np.ndarray) -> list[int]:
    return np.bincount(labels[indices], minlength=10).tolist()


class TestPartition:
    @pytest.mark.parametrize("clients", [10, 20, 100])
    def test_paper_partition_has_exact_counts(self, clients: int) -> None:
        # s = 20 %: 120 of 600 uniform (12 a class) and 480 over three dominant classes (160 each)
        splits = partition(
            LABELS, TEST_LABELS, CLASSES, clients, test_per_client=300, validation_share=0, seed=1
        )
        assert len(splits) == clients
        for client, split in enumerate(splits):
            dominant = [(2 * client) % 10, (2 * client + 1) % 10, (2 * client + 2) % 10]
            train, test = [12] * 10, [6] * 10
            for c in dominant:
                train[c], test[c] = 172, 86
            assert counts(LABELS, split.train) == train
            assert counts(TEST_LABELS, split.test) == test
            assert split.group == client % 5

    def test_unequal_groups(self) -> None:
        rng = np.random.default_rng(0)
        _, groups = class_shares("dominant", 20, 10, rng, group_shares=(8, 5, 4, 2, 1))
        assert np.bincount(groups).tolist() == [8, 5, 4, 2, 1]
        assert groups.tolist()[:9] == [0, 1, 2, 3, 4, 0, 1, 2, 3]  # the last to join are mixed
        with pytest.raises(ValueError, match="3 group shares"):
            class_shares("dominant", 20, 10, rng, group_shares=(1, 1, 1))
        with pytest.raises(DataError, match="group-shares: names 2 groups"):
            load_partition(resolve({"group-shares": "1,2"}).config)

    def test_disjoint_while_the_data_last(self) -> None:
        splits = partition(LABELS, TEST_LABELS, CLASSES, 20, test_per_client=100)
        everything = np.concatenate([np.r_[s.train, s.validation] for s in splits])
        assert len(np.unique(everything)) == len(everything) == 20 * 600
        tests = np.concatenate([s.test for s in splits])
        assert len(np.unique(tests)) == len(tests)

    def test_shares_images_only_when_a_class_runs_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        # 100 clients want 7600 of each even class, which has 5000, and 4400 of each odd one
        splits = partition(LABELS, TEST_LABELS, CLASSES, 100, test_per_client=10)
        used = np.bincount(np.concatenate([np.r_[s.train, s.validation] for s in splits]))
        assert "class 'a': clients are to hold 7600 training images in all" in caplog.text
        assert "lower train-per-client or num-clients" in caplog.text
        assert used[LABELS[: len(used)] % 2 == 1].max() == 1
        assert used.max() == 2
        for split in splits:  # never twice with the same client
            held = np.r_[split.train, split.validation]
            assert len(np.unique(held)) == len(held)

    def test_validation_is_a_share_of_training(self) -> None:
        for split in partition(LABELS, TEST_LABELS, CLASSES, 5, validation_share=0.1):
            assert len(split.train) == 540
            assert len(split.validation) == 60
            assert not set(split.train) & set(split.validation)

    def test_seeded(self) -> None:
        one, two, other = (
            partition(LABELS, TEST_LABELS, CLASSES, 3, seed=seed)[1].train for seed in (4, 4, 5)
        )
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_groups(self) -> None:
        assert dominant_groups(10) == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [0, 8, 9]]
        assert [len(g) for g in dominant_groups(62)] == [10, 26, 26]
        for classes in (2, 3, 26, 47):
            assert set().union(*dominant_groups(classes)) == set(range(classes))

    @given(
        st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda x: sum(x) > 0.01),
        st.integers(0, 1000),
    )
    @settings(max_examples=200)
    def test_rounding_is_exact_in_sum_and_off_by_less_than_one(
        self, shares: list[float], total: int
    ) -> None:
        exact = np.array(shares) / sum(shares) * total
        rounded = round_counts(np.array(shares), total)
        assert rounded.sum() == total
        assert (np.abs(rounded - exact) < 1 + 1e-6).all()

    @given(
        st.sampled_from(["dominant", "dirichlet", "shards", "iid"]),
        st.integers(1, 12),
        st.integers(0, 100),
    )
    @settings(max_examples=60)
    def test_every_kind_deals_equal_sizes_in_one_mix(
        self, kind: str, clients: int, seed: int
    ) -> None:
        splits = partition(
            LABELS,
            TEST_LABELS,
            CLASSES,
            clients,
            kind=kind,
            train_per_client=200,
            test_per_client=100,
            validation_share=0.2,
            seed=seed,
        )
        for split in splits:
            train = np.array(counts(LABELS, np.r_[split.train, split.validation]))
            test = np.array(counts(TEST_LABELS, split.test))
            assert (train.sum(), test.sum()) == (200, 100)
            assert (np.abs(train / 2 - test) <= 1.5).all()

    def test_shards_and_dirichlet_and_iid(self) -> None:
        rng = np.random.default_rng(0)
        shards, _ = class_shares("shards", 20, 10, rng, shards=2)
        assert ((shards > 0).sum(1) <= 2).all()
        assert np.allclose(shards.sum(0), 2)  # all classes alike
        peaked, _ = class_shares("dirichlet", 500, 10, rng, alpha=0.1)
        flat, _ = class_shares("dirichlet", 500, 10, rng, alpha=100)
        assert peaked.max(1).mean() > 0.6
        assert flat.max(1).mean() < 0.15
        iid, _ = class_shares("iid", 3, 4, rng)
        assert (iid == 0.25).all()

    @pytest.mark.parametrize(
        ("split", "there", "said"),
        [
            (
                "train",
                5,
                "'cat': one client is to hold 6 training images, there are 5: lower train-",
            ),
            ("test", 5, "'cat': one client is to hold 6 test images, there are 5: lower test-"),
            ("test", 0, "'cat' has no test images, but clients are to hold some: add some"),
        ],
    )
    def test_one_client_cannot_hold_more_than_there_is(
        self, split: str, there: int, said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            deal(np.zeros(there, dtype=int), np.array([[6]]), ("cat",), split, 0)


def make_images(root: Path, sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """root/{train,test}/{cat,dog}/*.png, four a class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (*(sizes or {}).get(name, (32, 32)), 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


class TestDatasets:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        load.cache_clear()

    def test_digits_are_all_there_and_split_by_class(self) -> None:
        data = load("digits", "")
        assert len(data.train_labels) + len(data.test_labels) == 1797
        assert data.shape == (1, 8, 8)
        shares = np.bincount(data.test_labels) / (
            np.bincount(data.test_labels) + np.bincount(data.train_labels)
        )
        assert ((shares > 0.28) & (shares < 0.32)).all()

    def test_imagefolder_reads_pixels_and_caches_them(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        data = load(f"imagefolder:{root}", "")
        assert data.classes == ("cat", "dog")
        assert data.train_images.shape == (8, 3, 32, 32)
        first = np.asarray(Image.open(root / "train" / "cat" / "0.png")).transpose(2, 0, 1)
        assert np.array_equal(data.train_images[0], first)
        (cache,) = (tmp_path / "cache" / "pfedgpa").iterdir()
        stamp = (cache / "train_images.npy").stat().st_mtime_ns
        load.cache_clear()
        again = load(f"imagefolder:{root}", "")
        assert np.array_equal(again.train_images, data.train_images)
        assert (cache / "train_images.npy").stat().st_mtime_ns == stamp

    def test_imagefolder_notices_changed_files(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        load(f"imagefolder:{root}", "")
        (root / "train" / "dog" / "3.png").unlink()
        load.cache_clear()
        assert len(load(f"imagefolder:{root}", "").train_labels) == 7

    def test_imagefolder_resizes(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own", {"dog": (40, 30)})
        with pytest.raises(DataError, match="image-size"):
            load(f"imagefolder:{root}", "")
        assert load(f"imagefolder:{root}", "", image_size=28).shape == (3, 28, 28)

    def test_imagefolder_refuses_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no folder .*train"):
            load(f"imagefolder:{tmp_path}", "")
        root = make_images(tmp_path / "own")
        (root / "test" / "cow").mkdir()
        (root / "test" / "cow" / "0.png").write_bytes(b"")
        with pytest.raises(DataError, match="train/ lacks: cow"):
            load(f"imagefolder:{root}", "")
        (root / "test" / "cow" / "0.png").unlink()
        (root / "train" / "cat" / "0.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"cat/0.png: cannot be read"):
            load(f"imagefolder:{root}", "")

    @pytest.mark.parametrize("name", ["fashion-mnist", "emnist-letters", "cifar10", "mnist"])
    def test_absent_data_say_what_to_do(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="download=true"):
            load(name, str(tmp_path))

    def test_a_cache_that_cannot_be_written_is_done_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        data = load(f"imagefolder:{make_images(tmp_path / 'own')}", "")
        assert data.train_images.shape == (8, 3, 32, 32)
        assert "cannot be kept there" in caplog.text

    def test_fashion_mnist(self, fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = load("fashion-mnist", str(fashion_mnist))
        # a second process reads neither the original files nor torchvision
        load.cache_clear()
        monkeypatch.setattr(datasets, "_torchvision", None)
        again = load("fashion-mnist", str(fashion_mnist))
        assert isinstance(again.train_images, np.memmap)
        assert np.array_equal(data.train_images, again.train_images)
        assert np.array_equal(data.test_labels, again.test_labels)
        assert data.classes == again.classes
        assert data.train_images.shape == (60000, 1, 28, 28)
        assert data.test_images.shape == (10000, 1, 28, 28)
        assert len(data.classes) == 10

    @pytest.mark.parametrize(("split", "classes"), [("byclass", 62), ("balanced", 47)])
    def test_emnist(self, emnist: Path, split: str, classes: int) -> None:
        data = load(f"emnist-{split}", str(emnist))
        assert data.shape == (1, 28, 28)
        assert len(data.classes) == classes
        assert set(np.unique(data.train_labels)) == set(range(classes))

    def test_cifar10_as_images(self, cifar10_folder: Path) -> None:
        # the labels of both splits are balanced, and the cache is a map, not a copy
        data = load("imagefolder:cifar10", str(cifar10_folder))
        assert data.train_images.shape == (50000, 3, 32, 32)
        assert isinstance(data.train_images, np.memmap)
        assert np.bincount(data.train_labels).tolist() == [5000] * 10
        assert np.bincount(data.test_labels).tolist() == [1000] * 10
