"""The command line: commands by name. Each is a dataclass of its arguments in one of these modules."""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import tyro
from rich.console import Console

from torchpi.cli import bench, checkpoints, data, evaluation, hub, init, policy, serving, stats, training, view
from torchpi.cli.arguments import REGISTRY, in_options, options_of, translate
from torchpi.cli.common import Command
from torchpi.data.files import ALLOW_OUTSIDE
from torchpi.errors import UsageError, closest, printable
from torchpi.training.config import TrainConfig
from torchpi.version import __version__

GROUPS: dict[str, dict[str, type[Command]]] = {
    "the beginning": {"init": init.Init},
    "a policy": {
        "demo": policy.Demo,
        "infer": policy.Infer,
        "serve": serving.Serve,
        "trace": policy.Trace,
        "doctor": checkpoints.Doctor,
        "compare": checkpoints.Compare,
    },
    "recordings": {
        "data inspect": data.DataInspect,
        "data draft": data.DataDraft,
        "data merge": data.DataMerge,
        "data split": data.DataSplit,
        "data delete": data.DataDelete,
        "data resample": data.DataResample,
        "sim record": data.SimRecord,
        "stats": stats.Stats,
        "view": view.View,
    },
    "training and evaluation": {"train": training.Train, "eval": evaluation.Eval},
    "checkpoints": {
        "convert": checkpoints.Convert,
        "quantize": checkpoints.Quantize,
        "push": hub.Push,
        "pull": hub.Pull,
    },
    "speed": {
        "bench": bench.Bench,
        "bench load": bench.BenchLoad,
        "bench data": bench.BenchData,
        "bench serve": bench.BenchServe,
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
_MAX_MESSAGE = 20_000
"""Characters of an error or a warning: a file from outside may have names of any length and number."""


def train_recipe(recipe: TrainConfig) -> None:
    """Run `torchpi train` with a recipe's values as defaults of its options; for recipes that are Python files."""
    main(["train", *sys.argv[1:]], recipe)


def main(argv: Sequence[str] | None = None, recipe: TrainConfig | None = None) -> None:
    """Run a command; a user's mistake ends with one line on stderr and exit status 1.

    Args:
        argv: the command's words; by default the process'.
        recipe: the defaults of `train`.
    """
    args = _allowed_outside(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"torchpi {__version__}")
        return
    begin = " ".join(word for word in args if word not in ("-h", "--help"))
    if begin not in COMMANDS and any(f"{name} ".startswith(f"{begin} ".lstrip()) for name in COMMANDS):
        _print_commands(begin)
        return
    name = max((name for name in COMMANDS if args[: len(name.split())] == name.split()), key=len, default="")
    options = options_of(COMMANDS[name]) if name else {}
    warnings.showwarning = partial(_show_warning, options)
    try:
        status = _parse(name, args, recipe or TrainConfig()).run()
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `torchpi … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (ValueError, KeyError, OSError, ModuleNotFoundError) as error:
        separator = "\n" if "\n" in str(error) else " "
        message = separator.join(map(str, (error, *getattr(error, "__notes__", ()))))
        print("error:", printable(in_options(message, options), _MAX_MESSAGE, keep="\n\t"), file=sys.stderr)
        raise SystemExit(1) from None
    if status:
        raise SystemExit(status)


def _print_commands(begin: str) -> None:
    """The page of `torchpi` alone, or of `torchpi data`: the commands in groups, with the beginning of their help."""
    lines = ["torchpi COMMAND [OPTIONS]: π₀ and π₀.₅ in plain PyTorch"]
    for title, group in GROUPS.items():
        commands = {name: command for name, command in group.items() if name.startswith(begin)}
        lines += [f"\n[bold]{title}[/bold]"] if commands else []
        for name, command in commands.items():
            summary = re.split(r"[.,:;(]", command.__doc__ or "", maxsplit=1)[0]
            lines.append(f"  [cyan]{name:<13}[/cyan]  {summary}")
    lines += [
        "\ntorchpi COMMAND --help explains one, torchpi --version prints the version.",
        "Links in datasets lead nowhere outside of them, but with --allow-outside FOLDER.",
        "Completion of the shell: torchpi --tyro-print-completion bash (or zsh, tcsh)",
    ]
    Console(highlight=False).print("\n".join(lines), soft_wrap=True)


def _allowed_outside(args: Sequence[str]) -> list[str]:
    """The words without each `--allow-outside FOLDER`: the folders go to all readers of datasets, in worker processes
    too, by the variable."""
    words, rest = list[str](), iter(args)
    for word in rest:
        option, _, folder = word.partition("=")
        if option in ("--allow-outside", "--allow_outside") and (folder := folder or next(rest, "")):
            os.environ[ALLOW_OUTSIDE] = os.pathsep.join(filter(None, (os.environ.get(ALLOW_OUTSIDE), folder)))
        else:
            words.append(word)
    return words


def _parse(name: str, args: list[str], recipe: TrainConfig) -> Command:
    """The command of that name with its arguments."""
    if not name:  # an option of torchpi itself, such as the completion of the shell
        if not args[0].startswith("-"):
            given = " ".join(args[: 2 if any(known.startswith(f"{args[0]} ") for known in COMMANDS) else 1])
            near = closest(given, COMMANDS) or next((known for known in COMMANDS if args[0] in known.split()), None)
            meant = f"; did you mean torchpi {near}?" if near else "."
            raise UsageError(f"There is no command {printable(given)!r}{meant} torchpi --help lists them.")
        commands: dict[str, Callable[..., Command]] = {**COMMANDS}
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="torchpi",
            description="π₀ and π₀.₅ in plain PyTorch. torchpi --version prints the version.",
            args=args,
            sort_subcommands=False,
        )
    command = COMMANDS[name]
    # ~ of --out=~/run too, which a shell leaves as it is.
    args = [re.sub(r"(^|=)~(?=/|$)", lambda found: f"{found[1]}{os.path.expanduser('~')}", word) for word in args]
    args = translate(args[len(name.split()) :], command, name)
    default: Command | Any = tyro.MISSING_NONPROP
    if command is training.Train:
        default = training.Train(config=training.recipe_of(args, recipe))
    # Alone: with the other commands, a mistyped option would bring suggestions from all of them.
    return tyro.cli(
        command,
        prog=f"torchpi {name}",
        args=args,
        default=default,
        config=(tyro.conf.PositionalMetavarFromFieldName,),
        registry=REGISTRY,
    )


def _show_warning(
    options: Mapping[str, str], message: Warning | str, category: type[Warning], *_: Any, **__: Any
) -> None:
    print("warning:", printable(in_options(str(message), options), _MAX_MESSAGE, keep="\n\t"), file=sys.stderr)
