"""π₀ and π₀.₅: from an observation to an action chunk.

The prefix (images and prompt) never attends to the suffix (actions). So the backbone reads it once, and all that the
action expert needs of it are each layer's keys and values. Training and inference are this one path; training lets the
gradient flow through the cache, inference keeps the cache for all Euler steps.

Sources: π₀ (arXiv:2410.24164), π₀.₅ (arXiv:2504.16054).
"""

import dataclasses
import functools

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from torchpi.config import Pi0Config
from torchpi.errors import ModelError
from torchpi.model import flow
from torchpi.model.gemma import Gemma, KeyValue, Modulation, Rope, rope_table
from torchpi.model.guidance import GivenActions, Guidance, guided_velocity
from torchpi.model.layers import Linear
from torchpi.model.masks import make_attn_mask, token_positions
from torchpi.model.siglip import SigLIP
from torchpi.model.suffix import Pi0Suffix, Pi05Suffix, init_projections
from torchpi.types import Observation

# flax's normal() by default, which openpi's code calls for it.
EMBEDDING_STD = 0.01


@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """What the action expert needs of the prefix."""

    key_values: list[KeyValue]
    """Per layer, keys after RoPE and values, each [B, S, G, K]."""
    mask: Bool[Tensor, "B S"]
    """True at real tokens."""

    def repeat(self, times: int) -> "PrefixCache":
        """Each sample's cache `times` times, one behind the other, for as many suffixes behind the same prefix."""
        if times == 1:
            return self
        repeated = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.key_values]
        return PrefixCache(repeated, self.mask.repeat_interleave(times, 0))


@dataclasses.dataclass(frozen=True)
class SuffixFrame:
    """What stays the same for the suffix over all Euler steps."""

    rope: Rope
    mask: Bool[Tensor, "B #T keys"] | None
    """Rows of suffix tokens, columns of prefix and suffix; None: every token sees every token."""


