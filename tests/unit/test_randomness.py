"""Seeds: one check and one message, wherever one is given."""

import numpy as np
import pytest

from torchpi.cli import main
from torchpi.randomness import checked_seed, generator_at
from torchpi.serving.settings import ServeSettings
from torchpi.sim.record import RecordSettings
from torchpi.training.config import TrainConfig

TAKEN = {
    "a draw": lambda seed: generator_at(seed, "noise", 3),
    "training": lambda seed: TrainConfig(seed=seed),
    "a server": lambda seed: ServeSettings(seed=seed),
    "a recording": lambda seed: RecordSettings("corridor", image_size=8, seed=seed),
}


MESSAGE = r"^The seed is .*; expected a whole number from 0 to 18446744073709551615\.$"


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("seed", [-1, 2**64, 10**20])
def test_a_seed_that_no_generator_takes_is_refused_by_one_message(take, seed):
    with pytest.raises(ValueError, match=MESSAGE):
        take(seed)


@pytest.mark.parametrize("seed", [1.5, 2.0, True, "7", None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=MESSAGE):
        checked_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**31, 2**64 - 1, np.int64(7)])
def test_a_seed_of_64_bits_is_taken(seed):
    assert checked_seed(seed) == seed
    assert 0 <= generator_at(int(seed), "noise").random() < 1


def test_infer_refuses_a_seed_beyond_64_bits(tmp_path, capsys):
    np.savez(tmp_path / "observation.npz", **{"state": np.zeros(3)})
    words = ["--inputs", str(tmp_path / "observation.npz"), "--out", str(tmp_path / "actions.npz")]
    with pytest.raises(SystemExit, match="1"):
        main(["infer", "demo", *words, "--device", "cpu", "--seed", str(10**20)])
    assert "error: The seed is 100000000000000000000; expected" in capsys.readouterr().err
