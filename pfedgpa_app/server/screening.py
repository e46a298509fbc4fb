"""All checks of a client's reply; each says what is wrong with it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.common.constant import ErrorCode

from pfedgpa_app.core.sections import FederationSettings
from pfedgpa_app.core.settings import listed
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import (
    NOT_FINITE,
    Layout,
    Weights,
    all_finite,
    finite,
    finite_elsewhere,
)
from pfedgpa_app.messages import bytes_of
from pfedgpa_app.methods.contract import MethodError
from pfedgpa_app.models.faults import NetworkError
from pfedgpa_app.training.evaluation import TEMPERATURES

_WHAT: dict[int, str] = {  # Flower's error codes in words, for the log
    ErrorCode.MESSAGE_UNAVAILABLE: "did not answer in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "did not answer in time",
    ErrorCode.MOD_FAILED_PRECONDITION: "uploads what its privacy mod does not accept",
    ErrorCode.NODE_UNAVAILABLE: "is no longer connected",
    ErrorCode.CLIENT_APP_CRASHED: "lost its process",
}
_LAST_WORDS = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception)\b.*)", re.MULTILINE)  # of a traceback
MOST_EXAMPLES = 2**53  # the most that a client may claim; float64 counts no further
_HEADER = 4096  # bytes; NumPy's format needs some 128
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = "Traceback (most recent call last):\n"
_BY_OWN_CODE: dict[str, type[MethodError | NetworkError]] = {
    "failed: method ": MethodError,
    "failed: network ": NetworkError,
}
_TOO_LARGE = " times as large as usual"
_RAISED = re.compile(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", re.DOTALL)  # as Flower reports errors


class NoUploadsError(RuntimeError):
    """Too few uploads of a round, or no final evaluation, can be used: the run cannot go on."""


class ClientError(Exception):
    """An error at a client, shown as the client's reply has it, with a simulation's traceback."""

    def __str__(self) -> str:
        return f"at a client\n{self.args[0]}"


def failure(reply: Message) -> str:
    """Return why a client failed, by its error reply, in one short text."""
    code, said = reply.error.code, cause(reply)
    if said.startswith(tuple(f"{kind.__name__}: " for kind in _BY_OWN_CODE.values())):
        return f"failed: {said.partition(': ')[2]}"[:600]
    return f"{_WHAT.get(code, 'failed')} (code {code}): {said[-300:]}"


def cause(reply: Message) -> str:
    """Return what went wrong at the client, by its error reply."""
    reason = _ANSI.sub("", reply.error.reason or "no reason given").strip()
    # the last of errors that caused one another
    said = _LAST_WORDS.findall(reason.rpartition(_TRACEBACK)[2])
    return said[-1] if said else _RAISED.sub(r"\1: \2", reason.partition(_TRACEBACK)[0].strip())


def own_fault(reasons: Collection[str]) -> MethodError | NetworkError | None:
    """Return the error of a method's own code, or of the network, if that alone failed clients."""
    for begins, kind in _BY_OWN_CODE.items():
        if reasons and all(reason.startswith(begins) for reason in reasons):
            return kind(next(iter(reasons)).removeprefix("failed: "))
    return None


def first_error(answers: Mapping[int, Message]) -> ClientError | None:
    """Return the first error among clients' replies, which --debug shows."""
    reasons = (reply.error.reason for reply in answers.values() if reply.has_error())
    return next((ClientError(reason) for reason in reasons), None)


def in_words(rejected: Mapping[int, str], most: int = 3) -> str:
    """Say why clients have no usable upload, the first ``most`` reasons, each once."""
    clients: dict[str, list[str]] = {}
    for client, reason in rejected.items():
        clients.setdefault(reason, []).append(str(client))
    return "; ".join(
        f"client {who[0]} {reason}" if len(who) == 1 else f"clients {listed(who)}: {reason}"
        for reason, who in list(clients.items())[:most]
    )


def remedy(reasons: Collection[str], settings: Collection[str], is_noised: bool = False) -> str:
    """Say what to do about a round that failed for these ``reasons``; "" if that is unknown.

    Args:
        settings: those by which its clients' training diverges if they are too large.
        is_noised: whether uploads have noise for differential privacy.
    """
    if not reasons or not all(reason.endswith((NOT_FINITE, _TOO_LARGE)) for reason in reasons):
        return ""
    finite = any(reason.endswith(_TOO_LARGE) for reason in reasons)
    if is_noised:
        what = "it is far larger than the weights" if finite else "training has diverged under it"
        return (
            f": that is the noise for privacy; {what}: raise local-dp-epsilon, or lower "
            "local-dp-clip, to which it is proportional"
            + ("; max-upload-norm=0 refuses no upload for its size" if finite else "")
        )
    if finite:
        return ""
    return (
        f": their training has diverged: lower {' or '.join(settings)}, or scale the network's "
        "inputs (a table's columns to about -1 to 1)"
    )


