"""Ask nodes who they are: whose partition each has, and what its data look like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import listed
from pfedgpa_app.server.screening import cause

Settings = dict[str, Any]  # the values that a ConfigRecord takes


class Answer(NamedTuple):
    """What a node answers: its partition and, where the run uses nodes' own data, their schema."""

    partition: int
    data: Any  # the schema as a dict, else None


class NodesError(RuntimeError):
    """The federation's nodes cannot serve the configured clients."""


def ask(
    grid: Grid,
    nodes: Iterable[int],
    settings: Settings,
    timeout: float,
    tell: Callable[[str, str], object],
) -> tuple[dict[int, Answer], str]:
    """Ask nodes who they are: {node: its answer}, and why the last failing one failed or ""."""
    questions = [
        Message(
            RecordDict({"config": ConfigRecord(settings)}),
            dst_node_id=node,
            message_type=MessageType.QUERY,
        )
        for node in nodes
    ]
    answers: dict[int, Answer] = {}
    failed = ""
    for reply in grid.send_and_receive(questions, timeout=timeout):
        node = reply.metadata.src_node_id
        partition = None if reply.has_error() else _partition_of(reply)
        if partition is None:
            why = cause(reply)[:300] if reply.has_error() else "does not say who it is"
            failed = f"node {node}: {why}"
            tell("warning", f"no client there: {failed}")
        else:
            answers[node] = Answer(partition, reply.content.config_records.get("data"))
    return answers, failed


def _partition_of(reply: Message) -> int | None:
    """The partition that a node says it has; None if it does not say so."""
    record: Any = reply.content.metric_records.get("node", {})
    partition = record.get("partition-id")
    return partition if isinstance(partition, int) else None


def wrong_number(
    wanted: int, nodes: int, answers: dict[int, Answer], failed: str, within: str
) -> NodesError:
    """Return the error where not as many nodes have data of their own as clients are ``wanted``."""
    if failed:
        why = f"; one without data: {failed}"
    elif len(answers) < nodes:
        why = f"; {nodes - len(answers)} did not answer {within}"
    elif nodes < wanted:
        why = ": start the others first"
    else:
        why = ": set it to that"
    there = in_words(sorted(answer.partition for answer in answers.values()))
    which = f" (partition-id {there})" if answers else ""
    return NodesError(
        f"num-clients is {wanted}, but the number of nodes with data is {len(answers)}{which}{why}"
    )


def node_at(answers: dict[int, Answer]) -> dict[int, int]:
    """Return {partition: its node}, in rising order; refuse a partition that two nodes have."""
    for partition, times in Counter(answer.partition for answer in answers.values()).items():
        if times > 1:
            raise NodesError(
                f"{times} nodes have partition-id={partition}: give each its own in --node-config"
            )
    return dict(sorted((answer.partition, node) for node, answer in answers.items()))


def schema_of(answers: Iterable[Answer]) -> Schema | None:
    """Return the schema of the nodes' own data; None if a node has none, as with shared data.

    Raises:
        NodesError: a schema cannot be read, or two differ.
    """
    first: tuple[int, Schema] | None = None
    for answer in answers:
        if answer.data is None:
            return None
        if why := mismatch(first, answer):
            raise NodesError(why)
        first = first or (answer.partition, Schema.of(NODES, answer.data))
    return first[1] if first else None


def mismatch(first: tuple[int, Schema] | None, answer: Answer) -> str:
    """Say why a node's data do not match those of the ``first`` partition; "" if they do."""
    partition, data = answer
    try:
        found = Schema.of(NODES, data)
    except (KeyError, TypeError, ValueError) as error:
        return (
            f"partition {partition} describes its data in another version's way: give all "
            f"nodes the same version ({type(error).__name__}: {error})"
        )
    if first is None or found == first[1]:
        return ""
    difference = _difference(first, (partition, found))
    return f"nodes' data do not match: {difference}: {_remedy(first[1], found)}"


def _difference(one: tuple[int, Schema], other: tuple[int, Schema]) -> str:
    """Say how the data of two partitions differ: in the order of columns, or altogether."""
    (first, ours), (second, theirs) = one, other
    if ours.classes == theirs.classes and sorted(ours.columns) == sorted(theirs.columns):
        for place, (here, there) in enumerate(zip(ours.columns, theirs.columns, strict=True), 1):
            if here != there:
                return (
                    f"the same columns are in another order: column {place} is {here!r} in "
                    f"partition {first} and {there!r} in partition {second}"
                )
    return f"partition {first} has {ours.examples()}, partition {second} has {theirs.examples()}"


def _remedy(one: Schema, other: Schema) -> str:
    """Say how to make the nodes' data alike."""
    if one.classes != other.classes:
        return (
            "give classes the same names; if a node has no example of some, name them all for "
            "the run, as in classes=cat,dog,owl"
        )
    if one.columns != other.columns:
        return "give all nodes the same columns in the same order"
    if one.pixels and other.pixels and one.shape[1:] == other.shape[1:]:
        return "some are grey and some in colour: convert those of one kind at their site"
    if one.pixels and other.pixels:
        return "give all nodes images of the same size and colours; image-size=64 resizes them"
    return "give all nodes examples of the same shape and kind"


def in_words(partitions: Iterable[int]) -> str:
    """Return partitions as text, as in "0, 1, 2"."""
    return listed([str(partition) for partition in partitions], most=20)
