"""The data flow of one request through the policy, and the frames that the policy sees without a simulator."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.inspect.inputs import Shapes, inputs_of_policy
from torchpi.inspect.trace import Trace, Values, trace_forward
from torchpi.policy import Policy
from torchpi.ui.format import format_shape


@dataclasses.dataclass(frozen=True)
class DemoFrame:
    """An observation with the action chunk that the policy answers."""

    observation: Mapping[str, Any]
    actions: np.ndarray
    """float32 [H, a]."""


@dataclasses.dataclass(frozen=True)
class DataFlow:
    """Every tensor of one request."""

    trace: Trace
    """A batch of one."""
    chunks: np.ndarray
    """In the robot's units, before the first Euler step and after each: float32 [steps + 1, H, a]."""

    @property
    def actions(self) -> np.ndarray:
        """The action chunk, float32 [H, a]."""
        return self.chunks[-1]

    @property
    def values(self) -> Values:
        """Values of the trace."""
        assert self.trace.values is not None
        return self.trace.values


def trace_request(policy: Policy, observation: Mapping[str, Any], noise: np.ndarray) -> DataFlow:
    """Trace a request through the policy.

    Args:
        observation: in the robot's keys.
        noise: [H, action_dim].
    """
    trace = trace_forward(inputs_of_policy(policy, Shapes(batch=1), observation, noise=noise))
    assert trace.values is not None
    state, _ = policy.prepare(observation)
    size = policy.embodiment.action_size
    steps = [policy.transforms.inverse(x_t, action_size=size) for x_t in trace.values.chunk]
    return DataFlow(trace, np.stack([policy.embodiment.from_model(x_t, state) for x_t in steps]).astype(np.float32))


def describe_flow(flow: DataFlow, policy: Policy) -> list[tuple[str, str]]:
    """Stages of the forward pass with their shapes, without the batch's axis."""
    trace, robot = flow.trace, policy.embodiment
    shapes = {(entry.step, entry.name): format_shape(entry.shape[1:]) for entry in trace.entries}
    cameras = [
        (camera.name, camera.key) for camera in robot.cameras if camera.name in trace.inputs.cameras and camera.key
    ]
    first, keys = cameras[0][0], " and ".join(str(key) for _, key in cameras)
    prompt = next(segment for segment in trace.segments if segment.label == "prompt")
    names = ", ".join(action.name for action in robot.actions)
    rate = "" if robot.control_hz is None else f" at {robot.control_hz:g} Hz"
    then = "" if robot.execute_steps is None else f"; after {robot.execute_steps} of them{rate} it observes again"
    tokens, text = shapes["2", f"image_tokens/{first}"], shapes["3", "text_tokens"]
    cache, noise = shapes["inference", "cache/layer_0/k"], shapes["inference", "noise"]
    return [
        ("images", f"{keys}: {len(cameras)} × uint8 {shapes['0', f'image/{first}']}"),
        (
            "prompt",
            f"{trace.inputs.prompt!r}: {prompt.stop - prompt.start} tokens, padded to "
            f"{trace.inputs.config.max_token_len}",
        ),
        ("SigLIP, embedder", f"{len(cameras)} × {tokens} and {text}"),
        ("prefix", f"all of it in one sequence: {shapes['4', 'prefix_tokens']}"),
        ("backbone, once", f"keys and values {cache} of each of {trace.count('layers')} layers"),
        ("action expert", f"{flow.values.num_steps} Euler steps from noise {noise}, each of which reads them"),
        ("action chunk", f"float32 {format_shape(flow.actions.shape)}: {names}{then}"),
    ]
