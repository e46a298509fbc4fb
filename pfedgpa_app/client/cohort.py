"""Clients that are served at the same time, and their final evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from flwr.app import Message

from pfedgpa_app.client.request import ClientRequest
from pfedgpa_app.core.weights import Weights, last_layers
from pfedgpa_app.models.networks import load, weights_of
from pfedgpa_app.training import evaluation, sgd
from pfedgpa_app.training.evaluation import FineTuning


class Cohort(Protocol):
    """Clients that learn at the same time: one network each, and the images that each holds.

    Attributes:
        initial: the network's weights as the run's seed initialises them.
    """

    initial: Weights

    def load(self, weights: Sequence[Weights]) -> None:
        """Set every client's weights; those not given are as the run's seed initialises them."""

    def train(self, recipe: sgd.Recipe, generators: Sequence[torch.Generator]) -> Sequence[float]:
        """Do local SGD on the training images; return every client's mean loss."""

    def evaluate(self, part: str) -> Sequence[evaluation.Score]:
        """Return every client's score on its own images of ``part``, a field of ``ClientData``."""

    def predict(self, part: str) -> Sequence[torch.Tensor]:
        """Return the class that every client's network sees in each of its images of ``part``."""


class SequentialCohort:
    """A cohort of one client."""

    def __init__(self, request: ClientRequest) -> None:
        self._data, self._made = request.data(), request.model()
        self.initial, self.model = weights_of(self._made), self._made

    def load(self, weights: Sequence[Weights]) -> None:
        self.model = copy.deepcopy(self._made)  # training may change what is not shared, too
        load(self.model, self.initial | weights[0])

    def train(self, recipe: sgd.Recipe, generators: Sequence[torch.Generator]) -> Sequence[float]:
        return [sgd.train(self.model, self._data.train, recipe, generators[0])]

    def evaluate(self, part: str) -> Sequence[evaluation.Score]:
        return [evaluation.evaluate(self.model, getattr(self._data, part))]

    def predict(self, part: str) -> Sequence[torch.Tensor]:
        return [evaluation.predict(self.model, getattr(self._data, part))]


def compare_fine_tunings(cohort: Cohort, requests: Sequence[ClientRequest]) -> list[Message]:
    """Evaluate before fine-tuning and after each kind of it; the fine-tuned copies are dropped.

    Fine-tunings that differ only in their number of epochs share these: the second epoch goes on
    from the first, with momentum begun anew. What else is asked for changes nothing for any.
    """
    config, asked = requests[0].config, requests[0].fine_tunings
    names = list(cohort.initial)
    before = FineTuning(0, 0.0)
    test: dict[FineTuning, Sequence[evaluation.Score]] = {}
    validation: dict[FineTuning, Sequence[evaluation.Score]] = {}

    def score(each: FineTuning) -> None:
        test[each], validation[each] = cohort.evaluate("test"), cohort.evaluate("validation")

    weights = [request.evaluated() for request in requests]
    agreement = _agreement(cohort, weights, [request.reference for request in requests])
    cohort.load(weights)
    score(before)
    for kind in dict.fromkeys(replace(each, epochs=1) for each in asked):
        trainable = last_layers(names, 1) if kind.part == "head" else None
        epoch = sgd.recipe(config, 1, kind.learning_rate, trainable)
        if kind.full_batch:
            every = max(len(request.data().train) for request in requests)
            epoch = replace(epoch, batch_size=every, weight_decay=0.0, augment=False)
        cohort.load(weights)
        generators = [request.generator("fine-tune") for request in requests]
        wanted = {each.epochs for each in asked if replace(each, epochs=1) == kind}
        with requests[0].seeded():  # networks that draw are served one at a time
            for done in range(max(wanted) + 1):
                if done:
                    cohort.train(epoch, generators)
                if done in wanted:
                    score(replace(kind, epochs=done))
    order = [before, *asked]
    return [
        request.compared(
            weights[i],
            [test[each][i] for each in order],
            [validation[each][i] for each in order],
            agreement[i],
        )
        for i, request in enumerate(requests)
    ]


def _agreement(
    cohort: Cohort, weights: Sequence[Weights], references: Sequence[Weights | None]
) -> list[int | None]:
    """Count the test images on which each client's weights predict what its reference does.

    It is None for a client without a reference.
    """
    predicted = []
    if any(reference is not None for reference in references):
        pairs = zip(references, weights, strict=True)
        for each in ([mine if ref is None else ref for ref, mine in pairs], weights):
            cohort.load(each)
            predicted.append(cohort.predict("test"))
    return [
        None if reference is None else int((predicted[0][i] == predicted[1][i]).sum())
        for i, reference in enumerate(references)
    ]
