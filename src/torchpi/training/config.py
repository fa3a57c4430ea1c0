"""A training recipe: everything that decides a run, in groups, as one JSON document."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tyro

from torchpi.assets import assets
from torchpi.config import Finetune, LoraConfig
from torchpi.errors import MissingFileError, TrainingError, closest, counted
from torchpi.randomness import checked_seed
from torchpi.schema import parse, read_json

Schedule = Literal["cosine", "rsqrt", "constant"]
Optimizer = Literal["adamw", "adamw8bit"]
Checkpointing = Literal["none", "full", "selective"]

Count = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Checked:
    """Checks the fields of a dataclass against the ranges and choices in their types."""

    def __post_init__(self) -> None:
        plain = get_type_hints(type(self))
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            try:
                msgspec.convert(getattr(self, name), kind)
            except msgspec.ValidationError as problem:
                rule = str(problem).removeprefix("Expected ")
                if get_origin(plain[name]) is Literal:
                    rule = f"one of {', '.join(get_args(plain[name]))}"
                raise TrainingError(f"{name} must be {rule}, got {getattr(self, name)!r}.") from problem


@dataclasses.dataclass(frozen=True)
class Augmentation(_Checked):
    """Random changes of the images; 0 switches a change off."""

    crop: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    """Fraction of the image's side that a crop keeps; 1 switches it off."""
    degrees: Annotated[float, msgspec.Meta(ge=0, le=180)] = 5.0
    """Rotation in ±degrees."""
    brightness: Fraction = 0.3
    """Change of the value in ±fractions."""
    contrast: Share = 0.4
    """Steepness of the value's curve, in (-1, 1)."""
    saturation: Fraction = 0.5
    """Change of the saturation in ±fractions."""
    hue: Fraction = 0.1
    """Change of the hue in ±turns."""
    color_probability: Fraction = 0.5
    """Fraction of the images whose colours are changed."""
    like_openpi: bool = False
    """Follow openpi's code where it differs from its intent: one random draw for all cameras of a sample, and no
    saturation."""


@dataclasses.dataclass(frozen=True)
class Source(_Checked):
    """One dataset of a mixture."""

    dataset: str
    """A LeRobot dataset: a folder, or hf://ORG/NAME."""
    embodiment: str
    """The robot, which says what cameras, state and actions are: a name (metaworld, aloha, …) or a JSON file."""
    weight: Positive = 1.0
    """Its share of the samples, relative to the sum of all weights."""
    episodes: str | None = None
    """Episodes to use, for example "0:40,57" or "task:open *"; by default all."""
    prompt: str | None = None
    """The instruction of all episodes, in place of their tasks."""
    rename: tuple[str, ...] = ()
    """Renamed columns, see `DataConfig.rename`."""
    fps: Positive | None = None
    """Frames per second to read it at, see `DataConfig.fps`."""
    tolerance_s: Positive | None = None
    """See `DataConfig.tolerance_s`."""
    norm_stats: str = "dataset"
    """Normalization statistics, see `DataConfig.norm_stats`."""


