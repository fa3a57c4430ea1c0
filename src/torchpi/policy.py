"""Policies: from a robot's observation to a chunk of the robot's actions."""

import dataclasses
import pathlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from torchpi.atomic import atomic_folder
from torchpi.checkpoints import folder
from torchpi.checkpoints.address import hub_address
from torchpi.checkpoints.checkpoint import open_policy
from torchpi.checkpoints.openpi_torch import EmbeddingChoice
from torchpi.checkpoints.publish import push_to_hub
from torchpi.checkpoints.sizes import ConfigLike
from torchpi.checkpoints.spec import (
    MAX_ACTION_PREFIX,
    PolicySpec,
    Preprocessing,
    check_metadata,
    check_sizes,
    state_dim_of,
)
from torchpi.collate import answer_of, check_observations, checked_arguments, collate, rtc_inputs
from torchpi.devices import fastest_dtype, usable_device
from torchpi.engine import InferenceEngine, check_device
from torchpi.errors import PolicyError, counted
from torchpi.model.pi0 import Pi0
from torchpi.model.rtc import Samples
from torchpi.robots import Embodiment
from torchpi.robots.limits import within_limits
from torchpi.samples import Pick, checked_pick, choose, finite_noise
from torchpi.transforms.images import OPENPI_IMAGES, ImageTransform
from torchpi.transforms.normalize import Normalization, NormStats, openpi_rules, save_norm_stats
from torchpi.transforms.pipeline import Transforms
from torchpi.transforms.prompt import find_tokenizer, load_tokenizer
from torchpi.types import ActionChunk, Observation, PreviousChunk

EngineMode = Literal["auto", "eager", "compiled", "graph"]


