"""The training recipe: all options of a run, in groups, stored as one JSON document."""

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
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
FractionBelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class _Checked:
    """Base of dataclasses whose fields are checked against the ranges and choices in their annotations."""

    def __post_init__(self) -> None:
        plain_types = get_type_hints(type(self))
        for name, annotation in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, annotation)
            except msgspec.ValidationError as error:
                expected = str(error).removeprefix("Expected ")
                if get_origin(plain_types[name]) is Literal:
                    expected = f"one of {', '.join(get_args(plain_types[name]))}"
                raise TrainingError(f"{name} must be {expected}, got {value!r}.") from error


@dataclasses.dataclass(frozen=True)
class Augmentation(_Checked):
    """Random changes of the images; 0 disables a change."""

    crop: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.95
    """Side of the random crop, as a fraction of the image's side; 1 disables cropping."""
    degrees: Annotated[float, msgspec.Meta(ge=0, le=180)] = 5.0
    """Largest rotation in either direction, in degrees."""
    brightness: Fraction = 0.3
    """Largest change of the brightness (HSV value) in either direction, as a fraction."""
    contrast: FractionBelowOne = 0.4
    """Largest change of the contrast (steepness of the curve applied to the HSV value) in either direction."""
    saturation: Fraction = 0.5
    """Largest change of the saturation in either direction, as a fraction."""
    hue: Fraction = 0.1
    """Largest change of the hue in either direction, in turns."""
    color_probability: Fraction = 0.5
    """Probability that the colours of an image are changed."""
    like_openpi: bool = False
    """Follow openpi's code: the cameras of a sample share one random draw, and the saturation never changes."""


@dataclasses.dataclass(frozen=True)
class Source(_Checked):
    """One dataset of a mixture."""

    dataset: str
    """A LeRobot dataset: a folder, or hf://ORG/NAME."""
    embodiment: str
    """The robot, which defines the cameras, state and actions: a name (metaworld, aloha, …) or a JSON file."""
    weight: Positive = 1.0
    """Weight of this dataset in the mixture; its fraction of the samples is weight / sum of all weights."""
    episodes: str | None = None
    """Episodes to use, for example "0:40,57" or "task:open *"; all by default."""
    prompt: str | None = None
    """Instruction for all episodes, instead of their recorded tasks."""
    rename: tuple[str, ...] = ()
    """Columns to rename, see `DataConfig.rename`."""
    fps: Positive | None = None
    """Frame rate to read the dataset at, see `DataConfig.fps`."""
    tolerance_s: Positive | None = None
    """Tolerance of timestamps in seconds, see `DataConfig.tolerance_s`."""
    norm_stats: str = "dataset"
    """Normalization statistics, see `DataConfig.norm_stats`."""


