"""Local-only: every client trains its own network and nothing is shared.

shared: nothing · kept: all weights, on the client · client: local-epochs of SGD a round ·
server: nothing · evaluated: the client's own network.
"""

from __future__ import annotations

from pfedgpa_app import training
from pfedgpa_app.config import Config
from pfedgpa_app.methods.base import ClientTask, Method, Upload
from pfedgpa_app.models import Weights, weights_of


class Local(Method[None]):
    """The reference that federation has to beat; as many steps as the others take."""

    title = "local-only"
    rounds = "local"

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> None:
        return None

    def expected_upload(self) -> Weights:
        return {}

    def download(self, client: int) -> Weights:
        return {}

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        pass

    @staticmethod
    def train(task: ClientTask) -> tuple[Weights, float]:
        if task.state:
            task.model.load_state_dict(task.state)
        loss = training.train(task.model, task.data.train, task.recipe, task.generator)
        task.state.update(weights_of(task.model))
        return {}, loss

    @staticmethod
    def evaluated(weights: Weights, state: Weights) -> Weights:
        return state
