"""Data flow of one request through the policy."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.errors import listed
from torchpi.inspect.inputs import Shapes, inputs_of_policy
from torchpi.inspect.trace import Trace, trace_forward
from torchpi.policy import Policy
from torchpi.ui.format import format_shape

DemoFrame = tuple[Mapping[str, Any], np.ndarray]
"""An observation and the policy's action chunk, float32 [H, a]."""


@dataclasses.dataclass(frozen=True)
class DataFlow:
    """Trace of one request, with all tensors."""

    trace: Trace
    chunks: np.ndarray
    """The chunk in the robot's units before the first Euler step and after each, float32 [steps + 1, H, a]."""

    @property
    def actions(self) -> np.ndarray:
        """The action chunk, float32 [H, a]."""
        return self.chunks[-1]


def trace_request(policy: Policy, observation: Mapping[str, Any], noise: np.ndarray) -> DataFlow:
    """Trace a request, an observation in the robot's keys and noise [H, action_dim], through the policy."""
    trace = trace_forward(inputs_of_policy(policy, Shapes(batch=1), observation, noise=noise))
    assert trace.values is not None
    assert trace.inputs.to_robot is not None
    return DataFlow(trace, np.stack([*map(trace.inputs.to_robot, trace.values.chunk)]))


def describe_flow(flow: DataFlow, policy: Policy) -> list[tuple[str, str]]:
    """Names and descriptions of the forward pass's stages, with shapes without the batch axis."""
    trace, robot, config = flow.trace, policy.embodiment, flow.trace.inputs.config
    shapes = {f"{entry.step} {entry.name}": format_shape(entry.shape[1:]) for entry in trace.entries}
    keys = {camera.name: camera.key for camera in robot.cameras if camera.name in trace.inputs.cameras and camera.key}
    first, count = next(iter(keys)), len(keys)
    prompt = next(segment for segment in trace.segments if segment.label == "prompt")
    tokens = f"{prompt.stop - prompt.start} tokens, padded to {config.max_token_len}"
    cache, steps = shapes["inference cache/layer_0/k"], len(flow.chunks) - 1
    actions = f"float32 {format_shape(flow.actions.shape)}: {', '.join(robot.action_names)}"
    if robot.execute_steps is not None:
        rate = "" if robot.control_hz is None else f" at {robot.control_hz:g} Hz"
        actions += f"; after {robot.execute_steps} of them{rate} it observes again"
    return [
        ("images", f"{listed(keys.values())}: {count} × uint8 {shapes[f'0 image/{first}']}"),
        ("prompt", f"{trace.inputs.prompt!r}: {tokens}"),
        ("SigLIP, embedder", f"{count} × {shapes[f'2 image_tokens/{first}']} and {shapes['3 text_tokens']}"),
        ("prefix", f"all tokens in one sequence: {shapes['4 prefix_tokens']}"),
        ("backbone, once", f"keys and values {cache} of each of {trace.count('layers')} layers"),
        ("action expert", f"{steps} Euler steps from noise {shapes['inference noise']}, each of which reads them"),
        ("action chunk", actions),
    ]
