"""Seeds: the same check and error message everywhere."""

import numpy as np
import pytest

from torchpi.cli import main
from torchpi.randomness import checked_seed, generator_at
from torchpi.serving.settings import ServeSettings
from torchpi.sim.record import RecordSettings
from torchpi.training.config import TrainConfig

USES = {
    "generator": lambda seed: generator_at(seed, "noise", 3),
    "recipe": lambda seed: TrainConfig(seed=seed),
    "server": lambda seed: ServeSettings(seed=seed),
    "recording": lambda seed: RecordSettings("corridor", image_size=8, seed=seed),
}


MESSAGE = r"^The seed is .*; expected a whole number from 0 to 18446744073709551615\.$"


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("seed", [-1, 2**64, 10**20])
def test_seed_out_of_range_raises_the_same_error_everywhere(use, seed):
    with pytest.raises(ValueError, match=MESSAGE):
        use(seed)


@pytest.mark.parametrize("seed", [1.5, 2.0, True, "7", None])
def test_seed_that_is_not_an_integer_raises_error(seed):
    with pytest.raises(ValueError, match=MESSAGE):
        checked_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**31, 2**64 - 1, np.int64(7)])
def test_seeds_up_to_64_bits_are_valid(seed):
    assert checked_seed(seed) == seed
    assert 0 <= generator_at(int(seed), "noise").random() < 1


def test_infer_command_rejects_a_seed_beyond_64_bits(tmp_path, capsys):
    np.savez(tmp_path / "observation.npz", **{"state": np.zeros(3)})
    words = ["--inputs", str(tmp_path / "observation.npz"), "--out", str(tmp_path / "actions.npz")]
    with pytest.raises(SystemExit, match="1"):
        main(["infer", "demo", *words, "--device", "cpu", "--seed", str(10**20)])
    assert "error: The seed is 100000000000000000000; expected" in capsys.readouterr().err
