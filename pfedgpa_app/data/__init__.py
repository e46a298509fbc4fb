"""Data sets, how they are dealt to clients, and what one client holds."""

from pfedgpa_app.core.own_code import is_reference
from pfedgpa_app.core.sections import NODES

EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
DATASETS = (
    *("digits", "mnist", "fashion-mnist", "kmnist"),
    *(f"emnist-{split}" for split in EMNIST_SPLITS),
    *("cifar10", "cifar100", "svhn"),
)
IMAGEFOLDER, NPZ, HUGGING_FACE = "imagefolder:", "npz:", "hf:"
_FILES = (IMAGEFOLDER, NPZ, HUGGING_FACE)


def is_known_dataset(name: str) -> bool:
    """Whether ``name`` is one of our data sets, a prefix with a path, code, or ``nodes``."""
    files = name.startswith(_FILES) and name not in _FILES
    return name in (*DATASETS, NODES) or files or is_own_code(name)


def is_own_code(name: str) -> bool:
    """Whether ``name`` is the import path of a user's own function, which loads the data."""
    return is_reference(name) and not name.startswith(_FILES)
