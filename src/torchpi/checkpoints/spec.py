"""Everything of a policy but its weights: what a checkpoint says, and what the arguments of `load_policy` add."""

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
"""The published models' tokenizer, which is public."""
MAX_ACTION_PREFIX = "max_action_prefix"
"""Key of a policy's metadata: the longest action prefix that it was trained to continue (training-time RTC)."""
_ACTIONS = tuple(f"action_{fact}" for fact in ("horizon", "names", "units", "commands", "limits", "range"))
_RATES = ("control_hz", "execute_steps", "num_steps")
_OTHERS = ("embodiment", "observation", "image_transform", "untrained_actions", "default_prompt", "engine")
FACTS = frozenset((*_ACTIONS, *_RATES, *_OTHERS))
"""Keys of `Policy.metadata` that embodiment and model decide."""
Preprocessing = Literal["openpi", "lerobot", "lerobot_0.4"]
"""The program as which images are resized, and the state is written into the prompt; lerobot: 0.5 and later."""
PREPROCESSING: Mapping[Preprocessing, tuple[ImageTransform, int | None]] = {
    "openpi": (OPENPI_IMAGES, None),
    "lerobot": (ImageTransform(filter="bilinear"), None),
    "lerobot_0.4": (ImageTransform(filter="bilinear", bars=-3), 32),
}
"""The images of each, and the dimensions to which it pads the state."""
_MAX_METADATA = 1_000_000
"""Bytes that every client gets at each connection."""


def check_metadata(metadata: Mapping[str, Any], robot: Embodiment | None, prompt: str | None, source: str) -> None:
    """Raise an error where free metadata can't be sent, or replace what the embodiment and the model say."""
    own = dict(robot.metadata) if robot else {}
    for name, value in {**own, **metadata, "default_prompt": prompt}.items():
        check_json({f"{name}": value}, f"{source}: metadata: {name!a:.80}", error=PolicyError)
    check_json([own, dict(metadata), prompt], f"{source}: metadata", error=PolicyError, max_bytes=_MAX_METADATA)
    clashes = [name for name in {**own, **metadata} if name in FACTS or f"{name}".startswith("torchpi/")]
    clashes += [name for name in metadata if name in own and metadata[name] != own[name]]
    if clashes:
        raise PolicyError(
            f"{source}: metadata can't have {first_of([f'{name!s:.80}' for name in clashes])}: clients are told there "
            "what the embodiment, the model and the server say. Take them out, or give them other names."
        )
    longest = metadata.get(MAX_ACTION_PREFIX, 0)
    if type(longest) is not int or longest < 0:
        raise PolicyError(f"{source}: metadata: {MAX_ACTION_PREFIX} is {longest!a:.80}; expected an integer from 0 on.")


