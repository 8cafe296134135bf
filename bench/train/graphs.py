"""A micro-batch's forward and backward passes as a CUDA graph: one launch for all of their kernels.

The kernels of a small model take less time than their launches. A graph repeats what was once recorded, at the same
addresses, so everything whose shape or number changes from step to step stays outside of it: the optimizer, the
clipping, the evaluation. (PyTorch's manual, CUDA semantics, whole-network capture.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Passes = Callable[..., Tensor]
Recorder = Callable[[Callable[[], None]], Callable[[], object]]
WARM_UP = 3  # runs before the recording, in which libraries choose their kernels and take their memory


def cuda_graph(run: Callable[[], None]) -> Callable[[], object]:
    """What repeats ``run`` on the GPU. It is run a few times, and then once without effect."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):  # back to it also after a failure
        run()
    return graph.replay


class Replayed:
    """Passes that are recorded at their first call and repeated at every call; they add to the gradients, which must
    be set to zero between steps and never be taken away.
    """

    def __init__(self, parameters: list[Tensor], device: torch.device, record: Recorder) -> None:
        """parameters: which have no gradients yet; record: ``cuda_graph``."""
        self.parameters, self.device, self.record = parameters, device, record
        self.replay: Callable[[], object] | None = None

    def __call__(self, passes: Passes, *batch: Tensor) -> Tensor:
        """What the passes return for a batch of the first one's shapes: a scalar, beside which they add to the
        parameters' gradients. They are the same at every call.
        """
        if self.replay is None:
            self._begin(passes, batch)
        assert self.replay is not None
        for place, value in zip(self.batch, batch, strict=True):
            place.copy_(value, non_blocking=True)
        self.replay()
        return self.result.clone()

    def _begin(self, passes: Passes, batch: tuple[Tensor, ...]) -> None:
        self.batch = [value.to(self.device, copy=True) for value in batch]
        self.result = torch.zeros((), device=self.device)

        def run() -> None:
            self.result.copy_(passes(*self.batch))

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # trial runs draw for nobody
            self.replay = self.record(run)
        for parameter in self.parameters:  # those without a gradient, which the optimizer leaves alone, stay so
            if parameter.grad is not None:
                parameter.grad.zero_()