class Pi0(nn.Module):
    """A vision-language-action model, π₀ or π₀.₅ by its config, at any size.

    The computation runs in the dtype of the weights, or in `compute_dtype` where that is set (float32 weights and
    bfloat16 matmuls, for training). Norms, softmax, RoPE, time and patch embedding, the suffix and the Euler steps
    always run in float32.
    """

    def __init__(
        self,
        config: Pi0Config,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model; its weights are those of `init_weights` with seed 0, on "meta" there are none."""
        super().__init__()
        self.config = config
        self.compute_dtype_override = compute_dtype
        with torch.device("meta"):
            self.vision = SigLIP(config.siglip, image_size=config.image_size, out_width=config.paligemma.width)
            self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.paligemma.width))
            self.backbone = Gemma(config.paligemma, adaptive_norm=False)
            self.expert = Gemma(config.action_expert, adaptive_norm=config.pi05)
            self.suffix = Pi05Suffix(config) if config.pi05 else Pi0Suffix(config)
            self.action_out_proj = Linear(config.action_expert.width, config.action_dim)
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.init_weights(torch.Generator(device).manual_seed(0))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matmuls in both stacks and the vision tower."""
        return self.compute_dtype_override or self.embedding.dtype

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill all weights for training from scratch, with the original's distributions.

        RMSNorm scales and adaptive norms are 0 (gates closed: the expert begins as the identity), kernels lecun-normal,
        in SigLIP xavier-uniform, the embedding N(0, 0.01²), SigLIP's head 0.
        """
        self.vision.init_weights(generator)
        nn.init.normal_(self.embedding, std=EMBEDDING_STD, generator=generator)
        self.backbone.init_weights(generator)
        self.expert.init_weights(generator)
        init_projections(self.suffix, generator)
        init_projections(self.action_out_proj, generator)

    # ---- prefix ----

    def embed_prefix(
        self, observation: Observation
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]]:
        """Embed images and prompt, images first, in the observation's order of cameras.

        Returns:
            tokens [B, S, D]; input_mask, True at real tokens; ar_mask, all False: the prefix is bidirectional.
        """
        images = torch.cat(list(observation.images.values()))  # [N·B, h, w, 3]
        image_tokens = self.vision(images, self.compute_dtype)  # [N·B, P, D]
        image_tokens = image_tokens.unflatten(0, (-1, observation.batch_size)).transpose(0, 1)  # [B, N, P, D]
        return self._join_prefix(image_tokens, observation)

    def embed_present_prefix(self, observation: Observation) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """The prefix's real tokens alone: `embed_prefix` without absent cameras and padding.

        Nothing real depends on a token that is left out, so the result of everything behind stays the same. Rows of
        unequal length are padded to the longest one.

        Returns:
            tokens and input_mask, as from `embed_prefix`, with each row's real tokens moved to the front.
        """
        camera_mask = torch.stack(list(observation.image_masks.values()), dim=1)  # [B, N]
        images = torch.stack(list(observation.images.values()), dim=1)  # [B, N, h, w, 3]
        present = self.vision(images[camera_mask], self.compute_dtype)
        image_tokens = present.new_zeros(*camera_mask.shape, *present.shape[1:])  # [B, N, P, D]
        image_tokens[camera_mask] = present
        tokens, mask, _ = self._join_prefix(image_tokens, observation)
        longest = int(mask.sum(dim=1).max())
        if longest == mask.shape[1]:
            return tokens, mask
        real_first = torch.argsort(~mask, dim=1, stable=True)[:, :longest]  # [B, longest]
        return torch.take_along_dim(tokens, real_first[:, :, None], dim=1), torch.gather(mask, 1, real_first)

    def _join_prefix(
        self, image_tokens: Float[Tensor, "B N P D"], observation: Observation
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]]:
        text_tokens = nn.functional.embedding(observation.tokenized_prompt, self.embedding).to(self.compute_dtype)
        # The original rounds the scale to the dtype of the computation before it multiplies.
        text_tokens = text_tokens * torch.tensor(self.config.paligemma.width**0.5, dtype=self.compute_dtype)
        tokens = torch.cat([image_tokens.flatten(1, 2), text_tokens], dim=1)  # [B, N·P + L, D]
        patches = image_tokens.shape[2]
        masks = [mask[:, None].expand(-1, patches) for mask in observation.image_masks.values()]
        input_mask = torch.cat([*masks, observation.tokenized_prompt_mask], dim=1)
        return tokens, input_mask, torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)

    def prefill(
        self, tokens: Float[Tensor, "B S D"], input_mask: Bool[Tensor, "B S"], *, all_real: bool = False
    ) -> PrefixCache:
        """Run the backbone over the prefix and keep each layer's keys and values.

        Args:
            tokens, input_mask: from `embed_prefix`.
            all_real: the caller knows that no token is padding; saves the mask.
        """
        # What padding holds must reach nothing: in attention its weight is 0, but 0 · NaN is NaN.
        tokens = tokens if all_real else tokens.masked_fill(~input_mask[:, :, None], 0)
        rope = rope_table(token_positions(input_mask), self.config.paligemma.head_dim)
        # Bidirectional: one row of the mask serves all queries. (Rows of padding attend to the real tokens instead of
        # to nothing, whose softmax would be NaN; nobody reads them.)
        mask = None if all_real else input_mask[:, None, :]
        return PrefixCache(self.backbone.keys_and_values(tokens, rope, mask), input_mask)

    # ---- suffix ----

    def embed_suffix(
        self,
        observation: Observation,
        noisy_actions: Float32[Tensor, "B H A"],
        timestep: Float32[Tensor, " B"],
    ) -> tuple[Float32[Tensor, "B T d"], Bool[Tensor, "B T"], Bool[Tensor, " T"], Float32[Tensor, "B d"] | None]:
        """Embed noisy actions and time (and for π₀ the state).

        Returns:
            tokens [B, T, d]; input_mask, all True; ar_mask; adarms_cond [B, d], None for π₀.
        """
        features = self.suffix.time_features(timestep)
        tokens = self.suffix(observation.state, noisy_actions, features)
        input_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        ar_mask = self.suffix.ar_mask(noisy_actions.shape[1], tokens.device)
        return tokens, input_mask, ar_mask, self.suffix.condition(features)

    def frame_suffix(
        self, prefix_mask: Bool[Tensor, "B S"], action_horizon: int, *, all_real: bool = False
    ) -> SuffixFrame:
        """Positions and attention mask of a suffix behind a prefix.

        Args:
            all_real: the caller knows that no prefix token is padding; saves the mask where the suffix is one group.
        """
        batch, device = prefix_mask.shape[0], prefix_mask.device
        ar_mask = self.suffix.ar_mask(action_horizon, device)
        count = ar_mask.shape[0]
        suffix_mask = torch.ones(batch, count, dtype=torch.bool, device=device)
        input_mask = torch.cat([prefix_mask, suffix_mask], dim=1)
        rope = rope_table(token_positions(input_mask)[:, -count:], self.config.action_expert.head_dim)
        if all_real and self.suffix.num_state_tokens == 0:
            return SuffixFrame(rope, None)
        prefix_ar_mask = torch.zeros(prefix_mask.shape[1], dtype=torch.bool, device=device)
        return SuffixFrame(rope, make_attn_mask(input_mask, torch.cat([prefix_ar_mask, ar_mask]), num_queries=count))

    def velocity(
        self,
        suffix_tokens: Float32[Tensor, "B T d"],
        cache: PrefixCache,
        frame: SuffixFrame,
        modulations: list[Modulation] | None,
    ) -> Float32[Tensor, "B H A"]:
        """v_t: run the action expert over the suffix, with the prefix's keys and values in front of its own."""
        out, _ = self.expert(
            suffix_tokens.to(self.compute_dtype),
            frame.rope,
            frame.mask,
            past=cache.key_values,
            modulations=modulations,
        )
        return self.action_out_proj(out[:, self.suffix.num_state_tokens :].float())

    def modulations(self, cond: Float32[Tensor, "B d"] | Float32[Tensor, "B T d"] | None) -> list[Modulation] | None:
        """Scale, shift and gate of the expert's norms for a condition; None for π₀, which has none."""
        return None if cond is None else self.expert.modulations(cond.to(self.compute_dtype))

    # ---- training and inference ----

    def compute_loss(
        self,
        observation: Observation,
        actions: Float32[Tensor, "B H A"],
        *,
        noise: Float32[Tensor, "B H A"] | Float32[Tensor, "B R H A"] | None = None,
        time: Float32[Tensor, " B"] | Float32[Tensor, "B R"] | None = None,
        num_draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Float32[Tensor, "B H"]:
        """The flow-matching loss (v_t − u_t)², mean over action dimensions (and over the draws).

        Several draws of noise and time share one pass over the prefix, which is most of the work: its keys and values
        do not depend on them.

        Args:
            actions: normalized and padded to action_dim.
            noise: x at t = 1, one draw [B, H, A] or several [B, R, H, A]; by default drawn from N(0, 1) with
                `generator`.
            time: [B] or [B, R]; by default drawn from Beta(1.5, 1)·0.999 + 0.001 with `generator`.
            num_draws: R, where neither noise nor time is given.

        Raises:
            ValueError: shapes do not fit the model or each other.
        """
        error = self.flow_error(observation, actions, noise=noise, time=time, num_draws=num_draws, generator=generator)
        return error.mean(dim=-1).mean(dim=1)

    def flow_error(
        self,
        observation: Observation,
        actions: Float32[Tensor, "B H A"],
        *,
        noise: Float32[Tensor, "B H A"] | Float32[Tensor, "B R H A"] | None = None,
        time: Float32[Tensor, " B"] | Float32[Tensor, "B R"] | None = None,
        num_draws: int = 1,
        generator: torch.Generator | None = None,
        num_given: Int[Tensor, "B R"] | None = None,
    ) -> Float32[Tensor, "B R H A"]:
        """(v_t − u_t)² of every draw and number, of which `compute_loss` is the mean; arguments and errors as there.

        Args:
            num_given: so many of the first actions are given without noise, at a time t = 0 of their own: for a policy
                that goes on from actions that are being executed. Their errors mean nothing.
        """
        self._check_actions(observation, actions, "actions")
        batch, draws = actions.shape[0], _num_draws(noise, time, num_draws)
        repeated = actions.repeat_interleave(draws, 0)  # [B·R, H, A]
        noise = self._noise(repeated.shape, None if noise is None else noise.reshape(repeated.shape), generator)
        if time is None:
            time = flow.sample_time(batch * draws, generator=generator, device=actions.device)
        time = time.reshape(-1)  # [B·R]
        if num_given is not None:
            time = flow.token_times(time, num_given.reshape(-1), actions.shape[1])  # [B·R, H]
        x_t, u_t = flow.interpolate(repeated, noise, time)
        tokens, input_mask, _ = self.embed_prefix(observation)
        cache = self.prefill(tokens, input_mask).repeat(draws)
        features = self.suffix.time_features(time)
        suffix_tokens = self.suffix(observation.state.repeat_interleave(draws, 0), x_t, features)
        frame = self.frame_suffix(cache.mask, actions.shape[1])
        v_t = self.velocity(suffix_tokens, cache, frame, self.modulations(self.suffix.condition(features)))
        return (v_t - u_t).square().unflatten(0, (batch, draws))

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Float32[Tensor, "B H A"] | None = None,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
        guidance: Guidance | None = None,
        given: GivenActions | None = None,
    ) -> Float32[Tensor, "B H A"]:
        """Integrate from noise to actions with `num_steps` Euler steps.

        Args:
            noise: the start; by default drawn from N(0, 1) with `generator`. It decides the horizon where the config
                leaves it unset.
            guidance: the chunk that this one has to go on from; by default none.
            given: first actions that are known, for a model that was trained with such ones (`flow_error`'s num_given).

        Returns:
            Normalized actions, padded to action_dim.

        Raises:
            ValueError: shapes do not fit the model or each other, or the horizon is neither given nor set.
        """
        times = flow.euler_times(num_steps)
        if noise is None:
            shape = (observation.batch_size, self.config.require("action_horizon"), self.config.action_dim)
            noise = self._noise(torch.Size(shape), None, generator)
        self._check_actions(observation, noise, "noise")
        tokens, input_mask = self.embed_present_prefix(observation)
        all_real = bool(input_mask.all())
        cache = self.prefill(tokens, input_mask, all_real=all_real)
        frame = self.frame_suffix(input_mask, noise.shape[1], all_real=all_real)
        # The time is the same for all samples, and known: its part of all steps is computed at once, which reads the
        # adaptive norms' matrices once instead of once per step.
        is_given = None if given is None else given.mask[:, :, None]  # [B, H, 1]
        all_times = torch.tensor(times if is_given is None else [*times, 0.0], device=noise.device)
        features = self.suffix.time_features(all_times)  # [num_steps, d], and one more where actions are given
        modulations = self.modulations(self.suffix.condition(features))  # per norm [num_steps, 1, 3d]

        def at(step: int, rows: Tensor) -> Tensor:
            """Of a step's time; of t = 0, the last row, for actions that are given."""
            now = rows[step : step + 1]
            return now if is_given is None else torch.where(is_given, rows[-1:].view(1, 1, -1), now.view(1, 1, -1))

        def velocity(step: int, x: Tensor) -> Tensor:
            suffix_tokens = self.suffix(observation.state, x, at(step, features))
            at_step = None if modulations is None else [at(step, m) for m in modulations]
            return self.velocity(suffix_tokens, cache, frame, at_step)

        x_t, dt = noise, -1.0 / num_steps
        for step, t in enumerate(times):
            if given is not None:
                x_t = torch.where(given.mask[:, :, None], given.actions, x_t)
            at_step = functools.partial(velocity, step)
            x_t = x_t + dt * (at_step(x_t) if guidance is None else guided_velocity(at_step, x_t, t, guidance))
        return x_t if given is None else torch.where(given.mask[:, :, None], given.actions, x_t)

    def _noise(self, shape: torch.Size, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if noise is None:
            return torch.randn(shape, generator=generator, device=self.device)
        if noise.shape != shape:
            raise ModelError(f"Noise must have the actions' shape {list(shape)}, got {list(noise.shape)}.")
        return noise

    def _check_actions(self, observation: Observation, actions: Tensor, name: str) -> None:
        horizon = self.config.action_horizon
        expected = f"[{observation.batch_size}, {'H' if horizon is None else horizon}, {self.config.action_dim}]"
        if (
            actions.ndim != 3
            or actions.shape[0] != observation.batch_size
            or actions.shape[2] != self.config.action_dim
            or (horizon is not None and actions.shape[1] != horizon)
        ):
            raise ModelError(f"{name} must be {expected}, got {list(actions.shape)}.")
        if actions.dtype is not torch.float32:
            raise ModelError(f"{name} must be float32, got {actions.dtype}.")


def _num_draws(noise: Tensor | None, time: Tensor | None, num_draws: int) -> int:
    """R, of which noise [B, R, H, A] and time [B, R] must say the same; without R in their shapes it is 1."""
    given = {
        name: (value.shape[1] if value.ndim == ndim else 1)
        for name, value, ndim in (("noise", noise, 4), ("time", time, 2))
        if value is not None
    }
    if len(set(given.values())) > 1:
        raise ModelError(f"Noise and time must have the same number of draws, got {given}.")
    draws = next(iter(given.values()), num_draws)
    if draws < 1:
        raise ModelError(f"num_draws must be a positive integer, got {draws}.")
    return draws
