"""Everything that defines a policy except its weights: stated in a checkpoint, or passed to `load_policy`."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torchpi.assets import assets
from torchpi.checkpoints.address import existing_file
from torchpi.config import PRESETS, Pi0Config
from torchpi.errors import CheckpointError, MissingExtraError, MissingFileError, PolicyError, counted, first_of, listed
from torchpi.model.flow import check_num_steps
from torchpi.robots import EMBODIMENTS, Embodiment, get_embodiment
from torchpi.schema import check_json
from torchpi.transforms.images import OPENPI_IMAGES, ImageTransform
from torchpi.transforms.normalize import Normalization, NormStats, load_norm_stats, rewrite_stats
from torchpi.transforms.prompt import load_tokenizer

TOKENIZER = "gs://big_vision/paligemma_tokenizer.model"
"""The published models' tokenizer, in a public bucket."""
MAX_ACTION_PREFIX = "max_action_prefix"
"""Metadata key: length of the longest action prefix that the policy was trained on (training-time RTC)."""
FACTS = frozenset(
    (
        "action_horizon", "action_names", "action_units", "action_commands", "action_limits", "action_range",
        "control_hz", "execute_steps", "num_steps",
        "embodiment", "observation", "image_transform", "untrained_actions", "default_prompt", "engine",
    )
)  # fmt: skip
"""Keys of `Policy.metadata` whose values follow from the embodiment and the model."""
Preprocessing = Literal["openpi", "lerobot", "lerobot_0.4"]
"""The program whose image resizing and prompt format a policy uses; "lerobot" is LeRobot 0.5 and later."""
PREPROCESSING: Mapping[Preprocessing, tuple[ImageTransform, int | None]] = {
    "openpi": (OPENPI_IMAGES, None),
    "lerobot": (ImageTransform(filter="bilinear"), None),
    "lerobot_0.4": (ImageTransform(filter="bilinear", bars=-3), 32),
}
"""The image transform of each program, and the dimension to which it pads the state in the prompt."""
_MAX_METADATA_BYTES = 1_000_000
"""Limit of the metadata that a server sends to every client that connects."""


def check_metadata(metadata: Mapping[str, Any], robot: Embodiment | None, prompt: str | None, source: str) -> None:
    """Raise an error if metadata can't be sent to clients, or redefines a value of the embodiment or the model."""
    robot_metadata = dict(robot.metadata) if robot else {}
    for name, value in {**robot_metadata, **metadata, "default_prompt": prompt}.items():
        check_json({f"{name}": value}, f"{source}: metadata: {name!a:.80}", error=PolicyError)
    everything = [robot_metadata, dict(metadata), prompt]
    check_json(everything, f"{source}: metadata", error=PolicyError, max_bytes=_MAX_METADATA_BYTES)
    clashes = [name for name in {**robot_metadata, **metadata} if name in FACTS or f"{name}".startswith("torchpi/")]
    clashes += [name for name in metadata if name in robot_metadata and metadata[name] != robot_metadata[name]]
    if clashes:
        raise PolicyError(
            f"{source}: metadata can't have {first_of([f'{name!s:.80}' for name in clashes])}: these keys are reserved "
            "for values of the embodiment, the model and the server. Remove or rename them."
        )
    max_prefix = metadata.get(MAX_ACTION_PREFIX, 0)
    if type(max_prefix) is not int or max_prefix < 0:
        raise PolicyError(f"{source}: metadata: {MAX_ACTION_PREFIX} is {max_prefix!a:.80}; expected an integer >= 0.")


