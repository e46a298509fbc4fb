"""Which client holds which images.

A partition is dealt, natural, or given by a file (partition_file.py). To deal one, a matrix of
class counts is made, one row per client, and that many images are handed out: no image twice, as
long as there are enough. A client's training and test images are two draws from one class mix, so
that a client with few images may be tested on a class of which it has no training images, as it
could be in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.sections import DataSettings
from pfedgpa_app.core.warning import warn_once


@dataclass(frozen=True)
class ClientSplit:
    """The indices of one client's images.

    ``train`` and ``validation`` index the training split, ``test`` the test split. ``group`` is
    hidden from server and methods.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    group: int

    @property
    def held(self) -> np.ndarray:
        """Its indices in the training split, validation included."""
        return np.concatenate([self.train, self.validation])


def round_counts(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole counts that sum to ``total`` in proportion to ``shares``, by largest remainder.

    Args:
        shares: non-negative, [..., C]; each row is normalised here.
    """
    exact = shares / shares.sum(axis=-1, keepdims=True) * total
    exact = np.round(exact, 9)  # 2.9999999996 must count as 3
    counts = np.floor(exact).astype(int)
    missing = total - counts.sum(axis=-1, keepdims=True)
    order = np.argsort(-(exact - counts), axis=-1, kind="stable")
    place = np.argsort(order, axis=-1, kind="stable")
    rounded: np.ndarray = counts + (place < missing)
    return rounded


def draw_counts(share: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Draw whole counts that sum to ``total``, on average over draws in proportion to ``share``.

    Each is the exact count, rounded down or up; what rounding down leaves is dealt by systematic
    sampling in a random order, so that no class is favoured.

    Args:
        share: non-negative, [C]; normalised here.
    """
    exact = np.round(share / share.sum() * total, 9)  # 2.9999999996 must count as 3
    counts: np.ndarray = np.floor(exact).astype(int)
    order = rng.permutation(len(share))
    passed = np.floor(np.cumsum((exact - counts)[order]).round(6) + rng.random()).astype(int)
    passed[-1] = total - counts.sum()
    counts[order] += np.diff(passed, prepend=0)
    return counts


def dominant_groups(num_classes: int) -> list[list[int]]:
    """The dominant classes of each hidden group (the split of pFedGPA's family).

    10 classes: the five overlapping triples (0,1,2) (2,3,4) … (8,9,0) of FedPAC's code;
    62 (EMNIST by class): digits, upper case, lower case; 2: one each; otherwise five overlapping
    windows, or as many as there are classes.
    """
    if num_classes == 2:  # windows overlap, and would be alike
        return [[0], [1]]
    if num_classes == 62:
        return [list(range(10)), list(range(10, 36)), list(range(36, 62))]
    groups = min(5, num_classes)
    edges = [g * num_classes // groups for g in range(groups + 1)]
    return [
        sorted({c % num_classes for c in range(edges[g], edges[g + 1] + 1)}) for g in range(groups)
    ]


def class_shares(
    settings: DataSettings, num_classes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return each client's class mix, by the ``partition`` that the settings name.

    Returns:
        shares [clients, classes], each row summing to 1, and each client's hidden group
        (0 for all where the partition has none).
    """
    kind, num_clients = settings.partition, settings.num_clients
    groups = np.zeros(num_clients, dtype=int)
    if kind == "iid":
        return np.full((num_clients, num_classes), 1 / num_classes), groups
    if kind == "dirichlet":
        shares = rng.dirichlet(np.full(num_classes, settings.dirichlet_alpha), size=num_clients)
        return shares, groups
    if kind == "shards":
        shards = settings.shards_per_client
        slots = num_clients * shards
        classes = rng.permutation(np.arange(slots) % num_classes).reshape(num_clients, shards)
        shares = np.zeros((num_clients, num_classes))
        np.add.at(shares, (np.arange(num_clients)[:, None], classes), 1 / shards)
        return shares, groups
    if kind != "dominant":
        raise ValueError(f"no partition called {kind!r}")
    dominant, group_shares = dominant_groups(num_classes), settings.group_shares
    if group_shares and len(group_shares) != len(dominant):
        raise ValueError(f"{len(group_shares)} group shares, but there are {len(dominant)} groups")
    sizes = round_counts(np.array(group_shares or [1.0] * len(dominant)), num_clients)
    # clients join the groups in turn, as long as a group lacks members
    groups = np.array([g for turn in range(max(sizes)) for g, n in enumerate(sizes) if turn < n])
    uniform_share = settings.uniform_share
    shares = np.full((num_clients, num_classes), uniform_share / num_classes)
    for client, group in enumerate(groups):
        shares[client, dominant[group]] += (1 - uniform_share) / len(dominant[group])
    return shares, groups


def client_counts(
    shares: np.ndarray, labels: np.ndarray, size: int | None, split: str, seed: int
) -> np.ndarray:
    """Return how many images of each class each client gets, [clients, C].

    Args:
        shares: each client's mix, [clients, C].
        size: images per client. None: all images are dealt, none twice, those of a class in
            proportion to its column of ``shares``.
        split: "train" or "test".
    """

    def drawn(share: np.ndarray, total: int, row: int) -> np.ndarray:
        if not share.any():
            return np.zeros(len(share), dtype=int)
        return draw_counts(share, total, numpy_generator(seed, f"counts-{split}", row))

    if size is not None:
        return np.stack([drawn(share, size, client) for client, share in enumerate(shares)])
    there = np.bincount(labels, minlength=shares.shape[1])
    columns = [drawn(shares[:, c], total, c) for c, total in enumerate(there)]
    return np.stack(columns, axis=1)


def deal(
    labels: np.ndarray, counts: np.ndarray, classes: Sequence[str], split: str, seed: int
) -> list[np.ndarray]:
    """Hand out ``counts[i, c]`` images of class c to each client i.

    Each class is shuffled once and dealt in this order. No image is dealt twice before its class is
    used up; then the class is dealt again from its start, with a warning.

    Args:
        classes: their names, for messages.
        split: "train" or "test".

    Returns:
        one index array per client, sorted.

    Raises:
        ValueError: one client is to hold more images of a class than there are.
    """
    rng = numpy_generator(seed, f"deal-{split}")
    images = "training images" if split == "train" else "test images"
    dealt: list[list[np.ndarray]] = [[] for _ in counts]
    short: list[str] = []
    for c, name in enumerate(classes):
        pool = rng.permutation(np.flatnonzero(labels == c))
        wanted = counts[:, c]
        if wanted.sum() and not len(pool):
            raise ValueError(
                f"class {name!r} has no {images}, but clients should hold some: add some, or leave "
                "the class out"
            )
        if wanted.max(initial=0) > len(pool):
            raise ValueError(
                f"class {name!r}: one client should hold {wanted.max()} {images}, but there are "
                f"{len(pool)}: lower {split}-per-client"
            )
        if wanted.sum() > len(pool):
            short.append(f"{wanted.sum()} of {name!r} (there are {len(pool)})")
        start = 0
        for client, n in enumerate(wanted):
            dealt[client].append(pool[(start + np.arange(n)) % max(1, len(pool))])
            start += n
    if short:
        more = f"; and of {len(short) - 3} more classes" if len(short) > 3 else ""
        warn_once(
            f"some {images} are shared by clients, who should hold {'; '.join(short[:3])}{more}: "
            f"lower {split}-per-client or num-clients to avoid it"
        )
    return [np.sort(np.concatenate(parts)) for parts in dealt]


def partition(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    classes: Sequence[str],
    settings: DataSettings,
) -> list[ClientSplit]:
    """Deal a data set to clients; a client's validation images are of its training images.

    Args:
        classes: their names.

    Raises:
        ValueError: a class has too few images for one client, or a client would have none.
    """
    seed = settings.seed
    shares, groups = class_shares(settings, len(classes), numpy_generator(seed, "partition"))

    def dealt(labels: np.ndarray, size: int | None, split: str) -> list[np.ndarray]:
        counts = client_counts(shares, labels, size, split, seed)
        return deal(labels, counts, classes, split, seed)

    train = dealt(train_labels, settings.train_per_client, "train")
    test = dealt(test_labels, settings.test_per_client, "test")
    return with_validation(train, test, groups, settings)


def with_validation(
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    groups: Sequence[int] | np.ndarray,
    settings: DataSettings,
) -> list[ClientSplit]:
    """Make each client's split, keeping a random share of its training images for validation.

    Raises:
        ValueError: a client has no image to train on, or none to be tested on.
    """
    splits = []
    for client, mine in enumerate(train):
        held_out = round(len(mine) * settings.validation_share)
        for kind, count in (("train", len(mine) - held_out), ("be tested", len(test[client]))):
            if count < 1:
                how = "lower num-clients, or choose another partition"
                if kind == "train" and len(mine):
                    how = "lower validation-share"
                raise ValueError(f"client {client} would have no image to {kind} on: {how}")
        shuffled = numpy_generator(settings.seed, "validation", client).permutation(mine)
        splits.append(
            ClientSplit(
                train=np.sort(shuffled[held_out:]),
                validation=np.sort(shuffled[:held_out]),
                test=test[client],
                group=int(groups[client]),
            )
        )
    return splits


def users_in_turn(users: np.ndarray, num_clients: int) -> list[list[str]]:
    """Return the names of each client's users: all users, sorted by name, dealt out in turn."""
    names: list[str] = np.unique(users).tolist()
    return [names[client::num_clients] for client in range(num_clients)]


def by_users(users: np.ndarray, test_users: np.ndarray, num_clients: int) -> list[list[np.ndarray]]:
    """Make the natural partition: the indices of each client's training and of its test images.

    Users are clients, as ``users_in_turn`` deals them; if there are more, several share a client.
    Test images of users without training images are nobody's.

    Raises:
        ValueError: the images' users are unknown, or fewer than clients, or one whose client has
            no test image.
    """
    known = {"users_train": len(users), "users_test": len(test_users)}
    if lacks := [name for name in known if not known[name]]:
        some = [f"{name}, but not {lacks[0]}" for name in known if known[name]]
        raise ValueError(
            f"partition = natural: the data set names {some[0] if some else 'no users'}"
        )
    dealt = users_in_turn(users, num_clients)
    client_of = {name: client for client, names in enumerate(dealt) for name in names}
    if len(client_of) < num_clients:
        raise ValueError(
            f"partition = natural: the data set has {len(client_of)} users, fewer than num-clients "
            f"= {num_clients}: set num-clients={len(client_of)}, or less"
        )
    splits = []
    for those in (users, test_users):
        owner = np.array([client_of.get(user, -1) for user in those])
        splits.append([np.flatnonzero(owner == client) for client in range(num_clients)])
    for name, client in client_of.items():
        if not len(splits[1][client]):
            raise ValueError(
                f"partition = natural: user {name} has no test example: give it one, or leave the "
                "user out"
            )
    return splits
