"""Door 2: the Flower ClientApp. It loads the node's data and calls the method's client half."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pfedgpa_app.client import Single, Visit, compare_ways, describe
from pfedgpa_app.privacy import private

app = ClientApp()


@app.query()
def who(message: Message, context: Context) -> Message:
    """Tell the server which partition this node is, and what data of its own it has."""
    return Message(describe(context), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of the method's client half."""
    return private(train_round, message, context)


def train_round(message: Message, context: Context) -> Message:
    """The round itself."""
    visit = Visit(message, context)
    task = visit.task()
    weights, loss = visit.method.train(task)
    return visit.trained(weights, loss)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count this client's correct predictions on its test images."""
    visit = Visit(message, context)
    client = Single(visit)
    client.load([visit.evaluated()])
    return visit.scored(client.evaluate("test")[0])


@app.evaluate("final")
def evaluate_final(message: Message, context: Context) -> Message:
    """Evaluate before fine-tuning and after each way of it."""
    visit = Visit(message, context)
    client = Single(visit)
    return compare_ways(client, [visit])[0]
