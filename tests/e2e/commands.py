"""Commands of the documents on small sizes, with small weights instead of the published ones."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import threading
from typing import Any

import numpy as np
import pytest

from torchpi.checkpoints import hub
from torchpi.checkpoints.address import PUBLISHED
from torchpi.cli import COMMANDS, _parse, main
from torchpi.cli.common import Command
from torchpi.config import PRESETS, Pi0Config
from torchpi.convert import convert
from torchpi.training.config import TrainConfig
from torchpi_client import WebsocketPolicy

SMALL_TRAINING = (
    "--num-steps 20 --batch-size 4 --flow-samples-per-obs 1 --warmup-steps 2 --holdout 0.3 --holdout-samples 4 "
    "--chunk-samples 4 --eval-every 20 --save-every 10 --log-every 5 --workers 0"
)


def shortened(line: str, *, tasks: str = "") -> list[str]:
    """Arguments of a command without `torchpi`, reduced to recordings of `tasks`, one episode and few steps."""
    line = re.sub(r"checkpoints/\d+", "checkpoints/00000020", line)
    line = re.sub(r"--episodes \d+", "--episodes 1", line)
    line = re.sub(r"(sim record.*--tasks) \S+", rf"\1 {tasks}", line)
    line = line.replace("--device cuda", "--device cpu")
    arguments = shlex.split(line, comments=True)
    if arguments[0] == "train" and "--dataset" in arguments:
        arguments += SMALL_TRAINING.split()
    if arguments[0] == "eval" and "--dataset" in arguments:
        arguments += ["--samples", "4"]
    if arguments[0] == "eval" and "--env" in arguments:
        if "--max-steps" in arguments:
            at = arguments.index("--max-steps")
            del arguments[at : at + 2]
        arguments += ["--max-steps", "16"]
    return arguments


def use_small_weights(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, golden_root: pathlib.Path) -> None:
    """Redirect the published addresses to tiny weights with robots' statistics in `folder`, and their presets to these
    weights' sizes."""
    entry = {"mean": [0.0] * 32, "std": [1.0] * 32, "q01": [-2.0] * 32, "q99": [2.0] * 32}
    for name, published in list(PRESETS.items()):
        if not name.startswith(("pi0_", "pi05_")):
            continue
        kind = golden_root / ("pi05" if published.pi05 else "pi0")
        fields = ("action_dim", "action_horizon", "max_token_len", "discrete_state_input")
        kept = {field: getattr(published, field) for field in fields}
        tiny = dataclasses.replace(Pi0Config.from_json(kind / "model_config.json"), **kept)
        monkeypatch.setitem(PRESETS, name, tiny)
        if not name.endswith("_base"):
            continue
        target = folder / PUBLISHED.removeprefix("gs://") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(
            kind / "jax_ckpt_pure", target, "openpi-jax", config=kind / "model_config.json", sizes={"action_dim": 32},
            check=False,
        )  # fmt: skip
        for asset in ("droid", "trossen", "ur5e"):
            file = target / "assets" / asset / "norm_stats.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    tokenizer = folder / "big_vision" / "paligemma_tokenizer.model"
    tokenizer.parent.mkdir()
    tokenizer.write_bytes((golden_root / "tokenizer" / "tiny_spm.model").read_bytes())
    monkeypatch.setattr(hub, "fetch", lambda address: folder / address.removeprefix("gs://"))


def serve_once(arguments: list[str], observation: dict[str, Any]) -> np.ndarray:
    """Run `torchpi serve` until a client has got its actions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []

    def ask() -> None:
        try:
            with WebsocketPolicy(f"ws://127.0.0.1:{port}") as policy:  # waits until it is there
                answers.append(policy.infer(observation)["actions"])
        finally:
            if serving.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    serving = threading.Event()
    serving.set()
    client = threading.Thread(target=ask, daemon=True)
    client.start()
    with contextlib.ExitStack() as stack:
        stack.callback(serving.clear)
        main([*arguments, "--port", str(port)])
    client.join()
    return answers[0]


def parsed(arguments: list[str]) -> Command:
    """The command with its arguments, without running it."""
    name = max((name for name in COMMANDS if arguments[: len(name.split())] == name.split()), key=len, default="")
    return _parse(name, arguments, TrainConfig())
