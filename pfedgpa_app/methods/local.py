"""Local-only: every client trains its own network and nothing is shared.

shared: nothing · kept: all weights, on the client · client: local-epochs of SGD a round ·
server: nothing · evaluated: the client's own network.
"""

from __future__ import annotations

from pfedgpa_app.config import Config
from pfedgpa_app.methods.base import Method, Upload
from pfedgpa_app.models import Weights


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
    def start(weights: Weights, state: Weights) -> Weights:
        return state

    @staticmethod
    def upload(trained: Weights, state: Weights) -> Weights:
        state.update(trained)
        return {}

    @staticmethod
    def evaluated(weights: Weights, state: Weights) -> Weights:
        return state