class Policy:
    """A model with its embodiment, normalization and tokenizer: observations in, actions in the robot's units out."""

    def __init__(
        self,
        model: Pi0,
        embodiment: Embodiment,
        *,
        norm_stats: Mapping[str, NormStats],
        normalization: Mapping[str, Normalization] | None = None,
        tokenizer: str | pathlib.Path,
        default_prompt: str | None = None,
        prompt_format: str = "openpi",
        truncation: str = "instruction",
        prompt_state_dim: int | None = None,
        image_transform: ImageTransform = OPENPI_IMAGES,
        num_steps: int = 10,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Assemble a policy.

        Args:
            norm_stats: statistics of "state" and "actions".
            normalization: rules for "state" and "actions"; by default openpi's, which depend on the variant.
            tokenizer: a SentencePiece model or tokenizer.json; the file is saved with the policy.
            default_prompt: for requests without a prompt; by default the embodiment's.
            prompt_format, truncation, prompt_state_dim, image_transform: see `Transforms`.
            num_steps: default number of Euler steps.
            metadata: free metadata for clients, in addition to the embodiment's; it must not repeat a key that the
                embodiment or the model sets.
            provenance: where the weights come from.

        Raises:
            FileNotFoundError: there is no tokenizer.
            KeyError: statistics or rules lack "state" or "actions".
            ValueError: the parts do not fit together.
        """
        self.model, self.embodiment = model, embodiment
        self.engine: InferenceEngine | None = None  # set by `use_engine`
        self.default_prompt = embodiment.default_prompt if default_prompt is None else default_prompt
        self.num_steps, self.provenance = num_steps, dict(provenance or {})
        self._metadata = dict(metadata or {})
        check_metadata(self._metadata, embodiment, self.default_prompt, f"A policy of {embodiment.name}")
        self._tokenizer_path = find_tokenizer(tokenizer)
        config = model.config
        self.transforms = Transforms(
            norm_stats, normalization or openpi_rules(config.pi05),
            tokenizer=load_tokenizer(self._tokenizer_path), discrete_state_input=config.state_in_prompt,
            max_token_len=config.max_token_len,  # None if the checkpoint doesn't say: the prompt is not cut
            action_dim=config.action_dim,
            image_size=(config.image_size, config.image_size), image_transform=image_transform,
            prompt_format=prompt_format, truncation=truncation, trained_action_dim=model.trained_action_dim,
            prompt_state_dim=prompt_state_dim if config.state_in_prompt else None,
            names={"state": embodiment.state_names, "actions": embodiment.action_names},
        )  # fmt: skip
        self._tokenizer_bytes = self._tokenizer_path.read_bytes()  # kept: the policy may outlive the file
        self._state_dim = state_dim_of(embodiment, norm_stats["state"].dim, config.action_dim)
        num_tokens = self.transforms.tokenizer.vocab_size
        check_sizes(embodiment, norm_stats["actions"].dim, config, self._tokenizer_path, num_tokens)
        self.transforms.warn_about_untrained_actions()

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: np.ndarray | None = None,
        num_steps: int | np.integer | None = None,
        num_samples: int | np.integer | None = None,
        pick: Pick | None = None,
        generator: torch.Generator | None = None,
        action_prefix: np.ndarray | None = None,
        delay: int | np.integer = 0,
        execution_horizon: int | np.integer | None = None,
    ) -> ActionChunk:
        """Compute an action chunk for one observation.

        Args:
            observation: in the format of the robot, see `example_observation`.
            noise: [H, action_dim], x at t = 1, or with `num_samples` [R, H, action_dim]; by default drawn with
                `generator`.
            num_steps: Euler steps; by default the policy's (usually 10).
            num_samples: R, number of chunks to sample; they share the work on images and prompt.
            pick: how to choose among the R chunks, see `samples.Pick`; by default "consensus".
            action_prefix: [k, a] in the robot's units: the actions of the previous chunk that are still to be executed
                at the time of the observation. The new chunk continues them (real-time chunking, see `model.rtc`).
                Delta actions are recomputed relative to the new state.
            delay: number of these actions that will have been executed when the new chunk arrives; it repeats them.
            execution_horizon: actions of the previous chunk executed since its inference began; by default H − k.

        Returns:
            "actions" float32 [H, a] in the robot's units, finite and within its limits; "policy_timing" in
            milliseconds; "actions_clipped" and "prompt_tokens_cut" if anything was clipped or cut. With `num_samples`
            also "samples" [R, H, a] and their spread, "action_std" [H, a] and "uncertainty". See `ActionChunk`.

        Raises:
            KeyError: a camera or a part of the state is missing or unknown.
            ActionError: actions are not finite, or exceed limits that the embodiment enforces by refusing the chunk.
            ValueError: any other problem of the observation or the arguments.
        """
        noises = None if noise is None else finite_noise(noise, self.model.config, num_samples)[None]
        if action_prefix is None and (delay != 0 or execution_horizon is not None):
            raise PolicyError(
                f"infer got delay {delay!r} and execution_horizon {execution_horizon!r} without an action_prefix; "
                "pass the remaining actions of the previous chunk as action_prefix, or neither argument."
            )
        prefix = None if action_prefix is None else PreviousChunk(action_prefix, delay, execution_horizon)
        return self.infer_batch(
            [observation], noise=noises, num_steps=num_steps, num_samples=num_samples, pick=pick, generator=generator,
            prefixes=[prefix],
        )[0]  # fmt: skip

    @torch.inference_mode(False)  # guidance needs gradients even if the caller is in inference mode
    def infer_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        *,
        noise: np.ndarray | None = None,
        num_steps: int | np.integer | None = None,
        num_samples: int | np.integer | None = None,
        pick: Pick | None = None,
        generator: torch.Generator | None = None,
        prefixes: Sequence[PreviousChunk | None] | None = None,
    ) -> list[ActionChunk]:
        """Compute action chunks for several independent observations in one pass; errors as in `infer`.

        Args:
            noise: [B, H, action_dim], or with `num_samples` [B, R, H, action_dim].
            prefixes: for each observation the previous chunk to continue, or None.
        """
        start = time.perf_counter()
        check_observations(observations)
        prefixes = checked_arguments(prefixes, generator, count=len(observations))
        requests = [
            # The previous actions are converted as in training: relative to the new state, and normalized.
            observation if prefix is None else {**observation, "actions": prefix.actions}
            for observation, prefix in zip(observations, prefixes, strict=True)
        ]
        states, samples = zip(*map(self.prepare, requests), strict=True)
        batch = collate(samples)
        noise_tensor = None
        if noise is not None:
            noise = finite_noise(noise, self.model.config, num_samples, batch=(len(samples),))
            noise_tensor = torch.from_numpy(noise.reshape(len(samples), -1, *noise.shape[-2:])).to(self.model.device)
        steps = self.num_steps if num_steps is None else num_steps
        if isinstance(steps, np.integer):
            steps = int(steps)
        pick = checked_pick(pick, num_samples, steps)
        prepared = time.perf_counter()
        rtc: dict[str, Any] = {}
        if any(prefixes):
            rtc = rtc_inputs(
                samples, prefixes, action_size=self.embodiment.action_size, device=self.model.device,
                horizon=self.model.config.require("action_horizon") if noise_tensor is None else noise_tensor.shape[2],
                max_action_prefix=self._metadata.get(MAX_ACTION_PREFIX, 0),
            )  # fmt: skip
        rtc |= {"noise": noise_tensor, "num_steps": steps, "generator": generator}
        sampled = self._sample(batch, num_samples, **rtc)
        chunks = sampled.actions.cpu().numpy()  # waits for the device
        residuals = [None] * len(chunks) if sampled.residual is None else sampled.residual.cpu().numpy()
        inferred = time.perf_counter()
        results = [self._postprocess(pick, *args) for args in zip(chunks, residuals, states, observations, strict=True)]
        timing = {
            "preprocess_ms": 1e3 * (prepared - start),
            "infer_ms": 1e3 * (inferred - prepared),
            "postprocess_ms": 1e3 * (time.perf_counter() - inferred),
        }
        return [answer_of(*result, timing, sample) for result, sample in zip(results, samples, strict=True)]

    def _sample(self, batch: Observation, num_samples: Any, *, noise: torch.Tensor | None, **rtc: Any) -> Samples:
        inputs, sampler = batch if self.engine else batch.to(self.model.device), self.engine or self.model
        with torch.autocast(self.model.device.type, enabled=False):  # the policy's own dtype applies
            if num_samples is not None:
                return sampler.sample_many(inputs, noise=noise, num_samples=int(num_samples), **rtc)
            noise = None if noise is None else noise[:, 0]
            return Samples(sampler.sample_actions(inputs, noise=noise, **rtc)[:, None], None)

    def prepare(self, observation: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Convert one observation to the model's inputs, see `Transforms.forward`; also return the state [s] in the
        model's units, to which delta actions are relative."""
        sample = self.embodiment.to_model(observation, default_prompt=self.default_prompt, state_dim=self._state_dim)
        return sample["state"], self.transforms.forward(sample)

    def _to_robot(self, chunk: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, int]:
        actions = self.transforms.inverse(chunk, action_size=self.embodiment.action_size)
        return within_limits(self.embodiment.from_model(actions, state), self.embodiment)

    def _postprocess(
        self, pick: Pick | None, chunks: np.ndarray, residuals: np.ndarray | None, state: np.ndarray, observation: Any
    ) -> tuple[np.ndarray, int, dict[str, Any]]:
        """Return the actions in the robot's units, the number of clipped values, and with `pick` the sample fields."""
        robot_chunks = [self._to_robot(chunk, state) for chunk in chunks]
        if pick is None:
            return *robot_chunks[0], {}
        num_dims = min(self.embodiment.action_size, self.model.trained_action_dim)  # the others are padding or noise
        residuals = None if residuals is None else residuals[..., :num_dims]
        samples = np.stack([actions for actions, _ in robot_chunks])
        kind = self.transforms.normalization["actions"].kind
        fields = choose(pick, samples, chunks[..., :num_dims], residuals, kind=kind, observation=observation)
        return *robot_chunks[fields["sample_index"]], fields

    def use_engine(self, mode: EngineMode, **settings: Any) -> None:
        """Select the inference engine. The model's weights must not change afterwards.

        Args:
            mode: "eager" (the plain model, no engine), "compiled", "graph" (needs a CUDA device), or "auto" ("graph"
                on a CUDA device, otherwise "eager").
            settings: arguments of `InferenceEngine`.

        Raises:
            ValueError: the mode is unknown, or not supported on the model's device.
        """
        if mode not in get_args(EngineMode):
            raise PolicyError(f"Unknown engine {mode!r}; expected one of {', '.join(get_args(EngineMode))}.")
        if mode == "auto":
            mode = "graph" if self.model.device.type == "cuda" else "eager"
        self.engine = None if mode == "eager" else InferenceEngine(self.model, mode=mode, **settings)

    def example_observation(self, *, deviations: float = 0.0) -> dict[str, Any]:
        """Build a valid request with made-up contents; the state is the training mean plus `deviations` standard
        deviations, clipped to the training range."""
        stats, rule = self.transforms.norm_stats["state"], self.transforms.normalization["state"]
        state = np.clip(stats.mean + deviations * stats.std, *stats.training_range(rule.kind))[: self._state_dim]
        return self.embodiment.example_observation(state_dim=self._state_dim, state=state)

    def __repr__(self) -> str:
        config, count = self.model.config, sum(parameter.numel() for parameter in self.model.parameters())
        dtype = str(self.model.embedding.dtype).removeprefix("torch.")
        return (
            f"<Policy of {self.embodiment.name}: {config.variant}, {count / 1e6:.4g} M parameters, {dtype} on "
            f"{self.model.device}, chunks of {config.action_horizon or 'any number of'} actions of "
            f"{counted(self.embodiment.action_size, 'dimension')}>"
        )

    @property
    def metadata(self) -> dict[str, Any]:
        """Information for clients: observation format, names, limits and ranges of actions, control rate, and more."""
        config = self.model.config
        return {
            "embodiment": self.embodiment.name,
            "observation": self.embodiment.observation_format,
            "image_transform": {"size": config.image_size, **dataclasses.asdict(self.transforms.image_transform)},
            "action_horizon": config.action_horizon,
            "action_names": list(self.embodiment.action_names),
            "action_units": list(self.embodiment.action_units),
            "action_commands": [action.command for action in self.embodiment.actions],
            "action_limits": self.embodiment.action_limits,
            "action_range": self._action_range(),
            "untrained_actions": list(self.transforms.untrained_actions),
            "control_hz": self.embodiment.control_hz,
            "execute_steps": self.embodiment.execute_steps,
            "num_steps": self.num_steps,
            "default_prompt": self.default_prompt,
            "engine": {"mode": "eager"} if self.engine is None else self.engine.metadata,
            **self.embodiment.metadata,
            **self._metadata,
        }

    def _action_range(self) -> dict[str, list[float]]:
        """Training range of the actions in the robot's units; for delta actions, state range plus delta range."""
        stats, size = self.transforms.norm_stats, self.embodiment.action_size
        low, high = (bound[:size].copy() for bound in stats["actions"].training_range())
        state_low, state_high = stats["state"].training_range()
        for i, is_delta in enumerate(self.embodiment.action_mask):
            if is_delta:
                low[i], high[i] = low[i] + state_low[i], high[i] + state_high[i]
        # The deltas are relative to state 0 here. The hook may flip the sign of a dimension, hence min and max.
        bounds = self.embodiment.from_model(np.stack([low, high]), np.zeros(self._state_dim))
        return {"low": bounds.min(axis=0).tolist(), "high": bounds.max(axis=0).tolist()}

    def save(
        self,
        path: str | pathlib.Path,
        *,
        overwrite: bool = False,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int | None = None,
    ) -> None:
        """Save the policy as a self-contained folder, atomically.

        Args:
            overwrite: replace an existing policy folder.
            dtype: dtype of the weights on disk; by default the model's.
            max_shard_bytes: split larger weights into shards of this size; None: a single file.

        Raises:
            ValueError: the path exists, and is not a policy folder or `overwrite` is not set.
        """
        with atomic_folder(folder.check_target(path, overwrite=overwrite)) as root:
            self.write_spec(root)
            folder.write_weights(root, self.model, dtype=dtype, max_shard_bytes=max_shard_bytes)

    @classmethod
    def from_pretrained(cls, address: str | pathlib.Path, *, revision: str | None = None, **options: Any) -> "Policy":
        """Load a policy with `load_policy(address, **options)`; ORG/NAME, unless there is such a folder, means
        hf://ORG/NAME at the branch, tag or commit `revision`."""
        return load_policy(hub_address(address, revision), **options)

    save_pretrained = save  # the name in transformers and LeRobot
    push_to_hub = push_to_hub
    fingerprint = folder.fingerprint

    def write_spec(self, root: pathlib.Path) -> None:
        """Write the files of a policy folder, without the weights, into an existing folder."""
        folder.write_policy_file(root, self.model, self.spec)
        save_norm_stats(root / "norm_stats.json", self.transforms.norm_stats)
        self.write_tokenizer(root)

    @property
    def spec(self) -> PolicySpec:
        return PolicySpec(
            source=f"a policy of {self.embodiment.name}",
            embodiment=self.embodiment,
            norm_stats=self.transforms.norm_stats,
            normalization=self.transforms.normalization,
            tokenizer=self._tokenizer_path,
            prompt_format=self.transforms.prompt_format,
            truncation=self.transforms.truncation,
            prompt_state_dim=self.transforms.prompt_state_dim,
            image_transform=self.transforms.image_transform,
            num_steps=self.num_steps,
            default_prompt=self.default_prompt,
            metadata=self._metadata,
            provenance=self.provenance,
        )

    def write_tokenizer(self, root: pathlib.Path) -> None:
        """Write tokenizer.model or tokenizer.json into a folder."""
        is_json = self._tokenizer_bytes.lstrip().startswith(b"{")
        (root / ("tokenizer.json" if is_json else "tokenizer.model")).write_bytes(self._tokenizer_bytes)


def load_policy(
    path: str | pathlib.Path,
    *,
    config: ConfigLike | None = None,
    embodiment: str | pathlib.Path | Embodiment | None = None,
    normalization: Literal["z_score", "quantile"] | None = None,
    norm_stats: str | pathlib.Path | None = None,
    asset_id: str | None = None,
    tokenizer: str | pathlib.Path | None = None,
    default_prompt: str | None = None,
    truncation: Literal["instruction", "original"] | None = None,
    preprocessing: Preprocessing | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora_alpha: tuple[float, float] | None = None,
    embedding: EmbeddingChoice | None = None,
    engine: EngineMode = "auto",
    emulate_fp8: bool = False,
    verify: bool = True,
) -> Policy:
    """Load a policy folder, a LeRobot policy or an openpi checkpoint.

    Policy folders and LeRobot policies are complete. For an openpi checkpoint the arguments supply what it lacks; for
    all formats they override what the checkpoint says.

    Args:
        path: a folder, see `load_model`; an address hf://… or gs://…, see `checkpoints.hub.fetch`; or "demo". The
            address of a published openpi checkpoint implies embodiment and config.
        config: a Pi0Config, a dict of its fields or a JSON file (both may be partial), or the name of a preset.
        embodiment: a name ("aloha", "droid", "libero", or a published policy's), a JSON file, or an Embodiment.
        normalization: by default the checkpoint's; if it states none, z_score for π₀ and quantile for π₀.₅.
        norm_stats: a norm_stats.json, or the folder that contains it.
        asset_id: selects assets/<id>/norm_stats.json of the checkpoint; by default the embodiment's, or the only one.
        tokenizer: a SentencePiece model or tokenizer.json; by default the folder's, or else the published models'.
        default_prompt: for requests without a prompt.
        truncation: how to cut prompts that are too long: "instruction" (shorten it) or "original" (cut the end).
        preprocessing: whose image resizing and state prompt to use: "openpi", "lerobot" (0.5 and later) or
            "lerobot_0.4"; by default what the policy was trained with, if the checkpoint says.
        device: by default a CUDA device if there is one, else the CPU.
        dtype: dtype of weights and computation; by default bfloat16 on a CUDA device with support, else float32.
        lora_alpha, embedding, emulate_fp8, verify, engine: see `load_model` and `Policy.use_engine`.

    Raises:
        FileNotFoundError, KeyError: a path does not exist; unknown embodiment.
        ValueError: something is missing in both checkpoint and arguments, contradictory, or corrupt.
    """
    device = usable_device(device)
    check_device(engine, device)
    checkpoint, spec = open_policy(
        path, config=config, embedding=embedding, lora_alpha=lora_alpha, embodiment=embodiment,
        normalization=normalization, norm_stats=norm_stats, asset_id=asset_id, tokenizer=tokenizer,
        default_prompt=default_prompt, truncation=truncation, preprocessing=preprocessing,
    )  # fmt: skip
    dtype = dtype or fastest_dtype(device)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    model = checkpoint.model(device=device, dtype=dtype, lora_alpha=lora_alpha, emulate_fp8=emulate_fp8, verify=verify)
    policy = policy_of(model, spec)
    policy.use_engine(engine)
    return policy


def policy_of(model: Pi0, spec: PolicySpec) -> Policy:
    assert spec.embodiment is not None
    assert spec.norm_stats is not None
    assert spec.tokenizer is not None
    not_arguments = ("source", "assets", "is_policy_folder", "unstated")
    return Policy(model, **{name: value for name, value in vars(spec).items() if name not in not_arguments})
