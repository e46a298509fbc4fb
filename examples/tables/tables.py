"""Made-up tables of twelve users each, who differ in one way; for tables.yaml."""

import numpy as np
from sklearn.datasets import make_classification
from sklearn.preprocessing import StandardScaler

USERS, ROWS, FEATURES, CLASSES = 12, 6000, 20, 4


def alike():
    """Users do not differ."""
    return _table(_anyone(np.random.default_rng(0)))


def uneven():
    """Users differ in how many rows they have: 30 to 1,941."""
    shares = 0.68 ** np.arange(USERS)
    return _table(np.random.default_rng(1).choice(USERS, ROWS, p=shares / shares.sum()))


def skewed():
    """Users differ in how frequent classes are: Dirichlet(0.3)."""
    rng = np.random.default_rng(2)
    labels = _table(np.zeros(ROWS))["y"]
    owners = np.empty(ROWS, dtype=int)
    for label in range(CLASSES):
        of = labels == label
        owners[of] = rng.choice(USERS, of.sum(), p=rng.dirichlet([0.3] * USERS))
    return _table(owners)


def turned():
    """Users are of three kinds, each of which measures the same things in its own way."""
    rng = np.random.default_rng(3)
    table = _table(_anyone(rng))
    for kind in range(3):
        turn, _ = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))
        mine = table["users"] % 3 == kind
        table["x"][mine] = table["x"][mine] @ turn
    return table


def renamed():
    """Users are of two kinds, who mean different things by the same label."""
    table = _table(_anyone(np.random.default_rng(4)))
    table["y"] = (table["y"] + table["users"] % 2) % CLASSES
    return table


def _anyone(rng):
    return rng.integers(USERS, size=ROWS)


def _table(owners):
    """The same rows, whoever owns them."""
    x, y = make_classification(
        ROWS, FEATURES, n_informative=12, n_classes=CLASSES, n_clusters_per_class=2, random_state=0
    )
    return {"x": StandardScaler().fit_transform(x), "y": y, "users": owners}
