"""Sampling in one bucket: eager, compiled, or replayed as a CUDA graph."""

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

# The default limit of torch.compile is lower than the number of buckets. Each bucket also recompiles if a setting of
# PyTorch, such as the number of threads, changes.
MAX_COMPILED = 64


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Settings for compiled calls. torch.compile can't trace under a default device, so that is disabled."""
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED), torch._C.DisableTorchFunction():
        yield


class GraphMemory:
    """Memory pool shared by an engine's CUDA graphs, which run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # for all captures: memory is only reused within a stream


class Runner:
    """Sampling in one bucket, from static inputs to static actions."""

    def __init__(
        self,
        packed: PackedModel,
        bucket: Bucket,
        mode: Mode,
        times: Sequence[TimeConditioning],
        memory: GraphMemory | None = None,
    ) -> None:
        """Allocate the inputs and run once, to compile or capture.

        Args:
            times: from `Pi0.step_conditionings`.
            memory: for CUDA graphs.
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
        # On a separate stream: graphs that run at the same time use the cuBLAS workspace of the capture stream.
        warm_up, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        warm_up.wait_stream(current)
        with torch.cuda.stream(warm_up):
            self._sample()  # compiles kernels and lets cuBLAS choose its own
        current.wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the device during the capture.
        graph = torch.cuda.graph(self.graph, memory.pool, memory.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(memory.stream), graph:  # a failed capture does not restore the stream itself
            self.samples = self._sample()

    def __call__(self, inputs: Inputs) -> Samples:
        """Sample actions for all observations of `inputs`."""
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
            return self.velocity(prefix, x_t, time.features, time.modulations)  # a float time would recompile each step

        return integrate(
            velocity, inputs.noise, self.times, guidance=inputs.guidance, action_prefix=inputs.action_prefix
        )
