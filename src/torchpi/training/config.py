"""A training recipe: everything that decides a run, as one JSON document."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torchpi.assets import assets
from torchpi.config import LoraConfig, Trained
from torchpi.errors import MissingFileError, TrainingError

Schedule = Literal["cosine", "rsqrt", "constant"]
Kind = Literal["adamw", "adamw8bit"]
Checkpointing = Literal["none", "layers", "selective"]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far images are changed; 0 switches a change off."""

    crop: float = 0.95
    """Share of the image's side that a crop keeps; 1 switches it off."""
    degrees: float = 5.0
    """Rotation in ±degrees."""
    brightness: float = 0.3
    """Change of the value in ±shares."""
    contrast: float = 0.4
    """Steepness of the value's curve, in (-1, 1)."""
    saturation: float = 0.5
    """Change of the saturation in ±shares."""
    hue: float = 0.1
    """Change of the hue in ±turns."""
    color_probability: float = 0.5
    """Share of the images whose colours are changed."""
    like_openpi: bool = False
    """As openpi's code does it, against what is meant: one draw for all cameras of a sample, and no saturation."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise TrainingError(f"augmentation.crop must be in (0, 1], got {self.crop}.")
        for name in ("brightness", "contrast", "saturation", "hue", "color_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"augmentation.{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.contrast == 1 or not 0 <= self.degrees <= 180:
            raise TrainingError(
                f"augmentation.contrast must be below 1 and degrees in [0, 180], got {self.contrast}, {self.degrees}."
            )


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset of a mixture."""

    dataset: str
    """A LeRobot dataset: a folder, or hf://ORG/NAME."""
    embodiment: str
    """Whose cameras, state and actions these are: a name (metaworld, aloha, …) or a JSON file."""
    weight: float = 1.0
    """Its share of the samples, in parts of the sum of all weights."""
    episodes: str | None = None
    """Which episodes, for example "0:40,57" or "task:open *"; by default all."""
    prompt: str | None = None
    """The instruction of all episodes, instead of their tasks."""
    rename: tuple[str, ...] = ()
    """As the recipe's field."""
    norm_stats: str = "dataset"
    """As the recipe's field."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise TrainingError(f"The weight of {self.dataset} must be positive, got {self.weight}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe. The defaults are openpi's; RUN/train.json holds a run's own, and is a recipe like any other."""

    dataset: str = ""
    """A LeRobot dataset: a folder, or hf://ORG/NAME[@REVISION]."""
    embodiment: str = ""
    """Whose cameras, state and actions these are: a name (metaworld, aloha, …) or a JSON file."""
    episodes: str | None = None
    """Which episodes, for example "0:40,57" or "task:open *"; by default all."""
    prompt: str | None = None
    """The instruction of all episodes, instead of their tasks."""
    rename: tuple[str, ...] = ()
    """The dataset's names that LeRobot and the robot have others for: OLD=NEW, for example actions=action; columns that
    have to be joined: joint_position+gripper_position=observation.state."""
    mixture: tuple[Source, ...] = ()
    """Several datasets instead of one, mixed by their weights; in a recipe's file, as a list of objects. The policy is
    saved for the first one's robot."""
    norm_stats: str = "dataset"
    """Whose statistics: "dataset" (of the episodes that are trained on), "init" or "init:ASSET_ID" (of the weights that
    the run begins with), or a norm_stats.json."""
    skip_idle: bool = False
    """Leave out frames at which the robot rests."""

    init: str | None = None
    """The weights that the run begins with: a policy folder, a checkpoint, hf://… or gs://…; by default random."""
    model: str | None = None
    """The model's sizes, a preset's name or a JSON file; by default those of `init`. Without `init` a model of these
    sizes is trained from scratch."""
    adapt: bool = False
    """Cut or extend the weights of `init` where `model` has other sizes; without it that is an error."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json; by default that of `init`, or from scratch the published models', for a
    small vocabulary the packaged one."""

    trained: Trained = "all"
    """What is trained: "all"; "frozen_vision" (all but SigLIP); "expert" (the action expert and the projections);
    "lora" (openpi's rule: LoRA matrices, SigLIP and the projections); "lora_strict" (LoRA matrices and projections)."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Where `trained` is "lora" or "lora_strict"."""
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights that are not trained, in memory."""

    num_steps: int = 30_000
    """Updates of the weights."""
    batch_size: int = 32
    """Samples per update, over all processes."""
    accumulate: int = 1
    """Passes per update: each process computes batch_size / processes / accumulate samples at once."""
    num_draws: int = 1
    """Draws of noise and time per sample; they share the pass over images and prompt, which is most of the work."""
    loss: Literal["all", "real"] = "all"
    """What the loss is the mean of: "all" numbers of a chunk, padding included, as openpi; or "real" ones only, without
    padded dimensions and steps past the end of the episode."""
    learning_rate: float = 2.5e-5
    """Peak of the schedule."""
    schedule: Schedule = "cosine"
    """After the warm-up: "cosine" to final_learning_rate at decay_steps, "rsqrt" or "constant"."""
    warmup_steps: int = 1000
    """Updates until the peak."""
    decay_steps: int | None = None
    """Update at which the cosine reaches `final_learning_rate`; by default num_steps."""
    final_learning_rate: float = 2.5e-6
    """Where the cosine ends."""
    timescale: float = 10_000.0
    """Of "rsqrt": peak/√(1 + (step − warm-up)/timescale)."""
    optimizer: Kind = "adamw"
    """"adamw", or "adamw8bit": moments in 8 bits (bitsandbytes)."""
    weight_decay: float = 1e-10
    """AdamW's, on all weights."""
    max_grad_norm: float = 1.0
    """Gradients are scaled to at most this global norm."""
    ema_decay: float = 0.99
    """Of the moving average of the weights, which is what the policy is saved with; 0: the weights themselves."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """Of the images."""
    max_given: int = 0
    """For real-time chunking: up to so many of a chunk's first actions are given without noise, as of a chunk that is
    being executed; how many is drawn for each draw of noise, and the loss is of the others. 0: none."""
    state_noise: float = 0.0
    """Standard deviation of noise on the normalized state, whose range is [-1, 1]."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the matmuls; weights, gradients' sums and the optimizer are float32."""
    checkpointing: Checkpointing = "none"
    """Which activations are computed a second time instead of kept: "none", "layers" (all but each layer's input) or
    "selective" (all but the results of matmuls with weights)."""
    compile: bool = False
    """Compile the layers (torch.compile); takes minutes at the beginning."""
    parallel: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """How several processes (torchrun) share the work: each has the whole model, a shard of it, or a shard within its
    group of `shard_size`."""
    shard_size: int = 0
    """Processes that share one copy of the model, for "hybrid"; 0: those of a node."""

    seed: int = 0
    """Of everything that is drawn."""
    holdout: float = 0.02
    """Share of the episodes that are not trained on but measured; at least one, unless it is 0."""
    holdout_samples: int = 256
    """Samples of the held-out episodes whose loss is measured."""
    chunk_samples: int = 32
    """Samples of the held-out episodes for which chunks are sampled and compared with the recorded ones; 0: none."""
    eval_every: int = 1000
    """Updates between measurements on the held-out episodes."""
    env: str | None = None
    """A simulator (metaworld) in which each saved policy is tried; by default none."""
    env_tasks: str | None = None
    """Its tasks, separated by commas; by default those of the dataset."""
    env_episodes: int = 10
    """Episodes per task."""
    save_every: int = 1000
    """Updates between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept as well."""
    log_every: int = 50
    """Updates between lines in metrics.jsonl."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl: tensorboard, wandb."""
    workers: int = 1
    """Processes that prepare samples, of each process that trains; 0: it does so itself."""
    image_cache_gb: float = 4.0
    """Compressed images that each of these processes keeps in memory, in GB (10⁹ bytes)."""
    device: str | None = None
    """Where the model is trained, cpu or cuda; by default cuda where there is one."""

    def __post_init__(self) -> None:
        positive = "num_steps batch_size accumulate num_draws holdout_samples eval_every save_every keep log_every"
        for name in (*positive.split(), "env_episodes"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be a positive integer, got {getattr(self, name)}.")
        if self.keep_every is not None and self.keep_every < 1:
            raise TrainingError(f"keep_every must be a positive integer, got {self.keep_every}.")
        not_negative = "warmup_steps state_noise weight_decay workers seed chunk_samples shard_size image_cache_gb"
        for name in (*not_negative.split(), "max_given"):
            if getattr(self, name) < 0:
                raise TrainingError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("max_grad_norm", "learning_rate", "timescale"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.holdout < 1:
            raise TrainingError(f"ema_decay and holdout must be in [0, 1), got {self.ema_decay}, {self.holdout}.")
        for name, kind in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise TrainingError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        if self.mixture and (self.dataset or self.embodiment or self.episodes):
            raise TrainingError(
                "A recipe has either dataset, embodiment and episodes, or a mixture of several datasets."
            )
        if self.trained in ("lora", "lora_strict") and self.init is None:
            raise TrainingError(
                f"Trained {self.trained!r} learns beside trained weights: say which with init (--init)."
            )
        if self.optimizer == "adamw8bit" and self.parallel != "ddp":
            raise TrainingError(
                "adamw8bit keeps its moments by blocks, which can't be sharded: use it with parallel ddp."
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets of the run."""
        return self.mixture or (
            Source(
                self.dataset,
                self.embodiment,
                episodes=self.episodes,
                prompt=self.prompt,
                rename=self.rename,
                norm_stats=self.norm_stats,
            ),
        )

    def to_json(self) -> str:
        """The document that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "TrainConfig":
        """Read a recipe; fields that it leaves out have their defaults.

        Args:
            path: a JSON file, or the name of a packaged recipe.
        """
        packaged = {file.stem: file for file in sorted((assets() / "recipes").glob("*.json"))}
        file = packaged.get(str(path), pathlib.Path(path))
        if not file.is_file():
            raise MissingFileError(f"There is no recipe {path}; packaged recipes are {', '.join(packaged)}.")
        try:
            return cls._from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise TrainingError(f"recipe {file}: {error}") from error

    @classmethod
    def _from_dict(cls, values: Any) -> "TrainConfig":
        values = dict(_known(values, cls, "a recipe"))
        for name, kind in (("augmentation", Augmentation), ("lora", LoraConfig)):
            if name in values:
                values[name] = kind(**_known(values[name], kind, name))
        sources = [_known(source, Source, "mixture") for source in values.get("mixture", ())]
        values["mixture"] = tuple(Source(**{**one, "rename": tuple(one.get("rename", ()))}) for one in sources)
        for name in ("trackers", "rename"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


_CHOICES: dict[str, Any] = {
    "trained": Trained,
    "frozen_dtype": Literal["float32", "bfloat16"],
    "loss": Literal["all", "real"],
    "schedule": Schedule,
    "optimizer": Kind,
    "dtype": Literal["float32", "bfloat16"],
    "checkpointing": Checkpointing,
    "parallel": Literal["ddp", "fsdp", "hybrid"],
}


def _known(values: Any, kind: type, what: str) -> dict[str, Any]:
    """The fields of a dataclass out of a JSON object, integers as floats where the field is one: JSON has a single kind
    of number."""
    if not isinstance(values, Mapping):
        raise TrainingError(f"{what} must be a JSON object, found {values!r}.")
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(types)):
        raise TrainingError(f"{what} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(types))}.")
    return {
        name: float(value) if types[name] is float and type(value) is int else value for name, value in values.items()
    }
