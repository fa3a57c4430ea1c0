"""Normalization and its statistics: inverse, files, and errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchpi.transforms import (
    Normalization,
    NormStats,
    constant_dims,
    load_norm_stats,
    normalize,
    save_norm_stats,
    unnormalize,
)
from torchpi.transforms.normalize import MAX_STATISTIC

RULES = [Normalization("z_score"), Normalization("quantile")]
numbers = st.floats(-100, 100, width=32)


def some_stats(d: int) -> NormStats:
    rng = np.random.default_rng(d)
    q01 = rng.normal(size=d)
    return NormStats(rng.normal(size=d), rng.uniform(0.1, 2, d), q01, q01 + rng.uniform(0.1, 4, d))


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(
    x=hnp.arrays(st.sampled_from([np.float32, np.float64]), st.tuples(st.just(3), st.integers(1, 6)), elements=numbers)
)
def test_unnormalize_inverts_normalize(rule, x):
    stats = some_stats(6)  # as long as x or longer
    np.testing.assert_allclose(unnormalize(normalize(x, stats, rule), stats, rule), x, rtol=0, atol=1e-10)


def test_normalized_values_follow_the_definition():
    stats = some_stats(3)
    z_score, quantile = RULES
    assert normalize(stats.mean, stats, z_score).tolist() == [0, 0, 0]
    np.testing.assert_allclose(normalize(stats.q01, stats, quantile), -1, atol=1e-12)
    np.testing.assert_allclose(normalize(stats.q99, stats, quantile), 1, atol=1e-4)


def test_unnormalize_handles_padding_beyond_the_statistics():
    x = np.linspace(-1, 1, 5)
    np.testing.assert_array_equal(unnormalize(x, some_stats(3), Normalization("quantile"))[3:], x[3:])
    np.testing.assert_allclose(unnormalize(x, some_stats(3), Normalization("z_score"))[3:], x[3:] * (1 + 1e-6))


def test_arguments_are_not_changed():
    x, stats = np.ones((2, 3)), some_stats(2)
    unnormalize(x, stats, Normalization("quantile"))
    normalize(x[:, :2], stats, Normalization("quantile"))
    assert (x == 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_statistics_shorter_than_the_data_are_an_error(rule):
    with pytest.raises(ValueError, match=r"Cannot normalize state: it has 4 dimensions.*only 3.*norm_stats="):
        normalize(np.zeros(4), some_stats(3), rule, what="state")


@pytest.mark.parametrize("function", [normalize, unnormalize])
def test_missing_quantiles_are_an_error(function):
    stats = NormStats(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match=r"actions by quantiles.*no q01 and q99.*z_score"):
        function(np.zeros(2), stats, Normalization("quantile"), what="actions")


def test_training_range_comes_from_quantiles_or_deviations():
    mean, std = np.array([1.0, 2.0]), np.array([0.5, 0.1])
    q01, q99 = np.array([0.0, 2.0]), np.array([3.0, 2.0])
    by_deviation = np.array([mean - 2.326 * std, mean + 2.326 * std])
    np.testing.assert_allclose(NormStats(mean, std).training_range("z_score"), by_deviation)
    np.testing.assert_allclose(NormStats(mean, std, q01, q99).training_range("quantile"), [q01, q99])
    # A z-score divides by the deviation, so q01 = q99 does not matter.
    both = [[0, by_deviation[0, 1]], [3, by_deviation[1, 1]]]
    np.testing.assert_allclose(NormStats(mean, std, q01, q99).training_range("z_score"), both)
    assert np.isinf(NormStats(mean, std).training_range("identity")).all()


def test_constant_dims():
    stats = NormStats(np.zeros(3), np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 2.0]), np.array([1.0, 1.0, 2.0]))
    assert constant_dims(stats, "z_score") == [1]
    assert constant_dims(stats, "quantile") == [2]


def test_unknown_rules_are_errors():
    with pytest.raises(ValueError, match=r"'min_max'.*z_score, quantile"):
        Normalization("min_max")
    with pytest.raises(ValueError, match=r"'none'.*openpi"):
        Normalization("z_score", eps_rule="none")


TWO, THREE = np.ones(2), np.ones(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": TWO, "std": THREE}, "unequal lengths.*'mean': 2, 'std': 3"),
        ({"mean": TWO, "std": -TWO}, r"std is negative in dimension \[0, 1\]"),
        ({"mean": np.array([0, np.nan]), "std": TWO}, r"mean is NaN or infinite in dimension \[1\]"),
        ({"mean": TWO, "std": np.array([np.inf, 1])}, r"std is NaN or infinite in dimension \[0\]"),
        ({"mean": TWO, "std": np.array([1, 1.1e12])}, r"std exceeds 1e\+12.*dimension \[1\]"),
        ({"mean": TWO, "std": TWO, "q01": -1e308 * TWO, "q99": TWO}, r"q01 exceeds 1e\+12.*dimension \[0, 1\]"),
        ({"mean": TWO, "std": TWO, "q01": TWO}, "only one of q01 and q99"),
        ({"mean": TWO, "std": TWO, "q01": TWO, "q99": TWO - 1}, "q99 is less than q01"),
        ({"mean": np.ones((1, 2)), "std": TWO}, r"mean has shape \[1, 2\]"),
        ({"mean": np.array(["a", "b"]), "std": TWO}, "mean is not a list of numbers"),
    ],
)
def test_invalid_statistics_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        NormStats(**values)


# Files


@settings(deadline=None)
@given(values=hnp.arrays(np.float64, 4, elements=st.floats(-MAX_STATISTIC, MAX_STATISTIC)))
def test_saved_statistics_are_read_back_bit_for_bit(values, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "norm_stats.json"
    save_norm_stats(
        path, {"state": NormStats(values, np.abs(values)), "actions": NormStats(values, np.abs(values), values, values)}
    )
    loaded = load_norm_stats(path)
    assert loaded["state"].q01 is None
    for array in (loaded["state"].mean, loaded["actions"].q99):
        assert array.tobytes() == values.tobytes()


def test_norm_stats_path_may_be_a_folder(tmp_path):
    save_norm_stats(tmp_path, {"state": some_stats(2)})
    assert (tmp_path / "norm_stats.json").is_file()
    assert load_norm_stats(str(tmp_path))["state"].dim == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'no object "norm_stats"'),
        ('{"state": {"mean": [0], "std": [1]}}', 'no object "norm_stats"'),
        ('{"norm_stats": {"state": [1]}}', '"state" has list.*mean and std'),
        ('{"norm_stats": {"state": {"mean": [0]}}}', r"\"state\" has \['mean'\].*mean and std"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [NaN]}}}', '"state".*std is NaN'),
        ('{"norm_stats": {"actions": {"mean": [Infinity], "std": [1]}}}', '"actions".*mean is NaN or infinite'),
        ('{"norm_stats": {"state": {"mean": ["x"], "std": [1]}}}', "mean is not a list of numbers"),
        ('{"norm_stats": {"state": {"mean": [[0], [1, 2]], "std": [1]}}}', "mean is not a list of numbers"),
        ('{"norm_stats": {"state": {"mean": {}, "std": [1]}}}', "mean is not a list of numbers"),
        ('{"norm_stats": {"state": {"mean": [[0]], "std": [1]}}}', r"mean has shape \[1, 1\]"),
    ],
)
def test_invalid_norm_stats_files_are_errors(content, message, tmp_path):
    file = tmp_path / "norm_stats.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_norm_stats(tmp_path)
    assert str(file) in str(error.value)


def test_missing_norm_stats_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json"):
        load_norm_stats(tmp_path)


def test_null_quantiles_are_read_as_none(tmp_path):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"norm_stats": {"state": {"mean": [0], "std": [1], "q01": None, "q99": None}}}))
    assert load_norm_stats(file)["state"].q99 is None
