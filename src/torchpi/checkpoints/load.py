"""Reading a model out of a checkpoint in any format."""

import pathlib
import warnings

import torch

from torchpi.checkpoints.checkpoint import LoraChoice, open_checkpoint
from torchpi.config import Pi0Config
from torchpi.model.pi0 import Pi0


def load_model(
    path: str | pathlib.Path,
    *,
    config: Pi0Config | str | pathlib.Path | None = None,
    adapt: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora_alpha: tuple[float, float] | None = None,
    lora: LoraChoice = "fold",
) -> Pi0:
    """Load a model from a policy folder, or a checkpoint of openpi (JAX or PyTorch) or LeRobot.

    Every array is consumed or named in an error; those that no computation reads are known and left out, see
    `Checkpoint.dropped`. Sizes come from the arrays; what they do not hold (in a JAX checkpoint action_horizon,
    max_token_len and discrete_state_input) comes from `config`, or stays unset.

    Args:
        path: the folder of a checkpoint, or a file of it; for openpi's JAX also `params` itself, or the folder of a
            training run with a single step; an address hf://… or gs://…; or "demo", the embedded policy.
        config: a Pi0Config, a JSON file (may be partial), or the name of a preset.
        adapt: cut or extend the weights to the action_dim of `config`, and take its action_horizon and max_token_len.
        dtype: of the weights, and so of the computation.
        device: where the weights go.
        lora_alpha: of the backbone and the action expert in a JAX LoRA checkpoint, which does not say it; by default
            openpi's, (16, 32).
        lora: what becomes of the LoRA weights in a JAX checkpoint: "fold" adds them to those that they change, "keep"
            attaches them to the model, in float32, to be trained on.

    Returns:
        The model in eval mode, with gradients enabled.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is in no known format, or in two; arrays are missing, left over, misshapen or unreadable; or
            `config` contradicts them.

    Warns: what `adapt` has done; what `config` overrules in a file next to the arrays.
    """
    checkpoint = open_checkpoint(path, config=config, adapt=adapt)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    return checkpoint.model(dtype=dtype, device=device, lora_alpha=lora_alpha, lora=lora)
