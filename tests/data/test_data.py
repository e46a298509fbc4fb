"""Partitions by exact counts; data sets, ours and the user's own."""

from __future__ import annotations

import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import ExifTags, Image, ImageCms

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import DataSettings
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data import datasets, pictures
from pfedgpa_app.data.client import load_dataset, load_partition
from pfedgpa_app.data.dataset import remarks
from pfedgpa_app.data.datasets import load
from pfedgpa_app.data.examples import examples
from pfedgpa_app.data.partition import (
    ClientSplit,
    class_shares,
    deal,
    dominant_groups,
    draw_counts,
    partition,
    round_counts,
)
from pfedgpa_app.data.pictures import recoloured
from pfedgpa_app.engine import LaunchError, local
from pfedgpa_app.runs.launcher import launch

LABELS = np.repeat(np.arange(10), 5000)
TEST_LABELS = np.repeat(np.arange(10), 1000)
CLASSES = tuple("abcdefghij")
PILLOW_13 = pytest.mark.skipif(
    Version(PIL.__version__) < Version("13"), reason="earlier ones cannot read what they write"
)


def counts(labels: np.ndarray, indices: np.ndarray) -> list[int]:
    found: list[int] = np.bincount(labels[indices], minlength=10).tolist()
    return found


def dealt(clients: int, **how: Any) -> list[ClientSplit]:
    settings = DataSettings(num_clients=clients, **how)
    return partition(LABELS, TEST_LABELS, CLASSES, settings)


