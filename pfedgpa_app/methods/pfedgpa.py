"""pFedGPA (Lai et al., AAAI 2025, arXiv 2409.05701): generate each client its own weights.

shared: all weights · kept: nothing · client: as FedAvg, from the weights it is sent · server:
learns the distribution of the newest rounds' uploads with a diffusion model, inverts each
client's newest upload into it and denoises · evaluated: the generated weights, before and
after fine-tuning.

The paper's text leaves the rounds before generation open; here they are FedAvg's. With
``pfedgpa.generate-from`` every round from that one ends with generation, and clients train
on from what was generated for them (the paper's Algorithm 1).
"""

from __future__ import annotations

import dataclasses

from pfedgpa_app.config import Config
from pfedgpa_app.diffusion.fit import FitSettings, WeightDistribution
from pfedgpa_app.methods.base import Upload
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.models import Weights
from pfedgpa_app.training import device_for


class PFedGPA(FedAvg):
    """The posterior mean at a calibrated strength, unless settings say otherwise."""

    title = "pFedGPA"

    @classmethod
    def federation(cls, config: Config) -> str:
        return "pfedgpa" if config.pfedgpa.generate_from else "fedavg"

    def download(self, client: int) -> Weights:
        return self.state.generated.get(client, self.state.global_weights)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        super().aggregate(server_round, uploads)
        self.state.fitted = None
        if 0 < self.config.pfedgpa.generate_from <= server_round:
            self.state.generated = self._generate()

    def personalise(self) -> dict[int, Weights]:
        """Generated weights; a client never seen gets the FedAvg model."""
        generated = self._generate()
        return {
            client: generated.get(client, self.state.global_weights)
            for client in range(self.config.num_clients)
        }

    def distribution(self) -> WeightDistribution:
        """The fitted distribution of the newest uploads; fitted once a round."""
        if self.state.fitted is None:
            names = {f.name for f in dataclasses.fields(FitSettings)}
            values = dataclasses.asdict(self.config.pfedgpa)
            self.state.fitted = WeightDistribution(
                self.state.buffer,
                FitSettings(**{k: v for k, v in values.items() if k in names}),
                self.config.seed,
                device_for(self.config.device),
            )
        return self.state.fitted

    def _generate(self) -> dict[int, Weights]:
        settings = self.config.pfedgpa
        return self.distribution().generate(
            settings.inversion,
            keep=settings.keep,
            draws=settings.draws,
            residual_keep=settings.residual_keep,
        )


class PFedGPAInverted(PFedGPA):
    """The paper to the letter: invert from T and replay all stored noise.

    By the identity theorem this is the upload's projection to the latent directions.
    """

    title = "pFedGPA (paper's inversion)"

    def _generate(self) -> dict[int, Weights]:
        steps = self.config.pfedgpa.diffusion_steps
        return self.distribution().generate("invert", strength=steps, keep=1.0)


class PFedGPASampled(PFedGPA):
    """The paper's ablation: each client gets one sample decoded from pure noise."""

    title = "pFedGPA without inversion"

    def _generate(self) -> dict[int, Weights]:
        return self.distribution().generate("sample")
