"""LeRobot's policy interface as far as both policy types share it: the action queue and real-time chunking.

LeRobot and the policy exchange everything in the robot's units: the policy normalizes with its own statistics, and the
processors around it do not change numbers. The unexecuted rest of a chunk, which LeRobot keeps from before its
postprocessor, is therefore also in the robot's units, as torchpi's real-time chunking expects.
"""

import abc
import dataclasses
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lerobot_policy_torchpi.errors import PluginError
from lerobot_policy_torchpi.observations import requests_of

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LeftOver:
    """Unexecuted rest of the chunk that the robot is executing."""

    actions: np.ndarray
    """float32 [k, a] in the robot's units, k ≥ 1."""
    delay: int
    """Number of these actions that will have been executed when the new chunk arrives, at most k."""


class ChunkPolicy(abc.ABC):
    """Policy that queues the actions of chunks; a subclass infers the chunks."""

    config: Any
    """Its n_action_steps, cameras, rtc_config and device are used."""
    metadata: Mapping[str, Any]
    """Metadata of the policy, see `torchpi.Policy.metadata`."""

    @abc.abstractmethod
    def _infer(
        self, requests: Sequence[dict[str, Any]], left_over: Sequence[LeftOver | None], noise: np.ndarray | None
    ) -> Sequence[Mapping[str, Any]]:
        """Answer each request, with "actions" [H, a]."""

    def reset(self) -> None:
        """Clear the action queue for a new episode."""
        self._queue: deque[Tensor] = deque()
        self._noted: set[str] = set()

    def select_action(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """Return the next action [B, a] from the queue, or from a new chunk, of which `n_action_steps` are executed."""
        if not self._queue:
            steps = self.config.n_action_steps or self.metadata.get("execute_steps")
            self._queue.extend(self.predict_action_chunk(batch, **options)[:, :steps].unbind(dim=1))
        return self._queue.popleft()

    @torch.compiler.disable  # uses NumPy and PIL; torchpi compiles its model itself
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Predict a chunk of actions [B, H, a] in the robot's units.

        Args:
            batch: see `requests_of`.
            inference_delay: number of control steps until the chunk arrives.
            prev_chunk_left_over: [k, a] or [B, k, a], unexecuted actions of the previous chunk, which the new chunk
                continues.
            execution_horizon: number of these actions, from the first on, that guide the new chunk; by default that of
                `rtc_config`, otherwise all.
            noise: x at t = 1, [B, H, action_dim].
        """
        requests = requests_of(batch, self.metadata["observation"], self.config.cameras)
        rtc = self.config.rtc_config
        if prev_chunk_left_over is None or (rtc is not None and not rtc.enabled):
            left_over: list[LeftOver | None] = [None] * len(requests)
        else:
            steps = execution_horizon or (None if rtc is None else rtc.execution_horizon)
            previous = prev_chunk_left_over[None] if prev_chunk_left_over.ndim == 2 else prev_chunk_left_over
            if len(previous) != len(requests):
                raise PluginError(
                    f"{len(previous)} previous chunks for {len(requests)} observations; expected as many."
                )
            left_over = [left_over_of(chunk[:steps], inference_delay or 0) for chunk in previous]
        answers = self._infer(requests, left_over, None if noise is None else noise.float().cpu().numpy())
        self._note(answers)
        return torch.from_numpy(np.stack([answer["actions"] for answer in answers])).float().to(self.config.device)

    def _note(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Warn once per episode about clipped values and cut prompts."""
        for key, text in (
            ("actions_clipped", "values of a chunk exceeded the robot's limits and were clipped"),
            ("prompt_tokens_cut", "tokens of the prompt did not fit and were cut"),
        ):
            if (count := max(answer.get(key, 0) for answer in answers)) and key not in self._noted:
                self._noted.add(key)
                _log.warning("torchpi: %d %s (reported once per episode).", count, text)


def left_over_of(chunk: Tensor, delay: int) -> LeftOver | None:
    """Rest of a chunk, or None if nothing is left.

    LeRobot's engine pads it with rows of zeros, which in the robot's units would be positions, so trailing zero rows
    are dropped. A real action of zeros at the end would only no longer guide the new chunk.
    """
    rows = chunk.float().cpu().numpy()
    used = np.flatnonzero(rows.any(axis=1))
    k = int(used[-1]) + 1 if used.size else 0
    return LeftOver(rows[:k], min(delay, k)) if k else None
