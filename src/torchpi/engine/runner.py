"""One bucket's sampling: run eagerly, compiled, or replayed as one CUDA graph."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchpi.engine.bucket import Bucket, Inputs
from torchpi.engine.packed import PackedModel
from torchpi.model.rtc import Samples, integrate
from torchpi.model.suffix import TimeConditioning

Mode = Literal["eager", "compiled", "graph"]

# One graph per bucket is more than torch.compile makes for one function by itself; each once more where a setting of
# PyTorch that it depends on, such as the number of threads, has changed.
MAX_COMPILED = 64


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Settings of compiled calls; torch.compile can't trace under a default device, which the engine does not need."""
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED), torch._C.DisableTorchFunction():
        yield


class GraphMemory:
    """Memory that the graphs of an engine share, since they run one after the other; of no graph yet."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # of all captures: memory is reused within a stream


class Runner:
    """Sampling of one bucket, from static inputs to static actions."""

    def __init__(
        self,
        packed: PackedModel,
        bucket: Bucket,
        mode: Mode,
        times: Sequence[TimeConditioning],
        memory: GraphMemory | None = None,
    ) -> None:
        """Allocate the inputs and make the first run, which compiles or captures.

        Args:
            times: `Pi0.step_conditionings`.
            memory: that of the engine's graphs.
        """
        packed = copy.copy(packed)
        packed.kernels = packed.kernels.for_another_stream()  # a graph may run while another one is captured
        self.packed, self.bucket, self.times = packed, bucket, times
        device = packed.embedding.device
        self.inputs = Inputs.empty(bucket, packed.config, device)
        self.prefill, self.velocity = packed.prefill, packed.velocity
        self.graph: torch.cuda.CUDAGraph | None = None
        self.settings = _compiling if mode == "compiled" else contextlib.nullcontext
        if mode == "compiled":
            self.prefill = torch.compile(self.prefill, dynamic=False, fullgraph=True)
            self.velocity = torch.compile(self.velocity, dynamic=False, fullgraph=True)
        if memory is not None:
            self._capture(device, memory)
        else:
            with self.settings():
                self._sample()

    def _capture(self, device: torch.device, memory: GraphMemory) -> None:
        # Not the captures' stream, whose workspace of cuBLAS the graphs that run meanwhile have.
        warm_up, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        warm_up.wait_stream(current)
        with torch.cuda.stream(warm_up):
            self._sample()  # compiles the kernels, and chooses those of cuBLAS
        current.wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads go on working with the device meanwhile.
        graph = torch.cuda.graph(self.graph, memory.pool, memory.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(memory.stream), graph:  # a capture that fails does not leave its stream by itself
            self.samples = self._sample()

    def __call__(self, inputs: Inputs) -> Samples:
        """Sample for as many observations as `inputs` has."""
        self.inputs.copy_(inputs)
        if self.graph is None:
            with self.settings():
                samples = self._sample()
        else:
            self.graph.replay()
            samples = self.samples.map(Tensor.clone)
        return samples.map(lambda tensor: tensor[: len(inputs.noise)])

    @torch.no_grad()
    def _sample(self) -> Samples:
        inputs, bucket = self.inputs, self.bucket
        prefix = self.prefill(inputs.images, inputs.tokens, inputs.valid, inputs.state, bucket.horizon)
        prefix = prefix.repeat(bucket.num_samples)

        def velocity(x_t: Tensor, time: TimeConditioning) -> Tensor:
            return self.velocity(prefix, x_t, time.features, time.modulations)  # a float would be a graph per step

        return integrate(
            velocity, inputs.noise, self.times, guidance=inputs.guidance, action_prefix=inputs.action_prefix
        )
