"""`torchpi quantize`: quantize a policy, with scales calibrated on frames of a dataset."""

import pathlib
from collections.abc import Mapping
from typing import Any

from torchpi.checkpoints.checkpoint import open_checkpoint
from torchpi.checkpoints.folder import check_target
from torchpi.engine.quantize import Quantization, quantize_model
from torchpi.errors import UsageError
from torchpi.evaluation.chunks import open_recorded, predict_chunks, sample_new_images
from torchpi.policy import load_policy
from torchpi.ui.progress import progress_bar


def quantize_policy(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    kind: str,
    *,
    dataset: str | pathlib.Path | None = None,
    num_observations: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    load: Mapping[str, Any] | None = None,
    **reading: Any,
) -> Quantization:
    """Write a policy as a quantized policy folder.

    Args:
        source: a policy in any format, see `load_policy`.
        out: a new folder; with `overwrite` also a policy folder to replace.
        kind: "fp8" or "int8".
        dataset: a LeRobot dataset of the policy's robot, from whose activations the scales of fp8 are computed.
        num_observations: number of its frames, spread evenly, see `sample_frames`.
        seed: seed of the frames and the noise.
        load: further arguments of `load_policy`.
        reading: further arguments of `LeRobotDataset`: rename, prompt, fps, tolerance_s.
    """
    if num_observations < 1:
        raise UsageError(f"num_observations is {num_observations}; calibration needs 1 or more, preferably 64.")
    if kind == "int8" and dataset is not None:
        raise UsageError("int8 takes its scales from the weights and from each input: leave out --dataset.")
    check_target(out, overwrite=overwrite)  # before the long computation
    policy, observe, calibration = load_policy(source, engine="eager", **(load or {})), None, {}
    if dataset is not None:
        data = open_recorded(policy, dataset, **reading)
        frames = sample_new_images(data, num_observations, seed=seed)
        calibration = {"dataset": str(dataset), "num_observations": len(frames)}

        def observe() -> None:
            with progress_bar("observations", len(frames)) as advance:
                predict_chunks(policy, data, frames, seed=seed, batch_size=4, on_batch=lambda count: advance(by=count))

    quantization = quantize_model(policy.model, kind, observe)
    policy.provenance["quantized"] = {"source": str(source), "kind": kind, **calibration}
    options = {name: value for name, value in (load or {}).items() if name in ("config", "embedding")}
    policy.save(out, dtype=open_checkpoint(source, **options).dtype, overwrite=overwrite)
    return quantization
