"""The part of LeRobot's policy interface that both kinds of policy share: the queue of actions, and real-time chunking.

Everything that passes between LeRobot and the policy is in the robot's units: the policy normalizes with statistics of
its own, and the processors around it leave numbers alone. So the unexecuted rest of a chunk, which LeRobot keeps from
before its postprocessor, is in the robot's units too, as torchpi's real-time chunking takes it.
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
    """The unexecuted rest of the chunk that the robot executes."""

    actions: np.ndarray
    """float32 [k, a] in the robot's units, k ≥ 1."""
    delay: int
    """The number of them that will have been executed when the new chunk arrives, at most k."""


class ChunkPolicy(abc.ABC):
    """Actions from chunks; a subclass infers the chunks."""

    config: Any
    """n_action_steps, cameras, rtc_config and device are read."""
    metadata: Mapping[str, Any]
    """The policy's, see `torchpi.Policy.metadata`."""

    @abc.abstractmethod
    def _infer(
        self, requests: Sequence[dict[str, Any]], left_over: Sequence[LeftOver | None], noise: np.ndarray | None
    ) -> Sequence[Mapping[str, Any]]:
        """The answer to each request, with "actions" [H, a]."""

    def reset(self) -> None:
        """Forget the queued actions, for a new episode."""
        self._queue: deque[Tensor] = deque()
        self._noted: set[str] = set()

    def select_action(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """The next action [B, a]: of the queue, or of a new chunk, of which `n_action_steps` are executed."""
        if not self._queue:
            steps = self.config.n_action_steps or self.metadata.get("execute_steps")
            self._queue.extend(self.predict_action_chunk(batch, **options)[:, :steps].unbind(dim=1))
        return self._queue.popleft()

    @torch.compiler.disable  # NumPy and PIL; torchpi compiles its model itself
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A chunk of actions [B, H, a] in the robot's units.

        Args:
            batch: see `requests_of`.
            inference_delay: the number of control steps until the chunk arrives.
            prev_chunk_left_over: [k, a] or [B, k, a], what this method returned before and was not executed: the new
                chunk continues it.
            execution_horizon: the number of its actions, from the first on, that the new chunk is drawn to; by default
                that of `rtc_config`, or else all.
            noise: x at t = 1 [B, H, action_dim].
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
        """Warn once an episode of values that were clipped and of prompts that were cut."""
        for key, text in (
            ("actions_clipped", "values of a chunk are beyond the robot's limits, and were clipped"),
            ("prompt_tokens_cut", "tokens of the prompt did not fit and were cut"),
        ):
            if (count := max(answer.get(key, 0) for answer in answers)) and key not in self._noted:
                self._noted.add(key)
                _log.warning("torchpi: %d %s (said once an episode).", count, text)


def left_over_of(chunk: Tensor, delay: int) -> LeftOver | None:
    """The rest of a chunk; None: nothing is left.

    LeRobot's engine pads it with rows of zeros, which in the robot's units are a position like any other: rows of zeros
    at the end are left out. An action that is all zeros there only loses its pull on the new chunk.
    """
    rows = chunk.float().cpu().numpy()
    used = np.flatnonzero(rows.any(axis=1))
    k = int(used[-1]) + 1 if used.size else 0
    return LeftOver(rows[:k], min(delay, k)) if k else None
