"""Images and prompts compared with LeRobot's own code, before and since version 0.5."""

from pathlib import Path

import numpy as np
import pytest

from torchpi.checkpoints.spec import PREPROCESSING
from torchpi.transforms import Normalization, NormStats, Transforms, load_tokenizer, resize_with_pad

GOLDEN = Path(__file__).parents[1] / "golden"
PROGRAMS = {"0.4": "lerobot_0.4", "0.5": "lerobot"}
with np.load(GOLDEN / "lerobot/images_and_prompts.npz") as arrays:
    CASES = dict(arrays)
SIZES = [name.removesuffix(".input") for name in CASES if name.endswith(".input") and not name.startswith("state")]


@pytest.mark.parametrize("version", PROGRAMS)
@pytest.mark.parametrize("size", SIZES)
def test_images_equal_lerobots(size, version):
    transform, _ = PREPROCESSING[PROGRAMS[version]]
    ours = resize_with_pad(CASES[f"{size}.input"], 14, 14, transform)
    np.testing.assert_allclose(ours, CASES[f"{size}.{version}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", PROGRAMS)
@pytest.mark.parametrize("dim", [7, 32, 40])
def test_prompts_equal_lerobots(dim, version):
    identity = NormStats(np.zeros(dim), np.ones(dim))
    transforms = Transforms(
        dict.fromkeys(("state", "actions"), identity),
        dict.fromkeys(("state", "actions"), Normalization("identity", "lerobot")),
        load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model"),
        discrete_state_input=True,
        max_token_len=None,
        action_dim=40,
        prompt_state_dim=PREPROCESSING[PROGRAMS[version]][1],
    )
    state, expected = CASES[f"state{dim}.input"], str(CASES[f"state{dim}.{version}"])
    assert transforms.prompt_text("open the drawer", state) == expected
    sample = {"image": {}, "image_mask": {}, "state": state, "prompt": "open the drawer"}
    tokens = transforms.forward(sample)["tokenized_prompt"]
    assert tokens.tolist() == transforms.tokenizer.encode(expected, add_bos=True)