_DATASET_FIELDS = ("dataset", "embodiment", "episodes", "prompt", "rename", "fps", "tolerance_s", "norm_stats")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """Samples: the dataset, its statistics and its augmentation."""

    dataset: str = ""
    """A LeRobot dataset: a folder, or hf://ORG/NAME[@REVISION]."""
    embodiment: str = ""
    """The robot, which defines the cameras, state and actions: a name (metaworld, aloha, …) or a JSON file."""
    episodes: Annotated[str | None, tyro.conf.arg(name="select")] = None
    """Episodes to use, for example "0:40,57" or "task:open *"; all by default."""
    prompt: str | None = None
    """Instruction for all episodes, instead of their recorded tasks."""
    rename: tuple[str, ...] = ()
    """Rename columns and cameras to LeRobot's names, as OLD=NEW: state=observation.state actions=action.
    Join columns with +: joint_position+gripper_position=observation.state."""
    fps: Positive | None = None
    """Frames per second to resample the dataset to, if the robot is controlled at another rate.
    The nearest frames are read, and actions converted. By default the recorded rate, which must be control_hz."""
    tolerance_s: Positive | None = None
    """Maximum error of timestamps and video frame times in seconds; by default a quarter of the frame interval."""
    mixture: Annotated[tuple[Source, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """Several datasets (a list of objects in a recipe), mixed by weight; the policy is saved for the first robot."""
    norm_stats: str = "dataset"
    """Normalization statistics: "dataset" (of the training episodes); "init" (the initial weights' statistics);
    "init:ASSET_ID" (theirs for another robot); or a norm_stats.json."""
    skip_idle: bool = False
    """Skip frames at which the robot does not move."""
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    """Random changes of the images."""
    state_noise: NotNegativeFloat = 0.0
    """Standard deviation of the noise added to the normalized state, whose range is [-1, 1]."""
    workers: NotNegative = 1
    """Worker processes that prepare samples for each training process; 0: the training process prepares them itself."""
    image_cache_gb: NotNegativeFloat = 4.0
    """Size of the cache of compressed images in each of these processes, in GB (10⁹ bytes)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        changed = [name for name in _DATASET_FIELDS if getattr(self, name) != getattr(DataConfig, name)]
        if self.mixture and changed:
            raise TrainingError(
                f"A recipe with a mixture of datasets can't also set {', '.join(changed)}; set them in the mixture's "
                "entries."
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The datasets of the run: the mixture, or the single dataset as a `Source`."""
        return self.mixture or (Source(**{name: getattr(self, name) for name in _DATASET_FIELDS}),)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
    """The initial weights, the trained parameters and their precision."""

    init: str | None = None
    """Initial weights: a policy folder, a checkpoint, PaliGemma's .npz file, hf://… or gs://…; random by default."""
    config: Annotated[str | None, tyro.conf.arg(name="model")] = None
    """The model's sizes: a preset or a JSON file; by default those of init. Without init: training from scratch."""
    adapt: bool = False
    """Cut or extend initial weights whose sizes differ from the model's; otherwise a difference is an error."""
    tokenizer: str | None = None
    """A SentencePiece model or tokenizer.json; by default the tokenizer of the initial weights.
    From scratch: the published models' tokenizer, or the packaged one if the vocabulary is small."""
    preprocessing: Literal["openpi", "lerobot", "lerobot_0.4"] | None = None
    """Library whose image resizing and prompt format are used (lerobot: 0.5 or later); by default init's, or openpi."""
    finetune: Finetune = "full"
    """Parameters to train: "full"; "frozen_vision" (all but SigLIP); "expert" (the action expert and the projections);
    "lora" (openpi's rule: LoRA matrices, SigLIP and the projections); "lora_strict" (LoRA matrices and projections)."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Rank and alpha for "lora" and "lora_strict"."""
    lora_alpha: tuple[float, float] | None = None
    """LoRA alphas of backbone and action expert in an openpi JAX checkpoint; needed unless its ranks are openpi's."""
    frozen_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype in which the frozen weights are kept."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the matmuls, bfloat16 by default if the device has it; trained weights and gradients stay float32."""
    activation_checkpointing: Checkpointing = "none"
    """Activations to recompute: "none", "full" (all but layer inputs) or "selective" (all but matmuls with weights)."""
    compile: bool = False
    """Compile the layers with torch.compile, once per padded prompt length; each takes about a minute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains_lora and self.init is None:
            raise TrainingError(f"finetune {self.finetune!r} needs initial weights: set init (--init).")
        if self.lora_alpha is not None and self.init is None:
            raise TrainingError("lora_alpha describes the initial weights, which are missing: set init (--init).")

    @property
    def trains_lora(self) -> bool:
        """True if LoRA matrices are trained instead of the weights that they are added to."""
        return self.finetune in ("lora", "lora_strict")


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Checked):
    """The loss, the learning-rate schedule and the optimizer."""

    flow_samples_per_obs: Count = 1
    """Flow samples (pairs of noise and time) per observation; they share the costly pass over images and prompt."""
    loss: Literal["all", "real"] = "all"
    """Elements of the loss: "all" (as in openpi) or "real": no padded dimensions and steps after the episode's end."""
    max_action_prefix: NotNegative = 0
    """Training-time real-time chunking: largest number of first actions that get no noise, drawn per flow sample.
    The robot would be executing them already, so they are left out of the loss; 0 disables it."""
    lr: Positive = 2.5e-5
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """Learning rate after the warm-up: "cosine" to min_lr at decay_steps, "rsqrt" or "constant"."""
    warmup_steps: NotNegative = 1000
    """Updates until the learning rate reaches its peak."""
    decay_steps: int | None = None
    """Update at which the cosine schedule reaches min_lr; num_steps by default."""
    min_lr: float = 2.5e-6
    """Final learning rate of the cosine schedule."""
    timescale: Positive = 10_000.0
    """Timescale of "rsqrt": lr/√(1 + (step − warmup_steps)/timescale)."""
    optimizer: Optimizer = "adamw"
    """Optimizer: "adamw", or "adamw8bit" with 8-bit moments (bitsandbytes)."""
    weight_decay: NotNegativeFloat = 1e-10
    """AdamW's weight decay, applied to all weights."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global L2 norm."""
    ema_decay: FractionBelowOne = 0.99
    """Decay of the exponential moving average (EMA) of the weights, which the saved policy has; 0 disables EMA."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig(_Checked):
    """Training in several processes (torchrun)."""

    strategy: Annotated[Literal["ddp", "fsdp", "hybrid"], tyro.conf.arg(name="parallel")] = "ddp"
    """Each process holds the whole model ("ddp"), a shard of it ("fsdp"), or a shard within its group ("hybrid")."""
    shard_size: NotNegative = 0
    """Processes that share one copy of the model, for "hybrid"; 0: the processes of a node."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Checked):
    """Saving and keeping checkpoints."""

    save_every: Count = 1000
    """Updates between checkpoints."""
    keep: Count = 2
    """Number of latest checkpoints to keep."""
    keep_every: Count | None = None
    """Also keep the checkpoints at multiples of this step."""


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Checked):
    """Evaluation during the run: held-out episodes and simulation."""

    holdout: FractionBelowOne = 0.02
    """Fraction of the episodes held out for evaluation; at least one episode unless 0."""
    holdout_samples: Count = 256
    """Held-out samples for the evaluation of the loss."""
    chunk_samples: NotNegative = 32
    """Held-out samples for which action chunks are sampled and compared with the recorded chunks; 0: none."""
    eval_every: Count = 1000
    """Updates between evaluations on the held-out episodes."""
    env: str | None = None
    """Simulator (metaworld, so101) in which to evaluate each saved policy; none by default."""
    env_tasks: str | None = None
    """Tasks of the simulator, separated by commas; by default the tasks of the dataset."""
    env_episodes: Count = 10
    """Simulated episodes per task."""

    @property
    def tasks(self) -> list[str] | None:
        """The task names in `env_tasks`."""
        return None if self.env_tasks is None else [name.strip() for name in self.env_tasks.split(",")]


class _AcceptsFlatOptions(type):
    """Metaclass that lets TrainConfig take options without their groups, old names included: TrainConfig(lr=1e-4)."""

    def __call__(cls, **fields: Any) -> Any:
        groups = {name: value for name, value in fields.items() if name in _GROUPS and not isinstance(value, Mapping)}
        assert len({isinstance(value, _GROUPS[name]) for name, value in groups.items()}) < 2, "use replace()"
        values = _values_by_path(fields, "The recipe")
        for group, name in values:
            if (group, name) in _OPTIONS or (not group and name in _GROUPS):
                continue
            close = closest(name, [*_PATHS, *_GROUPS, *RENAMED])
            hint = f"did you mean {RENAMED.get(close, close)}?" if close else "torchpi train --help lists all."
            raise TrainingError(f"A recipe has no option {name}; {hint}")
        arguments = _nested(values)
        for name, group_class in _GROUPS.items():
            if isinstance(arguments.get(name), Mapping):
                arguments[name] = group_class(**arguments[name])
        return super().__call__(**arguments)


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked, metaclass=_AcceptsFlatOptions):
    """A training recipe, with openpi's defaults. RUN/train.json is the recipe of a run and can be used again."""

    num_steps: Count = 30_000
    """Updates of the weights."""
    batch_size: Count = 32
    """Samples per update, over all processes."""
    grad_accum_steps: Count = 1
    """Micro-batches per update: each process computes batch_size / processes / grad_accum_steps samples at once."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str | None = None
    """Device of the model, cpu or cuda; by default cuda if available."""
    log_every: Count = 50
    """Updates between two lines in metrics.jsonl."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers that receive the metrics as well as metrics.jsonl: tensorboard, wandb."""
    wandb_project: str | None = None
    """Project at Weights & Biases; by default WANDB_PROJECT, or else torchpi."""
    wandb_name: str | None = None
    """Name of the run at Weights & Biases; by default WANDB_NAME, or else the name of the run folder."""
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
                "adamw8bit quantizes its moments in blocks, which can't be sharded: use it with parallel ddp."
            )

    def micro_batch_size(self, world_size: int) -> int:
        """Samples per micro-batch in each of `world_size` processes."""
        divisor = world_size * self.grad_accum_steps
        if self.batch_size % divisor:
            raise TrainingError(
                f"batch_size {self.batch_size} can't be divided by {counted(world_size, 'process', 'processes')} × "
                f"{self.grad_accum_steps} micro-batches; choose a multiple of {divisor}."
            )
        return self.batch_size // divisor

    @property
    def options(self) -> dict[str, Any]:
        """The values of all fields in one flat dictionary, by option name."""
        return flat_options(dataclasses.asdict(self))

    def replace(self, **options: Any) -> "TrainConfig":
        """Copy the recipe with other values of options: `config.replace(lr=1e-4, model="tiny")`."""
        return TrainConfig(**_nested(_values_by_path(vars(self)) | _values_by_path(options, "The recipe")))

    def to_json(self) -> str:
        """Write the JSON document that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "TrainConfig":
        """Read a recipe from a JSON file or by a packaged recipe's name; options may lie outside of their groups.

        Missing fields get their defaults.
        """
        packaged = {file.stem: file for file in sorted((assets() / "recipes").glob("*.json"))}
        file = packaged.get(str(path), pathlib.Path(path))
        if not file.is_file():
            raise MissingFileError(f"There is no recipe {path}; packaged recipes are {', '.join(packaged)}.")
        if file.suffix == ".py":
            raise TrainingError(f"A Python recipe is run: python {path}, with the options of torchpi train.")
        where, fields = f"The recipe {file}", read_json(file, error=TrainingError)
        if isinstance(fields, Mapping):
            fields = _nested(_values_by_path(fields, where))
        return parse(cls, fields, where, error=TrainingError)


Path = tuple[str, str]
"""Group of an option ("" for options without a group), and the name of its field."""

_GROUPS: dict[str, Any] = {
    field.name: kind
    for field in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(kind := field.default_factory)
}
_PATHS: dict[str, Path] = {
    **{field.name: ("", field.name) for field in dataclasses.fields(TrainConfig) if field.name not in _GROUPS},
    **{field.name: (group, field.name) for group, kind in _GROUPS.items() for field in dataclasses.fields(kind)},
    "model": ("model", "config"),
    "parallel": ("parallel", "strategy"),
}
del _PATHS["config"], _PATHS["strategy"]  # the options of these fields are "model" and "parallel"
_OPTIONS = {path: option for option, path in _PATHS.items()}

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
"""New names of options, by the names in earlier versions."""
RENAMED_VALUES = {"finetune": {"all": "full"}, "activation_checkpointing": {"layers": "full"}}
"""New values of options, by the values in earlier versions; valid only together with the option's old name."""


