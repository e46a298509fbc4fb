"""Local-only: every client trains its own network and nothing is shared.

shared: nothing · kept: all weights, on the client · client: local-epochs of SGD a round ·
server: nothing · evaluated: the client's own network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.methods.base import NOTHING


@dataclass(frozen=True)
class LocalSettings(MethodSettings):
    """Nothing but the learning rate."""


class Local(Averaging[Shared]):
    """The reference that federation has to beat, with as many steps as other methods take."""

    title = "local-only"
    settings = LocalSettings
    sends = NOTHING
    unused: ClassVar = {"start-from": "its clients are sent no weights"}

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        return []

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        pass
