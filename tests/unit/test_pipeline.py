"""`Transforms`: one sample to the model's inputs and back."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchpi.transforms import Normalization, NormStats, SentencePieceTokenizer, Transforms, pi05_prompt_text

TOKENIZER = SentencePieceTokenizer(Path(__file__).parents[1] / "golden" / "tokenizer" / "tiny_spm.model")


def stats(d: int = 3) -> NormStats:
    q01 = np.linspace(-2, -1, d)
    return NormStats(np.linspace(-1, 1, d), np.linspace(1, 2, d), q01, q01 + 3)


def transforms(**changes) -> Transforms:
    fields = {
        "norm_stats": {"state": stats(), "actions": stats()},
        "normalization": {"state": Normalization("quantile"), "actions": Normalization("quantile")},
        "tokenizer": TOKENIZER,
        "discrete_state_input": True,
        "max_token_len": 60,
        "action_dim": 5,
        "image_size": (28, 28),
    }
    return Transforms(**(fields | changes))


def sample(**changes) -> dict:
    fields = {
        "image": {"right": np.full((20, 40, 3), 9, np.uint8), "left": np.full((28, 28, 3), 7, np.uint8)},
        "image_mask": {"right": True, "left": False},
        "state": np.array([0.1, 0.2, 0.3]),
        "prompt": "lift it",
    }
    return fields | changes


def test_forward_returns_expected_shapes_dtypes_and_order():
    out = transforms().forward(sample(actions=np.zeros((4, 3), np.float32)))
    assert list(out["image"]) == list(out["image_mask"]) == ["right", "left"]
    assert all(image.shape == (28, 28, 3) and image.dtype == np.uint8 for image in out["image"].values())
    assert all(isinstance(mask, np.bool_) for mask in out["image_mask"].values())
    assert out["image"]["right"].any()
    assert not out["image"]["left"].any()  # absent
    described = {key: (out[key].shape, str(out[key].dtype)) for key in out if not key.startswith("image")}
    assert described == {
        "state": ((5,), "float64"),
        "tokenized_prompt": ((60,), "int64"),
        "tokenized_prompt_mask": ((60,), "bool"),
        "actions": ((4, 5), "float64"),
    }


def test_prompt_contains_the_normalized_unpadded_state():
    out = transforms().forward(sample())
    text = pi05_prompt_text("lift it", out["state"][:3])
    assert out["tokenized_prompt"][out["tokenized_prompt_mask"]].tolist() == TOKENIZER.encode(text, True)


@pytest.mark.parametrize("kind", ["quantile", "z_score"])
@settings(deadline=None)
@given(actions=hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.floats(-50, 50)))
def test_inverse_inverts_forward(kind, actions):
    both = transforms(normalization={"state": Normalization(kind), "actions": Normalization(kind)})
    chunk = both.forward(sample(actions=actions))["actions"]
    assert chunk.shape[1] == 5
    assert not chunk[:, actions.shape[1] :].any()
    np.testing.assert_allclose(both.inverse(chunk, action_size=actions.shape[1]), actions, rtol=0, atol=1e-12)


def test_float32_chunk_is_unnormalized_in_float64():
    chunk = transforms().inverse(np.zeros((2, 5), np.float32), action_size=3)
    assert chunk.dtype == np.float64
    np.testing.assert_allclose(chunk, [stats().q01 + 1.5 + 5e-7] * 2)


def test_forward_does_not_change_the_sample():
    given_sample = sample(actions=np.zeros((4, 3)))
    before = pickle.dumps(given_sample)
    transforms().forward(given_sample)
    assert pickle.dumps(given_sample) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.array([0, np.nan, np.inf])}, "NaN or infinity in state, dimension 1, 2"),
        ({"actions": np.array([[0, 0, 0], [0, 0, -np.inf]])}, "NaN or infinity in actions, dimension 2"),
        ({"state": np.zeros(6)}, "state has 6 dimensions.*action_dim is 5"),
        ({"actions": np.zeros((2, 6))}, "actions has 6 dimensions.*action_dim is 5"),
        ({"state": np.zeros(4)}, "normalize state: it has 4 dimensions.*only 3"),
        ({"actions": np.zeros((2, 4))}, "normalize actions: it has 4 dimensions.*only 3"),
        ({"prompt": 3}, "prompt is of type int"),
    ],
)
def test_invalid_samples_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        transforms().forward(sample(**changes))


def test_invalid_chunks_are_errors():
    with pytest.raises(ValueError, match="the model's action chunk, dimension 4"):
        transforms().inverse(np.array([[0, 0, 0, 0, np.nan]]), action_size=3)
    with pytest.raises(ValueError, match="5 dimensions to 6"):
        transforms().inverse(np.zeros((1, 5)), action_size=6)


def test_invalid_transforms_are_errors():
    with pytest.raises(KeyError, match=r"no statistics for actions; found \['state'\]"):
        transforms(norm_stats={"state": stats()})
    with pytest.raises(KeyError, match="no rule for state and actions"):
        transforms(normalization={})
    with pytest.raises(ValueError, match=r"state by quantiles.*no q01"):
        transforms(norm_stats={"state": NormStats(np.zeros(3), np.ones(3)), "actions": stats()})
    with pytest.raises(ValueError, match="truncation 'end'"):
        transforms(truncation="end")


def test_constant_dimension_warns_once_and_follows_the_formula():
    constant = NormStats(np.zeros(5), np.array([1.0, 0, 1, 0, 0]))  # the last two are padding, without a warning
    policy = transforms(
        norm_stats={"state": constant, "actions": constant},
        normalization={"state": Normalization("z_score"), "actions": Normalization("z_score")},
        discrete_state_input=False,
    )
    with pytest.warns(UserWarning, match="statistics of state don't vary in dimension 1:") as caught:
        outputs = [policy.forward(sample(state=np.array([0.0, 1e-6, 1.0]))) for _ in range(3)]
    assert len(caught) == 1
    np.testing.assert_allclose(outputs[0]["state"], [0, 1, 1, 0, 0], atol=1e-5)
    with pytest.warns(UserWarning, match="statistics of actions don't vary in dimension 1:") as caught:
        chunks = [policy.inverse(np.ones((1, 5)), action_size=3) for _ in range(3)]
    assert len(caught) == 1
    np.testing.assert_allclose(chunks[0], [[1 + 1e-6, 1e-6, 1 + 1e-6]])


def test_long_prompt_warns_once_and_counts_cut_tokens():
    policy = transforms()
    prompts = ["put the bowl in it " * 9, "open it " * 40]
    with pytest.warns(UserWarning, match="max_token_len is 60") as caught:
        outputs = [policy.forward(sample(prompt=prompt)) for prompt in prompts * 2]
    assert len(caught) == 2
    for prompt, warning, output in zip(prompts * 2, [*caught] * 2, outputs, strict=True):
        assert prompt[:20] in str(warning.message)
        valid = int(output["tokenized_prompt_mask"].sum())
        assert valid > 50
        needed = int(str(warning.message).split(" tokens")[0].split()[-1])
        assert output["prompt_tokens_cut"] == needed - valid
    assert "prompt_tokens_cut" not in policy.forward(sample(prompt="open it"))


def test_number_of_warnings_is_bounded(monkeypatch):
    policy, said = transforms(), []
    monkeypatch.setattr("warnings.warn", lambda message, *_, **__: said.append(message))
    for i in range(1010):
        policy._warn_once(f"prompt {i}", "cut")
    assert len(said) == 1000


def test_original_truncation_cuts_the_end():
    with pytest.warns(UserWarning, match="cut"):
        out = transforms(truncation="original").forward(sample(prompt="put the bowl in the sink " * 9))
    assert out["tokenized_prompt_mask"].all()


def test_transforms_can_be_pickled_to_worker_processes():
    copy = pickle.loads(pickle.dumps(transforms()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.forward(sample())["state"].shape == (5,)


def test_transforms_do_not_import_torch():
    """Transforms and robots can be used without torch."""
    code = "import sys; sys.modules['torch'] = None; import torchpi.transforms, torchpi.robots"
    subprocess.run([sys.executable, "-c", code], check=True)
