"""Whole policies compared with openpi: from its checkpoints and raw requests to the robot's actions."""

import numpy as np
import pytest

import torchpi

EMBODIMENTS = {"pi05.libero": "libero", "pi05.droid": "droid", "pi05.aloha": "aloha", "pi0.libero7": "libero"}
TOLERANCE = 2e-5


@pytest.fixture(params=EMBODIMENTS)
def name(request):
    return request.param


@pytest.fixture
def policy(name, golden_root, policy_cases):
    weights = golden_root / policy_cases[name]["weights"]
    return torchpi.load_policy(
        weights,
        config=weights.parent / "model_config.json",
        embodiment=EMBODIMENTS[name],
        norm_stats=golden_root / "policy" / name,
        tokenizer=golden_root / "tokenizer" / "tiny_spm.model",
        device="cpu",
    )


def test_all_golden_cases_are_tested(policy_cases):
    assert set(policy_cases) == set(EMBODIMENTS)


def test_actions_equal_openpis(name, policy, policy_case, policy_cases):
    request, case = policy_case(name)
    settings = policy_cases[name]
    # The normalization defaults to the variant's.
    assert policy.transforms.normalization["state"].kind == ("quantile" if settings["use_quantiles"] else "z_score")
    result = policy.infer(request, noise=case["noise"], num_steps=settings["num_steps"])
    assert sorted(result) == sorted(settings["result_keys"])
    assert result["actions"].dtype == np.float32
    assert result["actions"].shape == tuple(settings["actions_shape"])
    np.testing.assert_allclose(result["actions"], case["actions"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["pi05.aloha", "pi0.libero7"])
def test_saved_policy_gives_same_actions(name, policy, policy_case, tmp_path):
    """The saved folder contains all settings that the test above passes."""
    request, case = policy_case(name)
    policy.save(tmp_path / "policy")
    loaded = torchpi.load_policy(tmp_path / "policy", device="cpu")
    ours = [p.infer(request, noise=case["noise"], num_steps=1)["actions"] for p in (loaded, policy)]
    np.testing.assert_array_equal(*ours)
