"""FedAvg (McMahan et al. 2017, Algorithm 1).

"Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629.

shared: all weights · kept: nothing · client: local-epochs of SGD from the global weights ·
server: the mean weighted by training images · evaluated: the global weights on each client's test
images.
"""

from __future__ import annotations

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods.averaging import Averaging, Shared


class FedAvg(Averaging[Shared]):
    """One model for all clients."""

    title = "FedAvg"

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        joining = server_round > config.num_server_rounds
        return super().learning_rate(config, server_round) * (config.join_rate if joining else 1)

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """Each client's own upload: joining clients fine-tune the global weights."""
        return {client: upload.weights for client, upload in uploads.items()}
