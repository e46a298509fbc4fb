"""Clients that join after the last round."""

from __future__ import annotations

from typing import Any

from flwr.app import MessageType

from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods import name_of
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.halves import first_downloads, joined
from pfedgpa_app.server.screening import first_error, own_fault
from pfedgpa_app.server.strategy import Personalised


def join(
    strategy: Personalised, method: Personaliser[Any]
) -> tuple[list[dict[int, float]], dict[int, Weights]]:
    """Let the clients join that were held back, with weights that ``method`` makes.

    Returns:
        every client's accuracy in %, with the weights first sent and after each iteration, and
        what each was sent for the last of these evaluations.

    Raises:
        MethodError: the method's own code fails, at the server or at every client.
        NetworkError: the network fails at every client.
    """
    config, roster, initial = strategy.config, strategy.roster, strategy.initial
    rounds, last = config.num_server_rounds, config.num_server_rounds + config.join_iterations
    name = name_of(type(method))
    given = first_downloads(
        name, method, initial, range(config.initial_clients, config.num_clients)
    )
    sent = _sent(strategy, given, rounds)
    curve = [strategy.evaluator.accuracies(sent, rounds)]
    for server_round in range(rounds + 1, last + 1):
        settings = {"method": strategy.name, "round": server_round}
        messages = {
            client: roster.message(client, MessageType.TRAIN, mine, settings)
            for client, mine in given.items()
        }
        strategy.record_asked(server_round, messages)
        answers = roster.exchange(messages)
        here = [client for client in messages if roster.is_here(client)]
        away = [client for client in messages if client not in here]
        uploads, rejected = strategy.screened(server_round, here, answers, away)
        strategy.note_kept(server_round, answers)
        if uploads:
            given = given | joined(name, method, initial, server_round, uploads)
        elif fault := own_fault(rejected.values()):
            raise fault from first_error(answers)
        sent = _sent(strategy, given, server_round)
        curve.append(strategy.evaluator.accuracies(sent, server_round, server_round == last))
    return curve, sent


def _sent(
    strategy: Personalised, given: dict[int, Weights], server_round: int
) -> dict[int, Weights]:
    """Return what every client is evaluated with if it trains from ``given``."""
    half = strategy.half
    return {c: half.evaluation_of(server_round, c, mine) for c, mine in given.items()}
