"""The data set class, what its owner should know of it, and a test split where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pfedgpa_app.core.schema import WHOLE_NUMBERS
from pfedgpa_app.core.settings import DataError, listed

SPLITS = ("train", "test")
_CHANNELS = (1, 2, 3, 4)  # grey and coloured, either with transparency
_DARKEST = 64  # images of which no pixel is as bright count as unscaled
_LARGEST = 20.0  # a feature with a larger root mean square counts as unscaled


def no_names() -> np.ndarray:
    """Return an empty array: the names of samples or users where there are none."""
    return np.empty(0, dtype=str)


@dataclass(frozen=True)
class Dataset:
    """Labelled examples, split into training and test examples.

    Examples are pixels [N, C, H, W] uint8, or numbers [N, …] float32 that networks take as they
    are, or tokens [N, …] int64; labels are int64 [N].

    Attributes:
        train_samples: each training example's name, by which a partition file refers to it.
        train_users: the user to whom each training example belongs, for the natural partition;
            empty if unknown.
        columns: a table's column names, as in ``Schema``.
        own_test: whether the source has a test split; if not, ``test-share`` of its examples became
            the test split.
        unused: the names of the source's other parts, which are left out.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    train_samples: np.ndarray = field(default_factory=no_names)
    test_samples: np.ndarray = field(default_factory=no_names)
    train_users: np.ndarray = field(default_factory=no_names)
    test_users: np.ndarray = field(default_factory=no_names)
    columns: tuple[str, ...] = ()
    own_test: bool = True
    unused: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example; (C, H, W) for an image."""
        return self.train_images.shape[1:]

    @property
    def tokens(self) -> bool:
        """Whether examples are whole numbers that a network looks up."""
        return self.train_images.dtype == np.int64

    @property
    def pixels(self) -> bool:
        """Whether examples are images with values from 0 to 255."""
        return self.train_images.dtype == np.uint8


def remarks(data: Dataset) -> Iterator[str]:
    """Yield what the owner of a data set should know about it, and what to do."""
    if data.unused:
        is_or_are = "is" if len(data.unused) == 1 else "are"
        yield (
            f"dataset {data.name}: {listed(data.unused)} {is_or_are} left out; validation-share "
            "takes validation examples from each client's training examples"
        )
    if data.pixels and (text := _dark(data)):
        yield text
    if data.tokens and len(data.shape) > 1:
        shape = f"an example is of shape {list(data.shape)}"
        yield f"dataset {data.name}: {shape} and holds whole numbers; {WHOLE_NUMBERS}"
    if data.tokens or data.pixels:
        return
    if len(data.shape) == 3 and channels_last(data.shape):
        yield (
            f"dataset {data.name}: an example is of shape {list(data.shape)}; if it is an image, "
            "its channels are last, but PyTorch's layers need them first: np.moveaxis(x, -1, 1)"
        )
    if text := _unscaled(data):
        yield text


def _dark(data: Dataset) -> str:
    """Say so if no pixel, in a thousand images from all over the data, is bright; else ""."""
    some = data.train_images[:: max(1, len(data.train_images) // 1000)]
    if (brightest := int(some.max())) >= _DARKEST:
        return ""
    return (
        f"dataset {data.name}: its brightest pixel is {brightest}, of 255: if values go to 16, or "
        "images of 16 bits use 12 of them, scale them to the full range"
    )


def channels_last(shape: Sequence[int]) -> bool:
    """Whether an image of ``shape`` seems to have its channels last, as images are stored.

    It has as many as a picture has, or is a square of more.
    """
    first, middle, last = shape
    return first not in _CHANNELS and (last in _CHANNELS or first == middle != last)


def _unscaled(data: Dataset) -> str:
    """Say which number of an example is too large for networks to learn from; "" if none is."""
    rows = data.train_images.reshape(len(data.train_images), -1)
    # einsum needs no float64 copy of all rows
    sizes = np.sqrt(np.einsum("nf,nf->f", rows, rows, dtype=np.float64) / len(rows))
    most = int(sizes.argmax())
    if sizes[most] <= _LARGEST:
        return ""
    which = f"column {data.columns[most]!r}" if data.columns else f"number {most} of an example"
    return (
        f"dataset {data.name}: {which} is about {sizes[most]:.2g} in size, but networks learn from "
        "numbers of about 1: scale it"
    )


def split_off_test(
    name: str,
    labels: np.ndarray,
    classes: Sequence[str],
    share: float,
    users: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the test examples: ``share`` of each class, or of each user where ``users`` are given.

    At least one and never all of a class's (or user's) examples become test examples; none do if
    ``share`` is 0. The draw is the same in every run, whatever its seed.

    Returns:
        the indices of the training examples, and those of the test examples.

    Raises:
        DataError: a class, or a user, has only one example, and ``share`` is not 0.
    """
    if not share:
        return np.arange(len(labels)), np.arange(0)
    rng, test = np.random.default_rng(0), []
    kinds, of = (labels, "class") if users is None or not len(users) else (users, "user")
    for kind in np.unique(kinds):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        if len(members) < 2:
            called = classes[int(kind)] if of == "class" else kind
            raise DataError(
                f"dataset {name}: {of} {called} has only one example, but needs one to train on "
                "and one to test on: add some, or leave it out"
            )
        test.append(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    tests = np.zeros(len(labels), dtype=bool)
    tests[np.concatenate(test)] = True
    return np.flatnonzero(~tests), np.flatnonzero(tests)


def least_classes(test_share: float) -> int:
    """Return how many classes a data set must have: 2, or 1 if ``test_share`` is 0.

    With 0 nothing is learned: all examples test a network that is already trained.
    """
    return 2 if test_share else 1