_OF_ONE_DATASET = ("dataset", "embodiment", "episodes", "prompt", "rename", "fps", "tolerance_s", "norm_stats")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """Samples: the dataset, its statistics and its augmentation."""

    dataset: str = ""
    """A LeRobot dataset: a folder, or hf://ORG/NAME[@REVISION]."""
    embodiment: str = ""
    """The robot, which says what cameras, state and actions are: a name (metaworld, aloha, …) or a JSON file."""
    episodes: Annotated[str | None, tyro.conf.arg(name="select")] = None
    """Episodes to use, for example "0:40,57" or "task:open *"; by default all."""
    prompt: str | None = None
    """The instruction of all episodes, in place of their tasks."""
    rename: tuple[str, ...] = ()
    """Names of the dataset that differ from LeRobot's and the robot's: OLD=NEW, for example actions=action; columns
    that have to be joined: joint_position+gripper_position=observation.state."""
    fps: Positive | None = None
    """Frames per second to read the dataset at, where the robot acts at another rate than it was recorded with: the
    nearest frames, and actions as `torchpi.data.rate` says; by default those of the dataset, which must be the robot's
    control_hz."""
    tolerance_s: Positive | None = None
    """Seconds by which timestamps and frames of videos may be off their times; by default a quarter of a frame."""
    mixture: Annotated[tuple[Source, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """Several datasets in place of one, mixed by their weights; in a recipe's file, a list of objects. The policy is
    saved for the first one's robot."""
    norm_stats: str = "dataset"
    """Normalization statistics: "dataset" (of the episodes that are trained on), "init" or "init:ASSET_ID" (of the
    initial weights), or a norm_stats.json."""
    skip_idle: bool = False
    """Leave out frames at which the robot rests."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """Random changes of the images."""
    state_noise: NotNegativeFloat = 0.0
    """Standard deviation of noise on the normalized state, whose range is [-1, 1]."""
    workers: NotNegative = 1
    """Processes that prepare samples for each training process; 0: it prepares them itself."""
    image_cache_gb: NotNegativeFloat = 4.0
    """Compressed images that each of these processes keeps in memory, in GB (10⁹ bytes)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _OF_ONE_DATASET if getattr(self, name) != getattr(DataConfig, name)]
        if self.mixture and given:
            raise TrainingError(
                f"A recipe has either {', '.join(given)}, or a mixture of several datasets with theirs; state them in "
                "the mixture's entries."
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets of the run."""
        return self.mixture or (Source(**{name: getattr(self, name) for name in _OF_ONE_DATASET}),)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
    """The initial weights, and how much of the model is trained in which precision."""

    init: str | None = None
    """Initial weights: a policy folder, a checkpoint, PaliGemma's .npz file, hf://… or gs://…; by default random."""
    config: Annotated[str | None, tyro.conf.arg(name="model")] = None
    """The model's sizes, a preset's name or a JSON file; by default those of the initial weights. Without these, a
    model of these sizes is trained from scratch."""
    adapt: bool = False
    """Cut or extend the initial weights where the model has other sizes; without it that is an error."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json; by default that of the initial weights, or from scratch the published
    models', for a small vocabulary the packaged one."""
    preprocessing: Literal["openpi", "lerobot", "lerobot_0.4"] | None = None
    """As which program to resize images and to write the state into the prompt, lerobot is 0.5 and later; by default as
    the initial weights, or from scratch openpi."""
    finetune: Finetune = "full"
    """Trained parameters: "full"; "frozen_vision" (all but SigLIP); "expert" (the action expert and the projections);
    "lora" (openpi's rule: LoRA matrices, SigLIP and the projections); "lora_strict" (LoRA matrices and projections)."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Rank and alpha of "lora" and "lora_strict"."""
    lora_alpha: tuple[float, float] | None = None
    """Of the backbone and the action expert, of the LoRA in initial weights of openpi's JAX; needed unless its ranks
    are openpi's."""
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the frozen weights in memory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the matmuls, by default bfloat16 where the device has such arithmetic and float32 elsewhere; weights,
    accumulated gradients and the optimizer are float32."""
    activation_checkpointing: Checkpointing = "none"
    """Activations that are recomputed in the backward pass instead of kept: "none", "full" (all but each layer's input)
    or "selective" (all but the results of matmuls with weights)."""
    compile: bool = False
    """Compile the layers (torch.compile), anew for each length to which prompts are padded; takes a minute each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains_lora and self.init is None:
            raise TrainingError(f"finetune {self.finetune!r} needs initial weights: set init (--init).")
        if self.lora_alpha is not None and self.init is None:
            raise TrainingError("lora_alpha is that of initial weights: set init (--init).")

    @property
    def trains_lora(self) -> bool:
        """Low-rank matrices are trained in place of the weights that they are added to."""
        return self.finetune in ("lora", "lora_strict")


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Checked):
    """The loss, the learning-rate schedule and the optimizer."""

    flow_samples_per_obs: Count = 1
    """Flow samples, pairs of noise and time, per observation; they share the pass over images and prompt, which is
    most of the work."""
    loss: Literal["all", "real"] = "all"
    """Elements in the mean of the loss: "all" of a chunk, padding included, as openpi; or only "real" ones, without
    padded dimensions and steps past the end of the episode."""
    max_action_prefix: NotNegative = 0
    """Training-time real-time chunking: up to so many first actions of a chunk are an action prefix, without noise,
    like those of the chunk that is being executed; the number is drawn per flow sample, and the loss is of the others.
    0: none."""
    lr: Positive = 2.5e-5
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """Learning rate after the warm-up: "cosine" to min_lr at decay_steps, "rsqrt" or "constant"."""
    warmup_steps: NotNegative = 1000
    """Updates until the peak."""
    decay_steps: int | None = None
    """Update at which the cosine reaches min_lr; by default num_steps."""
    min_lr: float = 2.5e-6
    """Final learning rate of the cosine."""
    timescale: Positive = 10_000.0
    """Timescale of "rsqrt": lr/√(1 + (step − warmup_steps)/timescale)."""
    optimizer: Optimizer = "adamw"
    """"adamw", or "adamw8bit": moments in 8 bits (bitsandbytes)."""
    weight_decay: NotNegativeFloat = 1e-10
    """AdamW's weight decay, on all weights."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled to at most this global norm."""
    ema_decay: Share = 0.99
    """Decay of the exponential moving average (EMA) of the weights, with which the policy is saved; 0: no average."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig(_Checked):
    """Several processes (torchrun)."""

    strategy: Annotated[Literal["ddp", "fsdp", "hybrid"], tyro.conf.arg(name="parallel")] = "ddp"
    """Each process has the whole model ("ddp"), a shard of it ("fsdp"), or a shard within its group of shard_size
    ("hybrid")."""
    shard_size: NotNegative = 0
    """Processes that share one copy of the model, for "hybrid"; 0: those of a node."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Checked):
    """Saved checkpoints."""

    save_every: Count = 1000
    """Updates between checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this step are kept as well."""


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Checked):
    """Evaluation during the run: held-out episodes and simulation."""

    holdout: Share = 0.02
    """Fraction of the episodes that are held out for evaluation; at least one episode, unless it is 0."""
    holdout_samples: Count = 256
    """Held-out samples whose loss is evaluated."""
    chunk_samples: NotNegative = 32
    """Held-out samples for which chunks are sampled and compared with the recorded ones; 0: none."""
    eval_every: Count = 1000
    """Updates between evaluations on the held-out episodes."""
    env: str | None = None
    """A simulator (metaworld, so101) in which each saved policy is evaluated; by default none."""
    env_tasks: str | None = None
    """Its tasks, separated by commas; by default those of the dataset."""
    env_episodes: Count = 10
    """Episodes per task."""

    @property
    def tasks(self) -> list[str] | None:
        """The names in `env_tasks`."""
        return None if self.env_tasks is None else [name.strip() for name in self.env_tasks.split(",")]


class _FlatFields(type):
    """Lets a recipe be written without its groups as well, by options and their old names: TrainConfig(lr=1e-4)."""

    def __call__(cls, **fields: Any) -> Any:
        given = {name: value for name, value in fields.items() if name in _GROUPS and not isinstance(value, Mapping)}
        assert len({isinstance(value, _GROUPS[name]) for name, value in given.items()}) < 2, "use replace()"
        places = _places_of(fields, "The recipe")
        for group, name in places:
            if (group, name) in _OPTIONS or (not group and name in _GROUPS):
                continue
            close = closest(name, [*_PLACES, *_GROUPS, *RENAMED])
            hint = f"did you mean {RENAMED.get(close, close)}?" if close else "torchpi train --help lists all."
            raise TrainingError(f"A recipe has no option {name}; {hint}")
        return super().__call__(
            **{
                name: _GROUPS[name](**value) if name in _GROUPS and isinstance(value, Mapping) else value
                for name, value in _in_groups(places).items()
            }
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked, metaclass=_FlatFields):
    """A recipe. The defaults are openpi's; RUN/train.json holds a run's own, and is a recipe like any other."""

    num_steps: Count = 30_000
    """Updates of the weights."""
    batch_size: Count = 32
    """Samples per update, over all processes."""
    grad_accum_steps: Count = 1
    """Micro-batches per update: each process computes batch_size / processes / grad_accum_steps samples at once."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str | None = None
    """Device of the model, cpu or cuda; by default cuda where there is one."""
    log_every: Count = 50
    """Updates between lines in metrics.jsonl."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of the metrics besides metrics.jsonl: tensorboard, wandb."""
    wandb_project: str | None = None
    """Project at Weights & Biases, by default that of WANDB_PROJECT, or torchpi."""
    wandb_name: str | None = None
    """The run's name there, by default that of WANDB_NAME, or of its folder."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        checked_seed(self.seed)
        super().__post_init__()
        if self.optim.optimizer == "adamw8bit" and self.parallel.strategy != "ddp":
            raise TrainingError(
                "adamw8bit keeps its moments by blocks, which can't be sharded: use it with parallel ddp."
            )

    def micro_batch_size(self, world_size: int) -> int:
        """Samples that each of the processes computes at once."""
        parts = world_size * self.grad_accum_steps
        if self.batch_size % parts:
            raise TrainingError(
                f"batch_size {self.batch_size} can't be divided by {counted(world_size, 'process', 'processes')} × "
                f"{self.grad_accum_steps} micro-batches; choose a multiple of {parts}."
            )
        return self.batch_size // parts

    @property
    def options(self) -> dict[str, Any]:
        """All fields without their groups, by the names of their options."""
        return flat_options(dataclasses.asdict(self))

    def replace(self, **options: Any) -> "TrainConfig":
        """A copy with other values of options: `config.replace(lr=1e-4, model="tiny")`."""
        return TrainConfig(**_in_groups(_places_of(vars(self)) | _places_of(options, "The recipe")))

    def to_json(self) -> str:
        """The document that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "TrainConfig":
        """Read a recipe, in groups or flat as earlier versions wrote it; missing fields have their defaults.

        Args:
            path: a JSON file, or the name of a packaged recipe.
        """
        packaged = {file.stem: file for file in sorted((assets() / "recipes").glob("*.json"))}
        file = packaged.get(str(path), pathlib.Path(path))
        if not file.is_file():
            raise MissingFileError(f"There is no recipe {path}; packaged recipes are {', '.join(packaged)}.")
        if file.suffix == ".py":
            raise TrainingError(f"A Python recipe is run: python {path}, with the options of torchpi train.")
        where, fields = f"The recipe {file}", read_json(file, error=TrainingError)
        if isinstance(fields, Mapping):
            fields = _in_groups(_places_of(fields, where))
        return parse(cls, fields, where, error=TrainingError)


Place = tuple[str, str]
"""Group of an option ("": none) and the field's name there."""

_GROUPS: dict[str, Any] = {
    field.name: kind
    for field in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(kind := field.default_factory)
}
_PLACES: dict[str, Place] = {
    **{field.name: ("", field.name) for field in dataclasses.fields(TrainConfig) if field.name not in _GROUPS},
    **{field.name: (group, field.name) for group, kind in _GROUPS.items() for field in dataclasses.fields(kind)},
    "model": ("model", "config"),
    "parallel": ("parallel", "strategy"),
}
del _PLACES["config"], _PLACES["strategy"]  # fields whose options have other names
_OPTIONS = {place: option for option, place in _PLACES.items()}

RENAMED = {
    "accumulate": "grad_accum_steps",
    "num_draws": "flow_samples_per_obs",
    "learning_rate": "lr",
    "final_learning_rate": "min_lr",
    "schedule": "lr_schedule",
    "trained": "finetune",
    "checkpointing": "activation_checkpointing",
    "max_given": "max_action_prefix",
}
"""Options by the names of earlier versions."""
RENAMED_VALUES = {"finetune": {"all": "full"}, "activation_checkpointing": {"layers": "full"}}
"""Values of options by those of earlier versions, which go with the earlier name only."""


def _places_of(fields: Mapping[str, Any], where: str | None = None) -> dict[Place, Any]:
    """The values of a recipe by their places: of groups (a mapping or their class), options, or both.

    Args:
        where: the document's name in the errors about an option that is given twice, and about earlier names and values
            beside present ones; by default there are none.
    """
    defaults, found, given = dict[Place, Any](), dict[Place, Any](), dict[Place, str]()
    for name, group in fields.items():
        if isinstance(group, _GROUPS.get(name, ())):
            defaults |= {(name, key): value for key, value in vars(group).items()}
            continue
        nested = name in _GROUPS and isinstance(group, Mapping)
        for key, value in group.items() if nested else [(name, group)]:
            option, shown = RENAMED.get(key, key), f"{name}.{key}" if nested else key
            now = RENAMED_VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value
            place = (name, key) if nested else _PLACES.get(option, ("", key))
            if where and nested and option != key:
                raise TrainingError(f"{where}: {shown} is now {'.'.join(filter(None, _PLACES[option]))}.")
            if where and place in given:
                raise TrainingError(f"{where} has both {given[place]} and {shown}, the same option; leave one out.")
            if where and option == key and value != now:
                raise TrainingError(f"{where}: {shown} {value!r} is now {now!r}.")
            found[place], given[place] = now, shown
    return defaults | found


def _in_groups(places: Mapping[Place, Any]) -> dict[str, Any]:
    """A recipe's document with the values at their places."""
    document: dict[str, Any] = {}
    for (group, name), value in places.items():
        (document.setdefault(group, {}) if group else document)[name] = value
    return document


def flat_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a recipe's document by their names, whichever version wrote it."""
    return {_OPTIONS.get(place, place[1]): value for place, value in _places_of(document).items()}