def checked(arrays: ArrayRecord, expected: Weights) -> tuple[Weights | None, str]:
    """Return a client's arrays in the order of ``expected``, or None and what is wrong with them.

    Args:
        expected: tensors of the names, shapes and dtypes that they must have; they must be finite
            where these are.
    """
    missing, extra = sorted(expected.keys() - arrays), sorted(arrays.keys() - expected)
    if missing or extra:
        return None, f"sent tensors with missing names {missing[:9]} and extra names {extra[:9]}"
    for name, like in expected.items():  # before anything is unpacked
        size = bytes_of(arrays[name])
        if size > 8 * like.nbytes + _HEADER:  # a wrong dtype or shape is named as such below
            return None, f"sent {name} in {size} bytes, where {like.nbytes} are enough"
    try:
        weights: Weights = dict(arrays.to_torch_state_dict())
    except Exception as error:  # whatever malformed bytes make NumPy raise
        return None, f"sent arrays that cannot be read: {error}"
    for name, like in expected.items():
        tensor = weights[name]
        if tensor.shape != like.shape:
            return None, f"sent {name} of shape {list(tensor.shape)}, not {list(like.shape)}"
        if tensor.dtype != like.dtype:
            return None, f"sent {name} as {tensor.dtype}, not {like.dtype}"
        if not all_finite(tensor) and not finite_elsewhere(tensor, ~finite(like)):
            return None, f"sent {name} with {NOT_FINITE}"
    return {name: weights[name] for name in expected}, ""


def check_upload(
    reply: Message, expected: Weights, server_round: int, classes: int = 0
) -> tuple[Upload | None, str]:
    """Return the reply's upload, or None and what is wrong with it.

    Args:
        expected: tensors of the names, shapes and dtypes that an upload must have.
        server_round: the round that it must be of.
        classes: how many class counts a client that shares them must send.
    """
    if reply.has_error():
        return None, failure(reply)
    records = reply.content.array_records
    metrics: Any = reply.content.metric_records.get("metrics", {})
    if list(records) != ["arrays"]:
        return None, f"sent array records {sorted(records)} instead of ['arrays']"
    examples = metrics.get("num-examples")
    if not isinstance(examples, int) or not 1 <= examples <= MOST_EXAMPLES:
        return None, f"sent num-examples {examples!r} instead of a whole number from 1 to 2^53"
    if metrics.get("round") != server_round:
        return None, f"sent an upload of round {metrics.get('round')}"
    weights, wrong = checked(records["arrays"], expected)
    if weights is None:
        return None, wrong
    labels = metrics.get("label-counts", [])
    if not isinstance(labels, list) or any(not isinstance(n, int) or n < 0 for n in labels):
        return None, f"sent label-counts {labels!r} instead of whole numbers"
    if labels and (len(labels) != classes or not sum(labels)):
        return None, f"sent label-counts {labels!r} instead of counts of {classes} classes"
    losses = metrics.get("validation-losses", [])
    each = len(TEMPERATURES)
    if not isinstance(losses, list) or len(losses) not in (0, each, 2 * each):
        return None, f"sent validation-losses {losses!r} instead of {each} or {2 * each}"[:300]
    if any(not isinstance(n, (int, float)) or not 0 <= n < math.inf for n in losses):
        return None, f"sent validation-losses {losses!r} instead of finite losses"[:300]
    loss = metrics.get("loss", math.nan)
    if not isinstance(loss, (int, float)):
        return None, f"sent the loss {loss!r} instead of a number"[:300]
    rows = [losses[start : start + each] for start in range(0, len(losses), each)]
    return Upload(weights, examples, labels, rows, float(loss)), ""


def check_counts(counts: Mapping[str, Any], fine_tunings: int | None = None) -> str:
    """Return what is wrong with a client's evaluation; "" if nothing is.

    Args:
        fine_tunings: how many the final evaluation is to compare; None: it is a round's.
    """
    tested, validated = counts.get("test-images"), counts.get("validation-images")
    if fine_tunings is None:
        good = (
            _are_counts([counts.get("correct")], counts.get("images"), 1)
            and counts["images"] > 0
            and isinstance(counts.get("loss"), (int, float))
        )
    else:
        good = (
            _are_counts(counts.get("test"), tested, 1 + fine_tunings)
            and _are_counts(counts.get("validation"), validated, 1 + fine_tunings)
            and counts["test-images"] > 0
            and _are_counts([counts.get("agreement", 0)], tested, 1)
        )
    return "" if good else f"sent an impossible evaluation: {dict(counts)!r}"[:300]


