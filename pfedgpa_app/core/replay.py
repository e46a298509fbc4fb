"""Work that a GPU repeats: recorded once as a CUDA graph, then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Replayed:
    """Work over buffers that stay in place, done at each call.

    On a GPU it is captured as a CUDA graph at its second call and replayed from then on: small
    networks' steps are mostly waiting for their kernels to start.
    """

    def __init__(
        self, work: Callable[[], None], device: torch.device, pool: Any | None = None
    ) -> None:
        """Prepare ``work`` on ``device``.

        Args:
            pool: graph memory to share with other work that never runs at the same time.
        """
        self._work, self._device, self._pool = work, device, pool
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do the work once."""
        self._calls += 1
        if self._device.type != "cuda":
            self._work()
        elif self._graph is not None:
            self._graph.replay()
        elif self._calls == 1:  # torch makes its workspaces on another stream before the capture
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._work()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.empty_cache()  # the graph will allocate as much memory of its own
        else:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=self._pool):
                self._work()
            self._graph.replay()  # capturing only records