def _values_by_path(fields: Mapping[str, Any], where: str | None = None) -> dict[Path, Any]:
    """Map the path of each option to its value; old names and values are replaced by the new ones.

    Args:
        fields: groups (as dictionaries or dataclasses), single options, or both; options override dataclasses.
        where: the document's name in errors about options set twice and misplaced old names or values; None: no checks.
    """
    defaults, values, labels = dict[Path, Any](), dict[Path, Any](), dict[Path, str]()
    for name, value in fields.items():
        group_class = _GROUPS.get(name)
        if group_class is not None and isinstance(value, group_class):
            defaults |= {(name, field): field_value for field, field_value in vars(value).items()}
            continue
        is_group = group_class is not None and isinstance(value, Mapping)
        for key, stated in value.items() if is_group else [(name, value)]:
            option = RENAMED.get(key, key)
            label = f"{name}.{key}" if is_group else key
            path = (name, key) if is_group else _PATHS.get(option, ("", key))
            current = RENAMED_VALUES.get(option, {}).get(stated, stated) if isinstance(stated, str) else stated
            if where and is_group and option != key:
                raise TrainingError(f"{where}: {label} is now {'.'.join(filter(None, _PATHS[option]))}.")
            if where and path in labels:
                raise TrainingError(f"{where} has both {labels[path]} and {label}, the same option; remove one.")
            if where and option == key and stated != current:
                raise TrainingError(f"{where}: {label} {stated!r} is now {current!r}.")
            values[path], labels[path] = current, label
    return defaults | values


def _nested(values: Mapping[Path, Any]) -> dict[str, Any]:
    """Arrange values as a recipe document, with a dictionary per group."""
    document: dict[str, Any] = {}
    for (group, name), value in values.items():
        target = document.setdefault(group, {}) if group else document
        target[name] = value
    return document


def flat_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe document by option name, whichever version wrote the document."""
    return {_OPTIONS.get(path, path[1]): value for path, value in _values_by_path(document).items()}
