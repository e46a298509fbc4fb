"""Door 2: the Flower ClientApp. It loads the node's data and calls the method's client half."""

from __future__ import annotations

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pfedgpa_app.client.cohort import SequentialCohort, compare_fine_tunings
from pfedgpa_app.client.faults import network_named
from pfedgpa_app.client.privacy import with_local_dp
from pfedgpa_app.client.request import ClientRequest, describe

app = ClientApp()


@app.query()
def who(message: Message, context: Context) -> Message:
    """Tell the server which partition this node is, and what data of its own it has."""
    return Message(describe(message, context), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one round of the method's client half, with local differential privacy if it is set."""
    return with_local_dp(train_round, message, context)


def asked(message: Message, context: Context) -> ClientRequest:
    """Read what is asked of this client, and keep torch to one thread in this process."""
    torch.set_num_threads(1)  # clients share the cores; more threads only contend
    return ClientRequest(message, context)


def train_round(message: Message, context: Context) -> Message:
    """Do the round itself, without privacy."""
    request = asked(message, context)
    with request.seeded(), network_named(request):
        return request.trained(request.method.train(request.task()))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Count this client's correct predictions on its test images."""
    request = asked(message, context)
    with request.seeded(), network_named(request):
        client = SequentialCohort(request)
        client.load([request.evaluated()])
        return request.scored(client.evaluate("test")[0])


@app.evaluate("final")
def evaluate_final(message: Message, context: Context) -> Message:
    """Evaluate before fine-tuning and after each kind of it."""
    request = asked(message, context)
    with request.seeded(), network_named(request):
        return compare_fine_tunings(SequentialCohort(request), [request])[0]
