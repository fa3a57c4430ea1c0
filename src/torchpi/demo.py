"""The embedded policy with an observation for it, and the command that shows the way from one to the other."""

import dataclasses
import importlib.resources
import json
import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from torchpi.config import preset
from torchpi.model import flow
from torchpi.model.pi0 import Pi0
from torchpi.policy import Policy, collate
from torchpi.robots import Embodiment
from torchpi.transforms.normalize import Normalization, load_norm_stats
from torchpi.transforms.prompt import pi05_prompt_text

SEED = 0
_STATE = ("hand_x", "hand_y", "hand_z", "gripper")
_ACTIONS = ("delta_x", "delta_y", "delta_z", "gripper")
# The simulator reads its actions as increments, the model predicts them as they are: no delta actions.
EMBODIMENT = Embodiment.generic(
    "metaworld_demo",
    cameras={"base_0_rgb": "base", "left_0_rgb": "left", "wrist_0_rgb": "wrist"},
    state=_STATE,
    actions=_ACTIONS,
    control_hz=80,
    execute_steps=8,
)


def assets() -> pathlib.Path:
    """The folder with the package's data."""
    return pathlib.Path(str(importlib.resources.files("torchpi") / "assets"))


def demo_observation() -> dict[str, Any]:
    """Three camera frames, the state and the instruction of one moment at a simulated drawer."""
    root = assets() / "demo"
    description = json.loads((root / "observation.json").read_text(encoding="utf-8"))
    images = {key: np.asarray(Image.open(root / name)) for key, name in description["images"].items()}
    return {**images, "state": np.array(description["state"]), "prompt": description["prompt"]}


def demo_policy(*, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """The `tiny` preset, a true π₀.₅, untrained: random weights with a fixed seed.

    Its expert does not begin as the identity, as one to be trained would, so that something is to be seen: every weight
    that `init_weights` sets to 0 is drawn at random.
    """
    model = Pi0(preset("tiny"))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return Policy(
        model.to(device, dtype).eval(),
        EMBODIMENT,
        norm_stats=load_norm_stats(assets() / "demo"),
        normalization={key: Normalization("quantile", "openpi") for key in ("state", "actions")},
        tokenizer=assets() / "tiny_tokenizer.model",
        provenance={"source": f"untrained: random weights, seed {SEED}"},
    )


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What `run_demo` computed."""

    actions: np.ndarray
    """float32 [H, 4], in the robot's units."""
    way: list[np.ndarray]
    """The chunk [H, 4] in the robot's units at every Euler state, from noise to actions."""
    plot: pathlib.Path


def run_demo(out: pathlib.Path, *, num_steps: int = 10) -> DemoResult:
    """Take the embedded observation through the embedded policy, print each step of the way, and plot the chunk.

    Args:
        out: where the plot goes, a .png file.
    """
    console = Console(highlight=False)
    policy, observation = demo_policy(), demo_observation()
    model, config = policy.model, policy.model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"π₀.₅, preset tiny, {count / 1e6:.1f} M parameters, [bold]untrained[/bold]: its weights are random, so "
        "the way of the data is real, and the actions mean nothing."
    )
    table = Table("step", "what", "shape", "values", box=box.SIMPLE_HEAD)

    def row(step: str, what: str, value: torch.Tensor | np.ndarray) -> None:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        shape = f"{list(array.shape)} {array.dtype}"
        table.add_row(step, what, shape, f"{array.min():.3g} … {array.max():.3g}")

    for camera in EMBODIMENT.camera_names:
        key = camera.removesuffix("_0_rgb")
        row("observation", f"camera {key}", observation[key])
    row("", "state: " + ", ".join(_STATE), observation["state"])
    table.add_row("", "instruction", "", repr(observation["prompt"]))
    state, inputs = policy.prepare(observation)
    normalized = inputs["state"][: len(_STATE)]
    batch = collate([inputs])
    num_text = int(batch.tokenized_prompt_mask.sum())
    row("normalize", "state, by the policy's 1 % and 99 % quantiles", normalized)
    row("resize", f"each camera to {config.image_size}×{config.image_size}, in [−1, 1]", batch.images["base_0_rgb"])
    table.add_row("tokenize", "prompt", f"{num_text} tokens", repr(pi05_prompt_text(observation["prompt"], normalized)))
    noise = torch.randn(
        1,
        config.require("action_horizon"),
        config.action_dim,
        generator=torch.Generator().manual_seed(SEED),
    )
    states: list[torch.Tensor] = []
    with torch.no_grad():
        tokens, mask = model.embed_present_prefix(batch)
        row("embed", f"3 × {config.num_patches} image tokens, {num_text} text tokens", tokens)
        cache = model.prefill(tokens, mask)
        row("prefill", f"the backbone, once: keys of each of {len(cache.key_values)} layers", cache.key_values[0][0])
        row("", "… and values", cache.key_values[0][1])
        hook = model.suffix.register_forward_pre_hook(lambda module, args: states.append(args[1]))
        states.append(model.sample_actions(batch, noise=noise, num_steps=num_steps))
        hook.remove()
    for t, x_t in zip(flow.euler_times(num_steps), states, strict=False):
        row("denoise", f"x at t = {t:.1f}" + (", noise" if t == 1 else ""), x_t)
    row("", "x at t = 0, normalized actions", states[-1])
    way = [_to_robot(policy, x_t, state) for x_t in states]
    row("unnormalize", "actions: " + ", ".join(_ACTIONS), way[-1])
    console.print(table)
    plot_chunk(way, out)
    console.print(f"The chunk of {len(way[-1])} actions, from noise to the end, is drawn in {out}.")
    console.print("All of it, tensor by tensor, as a page: torchpi trace demo --html demo.html")
    return DemoResult(actions=way[-1].astype(np.float32), way=way, plot=out)


def _to_robot(policy: Policy, x_t: torch.Tensor, state: np.ndarray) -> np.ndarray:
    actions = policy.transforms.inverse(x_t[0].numpy(), action_size=policy.embodiment.action_size)
    return policy.embodiment.from_model(actions, state)


def plot_chunk(way: list[np.ndarray], out: pathlib.Path) -> None:
    """Draw the Euler states of a chunk, one panel per action dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * ((len(_ACTIONS) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(_ACTIONS) + 1) // 2, 2, sharex=True, squeeze=False).flatten()
    for i, (panel, name) in enumerate(zip(panels, _ACTIONS, strict=True)):
        for step, chunk in enumerate(way):
            last = step == len(way) - 1
            shade = 0.85 - 0.5 * step / len(way)
            panel.plot(chunk[:, i], color="#c2410c" if last else str(shade), linewidth=2 if last else 1)
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[-2:]:
        panel.set_xlabel("action in the chunk")
    figure.suptitle("From noise (grey) to the action chunk (orange); untrained weights", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
