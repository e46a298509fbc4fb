"""Sort out which replies' metrics can be used, from any ClientApp."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from pfedgpa_app.server.screening import MOST_EXAMPLES, failure

logger = logging.getLogger("flwr")
Aggregate = Callable[[list[RecordDict], str], MetricRecord]


def screened(
    replies: Sequence[Message], asked: Mapping[str, int], counted_by: str, what: str
) -> tuple[dict[int, RecordDict], dict[int, str]]:
    """{node: its reply} for replies with usable metrics, {node: what is wrong} for the others.

    Args:
        asked: {id of the message to it: a node that was to reply}.
        counted_by: the metric with a node's number of examples.
        what: they were asked to do, for the log.
    """
    usable: dict[int, RecordDict] = {}
    unusable = dict.fromkeys(asked.values(), "did not answer")
    if replies:  # as FedAvg logs it
        failed = sum(reply.has_error() for reply in replies)
        said = "aggregate_%s: Received %s results and %s failures"
        logger.info(said, what, len(replies) - failed, failed)

    def node_of(reply: Message) -> int:
        """The SuperLink itself replies for a node that is gone."""
        about = reply.metadata
        return asked.get(about.reply_to_message_id, about.src_node_id)

    # by node id, which is random: the order must not depend on when replies came
    for reply in sorted(replies, key=node_of):
        node = node_of(reply)
        unusable.pop(node, None)
        wrong = failure(reply) if reply.has_error() else unusable_metrics(reply, counted_by)
        if wrong:
            unusable[node] = wrong
        else:
            usable[node] = reply.content
    return usable, unusable


def unusable_metrics(reply: Message, counted_by: str) -> str:
    """What is wrong with a reply's metrics; "" if nothing is."""
    metrics = list(reply.content.metric_records.values())
    if len(metrics) != 1:
        return f"sent {len(metrics)} metric records, not 1"
    examples: Any = metrics[0].get(counted_by)
    number = isinstance(examples, (int, float)) and not isinstance(examples, bool)
    if not number or not 0 < examples <= MOST_EXAMPLES:
        return f"sent {counted_by} {examples!r} instead of a number above 0 and at most 2^53"[:300]
    return ""


def mean_of(
    contents: Mapping[int, RecordDict], function: Aggregate, counted_by: str
) -> tuple[MetricRecord | None, dict[int, str]]:
    """Apply ``function`` to metrics of the most common form, the only one it may accept.

    Returns:
        the mean; {node: what is wrong} for nodes whose metrics have another form.
    """
    if not contents:
        return None, {}
    forms = {node: metrics_form(content) for node, content in contents.items()}
    [(commonest, _)] = Counter(forms.values()).most_common(1)
    others = [node for node, form in forms.items() if form != commonest]
    alike = [content for node, content in contents.items() if node not in others]
    wrong = dict.fromkeys(others, "sent metrics unlike those of most nodes: left out")
    return function(alike, counted_by), wrong


def metrics_form(content: RecordDict) -> tuple[str, frozenset[tuple[str, int | None]]]:
    """The name of a reply's one metric record, its keys and the lengths of its lists."""
    [(name, metrics)] = content.metric_records.items()
    lengths = {k: len(v) if isinstance(v, list) else None for k, v in metrics.items()}
    return name, frozenset(lengths.items())
