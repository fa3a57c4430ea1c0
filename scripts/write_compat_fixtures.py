"""Write tests/compat/fixtures: files in the formats of earlier versions, and numbers that these versions computed.

Run it with an earlier version's source, in the repository's root, with one thread:

    git worktree add OLD 8fe4ff9 && git worktree add OLDER d4138ac~1
    PYTHONPATH=OLD/src OMP_NUM_THREADS=1 python scripts/write_compat_fixtures.py run
    PYTHONPATH=OLD/src OMP_NUM_THREADS=1 python scripts/write_compat_fixtures.py policies
    PYTHONPATH=OLDER/src OMP_NUM_THREADS=1 python scripts/write_compat_fixtures.py policies --suffix _v1

`run` writes a dataset, a recipe, a run that ended after 3 of 6 steps, and the metrics of the other 3 steps.
`policies` writes a π₀.₅ and a π₀ with random weights, and the actions sampled from fixed noise.
"""

import argparse
import dataclasses
import inspect
import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
import torch

import torchpi
from torchpi import Embodiment, GemmaConfig, Pi0Config, Policy, VisionConfig
from torchpi.transforms import Normalization, NormStats

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "compat" / "fixtures"
TOKENIZER = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "tokenizer" / "tiny_spm.model"
GEMMA = GemmaConfig(width=8, depth=2, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)
ROBOT = Embodiment.generic(
    "two_joints",
    cameras={"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"},
    state=["shoulder", "elbow"],
    actions=["shoulder", "elbow"],
    delta=["shoulder"],
    control_hz=20,
    execute_steps=2,
    default_prompt="pick up the cube",
    metadata={"reset_pose": [0.0, 0.5]},
)


def sizes(pi05: bool, action_dim: int) -> Pi0Config:
    return Pi0Config(
        pi05=pi05,
        paligemma_variant=GEMMA,
        action_expert_variant=GEMMA,
        siglip_variant=VisionConfig(width=8, depth=1, mlp_dim=16, num_heads=2, patch=8),
        action_dim=action_dim,
        action_horizon=4,
        max_token_len=120,
        vocab_size=512,
        image_size=16,
    )


def make_policy(kind: str) -> Policy:
    """Create a policy whose weights are all random, including those that are initialized with 0 for training."""
    model, generator = torchpi.Pi0(sizes(kind == "pi05", action_dim=3)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    mean = np.linspace(0.1, 0.7, 2)  # numbers without a finite decimal representation
    stats = NormStats(mean, mean / 3 + 0.1, -mean - 1, mean + 1)
    return Policy(
        model.eval(),
        ROBOT,
        norm_stats={"state": stats, "actions": stats},
        normalization={"state": Normalization("quantile"), "actions": Normalization("z_score")},
        tokenizer=TOKENIZER,
        truncation="original",
        metadata={"robot": "left"},
        provenance={"source": "scripts/write_compat_fixtures.py"},
    )


def write_policies(suffix: str) -> None:
    rng = np.random.default_rng(0)
    observation = {
        "front": rng.integers(0, 256, (48, 64, 3), np.uint8),
        "wrist": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "state": rng.normal(size=2).astype(np.float32),
        "prompt": "open the drawer",
    }
    for kind in ("pi05", "pi0"):
        noise = rng.standard_normal((4, 3)).astype(np.float32)
        folder = FIXTURES / f"policy_{kind}{suffix}"
        make_policy(kind).save(folder)
        policy = torchpi.load_policy(folder, device="cpu")
        arrays = {**observation, "noise": noise}
        arrays["actions"] = policy.infer(observation, noise=noise, num_steps=10)["actions"]
        if "action_prefix" in inspect.signature(policy.infer).parameters:
            continued = policy.infer(observation, noise=noise, action_prefix=arrays["actions"][1:], delay=1)
            arrays["continued"] = continued["actions"]
        np.savez_compressed(folder.with_suffix(".npz"), **arrays, **arithmetic())


def write_run() -> None:
    from torchpi.training.config import TrainConfig
    from torchpi.training.loop import train

    FIXTURES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TOKENIZER, FIXTURES / "tokenizer.model")
    (FIXTURES / "sizes.json").write_text(json.dumps(sizes(True, action_dim=4).to_dict(), indent=2) + "\n")
    os.chdir(FIXTURES)  # a recipe's paths are relative to the working directory
    write_dataset(pathlib.Path("dataset"))
    config = TrainConfig.from_json("recipe.json")
    train(config, pathlib.Path("whole"))
    # The same run, interrupted: the end of the schedule is part of the recipe.
    train(dataclasses.replace(config, num_steps=3, decay_steps=6), pathlib.Path("run"))
    with tempfile.TemporaryDirectory() as folder:
        resumed = pathlib.Path(folder) / "run"
        shutil.copytree("run", resumed)
        train(dataclasses.replace(config, decay_steps=6), resumed, resume=True)
        lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in pathlib.Path("whole/metrics.jsonl").read_text().splitlines()]
    resumed_lines = [line for line in lines if line["step"] > 3]
    losses = [(line["step"], line["loss"]) for line in whole if "loss" in line and line["step"] > 3]
    assert losses == [(line["step"], line["loss"]) for line in resumed_lines if "loss" in line]
    pathlib.Path("resumed_metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in resumed_lines))
    np.savez("resumed_arithmetic.npz", **arithmetic())
    shutil.rmtree("whole")
    about = pathlib.Path("run", "run.json")
    document = json.loads(about.read_text()) | {"command": "torchpi train --recipe recipe.json --out run --num-steps 3"}
    about.write_text(json.dumps(document, indent=2) + "\n")
    for page in ("report.html", "curves.png"):
        pathlib.Path("run", page).unlink(missing_ok=True)
    for extra in ("chunks", "tensorboard", "pictures"):
        shutil.rmtree(pathlib.Path("run", extra), ignore_errors=True)


def write_dataset(path: pathlib.Path) -> None:
    """Write three episodes of six frames, whose images compress well."""
    from torchpi.data import LeRobotWriter

    rng = np.random.default_rng(0)
    with LeRobotWriter(
        path,
        fps=80,
        cameras=dict.fromkeys(("base", "wrist"), (32, 32, 3)),
        state_names=["hand_x", "hand_y", "hand_z", "gripper"],
        action_names=["delta_x", "delta_y", "delta_z", "gripper"],
    ) as writer:
        for task in ("open the drawer", "close the faucet", "open the drawer"):
            for _ in range(6):
                blocks = rng.integers(0, 256, (2, 4, 4, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
                images = {"observation.images.base": blocks[0], "observation.images.wrist": blocks[1]}
                writer.add_frame({**images, "observation.state": rng.normal(size=4), "action": rng.normal(size=4)})
            writer.save_episode(task)


def arithmetic() -> dict[str, np.ndarray]:
    """PyTorch version and CPU capability; if both are equal, results are bit-identical."""
    return {"torch": np.array(torch.__version__), "cpu": np.array(torch.backends.cpu.get_cpu_capability())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "policies"])
    parser.add_argument("--suffix", default="_v2", help="suffix of the policies' names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_run() if arguments.what == "run" else write_policies(arguments.suffix)
