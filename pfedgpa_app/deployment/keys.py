"""Make a deployment's keys and certificates: for one authority, one server and each node."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pfedgpa_app.core.settings import ConfigError

CA, CA_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.crt", "server.key"
AUTHORITY = "pFedGPA federation"
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # by which the SuperLink's own processes reach it
_LABEL = "(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"(\*\.)?({_LABEL}\.)*(?!\d+$){_LABEL}")  # what ends in a number is an address
Key = ec.EllipticCurvePrivateKey


def _private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(content)


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> str:
    """Return a host's name or address as certificates hold it."""
    host = text.removesuffix(".")  # which in the DNS says that the name is complete
    if _is_address(host):
        return host
    if re.fullmatch(r".+:\d+", text):
        raise ConfigError(f"--host {text!r}: give the host without the port")
    try:
        host = host.encode("idna").decode()
    except UnicodeError as error:
        raise ConfigError(f"--host {text!r}: is not a host name") from error
    if not _NAME.fullmatch(host):
        raise ConfigError(f"--host {text!r}: is not a host name")
    return host


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _address(host: str) -> x509.GeneralName:
    if _is_address(host):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def make(folder: Path, hosts: Sequence[str], nodes: int, days: int = 365) -> list[Path]:
    """Make an authority, a certificate for the SuperLink, and SuperNodes' keys.

    Args:
        folder: where the files go.
        hosts: names and addresses by which nodes reach the SuperLink; loopback is added.
        nodes: how many SuperNodes there are: ``node-0``, ``node-0.pub``, ….
        days: how long the certificates are valid.

    Returns:
        the paths of the new files.

    Raises:
        ConfigError: one of the files exists already, as keys are not replaced unasked; or a host's
            name is not valid.
    """
    hosts = list(dict.fromkeys([*map(_host, hosts), *LOOPBACK]))
    names = [CA, CA_KEY, SERVER, SERVER_KEY]
    names += [f"node-{i}{end}" for i in range(nodes) for end in ("", ".pub")]
    paths = [folder / name for name in names]
    if there := [path for path in paths if path.exists()]:
        raise ConfigError(f"{there[0]} already exists: name another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)

    authority, server = _new_key(), _new_key()
    root, leaf = _certificates(authority, server, hosts, days)
    _private(folder / CA_KEY, _pem(authority))
    _private(folder / SERVER_KEY, _pem(server))
    (folder / CA).write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / SERVER).write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    for i in range(nodes):
        private, public = _ssh(_new_key())
        _private(folder / f"node-{i}", private)
        (folder / f"node-{i}.pub").write_bytes(public)
    return paths


def _new_key() -> Key:
    return ec.generate_private_key(ec.SECP384R1())  # Flower takes NIST's curves only


def _ssh(key: Key) -> tuple[bytes, bytes]:
    """Return a key and its public half in OpenSSH's format."""
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def _certificates(
    authority: Key, server: Key, hosts: Sequence[str], days: int
) -> tuple[x509.Certificate, x509.Certificate]:
    """Return the authority's certificate, and that of the server at ``hosts``."""
    identity = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    names = x509.SubjectAlternativeName([_address(host) for host in hosts])
    root = (
        _certificate(AUTHORITY, authority, days, is_authority=True)
        .add_extension(identity, critical=False)
        .sign(authority, hashes.SHA384())
    )
    leaf = (
        _certificate(hosts[0][:64], server, days, is_authority=False)  # X.509's limit of a name
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority, hashes.SHA384())
    )
    return root, leaf


def _certificate(
    subject: str, key: Key, days: int, *, is_authority: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    limits = x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(AUTHORITY))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(limits, critical=True)
        .add_extension(usage, critical=True)
    )
