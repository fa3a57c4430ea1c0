"""Buckets: the sizes that determine all shapes of a sampling call, and the inputs in these shapes."""

import dataclasses

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from torchpi.config import Pi0Config
from torchpi.errors import counted
from torchpi.model.rtc import ActionPrefix, Guidance
from torchpi.types import Observation


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Static sizes of a sampling call. Everything else is tensor content."""

    batch: int
    cameras: int
    """Number of cameras that are present."""
    prompt_tokens: int
    horizon: int
    num_samples: int = 1
    """Chunks per observation."""
    num_steps: int = 10
    guidance: float | None = None
    """β of the guidance; None: no guidance."""
    action_prefix: bool = False

    def __str__(self) -> str:
        actions = counted(self.horizon, "action")
        if self.num_samples > 1:
            actions += f" × {self.num_samples}"
        parts = [f"batch {self.batch}", counted(self.cameras, "camera"), f"{self.prompt_tokens} prompt tokens", actions]
        parts.append(counted(self.num_steps, "step"))
        if self.guidance is not None:
            parts.append(f"guided (β = {self.guidance:g})")
        if self.action_prefix:
            parts.append("action prefix")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of a sampling call in a bucket's shapes, possibly with fewer samples."""

    images: Float32[Tensor, "N B h w 3"]
    tokens: Int[Tensor, "B L"]
    valid: Int[Tensor, " B"]
    """Number of valid tokens in the prefix; they come first."""
    state: Float32[Tensor, "B A"]
    noise: Float32[Tensor, "B R H A"]
    guidance: Guidance | None
    action_prefix: ActionPrefix | None

    @classmethod
    def empty(cls, bucket: Bucket, config: Pi0Config, device: torch.device) -> "Inputs":
        batch, size = bucket.batch, config.image_size
        chunk = (batch, bucket.horizon, config.action_dim)
        valid = bucket.cameras * config.num_patches + bucket.prompt_tokens

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            images=zeros(bucket.cameras, batch, size, size, 3),
            tokens=zeros(batch, bucket.prompt_tokens, dtype=torch.int64),
            valid=torch.full((batch,), valid, dtype=torch.int32, device=device),
            state=zeros(batch, config.action_dim),
            noise=zeros(batch, bucket.num_samples, *chunk[1:]),
            guidance=None if bucket.guidance is None else Guidance(zeros(*chunk), zeros(*chunk), bucket.guidance),
            action_prefix=ActionPrefix(zeros(*chunk), zeros(*chunk[:2]).bool()) if bucket.action_prefix else None,
        )

    def _tensors(self, num_tokens: int) -> list[Tensor]:
        """All tensors, with the batch first, and with `num_tokens` prompt tokens."""
        tensors = [self.images.transpose(0, 1), self.tokens[:, :num_tokens], self.valid, self.state, self.noise]
        if self.guidance is not None:
            tensors += [self.guidance.target, self.guidance.weight]
        if self.action_prefix is not None:
            tensors += [self.action_prefix.actions, self.action_prefix.mask]
        return tensors

    def copy_(self, other: "Inputs") -> None:
        """Copy inputs with the same number of samples or fewer; their last sample fills the rest."""
        length = other.tokens.shape[1]
        for mine, theirs in zip(self._tensors(length), other._tensors(length), strict=True):
            mine[: len(theirs)].copy_(theirs, non_blocking=True)
            mine[len(theirs) :] = mine[len(theirs) - 1 : len(theirs)]


def make_inputs(
    observation: Observation,
    noise: Float32[Tensor, "B R H A"],
    num_patches: int,
    guidance: Guidance | None,
    action_prefix: ActionPrefix | None,
) -> Inputs | None:
    """Inputs of a sampling call; None if samples have different cameras, or none. Reads the masks on the host."""
    camera_mask = torch.stack(list(observation.image_masks.values())).cpu()  # [N, B]
    present = camera_mask[:, 0]
    if not present.any() or not (camera_mask == present[:, None]).all():
        return None
    pairs = zip(observation.images.values(), present.tolist(), strict=True)
    images = [image for image, is_present in pairs if is_present]
    token_mask = observation.tokenized_prompt_mask
    lengths = token_mask.sum(dim=1)
    valid_first = torch.argsort(~token_mask, dim=1, stable=True)[:, : int(lengths.max())]
    return Inputs(
        images=torch.stack(images),
        tokens=observation.tokenized_prompt.gather(1, valid_first),
        valid=len(images) * num_patches + lengths,
        state=observation.state,
        noise=noise,
        guidance=guidance,
        action_prefix=action_prefix,
    )
