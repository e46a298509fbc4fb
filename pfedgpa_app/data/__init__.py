"""Images, how they are dealt to clients, and what one client holds."""

DATASET_HELP = (
    "digits, mnist, fashion-mnist, emnist-SPLIT (balanced, byclass, bymerge, digits, letters, "
    "mnist), cifar10, imagefolder:PATH with train/ and test/ by class (a relative PATH: below the "
    "current folder, else below data-dir), or nodes: each node's own, which its --node-config "
    "names as dataset"
)
NODES = "nodes"
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
