"""A ClientApp that knows nothing of personalisation."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


def _received(msg: Message, context: Context) -> tuple[Net, Any, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    node: Any = context.node_config
    run: Any = context.run_config
    return model, *load_data(node["partition-id"], node["num-partitions"], run["batch-size"])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    model, trainloader, _ = _received(msg, context)
    config: Any = msg.content.config_records["config"]
    epochs: Any = context.run_config["local-epochs"]
    loss = train_fn(model, trainloader, epochs, config["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(trainloader.dataset)})
    metrics["partition-id"] = context.node_config["partition-id"]
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model on local data."""
    model, _, testloader = _received(msg, context)
    loss, accuracy = test_fn(model, testloader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(testloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