def check_sizes(robot: Embodiment, stats_dim: int, config: Pi0Config, tokenizer: pathlib.Path, num_tokens: int) -> None:
    """Raise an error if the actions do not fit the model or the statistics, or the tokenizer has too many tokens."""
    if robot.action_size > config.action_dim:
        raise PolicyError(
            f"embodiment {robot.name!r} has {robot.action_size} action dimensions, the model only {config.action_dim}."
        )
    if stats_dim < robot.action_size:
        raise PolicyError(
            f"The action statistics have {counted(stats_dim, 'dimension')}, embodiment {robot.name!r} has "
            f"{robot.action_size}; they belong to another robot."
        )
    if num_tokens > config.vocab_size:
        raise PolicyError(
            f"The tokenizer {tokenizer} has {num_tokens} tokens, the model's embedding only {config.vocab_size}; it "
            "belongs to another model."
        )


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Everything that defines a policy except its weights; None: the checkpoint does not state it."""

    source: str
    """The checkpoint, for error messages."""
    embodiment: Embodiment | None = None
    norm_stats: Mapping[str, NormStats] | None = None
    """Statistics of "state" and "actions"."""
    normalization: Mapping[str, Normalization] | None = None
    """Rules for "state" and "actions"; None: openpi's, which depend on the variant."""
    tokenizer: pathlib.Path | None = None
    prompt_format: str = "openpi"
    truncation: str = "instruction"
    prompt_state_dim: int | None = None
    """Dimensions to which the state in the prompt is padded with zeros; None: no padding."""
    image_transform: ImageTransform = OPENPI_IMAGES
    unstated: str = ""
    """Warning that the checkpoint does not state its image and prompt preprocessing; empty if it does."""
    default_prompt: str | None = None
    num_steps: int = 10
    """Default number of Euler steps."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assets: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    """Paths of an openpi checkpoint's norm_stats.json files by asset ID, one per robot."""
    is_policy_folder: bool = False
    """The checkpoint is a policy folder, which must contain its tokenizer."""

    def __post_init__(self) -> None:
        """Check the fields that do not depend on the weights."""
        check_num_steps(self.num_steps, f"{self.source}: ")
        check_metadata(self.metadata, self.embodiment, self.default_prompt, self.source)

    def requested(
        self,
        *,
        embodiment: str | pathlib.Path | Embodiment | None = None,
        normalization: Literal["z_score", "quantile"] | None = None,
        norm_stats: str | pathlib.Path | None = None,
        asset_id: str | None = None,
        tokenizer: str | pathlib.Path | None = None,
        default_prompt: str | None = None,
        truncation: Literal["instruction", "original"] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> "PolicySpec":
        """Apply the arguments of `load_policy`; the result has an embodiment and statistics.

        Does not download the published models' tokenizer, see `with_tokenizer`.
        """
        robot = self.embodiment if embodiment is None else get_embodiment(embodiment)
        if robot is None:
            raise PolicyError(
                f"{self.source} does not say which robot it is for: pass embodiment=, one of {', '.join(EMBODIMENTS)}, "
                f"a JSON file or an Embodiment (and config=, one of {', '.join(PRESETS)}, or your own)."
            )
        self._check_robot(robot, norm_stats)
        if asset_id is not None and (self.norm_stats or norm_stats):
            other = "norm_stats= gives a file" if norm_stats else f"{self.source} has statistics of its own"
            raise PolicyError(
                f"asset_id={asset_id!r} chooses among the statistics of an openpi checkpoint's assets, but {other}; "
                "leave it out."
            )
        stats, rules = self.norm_stats, self.normalization
        if norm_stats is not None or stats is None:
            stats = load_norm_stats(norm_stats or self.asset(asset_id, robot.asset_id))
            if embodiment is None and self.norm_stats is None and rules is not None and len(robot.state) == 1:
                # The features of a LeRobot base may have more dimensions than the robot that the statistics belong to.
                state = dataclasses.replace(robot.state[0], names=robot.state[0].names[: stats["state"].dim])
                actions = robot.actions[: stats["actions"].dim]
                robot = dataclasses.replace(robot, state=(state,), actions=actions)
        if normalization is not None:
            rules = dict.fromkeys(("state", "actions"), Normalization(normalization, "openpi"))
        return dataclasses.replace(
            self.preprocessed_by(preprocessing),
            embodiment=robot,
            norm_stats=stats,
            normalization=rules,
            tokenizer=self.tokenizer if tokenizer is None else existing_file(tokenizer),
            # A new embodiment brings its own default prompt.
            default_prompt=self.default_prompt if default_prompt is None and embodiment is None else default_prompt,
            truncation=truncation or self.truncation,
        )

    def preprocessed_by(self, program: Preprocessing | None) -> "PolicySpec":
        """Use a program's image transform and prompt format; None: the checkpoint's, warning if it states none."""
        if program is not None:
            if program not in PREPROCESSING:
                raise PolicyError(f"preprocessing={program!r} is not one of {', '.join(PREPROCESSING)}.")
            transform, state_dim = PREPROCESSING[program]
            return dataclasses.replace(self, image_transform=transform, prompt_state_dim=state_dim)
        if self.unstated:
            warnings.warn(self.unstated, UserWarning, stacklevel=3)
        return self

    def require_preprocessing(self, program: Literal["openpi", "lerobot"], config: Pi0Config) -> list[str]:
        """Raise an error if a program can't reproduce the policy's image padding or prompt.

        Returns a note if it resizes images with another filter.
        """
        expected, images = PREPROCESSING[program][0], self.image_transform
        problems = []
        if images.bars != expected.bars:
            problems.append(f"bars of {images.bars} beside images that are not square")
        if config.state_in_prompt and self.embodiment and self.prompt_state_dim:
            padding = self.prompt_state_dim - self.embodiment.state_dims[-1]
            if padding > 0:
                problems.append(f"{padding} zeros behind the state in the prompt")
        if problems:
            raise CheckpointError(
                f"{self.source} was trained with {listed(problems)}, as in LeRobot up to 0.4.4; {program} does not do "
                "this now, and the policy would act differently. If the policy was trained without these, or (for the "
                f'bars) all its images are square, pass preprocessing="{program}".'
            )
        if images.filter == expected.filter:
            return []
        return [
            f"{program} resizes images with another filter ({expected.filter}); send images of the model's size, "
            f"resized with torchpi.transforms.resize_with_pad ({images.filter})"
        ]

    def _check_robot(self, robot: Embodiment, norm_stats: str | pathlib.Path | None) -> None:
        """Raise an error if the checkpoint's statistics can't belong to a robot with these dimensions."""
        trained = self.embodiment
        if trained is None or self.norm_stats is None or norm_stats is not None:
            return
        dims = {"state": (robot.state_dims, trained.state_dims), "action": ([robot.action_size], [trained.action_size])}
        for what, (requested_dims, trained_dims) in dims.items():
            if not {*requested_dims} & {*trained_dims}:
                raise PolicyError(
                    f"{self.source} is for embodiment {trained.name!r}, whose {what} has "
                    f"{counted(trained_dims[-1], 'dimension')}; that of embodiment {robot.name!r} has "
                    f"{requested_dims[-1]}. Use that robot, or pass norm_stats= with statistics of this one."
                )

    def with_tokenizer(self, vocab_size: int) -> "PolicySpec":
        """Add a tokenizer if the checkpoint has none: the packaged one if its vocabulary has this size, or else the
        published models', downloaded into the cache.
        """
        if self.tokenizer:
            return self
        if self.is_policy_folder:
            raise MissingFileError(
                f"{self.source} has no tokenizer.model or tokenizer.json, which a policy folder must contain; get the "
                "folder again, or pass tokenizer= with the file."
            )
        packaged = assets() / "tiny_tokenizer.model"
        if load_tokenizer(packaged).vocab_size == vocab_size:
            return dataclasses.replace(self, tokenizer=packaged)
        try:
            return dataclasses.replace(self, tokenizer=existing_file(TOKENIZER))
        except (OSError, CheckpointError, MissingExtraError) as error:
            error.add_note(
                f"It is the published models' tokenizer; pass tokenizer= with a file of {vocab_size} tokens instead."
            )
            raise

    def normalized_by(self, rules: Mapping[str, Normalization]) -> tuple["PolicySpec", list[str]]:
        """Change the normalization rules, and rewrite the statistics so that the normalized values stay the same.

        Also returns notes on the changes; see `rewrite_stats`.
        """
        assert self.embodiment is not None
        assert self.norm_stats is not None
        assert self.normalization is not None
        stats, notes = dict(self.norm_stats), []
        for key, names in (("state", self.embodiment.state_names), ("actions", self.embodiment.action_names)):
            old, new = self.normalization[key], rules[key]
            stats[key], constant = rewrite_stats(stats[key], old, new, what=key, names=names)
            if stats[key] is self.norm_stats[key]:
                continue
            if new.kind == "z_score":
                rewritten = "mean and std"
            elif old.kind == "quantile":
                rewritten = "q01 and q99"
            else:
                rewritten = "q01 and q99, which are no longer quantiles of the data,"
            notes.append(
                f"normalization of {key} changes from {old.kind} with {old.eps_rule}'s eps to {new.kind} with "
                f"{new.eps_rule}'s: {rewritten} are rewritten to give the same numbers"
            )
            if constant:
                notes.append(
                    f"{key} {', '.join(constant)} (nearly) never changed in the data: other values are scaled "
                    "differently in the target, because of its eps"
                )
        return dataclasses.replace(self, norm_stats=stats, normalization=rules), notes

    def require_statistics(self) -> None:
        """Raise an error if the checkpoint has normalization rules but no statistics, like LeRobot's bases."""
        if self.norm_stats is None and self.normalization is not None:
            kinds = listed(f"{key} by {rule.kind}" for key, rule in self.normalization.items())
            raise PolicyError(
                f"{self.source} has no statistics, and normalizes {kinds}: pass norm_stats= with the "
                "norm_stats.json of the robot, which torchpi stats --out writes, or train it on the robot's dataset."
            )

    def asset(self, asset_id: str | None, robots_asset_id: str | None = None) -> pathlib.Path:
        """Path of the norm_stats.json for an asset ID, or else for the robot's, or else the only one."""
        self.require_statistics()
        if asset_id is None and robots_asset_id in self.assets:
            asset_id = robots_asset_id
        if asset_id is None and len(self.assets) == 1:
            return next(iter(self.assets.values()))
        names = ", ".join(self.assets)
        if asset_id is None:
            found = f"several: {names}; choose with asset_id=" if names else "none; pass norm_stats= with a path"
            raise PolicyError(f"No normalization statistics are chosen for {self.source}: its assets have {found}.")
        if asset_id not in self.assets:
            raise PolicyError(f"{self.source} has no statistics for asset_id {asset_id!r}; it has {names or 'none'}.")
        return self.assets[asset_id]


def state_dim_of(embodiment: Embodiment, stats_dim: int, action_dim: int) -> int:
    """Length of the policy's state: the embodiment's largest that the statistics and the model have room for."""
    fitting = [dim for dim in embodiment.state_dims if dim <= min(stats_dim, action_dim)]
    if not fitting:
        raise PolicyError(
            f"embodiment {embodiment.name!r} has a state of {listed(embodiment.state_dims, 'or')} dimensions, "
            f"but the statistics have {stats_dim} and the model's action_dim is {action_dim}; neither may be smaller. "
            "Use statistics of this robot, and a model with a larger action_dim: convert --action-dim, or for training "
            "--model and --adapt."
        )
    return fitting[-1]
