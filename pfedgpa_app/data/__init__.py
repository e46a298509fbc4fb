"""Images, how they are dealt to clients, and what one client holds."""

DATASET_HELP = (
    "digits, mnist, fashion-mnist, emnist-SPLIT (balanced, byclass, bymerge, digits, letters, "
    "mnist), cifar10, or imagefolder:PATH with train/ and test/ by class"
)
EMNIST_SPLITS = ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
DATASETS = (
    "digits",
    "mnist",
    "fashion-mnist",
    *(f"emnist-{split}" for split in EMNIST_SPLITS),
    "cifar10",
)


def is_known_dataset(name: str) -> bool:
    """Whether ``name`` is one of ours or an ``imagefolder:PATH``."""
    return name in DATASETS or (name.startswith("imagefolder:") and len(name) > 12)