def check_sizes(robot: Embodiment, stats_dim: int, config: Pi0Config, tokenizer: pathlib.Path, num_tokens: int) -> None:
    """Raise an error where actions do not fit model and statistics, or a tokenizer of so many tokens the model."""
    if robot.action_size > config.action_dim:
        raise PolicyError(
            f"embodiment {robot.name!r} has {robot.action_size} action dimensions, the model only {config.action_dim}."
        )
    if stats_dim < robot.action_size:
        raise PolicyError(
            f"The statistics of actions have {counted(stats_dim, 'dimension')}, embodiment {robot.name!r} has "
            f"{robot.action_size}; they belong to another robot."
        )
    if num_tokens > config.vocab_size:
        raise PolicyError(
            f"The tokenizer {tokenizer} has {num_tokens} tokens, the model's embedding only {config.vocab_size}; it "
            "belongs to another model."
        )


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Everything of a policy but its weights. None: the checkpoint does not say."""

    source: str
    """The checkpoint, for messages."""
    embodiment: Embodiment | None = None
    norm_stats: Mapping[str, NormStats] | None = None
    """Statistics of "state" and "actions"."""
    normalization: Mapping[str, Normalization] | None = None
    """The rule for "state" and for "actions"; None: openpi's, which follows the variant."""
    tokenizer: pathlib.Path | None = None
    prompt_format: str = "openpi"
    truncation: str = "instruction"
    prompt_state_dim: int | None = None
    """Dimensions of the state in the prompt, zeros behind the robot's; None: the robot's."""
    image_transform: ImageTransform = OPENPI_IMAGES
    unstated: str = ""
    """Warning about images and state in the prompt, where the checkpoint leaves them open; empty: it does not."""
    default_prompt: str | None = None
    num_steps: int = 10
    """Euler steps of an inference that does not ask for another number."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assets: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    """Paths of an openpi checkpoint's norm_stats.json files, by asset ID; one per robot."""
    is_policy_folder: bool = False
    """It is of a policy folder, which holds its tokenizer itself."""

    def __post_init__(self) -> None:
        """Check what can be checked before any weight is read."""
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
        """The spec with what the arguments of `load_policy` add and overrule; embodiment and statistics are known then.

        The published models' tokenizer is not downloaded, see `with_tokenizer`.
        """
        robot = self.embodiment if embodiment is None else get_embodiment(embodiment)
        if robot is None:
            raise PolicyError(
                f"{self.source} does not say which robot it is for: pass embodiment=, one of {', '.join(EMBODIMENTS)}, "
                f"a JSON file, or an Embodiment (and config=, one of {', '.join(PRESETS)}, or your own)."
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
                # A base's features may have more dimensions than the robot, which the statistics are of.
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
            # Another robot has its own default.
            default_prompt=self.default_prompt if default_prompt is None and embodiment is None else default_prompt,
            truncation=truncation or self.truncation,
        )

    def preprocessed_by(self, program: Preprocessing | None) -> "PolicySpec":
        """The spec with a program's images and prompt; None: the checkpoint's, with a warning where it is silent."""
        if program is not None:
            if program not in PREPROCESSING:
                raise PolicyError(f"preprocessing={program!r} is not one of {', '.join(PREPROCESSING)}.")
            transform, state_dim = PREPROCESSING[program]
            return dataclasses.replace(self, image_transform=transform, prompt_state_dim=state_dim)
        if self.unstated:
            warnings.warn(self.unstated, UserWarning, stacklevel=3)
        return self

    def require_preprocessing(self, program: Literal["openpi", "lerobot"], config: Pi0Config) -> list[str]:
        """Refuse images and prompts that a program does not make; a note on a resize that it does otherwise."""
        wanted, images, dim = PREPROCESSING[program][0], self.image_transform, self.prompt_state_dim or 0
        problems = [f"bars of {images.bars} beside images that are not square"] * (images.bars != wanted.bars)
        if config.state_in_prompt and self.embodiment and (own := self.embodiment.state_dims[-1]) < dim:
            problems.append(f"{dim - own} zeros behind the state in the prompt")
        if problems:
            raise CheckpointError(
                f"{self.source} was trained with {listed(problems)}, as by LeRobot until 0.4.4; {program} makes "
                "none now, and the policy would act otherwise. If it was trained without, or, as to the bars, sees "
                f'square images only, pass preprocessing="{program}".'
            )
        note = f"images are resized otherwise there ({wanted.filter}); send them in the model's size, resized by "
        return [f"{note}torchpi.transforms.resize_with_pad ({images.filter})"] * (images.filter != wanted.filter)

    def _check_robot(self, robot: Embodiment, norm_stats: str | pathlib.Path | None) -> None:
        """Refuse another robot than the checkpoint's whose dimensions its statistics can't be those of."""
        own = self.embodiment
        if own is None or self.norm_stats is None or norm_stats is not None:
            return
        lengths = {"state": (robot.state_dims, own.state_dims), "action": ([robot.action_size], [own.action_size])}
        for what, (dims, own_dims) in lengths.items():
            if not {*dims} & {*own_dims}:
                raise PolicyError(
                    f"{self.source} is of embodiment {own.name!r}, whose {what} has "
                    f"{counted(own_dims[-1], 'dimension')}; that of embodiment {robot.name!r} has {dims[-1]}. Take "
                    "that robot, or pass norm_stats= with statistics of this one."
                )

    def with_tokenizer(self, vocab_size: int) -> "PolicySpec":
        """The spec with a tokenizer, where the checkpoint has none: the packaged one if the model's vocabulary is its
        own, or the published models', downloaded into the cache.
        """
        if self.tokenizer:
            return self
        if self.is_policy_folder:
            raise MissingFileError(
                f"{self.source} has no tokenizer.model or tokenizer.json, which a policy folder holds; get it again, "
                "or pass tokenizer= with the file."
            )
        packaged = assets() / "tiny_tokenizer.model"
        if load_tokenizer(packaged).vocab_size == vocab_size:
            return dataclasses.replace(self, tokenizer=packaged)
        try:
            return dataclasses.replace(self, tokenizer=existing_file(TOKENIZER))
        except (OSError, CheckpointError, MissingExtraError) as error:
            error.add_note(f"It is the published models' tokenizer; pass tokenizer= with that of {vocab_size} tokens.")
            raise

    def normalized_by(self, rules: Mapping[str, Normalization]) -> tuple["PolicySpec", list[str]]:
        """The spec by other rules, with `rewrite_stats` of its statistics, which give the same numbers; and notes."""
        assert self.embodiment and self.norm_stats and self.normalization  # noqa: PT018
        stats, notes = dict(self.norm_stats), []
        for key, names in (("state", self.embodiment.state_names), ("actions", self.embodiment.action_names)):
            here, there = self.normalization[key], rules[key]
            stats[key], constant = rewrite_stats(stats[key], here, there, what=key, names=names)
            if stats[key] is self.norm_stats[key]:
                continue
            both = f"{here.kind} with {here.eps_rule}'s eps here, {there.kind} with {there.eps_rule}'s there"
            unlike = ", which are no quantiles of the data," if there.kind == "quantile" != here.kind else ""
            changed = "mean and std" if there.kind == "z_score" else f"q01 and q99{unlike}"
            notes.append(f"normalization of {key} is {both}: {changed} are rewritten to give the same numbers")
            if constant:
                notes.append(
                    f"{key} {', '.join(constant)} (nearly) never changed in the data: values that differ from that are "
                    "scaled otherwise there, by another eps"
                )
        return dataclasses.replace(self, norm_stats=stats, normalization=rules), notes

    def require_statistics(self) -> None:
        """Raise an error where the checkpoint says how it normalizes, and not by which numbers, as LeRobot's bases."""
        if self.norm_stats is None and self.normalization is not None:
            kinds = listed(f"{key} by {rule.kind}" for key, rule in self.normalization.items())
            raise PolicyError(
                f"{self.source} has no statistics, and normalizes {kinds}: pass norm_stats= with the "
                "norm_stats.json of the robot, which torchpi stats --out writes, or train it on the robot's dataset."
            )

    def asset(self, asset_id: str | None, robots_asset_id: str | None = None) -> pathlib.Path:
        """The norm_stats.json of a robot in an openpi checkpoint."""
        self.require_statistics()
        if asset_id is None and robots_asset_id in self.assets:
            asset_id = robots_asset_id
        if asset_id is None and len(self.assets) == 1:
            return next(iter(self.assets.values()))
        names = ", ".join(self.assets)
        if asset_id is None:
            found = f"several: {names}; choose with asset_id=" if names else "none; pass norm_stats= with a path"
            raise PolicyError(
                f"Which normalization statistics belong to {self.source}? In its assets there are {found}."
            )
        if asset_id not in self.assets:
            raise PolicyError(f"{self.source} has no statistics for asset_id {asset_id!r}; it has {names or 'none'}.")
        return self.assets[asset_id]


def state_dim_of(embodiment: Embodiment, stats_dim: int, action_dim: int) -> int:
    """Length of the state that this policy takes: the last of the embodiment's that fits statistics and model."""
    fitting = [dim for dim in embodiment.state_dims if dim <= min(stats_dim, action_dim)]
    if not fitting:
        raise PolicyError(
            f"embodiment {embodiment.name!r} has a state of {listed(embodiment.state_dims, 'or')} dimensions, "
            f"but the statistics have {stats_dim} and the model's action_dim is {action_dim}; neither may be less. "
            "Take statistics of this robot, and a model of larger action_dim: convert --action-dim, or in training "
            "--model and --adapt."
        )
    return fitting[-1]
