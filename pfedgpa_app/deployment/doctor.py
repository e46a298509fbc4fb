"""Check a node before a run: versions, data, keys, certificates, connection."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from packaging.requirements import Requirement

from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.sections import NODES, TrainingSettings
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.client import schema_of, with_classes
from pfedgpa_app.data.dataset import Dataset, remarks
from pfedgpa_app.data.datasets import load
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import weights_of

DISTRIBUTION = "pfedgpa-app"
_PATIENCE = 10.0  # seconds for a connection
_FREE = 2 * 2**30  # bytes that should be free on a disk
# {check: the one without which it is not made}
_NEEDS = {"network": "data", "connection": "certificate"}


class NodeError(Exception):
    """A check failed; the text says what to do."""


@dataclass(frozen=True)
class Node:
    """What to check; an empty field is not checked."""

    dataset: str = ""
    data_dir: str = ""
    image_size: int = 0
    classes: tuple[str, ...] = ()
    model: str = "auto"
    superlink: str = ""
    certificates: str = ""  # the authority's, which vouches for the SuperLink's
    key: str = ""
    state_dir: str = ""


def python() -> str:
    """Return the interpreter's version."""
    return ".".join(map(str, sys.version_info[:3]))


def packages() -> str:
    """Check all packages that the installed app requires, and that their versions are in range."""
    try:
        wanted = map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
    except importlib.metadata.PackageNotFoundError as error:
        raise NodeError(f"{DISTRIBUTION} is not installed: pip install the app") from error
    wrong, names = [], []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # it belongs to an extra
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        names.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        raise NodeError(f"{'; '.join(wrong)}: pip install the app again")
    return ", ".join(names[:3]) + f" and {len(names) - 3} more"


def _examples(node: Node) -> Dataset:
    if node.dataset == NODES:
        raise NodeError("dataset nodes: name this node's own data set")
    try:
        found = load(node.dataset, node.data_dir, image_size=node.image_size)
        return with_classes(found, node.classes)
    except (DataError, ValueError) as error:
        raise NodeError(str(error)) from error


def data(node: Node, found: Dataset) -> str:
    """Describe the node's examples."""
    text = "; ".join(remarks(found))
    return (
        f"{node.dataset}: {len(found.train_labels):,} training and {len(found.test_labels):,} test "
        f"{schema_of(found).examples()}{text and f'; but {text}'}"
    )


def network(node: Node, found: Dataset) -> str:
    """Check that the run's network takes the node's examples."""
    try:
        made = network_of(TrainingSettings(model=node.model), schema_of(found))
    except ValueError as error:
        raise NodeError(str(error)) from error
    return f"{node.model}: {sum(t.numel() for t in weights_of(made).values()):,} weights"


def certificate(node: Node) -> str:
    """Check the authority's certificate."""
    path = user_path(node.certificates)
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NodeError(f"{path}: is not a certificate: {error}") from error
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if left.total_seconds() < 0:
        raise NodeError(
            f"{path}: expired on {found.not_valid_after_utc:%Y-%m-%d}: run pfedgpa keys"
        )
    return f"{path}: valid for {left.days} days"


def key(node: Node) -> str:
    """Check the node's private key."""
    path = user_path(node.key)
    try:
        found = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise NodeError(f"{path}: is not a private key in OpenSSH's format: {error}") from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise NodeError(f"{path}: Flower takes only keys on NIST's curves: run pfedgpa keys")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise NodeError(f"{path}: others may read it: chmod 600 {path}")
    return f"{path}: {found.curve.name}"


def state_dir(node: Node) -> str:
    """Check the folder in which clients keep their state."""
    path = user_path(node.state_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise NodeError(f"{path}: cannot be written to: {error}") from error
    free = shutil.disk_usage(path).free
    if free < _FREE:
        raise NodeError(f"{path}: {free / 2**30:.1f} GiB left, less than {_FREE / 2**30:.0f}")
    return f"{path}: {free / 2**30:.0f} GiB left"


def connection(node: Node) -> str:
    """Check that the SuperLink answers, and that the authority vouches for it."""
    found = re.fullmatch(r"(?:\[(.+)\]|([^:]+)):(\d+)", node.superlink)
    if found is None:
        raise NodeError(f"{node.superlink!r}: must be HOST:PORT")
    host, port = found[1] or found[2], int(found[3])
    try:
        with socket.create_connection((host, port), _PATIENCE) as plain:
            if not node.certificates:
                return f"{node.superlink}: it listens, without encryption"
            context = ssl.create_default_context(cafile=user_path(node.certificates))
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return f"{node.superlink}: {secure.version()}, a certificate for {host}"
    except ssl.SSLCertVerificationError as error:
        raise NodeError(
            f"{node.superlink}: its certificate is not valid: {error.verify_message}; was it made "
            "for this host, by this authority?"
        ) from error
    except ssl.SSLError as error:
        raise NodeError(f"{node.superlink}: does not speak TLS: {error.reason}") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        raise NodeError(f"{node.superlink}: cannot be reached: {error}") from error


def examine(node: Node) -> Iterator[tuple[str, bool, str]]:
    """Yield (check, whether it passes, what was found or what to do), one check after the other."""
    checks: list[tuple[str, Callable[[], str]]] = [("python", python), ("packages", packages)]
    if node.dataset:
        found = cache(lambda: _examples(node))
        checks += [
            ("data", lambda: data(node, found())),
            ("network", lambda: network(node, found())),
        ]
    if node.state_dir:
        checks.append(("state-dir", lambda: state_dir(node)))
    if node.certificates:
        checks.append(("certificate", lambda: certificate(node)))
    if node.key:
        checks.append(("key", lambda: key(node)))
    if node.superlink:
        checks.append(("connection", lambda: connection(node)))
    failed = set[str]()
    for name, check in checks:
        if _NEEDS.get(name) in failed:
            continue
        try:
            yield name, True, check()
        except NodeError as trouble:
            failed.add(name)
            yield name, False, str(trouble)
