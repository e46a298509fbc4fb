"""Door 2: the Flower ClientApp. It loads the node's data and calls the method's client half."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pfedgpa_app import training
from pfedgpa_app.config import Config, resolve_cached
from pfedgpa_app.data.client import ClientData, load_client, load_dataset
from pfedgpa_app.methods import method_class
from pfedgpa_app.methods.base import ClientTask
from pfedgpa_app.models import Weights, build, network_name
from pfedgpa_app.randomness import torch_generator

app = ClientApp()

Metrics = dict[str, int | float | list[int] | list[float]]


class Visit:
    """One message to one client: what both handlers need of it."""

    def __init__(self, message: Message, context: Context) -> None:
        torch.set_num_threads(1)  # clients share the cores; more threads only contend
        self.message, self.context = message, context
        self.config: Config = resolve_cached(context.run_config).config
        asked: Any = message.content.config_records["config"]
        self.asked = asked
        self.client, self.round = int(asked["client"]), int(asked["round"])
        self.method = method_class(str(asked["method"]))
        self.weights: Weights = dict(message.content.array_records["arrays"].to_torch_state_dict())
        self._state_key = f"{asked['method']}.{self.client}"
        kept = context.state.array_records.get(self._state_key)
        self.state: Weights = dict(kept.to_torch_state_dict()) if kept else {}

    def data(self) -> ClientData:
        return load_client(self.config, self.client)

    def model(self) -> torch.nn.Module:
        dataset = load_dataset(self.config)
        network = network_name(self.config.model, dataset.shape)
        model = build(network, len(dataset.classes), self.config.seed)
        device = training.device_for(self.config.device)
        return model.to(device).to(memory_format=torch.channels_last)

    def evaluated_model(self) -> torch.nn.Module:
        model = self.model()
        if weights := self.method.evaluated(self.weights, self.state):
            model.load_state_dict(weights)
        return model

    def recipe(self, epochs: int, learning_rate: float) -> training.Recipe:
        c = self.config
        return training.Recipe(
            epochs, learning_rate, c.batch_size, c.momentum, c.weight_decay, c.augment
        )

    def generator(self, *purpose: str | int) -> torch.Generator:
        return torch_generator(self.config.seed, *purpose, self.round, self.client)

    def keep_state(self) -> None:
        if self.state:
            self.context.state[self._state_key] = ArrayRecord(self.state)

    def reply(self, metrics: Metrics, weights: Weights | None = None) -> Message:
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if weights is not None:
            content["arrays"] = ArrayRecord(weights)
        return Message(content, reply_to=self.message)


@app.query()
def who(message: Message, context: Context) -> Message:
    """Tell the server which partition this node is."""
    partition = int(context.node_config.get("partition-id", -1))
    return Message(
        RecordDict({"node": MetricRecord({"partition-id": partition})}), reply_to=message
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of the method's client half."""
    visit = Visit(message, context)
    task = ClientTask(
        visit.weights,
        visit.model(),
        visit.data(),
        visit.recipe(visit.config.local_epochs, visit.config.learning_rate),
        visit.generator("train"),
        visit.state,
    )
    weights, loss = visit.method.train(task)
    visit.keep_state()
    return visit.reply({"num-examples": len(task.data.train), "loss": loss}, weights)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count this client's correct predictions on its test images."""
    visit = Visit(message, context)
    score = training.evaluate(visit.evaluated_model(), visit.data().test)
    return visit.reply({"correct": score.correct, "loss": score.loss, "images": score.images})


@app.evaluate("final")
def evaluate_final(message: Message, context: Context) -> Message:
    """Evaluate before fine-tuning and after each way of it; the fine-tuned copies are dropped."""
    visit = Visit(message, context)
    data = visit.data()
    ways = list(zip(visit.asked["epochs"], visit.asked["learning-rates"], strict=True))
    test: dict[tuple[int, float], int] = {}
    validation: dict[tuple[int, float], int] = {}

    def score(way: tuple[int, float], model: torch.nn.Module) -> None:
        test[way] = training.evaluate(model, data.test).correct
        validation[way] = training.evaluate(model, data.validation).correct

    before = (0, 0.0)
    score(before, visit.evaluated_model())
    for rate in dict.fromkeys(rate for _, rate in ways):
        model = visit.evaluated_model()
        generator = visit.generator("fine-tune")
        for epoch in range(max(epochs for epochs, r in ways if r == rate) + 1):
            if epoch:
                training.train(model, data.train, visit.recipe(1, rate), generator)
            if (epoch, rate) in ways:
                score((epoch, rate), model)
    order = [before, *ways]
    return visit.reply(
        {
            "test": [test[way] for way in order],
            "test-images": len(data.test),
            "validation": [validation[way] for way in order],
            "validation-images": len(data.validation),
        }
    )