class TestPartition:
    @pytest.mark.parametrize("clients", [10, 20, 100])
    def test_paper_partition_has_exact_counts(self, clients: int) -> None:
        # s = 20 %: 120 of 600 uniform (12 a class) and 480 over three dominant classes (160 each)
        splits = dealt(clients, test_per_client=300, validation_share=0, seed=1)
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
        sizes = DataSettings(num_clients=20, group_shares=(8, 5, 4, 2, 1))
        _, groups = class_shares(sizes, 10, rng)
        assert np.bincount(groups).tolist() == [8, 5, 4, 2, 1]
        assert groups.tolist()[:9] == [0, 1, 2, 3, 4, 0, 1, 2, 3]  # the last to join are mixed
        with pytest.raises(ValueError, match="3 group shares"):
            class_shares(DataSettings(num_clients=20, group_shares=(1, 1, 1)), 10, rng)
        with pytest.raises(DataError, match="group-shares: names 2 groups"):
            load_partition(resolve({"group-shares": "1,2"}).config)

    def test_disjoint_while_the_data_last(self) -> None:
        splits = dealt(20, test_per_client=100)
        everything = np.concatenate([np.r_[s.train, s.validation] for s in splits])
        assert len(np.unique(everything)) == len(everything) == 20 * 600
        tests = np.concatenate([s.test for s in splits])
        assert len(np.unique(tests)) == len(tests)

    def test_shares_images_only_when_a_class_runs_out(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        warn_once.cache_clear()
        # 100 clients want 7600 of each even class, which has 5000, and 4400 of each odd one
        splits, again = (dealt(100, test_per_client=10) for _ in range(2))
        assert np.array_equal(splits[0].train, again[0].train)
        used = np.bincount(np.concatenate([np.r_[s.train, s.validation] for s in splits]))
        [said] = caplog.messages  # once, in one line, three of the classes by name
        assert said.count("there are 5000") == 3
        assert "; and of 2 more classes: lower" in said
        assert "training images are shared by clients, who should hold 7600 of 'a' (there" in said
        assert "lower train-per-client or num-clients" in said
        assert used[LABELS[: len(used)] % 2 == 1].max() == 1
        assert used.max() == 2
        for split in splits:  # never twice with the same client
            held = np.r_[split.train, split.validation]
            assert len(np.unique(held)) == len(held)

    def test_validation_is_a_share_of_training(self) -> None:
        for split in dealt(5, validation_share=0.1):
            assert len(split.train) == 540
            assert len(split.validation) == 60
            assert not set(split.train) & set(split.validation)

    def test_seeded(self) -> None:
        one, two, other = (dealt(3, seed=seed)[1].train for seed in (4, 4, 5))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)

    def test_groups(self) -> None:
        assert dominant_groups(10) == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [0, 8, 9]]
        assert [len(g) for g in dominant_groups(62)] == [10, 26, 26]
        assert dominant_groups(2) == [[0], [1]]
        for classes in range(2, 70):
            groups = dominant_groups(classes)
            assert set().union(*groups) == set(range(classes))
            assert len(set(map(tuple, groups))) == len(groups) > 1

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

    @given(st.lists(st.floats(0.01, 5), min_size=2, max_size=12), st.integers(0, 500))
    def test_a_draw_of_counts_is_each_exact_count_rounded_down_or_up(
        self, share: list[float], total: int
    ) -> None:
        exact = np.array(share) / sum(share) * total
        drawn = draw_counts(np.array(share), total, np.random.default_rng(total))
        assert drawn.sum() == total
        assert (np.abs(drawn - exact) < 1 + 1e-6).all()

    def test_draws_of_counts_are_in_proportion_in_the_mean(self) -> None:
        share = np.array([0.05, 0.3, 0.0, 0.15, 0.5])
        rng = np.random.default_rng(0)
        mean = np.mean([draw_counts(share, 7, rng) for _ in range(4000)], axis=0)
        # the deviation of a mean of 4000 draws of 0 or 1 is at most 0.008
        np.testing.assert_allclose(mean, 7 * share, atol=0.04)

    @pytest.mark.parametrize("size", [5, 30, None])
    def test_no_class_is_favoured_where_counts_are_rounded(self, size: int | None) -> None:
        # with five images a client of ten classes, all clients once held the first five only
        splits = dealt(40, partition="iid", train_per_client=size, test_per_client=5)
        for labels, of in ((LABELS, "train"), (TEST_LABELS, "test")):
            held = [np.r_[each.train, each.validation] for each in splits]
            images = held if of == "train" else [each.test for each in splits]
            counts = np.bincount(labels[np.concatenate(images)], minlength=len(CLASSES))
            mean = counts.sum() / len(CLASSES)
            assert (np.abs(counts - mean) <= 4 * np.sqrt(40) / 2 + 1).all(), of

    def test_more_clients_change_nothing_for_the_first(self) -> None:
        few, many = (dealt(n, train_per_client=30, test_per_client=20) for n in (5, 8))
        for one, other in zip(few, many, strict=False):
            np.testing.assert_array_equal(one.train, other.train)
            np.testing.assert_array_equal(one.test, other.test)

    @given(
        st.sampled_from(["dominant", "dirichlet", "shards", "iid"]),
        st.integers(1, 12),
        st.integers(0, 100),
    )
    @settings(max_examples=60)
    def test_every_kind_deals_equal_sizes_in_one_mix(
        self, kind: str, clients: int, seed: int
    ) -> None:
        how = {"train_per_client": 200, "test_per_client": 100, "validation_share": 0.2}
        splits = dealt(clients, partition=kind, seed=seed, **how)
        for split in splits:
            train = np.array(counts(LABELS, np.r_[split.train, split.validation]))
            test = np.array(counts(TEST_LABELS, split.test))
            assert (train.sum(), test.sum()) == (200, 100)
            assert (np.abs(train / 2 - test) <= 1.5).all()

    def test_shards_and_dirichlet_and_iid(self) -> None:
        rng = np.random.default_rng(0)
        shards, _ = class_shares(DataSettings(num_clients=20, partition="shards"), 10, rng)
        assert ((shards > 0).sum(1) <= 2).all()
        assert np.allclose(shards.sum(0), 2)  # all classes alike
        peaked, flat = (
            class_shares(
                DataSettings(num_clients=500, partition="dirichlet", dirichlet_alpha=alpha), 10, rng
            )[0]
            for alpha in (0.1, 100)
        )
        assert peaked.max(1).mean() > 0.6
        assert flat.max(1).mean() < 0.15
        iid, _ = class_shares(DataSettings(num_clients=3, partition="iid"), 4, rng)
        assert (iid == 0.25).all()

    @pytest.mark.parametrize(
        ("split", "there", "said"),
        [
            (
                "train",
                5,
                "'cat': one client should hold 6 training images, but there are 5: lower train-",
            ),
            (
                "test",
                5,
                "'cat': one client should hold 6 test images, but there are 5: lower test-",
            ),
            ("test", 0, "'cat' has no test images, but clients should hold some: add some"),
        ],
    )
    def test_one_client_cannot_hold_more_than_there_is(
        self, split: str, there: int, said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            deal(np.zeros(there, dtype=int), np.array([[6]]), ("cat",), split, 0)


def make_images(
    root: Path, sizes: dict[str, tuple[int, int]] | None = None, mode: str = "RGB"
) -> Path:
    """root/{train,test}/{cat,dog}/*.png, four a class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (*(sizes or {}).get(name, (32, 32)), 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return root


def one_image_a_class(root: Path, image: Image.Image, suffix: str, **options: Any) -> Path:
    """root/{train,test}/only/image.SUFFIX."""
    for split in ("train", "test"):
        folder = root / split / "only"
        folder.mkdir(parents=True)
        image.save(folder / f"image.{suffix}", **options)
    return root


def tiff_of_12_bits(path: Path, values: list[int]) -> None:
    """A grey TIFF of one row, which Pillow reads and does not write."""
    bits = "".join(f"{value:012b}" for value in values)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    #       width, height, bits, uncompressed, black is 0, offset, channels, rows, bytes
    tags = (256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries += [
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((278, 1), (279, len(data)))
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


COLOURS = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(8, 10, 3))
TURNS = [  # that make orientations 2 to 8 upright
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
]
SIXTEEN_BITS = np.array([[0, 255, 256, 257, 32768, 65279, 65535]] * 7, dtype=np.uint16)


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

    def test_imagefolder_is_decoded_anew_by_another_pillow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fingerprint of the pixels names what has decoded them."""
        root = make_images(tmp_path / "own")
        for version in ("98.0", "99.0", "99.0"):
            monkeypatch.setattr(pictures, "version", lambda _, version=version: version)
            load(f"imagefolder:{root}", "")
            load.cache_clear()
        assert len(list((tmp_path / "cache" / "pfedgpa").iterdir())) == 2

    def test_imagefolder_notices_changed_files(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        load(f"imagefolder:{root}", "")
        (root / "train" / "dog" / "3.png").unlink()
        load.cache_clear()
        assert len(load(f"imagefolder:{root}", "").train_labels) == 7

    @pytest.mark.parametrize("change", ["names swapped", "written over"])
    def test_imagefolder_notices_it_where_sizes_and_times_stay(
        self, change: str, tmp_path: Path
    ) -> None:
        """As those of plain bitmaps out of an archive."""
        for kind, level in (("cat", 10), ("dog", 200)):
            (tmp_path / "own" / kind).mkdir(parents=True)
            for i in range(4):
                file = tmp_path / "own" / kind / f"{i}.bmp"
                Image.new("RGB", (8, 8), (level,) * 3).save(file)
                os.utime(file, (0, 0))
        before = load(f"imagefolder:{tmp_path / 'own'}", "")
        assert set(before.train_images[before.train_labels == 0].ravel()) == {10}
        cat, dog = tmp_path / "own" / "cat", tmp_path / "own" / "dog"
        if change == "names swapped":
            cat.rename(tmp_path / "own" / "other")
            dog.rename(cat)
            (tmp_path / "own" / "other").rename(dog)
        else:
            for file in cat.iterdir():
                file.write_bytes((dog / file.name).read_bytes())
                os.utime(file, (0, 0))
        load.cache_clear()
        after = load(f"imagefolder:{tmp_path / 'own'}", "")
        assert set(after.train_images[after.train_labels == 0].ravel()) == {200}

    def test_imagefolder_resizes(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own", {"dog": (40, 30)})
        with pytest.raises(
            DataError, match=r"dog/0.png: is 40×30 .*cat/0.png is 32×32; set image-"
        ):
            load(f"imagefolder:{root}", "")
        assert load(f"imagefolder:{root}", "", image_size=28).shape == (3, 28, 28)

    def test_train_and_test_images_are_of_one_size(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        shutil.rmtree(root / "test")
        shutil.copytree(make_images(tmp_path / "other", {"cat": (28, 28)}) / "test", root / "test")
        with pytest.raises(DataError, match=r"test/cat/0.png: is 28×28 .*train/cat/0.png is 32×32"):
            load(f"imagefolder:{root}", "")

    @pytest.mark.parametrize("coloured", ["train/cat/0.png", "train/cat/2.png", "test/dog/3.png"])
    def test_grey_images_are_coloured_where_any_is(self, coloured: str, tmp_path: Path) -> None:
        grey = load(f"imagefolder:{make_images(tmp_path / 'grey', mode='L')}", "")
        assert grey.shape == (1, 32, 32)
        root = make_images(tmp_path / "own", mode="L")
        Image.new("RGB", (32, 32), (1, 2, 3)).save(root / coloured)
        mixed = load(f"imagefolder:{root}", "")
        assert mixed.train_images.shape == mixed.test_images.shape == (8, 3, 32, 32)
        for ours, theirs in (
            (mixed.train_images, grey.train_images),
            (mixed.test_images, grey.test_images),
        ):
            differ = (ours != theirs).any(axis=(1, 2, 3))
            assert (ours[differ] == np.array([1, 2, 3]).reshape(3, 1, 1)).all()
        both = np.concatenate([mixed.train_images, mixed.test_images])
        assert (both == np.array([1, 2, 3]).reshape(3, 1, 1)).all(axis=(1, 2, 3)).sum() == 1

    # what Pillow writes of each mode, and how it reads it again
    @pytest.mark.parametrize(
        ("mode", "suffix", "read", "channels"),
        [
            ("1", "png", "1", 1),
            ("1", "tif", "1", 1),
            ("L", "png", "L", 1),
            ("L", "jpg", "L", 1),
            ("L", "bmp", "L", 1),
            ("L", "gif", "P", 3),
            ("LA", "png", "LA", 3),
            ("LA", "tif", "LA", 3),
            ("P", "png", "P", 3),
            ("P", "bmp", "P", 3),
            ("P", "gif", "P", 3),
            ("PA", "tif", "PA", 3),
            ("RGB", "png", "RGB", 3),
            ("RGB", "ppm", "RGB", 3),
            ("RGBA", "png", "RGBA", 3),
            ("RGBA", "tif", "RGBA", 3),
            ("RGBX", "tif", "RGB", 3),
            ("CMYK", "jpg", "CMYK", 3),
            ("CMYK", "tif", "CMYK", 3),
            ("YCbCr", "jpg", "RGB", 3),
            pytest.param("YCbCr", "tif", "YCbCr", 3, marks=PILLOW_13),
            ("LAB", "tif", "LAB", 3),
        ],
    )
    def test_modes_of_8_bits(
        self, mode: str, suffix: str, read: str, channels: int, tmp_path: Path
    ) -> None:
        if mode == "LAB":
            profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
            image = ImageCms.profileToProfile(COLOURS, *profiles, outputMode="LAB")
            assert image is not None
        else:
            image = COLOURS.convert("P" if mode == "PA" else mode).convert(mode)
        root = one_image_a_class(tmp_path / "own", image, suffix)
        with Image.open(root / "train" / "only" / f"image.{suffix}") as again:
            assert again.mode == read
            expected = np.atleast_3d(np.asarray(again.convert("RGB" if channels == 3 else "L")))
        data = load(f"imagefolder:{root}", "")
        assert data.shape == (channels, 8, 10)
        assert np.array_equal(data.train_images[0], expected.transpose(2, 0, 1))

    @pytest.mark.parametrize(
        ("mode", "suffix", "read"),
        [
            ("I;16", "png", "I;16"),
            ("I;16", "tif", "I;16"),
            ("I;16", "ppm", "I"),
            ("I;16B", "png", "I;16"),
            ("I;16B", "tif", "I;16B"),
        ],
    )
    def test_16_bits_are_scaled_to_8(
        self, mode: str, suffix: str, read: str, tmp_path: Path
    ) -> None:
        pixels = SIXTEEN_BITS.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        image = Image.frombytes(mode, SIXTEEN_BITS.shape, pixels)
        root = one_image_a_class(tmp_path / "own", image, suffix)
        with Image.open(root / "train" / "only" / f"image.{suffix}") as again:
            assert again.mode == read
        data = load(f"imagefolder:{root}", "")
        assert data.shape == (1, 7, 7)
        assert data.train_images[0, 0, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
        assert data.test_images[0, 0, 6].tolist() == [0, 0, 1, 1, 128, 254, 255]
        load.cache_clear()
        assert load(f"imagefolder:{root}", "", image_size=8).shape == (1, 8, 8)

    def test_12_bits_are_scaled_to_8(self, tmp_path: Path) -> None:
        root = one_image_a_class(tmp_path / "own", Image.new("L", (4, 1)), "tif")
        tiff_of_12_bits(root / "train" / "only" / "image.tif", [0, 15, 2048, 4095])
        assert load(f"imagefolder:{root}", "").train_images[0, 0, 0].tolist() == [0, 0, 128, 255]

    @pytest.mark.parametrize(("mode", "suffix"), [("I", "tif"), ("F", "tif"), ("F", "ppm")])
    def test_pixels_without_a_range_are_refused(
        self, mode: str, suffix: str, tmp_path: Path
    ) -> None:
        root = one_image_a_class(tmp_path / "own", Image.new(mode, (8, 8), 1), suffix)
        said = (
            rf"train/only/image.{suffix}: .*no defined range \(mode {mode}\); save it with 8 or 16"
        )
        with pytest.raises(DataError, match=said):
            load(f"imagefolder:{root}", "")

    @pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_images_are_turned_as_exif_says(
        self, orientation: int, suffix: str, tmp_path: Path
    ) -> None:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options = {"lossless": True} if suffix == "webp" else {}
        root = one_image_a_class(tmp_path / "own", COLOURS, suffix, exif=exif, **options)
        upright = [
            np.asarray(COLOURS),
            *(np.asarray(COLOURS.transpose(t)) for t in TURNS),
        ][orientation - 1]
        data = load(f"imagefolder:{root}", "")
        assert np.array_equal(data.train_images[0], upright.transpose(2, 0, 1))

    def test_garbled_exif_is_overlooked(self, tmp_path: Path) -> None:
        root = one_image_a_class(tmp_path / "own", COLOURS, "png", exif=b"Exif\0\0garbled")
        data = load(f"imagefolder:{root}", "")
        assert np.array_equal(data.train_images[0], np.asarray(COLOURS).transpose(2, 0, 1))

    @pytest.mark.parametrize(
        "copy",
        [
            "train/.ipynb_checkpoints/0.png",
            "train/__MACOSX/cat/0.png",
            "test/.hidden/0.png",
            "train/cat/.0-checkpoint.png",
            "train/cat/._0.png",
            "train/cat/.ipynb_checkpoints/0-checkpoint.png",
            "train/cat/more/__MACOSX/0.png",
            "test/dog/__MACOSX/._0.png",
        ],
    )
    def test_hidden_files_and_folders_are_not_there(self, copy: str, tmp_path: Path) -> None:
        root = make_images(tmp_path / ".own")  # what lies above is the user's
        (root / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train" / "cat" / "0.png", root / copy)
        data = load(f"imagefolder:{root}", "")
        assert data.classes == ("cat", "dog")
        assert len(data.train_labels) == len(data.test_labels) == 8

    @pytest.mark.parametrize(
        ("link", "to", "said"),
        [
            ("train/cat/9.png", "nowhere.png", "train/cat/9.png cannot be read: No such file"),
            ("test/dog/9.png", "9.png", "test/dog/9.png cannot be read: Too many levels"),
            ("train/cow", "nowhere", "train/cow cannot be read: No such file"),
            ("train/cat/up", "..", "train/cat/up: is a link to a folder that contains it"),
            ("train/cat/self", ".", "train/cat/self: is a link to a folder that contains it"),
        ],
    )
    def test_links_that_lead_nowhere_are_named(
        self, link: str, to: str, said: str, tmp_path: Path
    ) -> None:
        root = make_images(tmp_path / "own")
        (root / link).symlink_to(to)
        if to == "..":
            said = "train/cat/up/cat: is a link to a folder that contains it"
        with pytest.raises(DataError, match=said):
            load(f"imagefolder:{root}", "")

    def test_only_a_links_target_is_to_be_repaired(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = make_images(tmp_path / "own")

        def torn(path: Path) -> None:
            raise OSError("the tape is torn")

        monkeypatch.setattr(datasets, "files_below", torn)
        (tmp_path / "MNIST").mkdir()
        with pytest.raises(DataError, match=f"mnist: {tmp_path} cannot be read: the tape is torn$"):
            load("mnist", str(tmp_path))
        (root / "train" / "cow").symlink_to("nowhere")
        with pytest.raises(DataError, match=r"cow cannot be read: .*; it is a link: repair its"):
            load(f"imagefolder:{root}", "")

    def test_links_to_other_folders_hold(self, tmp_path: Path) -> None:
        root, other = make_images(tmp_path / "own"), make_images(tmp_path / "other")
        (root / "train" / "cow").symlink_to(other / "train" / "cat")
        (root / "train" / "cat" / "more").symlink_to(other / "train" / "cat")
        (root / "train" / "cat" / "notes.txt").symlink_to("nowhere")
        data = load(f"imagefolder:{root}", "")
        assert np.bincount(data.train_labels).tolist() == [8, 4, 4]

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("9.ppm", b"P6 1x1 255 ", "cannot be read as an image: .*; mend it, or remove it"),
            ("9.ppm", b"P6\n4 4\n99999999\n" + bytes(48), "cannot be read as an image"),
            ("9.ppm", b"P6\n0 0\n255\n", "cannot be read as an image"),
            ("9.png", b"", "cannot be read as an image"),
            ("9.bmp", b"BM" + b"\xff" * 60, "cannot be read as an image"),
            ("9.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40, "cannot be read as an image"),
        ],
        ids=["header", "maxval", "no pixels", "empty", "bmp", "tiff"],
    )
    def test_damaged_images_are_named(
        self, name: str, content: bytes, said: str, tmp_path: Path
    ) -> None:
        root = make_images(tmp_path / "own")
        (root / "test" / "dog" / name).write_bytes(content)
        with pytest.raises(DataError, match=f"test/dog/{name}: {said}"):
            load(f"imagefolder:{root}", "")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            (
                "train/cat/9.HEIC",
                "train/cat/9.HEIC: images of this kind cannot be read: save it",
            ),
            ("train/cow/0.xcf", r"the folder .*train/cow has no image, only 0.xcf .*\.png.* add"),
        ],
    )
    def test_images_that_would_be_missing_are_named(
        self, name: str, said: str, tmp_path: Path
    ) -> None:
        root = make_images(tmp_path / "own")
        (root / "train" / "none").mkdir()
        assert load(f"imagefolder:{root}", "").classes == ("cat", "dog")
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"")
        load.cache_clear()
        with pytest.raises(DataError, match=said):
            load(f"imagefolder:{root}", "")

    def test_images_by_any_suffix_of_their_kind(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        (root / "train" / "cat" / "0.png").unlink()
        kinds = ["jpeg", "jpe", "jfif", "jp2", "pgm", "tga", "tiff"]
        for kind in kinds:
            Image.new("RGB", (32, 32)).save(root / "train" / "cat" / f"9.{kind}")
        data = load(f"imagefolder:{root}", "")
        assert np.bincount(data.train_labels).tolist() == [3 + len(kinds), 4]

    @pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "webp", "ppm", "tif"])
    def test_cut_images_are_named(self, kind: str, tmp_path: Path) -> None:
        root = one_image_a_class(tmp_path / "own", COLOURS, kind)
        file = root / "train" / "only" / f"image.{kind}"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DataError, match=f"image.{kind}: cannot be read as an image"):
            load(f"imagefolder:{root}", "")

    def test_a_class_of_one_image_is_named(self, tmp_path: Path) -> None:
        for name, count in (("cat", 2), ("dog", 1)):
            (tmp_path / name).mkdir()
            for i in range(count):
                Image.new("L", (4, 4)).save(tmp_path / name / f"{i}.png")
        with pytest.raises(DataError, match="class dog has only one example"):
            load(f"imagefolder:{tmp_path}", "")

    @pytest.mark.parametrize("side", [10_000, 14_000])  # where Pillow warns, and where it refuses
    def test_images_too_large_are_named(self, side: int, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        Image.new("1", (side, side)).save(root / "train" / "dog" / "9.png")
        with pytest.raises(DataError, match=r"dog/9.png: has more than 89,478,485 pixels: make it"):
            load(f"imagefolder:{root}", "", image_size=32)

    @pytest.mark.parametrize(
        "file", ["about.json", "stamps.json", "train_images.npy", "test_labels.npy"]
    )
    @pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbled", "a folder"])
    def test_a_damaged_cache_is_made_anew(self, file: str, damage: str, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        first = load(f"imagefolder:{root}", "")
        (cache,) = (tmp_path / "cache" / "pfedgpa").iterdir()
        damaged, whole = cache / file, (cache / file).read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        left = {"empty": b"", "cut": whole[:-1], "garbled": flipped}
        damaged.unlink()
        time.sleep(0.02)  # clocks of file systems tick a hundred times a second
        if damage == "a folder":
            damaged.mkdir()
        elif damage != "missing":
            damaged.write_bytes(left[damage])
        load.cache_clear()
        data = load(f"imagefolder:{root}", "")
        assert data.classes == first.classes
        for name in datasets.ARRAYS:
            assert np.array_equal(getattr(data, name), getattr(first, name))
        assert isinstance(data.train_images, np.memmap)
        assert file == "stamps.json" or (cache / file).read_bytes() == whole
        assert list((tmp_path / "cache" / "pfedgpa").iterdir()) == [cache]

    def test_a_file_in_the_caches_place_is_replaced(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        load(f"imagefolder:{root}", "")
        (cache,) = (tmp_path / "cache" / "pfedgpa").iterdir()
        shutil.rmtree(cache)
        cache.write_text("no folder")
        load.cache_clear()
        assert isinstance(load(f"imagefolder:{root}", "").train_images, np.memmap)

    def test_replacing_a_cache_leaves_its_readers_alone(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        load(f"imagefolder:{root}", "")
        load.cache_clear()
        reader = load(f"imagefolder:{root}", "")
        expected = reader.train_images.copy()
        (cache,) = (tmp_path / "cache" / "pfedgpa").iterdir()
        (cache / "about.json").write_text("garbled")
        load.cache_clear()
        load(f"imagefolder:{root}", "")
        assert np.array_equal(reader.train_images, expected)

    def test_a_cache_that_another_replaced_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # both found it damaged; the other's is in place when ours is ready
        root = make_images(tmp_path / "own")
        load(f"imagefolder:{root}", "")
        (cache,) = (tmp_path / "cache" / "pfedgpa").iterdir()
        rename = Path.rename

        def raced(self: Path, target: Path) -> Path:
            if target == cache:
                shutil.copytree(self, cache)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", raced)
        (cache / "about.json").write_text("garbled")
        load.cache_clear()
        assert load(f"imagefolder:{root}", "").classes == ("cat", "dog")
        assert list((tmp_path / "cache" / "pfedgpa").iterdir()) == [cache]

    def test_relative_imagefolders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        here, below = tmp_path / "here", tmp_path / "data"
        make_images(below / "own")
        make_images(here / "mine" / "own", mode="L")
        monkeypatch.chdir(here)
        assert load("imagefolder:own", str(below)).shape == (3, 32, 32)
        assert load("imagefolder:mine/own", str(below)).shape == (1, 32, 32)
        (here / "own").mkdir()  # something else that has the name
        load.cache_clear()
        assert load("imagefolder:own", str(below)).shape == (3, 32, 32)
        monkeypatch.chdir(here / "mine")  # both have one: the current folder's
        assert load("imagefolder:own", str(below)).shape == (1, 32, 32)
        said = f"no folder {here}/mine/none nor {below}/none; images are expected"
        with pytest.raises(DataError, match=said):
            load("imagefolder:none", str(below))

    def test_relative_imagefolders_are_the_users_where_the_run_works(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_images(tmp_path / "here" / "own")
        monkeypatch.chdir(tmp_path / "here")
        sent: dict[str, Any] = {}

        def carry(app: Path, settings: dict[str, Any], *rest: object) -> str:
            sent.update(settings)
            return "that will do"

        monkeypatch.setattr(local, "run", carry)
        given = {"dataset": "imagefolder:own", "engine": "process", "method": "fedavg"}
        sizes = {"num-clients": 2, "train-per-client": 2, "test-per-client": 2}
        with pytest.raises(LaunchError, match="that will do"):
            launch(given | sizes)
        (tmp_path / "there" / "own").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "there")
        assert load_dataset(resolve(sent).config).classes == ("cat", "dog")
        assert sent["dataset"] == "imagefolder:own"  # as a resumed run compares it

    def test_imagefolder_refuses_what_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images in the folders of"):
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

    def test_a_folder_beside_train_and_test_is_said_to_be_left_out(self, tmp_path: Path) -> None:
        root = make_images(tmp_path / "own")
        (root / "val" / "cat").mkdir(parents=True)
        (root / ".hidden").mkdir()
        for _ in ("read", "kept"):
            data = load(f"imagefolder:{root}", "")
            assert data.train_images.shape == (8, 3, 32, 32)
            assert data.own_test
            [said] = remarks(data)
            assert "own: val/ is left out; validation-share" in said
            load.cache_clear()

    def test_grey_and_colour(self) -> None:
        """Of colours what Pillow has for them, of grey three alike; others stay as they are."""
        colour = np.array([[[[255, 0]], [[0, 255]], [[0, 0]]]], np.uint8)
        assert recoloured(colour, 1).tolist() == [[[[76, 150]]]]  # ITU-R 601: 0.299 and 0.587
        assert recoloured(colour[:, :1], 3).tolist() == [[[[255, 0]]] * 3]
        assert recoloured(colour, 3) is colour
        assert recoloured(colour, 4) is colour

    @pytest.mark.parametrize("name", ["fashion-mnist", "emnist-letters", "cifar10", "mnist"])
    def test_absent_data_say_what_to_do(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="download=true"):
            load(name, str(tmp_path))

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01\0\0\0\x09", b"\xff" * 99])
    def test_damaged_official_files_are_named(self, content: bytes, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (raw / f"{split}-{kind}-ubyte").write_bytes(content)
        with pytest.raises(DataError, match=f"its files in {tmp_path}/MNIST are damaged .*delete"):
            load("mnist", str(tmp_path))

    def test_a_cache_that_cannot_be_written_is_done_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        data = load(f"imagefolder:{make_images(tmp_path / 'own')}", "")
        assert data.train_images.shape == (8, 3, 32, 32)
        assert "cannot be cached there" in caplog.text

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
        # upright, as a photo is that a user would predict: a one is high, not wide
        ones = data.train_images[data.train_labels == data.classes.index("1")]
        ink = ones.mean(axis=(0, 1))
        assert (ink.sum(axis=1) > ink.sum(axis=1).max() / 4).sum() > 1.5 * (
            ink.sum(axis=0) > ink.sum(axis=0).max() / 4
        ).sum()


def test_a_data_set_of_no_name_is_refused() -> None:
    """As a node may name one."""
    with pytest.raises(DataError, match=r"dataset cifar11: .* did you mean cifar10\?"):
        load("cifar11", "")


def test_tokens_of_a_file_are_whole_numbers(tmp_path: Path) -> None:
    schema = Schema("words", ("a", "b"), (3,), tokens=True)
    file = tmp_path / "words.csv"
    file.write_text("1,2,3\n4,5,6.0\n")
    assert examples([file], schema, resize=False)[1].tolist() == [[1, 2, 3], [4, 5, 6]]
    file.write_text("1,2,3\n4,1.7,6\n")
    with pytest.raises(DataError, match=r"words.csv: has 1.7, but the network takes whole numbers"):
        examples([file], schema, resize=False)


def test_cifar10_as_images(cifar10_folder: Path) -> None:
    """Its 60,000 images are decoded once a machine, not once a test."""
    # the labels of both splits are balanced, and the cache is a map, not a copy
    data = load("imagefolder:cifar10", str(cifar10_folder))
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert isinstance(data.train_images, np.memmap)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
