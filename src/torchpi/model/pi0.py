"""π₀ and π₀.₅: from an observation to an action chunk.

The prefix (images and prompt) never attends to the suffix (actions). The backbone therefore runs once over the prefix,
and the action expert needs only the keys and values of each layer. Training and inference share this path: in training
gradients flow through the cache, in inference all Euler steps reuse it.

Sources: π₀ (arXiv:2410.24164), π₀.₅ (arXiv:2504.16054).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from torchpi.config import Pi0Config
from torchpi.errors import ModelError
from torchpi.model import flow
from torchpi.model.cache import AttentionInputs, KVCache
from torchpi.model.gemma import Gemma, rope_table
from torchpi.model.layers import Linear, embed_tokens, require_count, require_shape
from torchpi.model.masks import make_attn_mask, token_positions
from torchpi.model.rtc import ActionPrefix, Guidance, Samples, check_previous, integrate
from torchpi.model.siglip import SigLIP
from torchpi.model.suffix import Pi0Suffix, Pi05Suffix, TimeConditioning, init_projections
from torchpi.types import Observation, require_observation

EMBEDDING_STD = 0.01  # the default of flax's normal(), which openpi uses


class Pi0(nn.Module):
    """Vision-language-action model π₀ or π₀.₅, in the sizes of its config.

    The model computes in the dtype of its weights, or in `compute_dtype` if that is set (float32 weights with bfloat16
    matmuls, for training). Norms, softmax, RoPE, time and patch embeddings, the suffix and the Euler steps always run
    in float32. Don't use `torch.autocast`: it would round these as well.
    """

    @torch.inference_mode(False)  # inference tensors could not be trained later
    def __init__(
        self,
        config: Pi0Config,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model and fill the weights by `init_weights` with seed 0; on device "meta" they stay empty."""
        super().__init__()
        self.config = config
        self.trained_action_dim = config.action_dim  # dimensions added by `checkpoints.sizes.adapt` are untrained
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
        """Device of the weights."""
        return self.embedding.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matmuls in the backbone, the action expert and the vision tower."""
        return self.compute_dtype_override or self.embedding.dtype

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize all weights for training from scratch, with openpi's distributions.

        RMSNorm scales and adaptive norms are 0 (closed gates: the expert starts as the identity), matrices are
        lecun-normal (in SigLIP xavier-uniform), the embedding is N(0, 0.01²) and SigLIP's head 0.
        """
        self.vision.init_weights(generator)
        nn.init.normal_(self.embedding, std=EMBEDDING_STD, generator=generator)
        self.backbone.init_weights(generator)
        self.expert.init_weights(generator)
        init_projections(self.suffix, generator)
        init_projections(self.action_out_proj, generator)

    # ---- prefix ----

    def embed_prefix(
        self, observation: Observation, *, drop_padding: bool = False
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]]:
        """Embed images and prompt: first the images, in the observation's camera order, then the prompt.

        Args:
            drop_padding: drop absent cameras and padding; shorter rows are padded to the longest one. Valid tokens
                don't depend on dropped ones, so results don't change. Reads the masks on the host.

        Returns:
            tokens [B, S, D]; input_mask, True at valid tokens; ar_mask, all False (the prefix is bidirectional).
        """
        require_observation(observation)
        if drop_padding:
            return self._embed_valid_prefix(observation)
        images = torch.cat(list(observation.images.values()))  # [N·B, h, w, 3]
        image_tokens = self.vision(images, self.compute_dtype)  # [N·B, P, D]
        image_tokens = image_tokens.unflatten(0, (-1, observation.batch_size)).transpose(0, 1)  # [B, N, P, D]
        return self._join_prefix(image_tokens, observation)

    def _embed_valid_prefix(
        self, observation: Observation
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]]:
        camera_mask = torch.stack(list(observation.image_masks.values()), dim=1)  # [B, N]
        images = torch.stack(list(observation.images.values()), dim=1)  # [B, N, h, w, 3]
        present = self.vision(images[camera_mask], self.compute_dtype)
        image_tokens = present.new_zeros(*camera_mask.shape, *present.shape[1:])  # [B, N, P, D]
        image_tokens[camera_mask] = present
        tokens, mask, ar_mask = self._join_prefix(image_tokens, observation)
        longest = int(mask.sum(dim=1).max())
        if longest < mask.shape[1]:
            valid_first = torch.argsort(~mask, dim=1, stable=True)[:, :longest]  # [B, longest]
            tokens = torch.take_along_dim(tokens, valid_first[:, :, None], dim=1)
            mask, ar_mask = torch.gather(mask, 1, valid_first), ar_mask[:longest]
        return tokens, mask, ar_mask

    def _join_prefix(
        self, image_tokens: Float[Tensor, "B N P D"], observation: Observation
    ) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]]:
        text_tokens = embed_tokens(observation.tokenized_prompt, self.embedding).to(self.compute_dtype)
        # openpi rounds the scale to the compute dtype before multiplying.
        text_tokens = text_tokens * torch.tensor(self.config.paligemma.width**0.5, dtype=self.compute_dtype)
        tokens = torch.cat([image_tokens.flatten(1, 2), text_tokens], dim=1)  # [B, N·P + L, D]
        patches = image_tokens.shape[2]
        masks = [mask[:, None].expand(-1, patches) for mask in observation.image_masks.values()]
        input_mask = torch.cat([*masks, observation.tokenized_prompt_mask], dim=1)
        return tokens, input_mask, torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)

    def prefill(
        self,
        observation: Observation,
        prefix: tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Bool[Tensor, " S"]] | None = None,
        *,
        action_horizon: int | None = None,
        no_padding: bool = False,
    ) -> KVCache:
        """Run the backbone over the prefix and keep each layer's keys and values.

        Args:
            prefix: output of `embed_prefix`; by default the observation is embedded here, with its padding.
            action_horizon: H of the suffix; by default the config's.
            no_padding: all tokens of `prefix` are valid, so no mask is needed.

        Raises:
            ValueError: neither the argument nor the config sets the horizon.
        """
        tokens, input_mask, ar_mask = self.embed_prefix(observation) if prefix is None else prefix
        rope = rope_table(token_positions(input_mask), self.config.paligemma.head_dim)
        if no_padding:
            key_values = self.backbone.keys_and_values(tokens, rope, None)
        else:
            # Padding has attention weight 0, but 0 · NaN is NaN: clear its contents.
            tokens = tokens.masked_fill(~input_mask[:, :, None], 0)
            # The prefix is bidirectional, so one mask row serves all queries. (Padding queries also attend to the valid
            # tokens: the softmax of an empty row would be NaN. Their outputs are unused.)
            key_values = self.backbone.keys_and_values(tokens, rope, input_mask[:, None, :])
        horizon = action_horizon or self.config.require("action_horizon")
        suffix = self.suffix_attention(input_mask, ar_mask, horizon, no_padding=no_padding)
        if not torch.is_grad_enabled():  # with gradients, `KeyValue.extended` concatenates instead
            key_values = [key_value.with_room(self.suffix.num_state_tokens + horizon) for key_value in key_values]
        return KVCache(key_values, suffix, observation.state)

    # ---- suffix ----

    def embed_suffix(
        self,
        observation: Observation,
        noisy_actions: Float32[Tensor, "B H A"],
        timestep: Float32[Tensor, " B"],
    ) -> tuple[Float32[Tensor, "B T d"], Bool[Tensor, "B T"], Bool[Tensor, " T"], Float32[Tensor, "B d"] | None]:
        """Embed noisy actions and time, and for π₀ the state.

        Returns:
            tokens [B, T, d]; input_mask, all True; ar_mask; adarms_cond [B, d], or None for π₀.
        """
        self.check_actions(observation, noisy_actions, "noisy_actions")
        require_shape("timestep", timestep, noisy_actions.shape[:1])
        features = self.suffix.time_features(timestep)
        tokens = self.suffix(observation.state, noisy_actions, features)
        input_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        ar_mask = self.suffix.ar_mask(noisy_actions.shape[1], tokens.device)
        return tokens, input_mask, ar_mask, self.suffix.condition(features)

    def suffix_attention(
        self,
        prefix_mask: Bool[Tensor, "B S"],
        prefix_ar_mask: Bool[Tensor, " S"],
        action_horizon: int,
        *,
        no_padding: bool = False,
    ) -> AttentionInputs:
        """Compute positions and attention mask of a suffix that follows a prefix.

        Args:
            no_padding: all tokens of the prefix are valid, so a suffix of a single group needs no mask.
        """
        suffix_ar_mask = self.suffix.ar_mask(action_horizon, prefix_mask.device)
        count = suffix_ar_mask.shape[0]
        suffix_mask = torch.ones(prefix_mask.shape[0], count, dtype=torch.bool, device=prefix_mask.device)
        input_mask = torch.cat([prefix_mask, suffix_mask], dim=1)
        rope = rope_table(token_positions(input_mask)[:, -count:], self.config.action_expert.head_dim)
        if no_padding and self.suffix.num_state_tokens == 0:
            return AttentionInputs(rope, None)
        ar_mask = torch.cat([prefix_ar_mask, suffix_ar_mask])
        return AttentionInputs(rope, make_attn_mask(input_mask, ar_mask, num_queries=count))

    def time_conditioning(self, time: Float32[Tensor, " B"] | Float32[Tensor, "B H"]) -> TimeConditioning:
        """Compute the expert's inputs that depend on the time (one per sample or per action)."""
        features = self.suffix.time_features(time)
        cond = self.suffix.condition(features)
        modulations = None if cond is None else self.expert.modulations(cond.to(self.compute_dtype))
        return TimeConditioning(time, features, modulations)

    def time_conditionings(self, times: Sequence[float]) -> list[TimeConditioning]:
        """Compute `time_conditioning` for several times at once, which reads the norms' matrices only once."""
        # Created on the device: a copy from the host would make a GPU wait.
        on_device = torch.stack([torch.full((), t, dtype=torch.float32, device=self.device) for t in times])
        at_all = self.time_conditioning(on_device)
        features = at_all.features.split(1)  # [1, d] each
        modulations: Sequence[Sequence[Tensor] | None] = [None] * len(times)
        if at_all.modulations is not None:
            modulations = list(zip(*(modulation.split(1) for modulation in at_all.modulations), strict=True))
        return [TimeConditioning(*one) for one in zip(times, features, modulations, strict=True)]

    def step_conditionings(self, num_steps: int, *, action_prefix: bool) -> list[TimeConditioning]:
        """Compute `time_conditionings` for the Euler steps, followed by t = 0 if there is an action prefix."""
        return self.time_conditionings([*flow.euler_times(num_steps), *([0.0] if action_prefix else [])])

    def denoise_step(
        self,
        cache: KVCache,
        x_t: Float32[Tensor, "B H A"],
        time: Float32[Tensor, " B"] | Float32[Tensor, "B H"] | TimeConditioning,
    ) -> Float32[Tensor, "B H A"]:
        """Compute the velocity v_t: run the action expert over the suffix, which also attends to the cached prefix.

        Args:
            cache: output of `prefill`; the keys and values of the suffix are written into its free slots.
            time: one per sample or per action, or the precomputed `time_conditioning`.
        """
        horizon = cache.suffix.rope[0].shape[1] - self.suffix.num_state_tokens
        require_shape("x_t of this cache", x_t, (len(cache.state), horizon, self.config.action_dim))
        if not isinstance(time, TimeConditioning):
            require_shape("time", time, x_t.shape[:1], x_t.shape[:2])
            time = self.time_conditioning(time)
        tokens = self.suffix(cache.state, x_t, time.features)  # [B, T, d]
        out, _ = self.expert(
            tokens.to(self.compute_dtype),
            cache.suffix.rope,
            cache.suffix.mask,
            past=cache.key_values,
            modulations=time.modulations,
        )  # [B, T, d]
        return self.action_out_proj(out[:, self.suffix.num_state_tokens :].float())  # [B, H, A]

    # ---- training and inference ----

    def forward(
        self,
        observation: Observation,
        actions: Float32[Tensor, "B H A"],
        *,
        noise: Float32[Tensor, "B H A"] | Float32[Tensor, "B R H A"],
        time: Float32[Tensor, " B"] | Float32[Tensor, "B R"],
        prefix_len: Int[Tensor, " B"] | Int[Tensor, "B R"] | None = None,
        loss_mask: Bool[Tensor, "B H A"] | Bool[Tensor, "B R H A"] | None = None,
    ) -> Float32[Tensor, "B H"] | Float32[Tensor, "B R H"]:
        """Compute the flow-matching loss (v_t − u_t)², averaged over the action dimensions.

        With R samples of noise and time per observation, the prefix is run only once per observation: its keys and
        values don't depend on noise or time. The prefix is most of the work.

        Args:
            actions: normalized and padded to action_dim.
            noise: x at t = 1, one or R samples per observation.
            time: t in (0, 1], one per noise sample.
            prefix_len: length of the action prefix, whose actions get t = 0 (training for real-time chunking, see
                `model.rtc.ActionPrefix`). The loss of the prefix is meaningless: mask it.
            loss_mask: False for elements that count as 0 in the mean.

        Raises:
            ValueError: shapes don't match the model or each other.
        """
        self.check_actions(observation, actions, "Actions")
        require_shape("Noise", noise)
        require_shape("Time", time)
        num_samples = noise.shape[1] if noise.ndim == 4 else 1
        expected = (*actions.shape[:1], *noise.shape[1:-2])  # [B] or [B, R]
        if noise.shape != (*expected, *actions.shape[1:]) or time.shape != expected:
            raise ModelError(
                f"Noise must be {list(actions.shape)}, or have R samples per observation, and time one number for each "
                f"sample; got {list(noise.shape)} and {list(time.shape)}."
            )
        for name, tensor, shape in (("prefix_len", prefix_len, time.shape), ("loss_mask", loss_mask, noise.shape)):
            if tensor is not None and tensor.shape != shape:
                raise ModelError(f"{name} must be {list(shape)}, got {list(tensor.shape)}.")
        x_0, x_1, t = actions.repeat_interleave(num_samples, 0), noise.flatten(0, -3), time.flatten()  # [B·R, …]
        if prefix_len is not None:
            t = flow.token_times(t, prefix_len.flatten(), actions.shape[1])  # [B·R, H]
        x_t, u_t = flow.interpolate(x_0, x_1, t)
        cache = self.prefill(observation, action_horizon=actions.shape[1]).repeat(num_samples)
        loss = (self.denoise_step(cache, x_t, t) - u_t).square().view(noise.shape)
        if loss_mask is not None:
            loss = loss * loss_mask
        return loss.mean(dim=-1)

    def compute_loss(
        self,
        observation: Observation,
        actions: Float32[Tensor, "B H A"],
        *,
        noise: Float32[Tensor, "B H A"] | Float32[Tensor, "B R H A"] | None = None,
        time: Float32[Tensor, " B"] | Float32[Tensor, "B R"] | None = None,
        flow_samples_per_obs: int = 1,
        generator: torch.Generator | None = None,
    ) -> Float32[Tensor, "B H"]:
        """Compute the flow-matching loss: `forward`, averaged over the R samples of noise and time per observation.

        Args:
            noise: x at t = 1, [B, H, A] or [B, R, H, A]; by default drawn from N(0, 1) with `generator`.
            time: [B] or [B, R]; by default drawn from Beta(1.5, 1)·0.999 + 0.001 with `generator`.
            flow_samples_per_obs: R, used if neither noise nor time is passed. Other arguments as in `forward`.

        Raises:
            ValueError: shapes don't match the model or each other.
        """
        self.check_actions(observation, actions, "Actions")
        require_count("flow_samples_per_obs", flow_samples_per_obs)
        shape: tuple[int, ...] = (len(actions), flow_samples_per_obs)  # [B, R]
        if noise is not None:
            require_shape("Noise", noise)
            shape = tuple(noise.shape[:-2])
        if time is not None:
            flow.check_time(time)
            shape = tuple(time.shape)
        if noise is None:
            size = (*shape, *actions.shape[1:])
            noise = torch.randn(size, generator=generator, dtype=torch.float32, device=self.device)
        if time is None:
            time = flow.sample_time(math.prod(shape), generator=generator, device=actions.device).view(shape)
        loss = self.forward(observation, actions, noise=noise, time=time)
        return loss if loss.ndim == 2 else loss.mean(dim=1)

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Float32[Tensor, "B H A"] | None = None,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
        guidance: Guidance | None = None,
        action_prefix: ActionPrefix | None = None,
    ) -> Float32[Tensor, "B H A"]:
        """Integrate from noise to actions with `num_steps` Euler steps.

        Args:
            noise: x at t = 1; by default drawn from N(0, 1) with `generator`. Sets the horizon if the config does not.
            guidance: steers the chunk towards the previous one (real-time chunking).
            action_prefix: known first actions, for a model trained with action prefixes (real-time chunking).

        Returns:
            Normalized actions, padded to action_dim.

        Raises:
            ValueError: shapes don't match the model or each other, or neither noise nor config sets the horizon.
        """
        if noise is not None:
            self.check_actions(observation, noise, "Noise")
            noise = noise[:, None]
        rtc: dict[str, Any] = {"guidance": guidance, "action_prefix": action_prefix}
        return self.sample_many(observation, noise=noise, num_steps=num_steps, generator=generator, **rtc).actions[:, 0]

    @torch.no_grad()
    def sample_many(
        self,
        observation: Observation,
        *,
        noise: Float32[Tensor, "B R H A"] | None = None,
        num_samples: int = 1,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
        guidance: Guidance | None = None,
        action_prefix: ActionPrefix | None = None,
    ) -> Samples:
        """Sample R action chunks per observation, which share one pass over the prefix.

        Args:
            num_samples: R, used if noise is not passed; sample i does not depend on R.
            guidance, action_prefix: one per observation, shared by its samples. Other arguments as in `sample_actions`.
        """
        require_observation(observation)
        if noise is None:
            noise = self.draw_noise(observation.batch_size, generator, num_samples)
        self.check_actions(observation, noise, "Noise", num_samples="R, ")
        check_previous(noise[:, 0], guidance, action_prefix)
        prefix = self.embed_prefix(observation, drop_padding=True)
        no_padding = bool(prefix[1].all())  # no value is read on the host after this one
        cache = self.prefill(observation, prefix, action_horizon=noise.shape[2], no_padding=no_padding)
        return self.denoise(cache, noise, num_steps=num_steps, guidance=guidance, action_prefix=action_prefix)

    @torch.no_grad()
    def denoise(
        self,
        cache: KVCache,
        noise: Float32[Tensor, "B R H A"],
        *,
        num_steps: int = 10,
        guidance: Guidance | None = None,
        action_prefix: ActionPrefix | None = None,
    ) -> Samples:
        """Run the Euler steps of `sample_many` from a prefilled cache, without reading a value on the host."""
        times = self.step_conditionings(num_steps, action_prefix=action_prefix is not None)
        velocity = functools.partial(self.denoise_step, cache.repeat(noise.shape[1]))
        return integrate(velocity, noise, times, guidance=guidance, action_prefix=action_prefix)

    def draw_noise(
        self, batch: int, generator: torch.Generator | None, num_samples: int = 1
    ) -> Float32[Tensor, "B R H A"]:
        """Draw noise from N(0, 1), one sample index at a time, so that sample i does not depend on `num_samples`."""
        require_count("num_samples", num_samples)
        shape = (batch, *self.config.chunk_shape)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": self.device}
        return torch.stack([torch.randn(shape, **options) for _ in range(num_samples)], dim=1)

    def check_actions(self, observation: Observation, actions: Tensor, name: str, *, num_samples: str = "") -> None:
        """Raise a ModelError for a wrong shape or dtype; `num_samples` is "R, " if there is a sample axis."""
        require_observation(observation)
        require_shape(name, actions)
        horizon = self.config.action_horizon
        expected = f"[{observation.batch_size or 'B'}, {num_samples}{horizon or 'H'}, {self.config.action_dim}]"
        shape, ndim = actions.shape, 4 if num_samples else 3
        fits = len(shape) == ndim and all(shape) and shape[0] == observation.batch_size
        if not fits or shape[-1] != self.config.action_dim or horizon not in (None, shape[-2]):
            raise ModelError(f"{name} must be {expected}, got {list(actions.shape)}.")
        if actions.dtype is not torch.float32:
            raise ModelError(f"{name} must be float32, got {actions.dtype}.")
