"""Images, how they are dealt to clients, and what one client holds."""

from pfedgpa_app.core.sections import NODES

EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
DATASETS = (
    "digits",
    "mnist",
    "fashion-mnist",
    *(f"emnist-{split}" for split in EMNIST_SPLITS),
    "cifar10",
)


def is_known_dataset(name: str) -> bool:
    """Whether ``name`` is one of ours, an ``imagefolder:PATH`` or ``nodes``."""
    return name in (*DATASETS, NODES) or (name.startswith("imagefolder:") and len(name) > 12)
