"""A hospital's side, which knows nothing of personalisation but for who it is."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tabular import task

app = ClientApp()


def _received(message: Message, context: Context) -> tuple[task.Net, Any]:
    net, node = task.Net(), context.node_config
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return net, task.load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the hospital's own records, at the rate that the server says."""
    net, (x, y, _, _) = _received(message, context)
    config: Any = message.content.config_records["config"]
    epochs: Any = context.run_config["local-epochs"]
    torch.manual_seed(config["server-round"])
    loss = task.train(net, x, y, epochs, config["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(x)})
    metrics["partition-id"] = context.node_config["partition-id"]
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test what the server sent on the hospital's own records."""
    net, (_, _, x, y) = _received(message, context)
    metrics = MetricRecord({"accuracy": task.test(net, x, y), "num-examples": len(x)})
    metrics["partition-id"] = context.node_config["partition-id"]
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
