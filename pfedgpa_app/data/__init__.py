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


def is_known_dataset(name: str) -> bool:
    """Whether ``name`` is one of our data sets, a prefix with a path, code, or ``nodes``."""
    kinds = (IMAGEFOLDER, NPZ, HUGGING_FACE)
    files = any(name.startswith(kind) and name != kind for kind in kinds)
    return name in (*DATASETS, NODES) or files or is_reference(name)