def _are_counts(correct: Any, images: Any, many: int) -> bool:
    """Whether ``correct`` has ``many`` counts, each from 0 to ``images``."""
    if not isinstance(images, int) or not isinstance(correct, list) or len(correct) != many:
        return False
    return all(isinstance(n, int) and 0 <= n <= images for n in correct)


def norm(weights: Weights) -> float:
    """Return the norm of all tensors as one vector; numbers that are not finite count as 0."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float64)) for t in weights.values()]
    size = math.hypot(*(float(torch.linalg.vector_norm(t)) for t in wide))
    if math.isfinite(size):
        return size
    return math.hypot(*(float(t.abs().nan_to_num(posinf=0).norm()) for t in wide))


def _trained(weights: Weights, beside: tuple[str, ...]) -> Weights:
    """Return ``weights`` without the tensors whose names begin with one of ``beside``."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(beside)}


def too_large(
    uploads: dict[int, Upload], expected: Weights, limit: float, beside: tuple[str, ...] = ()
) -> dict[int, str]:
    """Return, by client, why uploads over ``limit`` times as large as the median are refused.

    With fewer than three uploads one could move the median, so ``expected`` is the measure. Tensors
    whose names begin with one of ``beside`` do not count.
    """
    norms = {client: norm(_trained(upload.weights, beside)) for client, upload in uploads.items()}
    usual = (
        statistics.median(norms.values()) if len(norms) > 2 else norm(_trained(expected, beside))
    )
    if not limit or not usual:
        return {}
    return {
        client: f"sent weights {size / usual:.3g}{_TOO_LARGE}"
        for client, size in norms.items()
        if size > limit * usual
    }


def too_far(
    uploads: dict[int, Upload], limit: float, beside: tuple[str, ...] = ()
) -> dict[int, str]:
    """Return, by client, why uploads over ``limit`` times as far off as is usual are refused.

    Distances are from the median of each weight over the uploads, which a minority cannot move far;
    usual is the median distance. Fewer than three uploads are not compared. Tensors whose names
    begin with one of ``beside`` do not count.
    """
    trained = {client: _trained(upload.weights, beside) for client, upload in uploads.items()}
    weights = {client: own for client, own in trained.items() if own}
    if not limit or len(weights) < 3:
        return {}
    layout = Layout.of(next(iter(weights.values())))
    vectors = torch.stack([layout.flatten(own) for own in weights.values()])
    # by NumPy: torch's median of an even number is the lower one of the middle two
    middle = torch.from_numpy(np.median(vectors.numpy(), axis=0))
    distances = (vectors - middle).norm(dim=1).tolist()
    usual = statistics.median(distances)
    return {
        client: f"sent weights {distance / usual:.3g} times as far from the median as usual"
        for client, distance in zip(weights, distances, strict=True)
        if distance > limit * usual > 0
    }


def screened(
    sent: Iterable[int],
    answers: Mapping[int, Message],
    expected: Weights,
    server_round: int,
    classes: int,
    config: FederationSettings,
    beside: tuple[str, ...] = (),
) -> tuple[dict[int, Upload], dict[int, str]]:
    """Return the usable uploads of a round, and why the others are not usable, by client.

    Args:
        sent: clients that were asked.
        expected: tensors of the names, shapes and dtypes that an upload must have.
        classes: how many class counts a client that shares them must send.
        beside: beginnings of the names of tensors that do not count for an upload's size or
            distance.
    """
    uploads: dict[int, Upload] = {}
    rejected: dict[int, str] = {}
    for client in sent:
        if client not in answers:
            rejected[client] = f"did not answer within {config.timeout:g} s"
            continue
        upload, reason = check_upload(answers[client], expected, server_round, classes)
        if upload is None:
            rejected[client] = reason
        else:
            uploads[client] = upload
    rejected |= too_large(uploads, expected, config.max_upload_norm, beside)
    uploads = {c: upload for c, upload in uploads.items() if c not in rejected}
    rejected |= too_far(uploads, config.max_distance, beside)
    return {c: upload for c, upload in uploads.items() if c not in rejected}, rejected
