"""Delta actions and padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchpi.transforms import absolute_actions, bool_mask, delta_actions, pad_to_dim, unpad

numbers = st.floats(-1e3, 1e3)


@settings(deadline=None)
@given(
    actions=hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.just(5)), elements=numbers),
    state=hnp.arrays(np.float64, 6, elements=numbers),
    mask=st.lists(st.booleans(), max_size=5),
)
def test_absolute_inverts_delta(actions, state, mask):
    delta = delta_actions(actions, state, mask)
    np.testing.assert_allclose(absolute_actions(delta, state, mask), actions, rtol=0, atol=1e-9)
    unmasked = [i for i in range(5) if i >= len(mask) or not mask[i]]
    np.testing.assert_array_equal(delta[:, unmasked], actions[:, unmasked])


def test_all_deltas_refer_to_the_first_state():
    actions = np.array([[1.0, 5.0], [2.0, 6.0]])
    assert delta_actions(actions, np.array([1.0, 1.0]), (True, False)).tolist() == [[0, 5], [1, 6]]
    assert actions.tolist() == [[1, 5], [2, 6]]  # the argument is not changed


@pytest.mark.parametrize(("a", "s"), [(2, 3), (3, 2)])
def test_too_long_mask_is_an_error(a, s):
    with pytest.raises(ValueError, match=f"mask has 3 dimensions.* number 3, actions have {a} and the state has {s}"):
        delta_actions(np.zeros((1, a)), np.zeros(s), (True,) * 3)


def test_state_may_lack_absolute_dimensions():
    actions, state, mask = np.array([[1.0, 5.0, 7.0]]), np.array([1.0]), (True, False, False)
    delta = delta_actions(actions, state, mask)
    assert delta.tolist() == [[0, 5, 7]]
    assert absolute_actions(delta, state, mask).tolist() == actions.tolist()
    assert delta_actions(actions, state[:0], (False,) * 3).tolist() == actions.tolist()


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-9, 9, width=32)), more=st.integers(0, 5)
)
def test_unpad_inverts_pad(x, more):
    padded = pad_to_dim(x, x.shape[-1] + more)
    assert padded.shape == (*x.shape[:-1], x.shape[-1] + more)
    assert not padded[..., x.shape[-1] :].any()
    np.testing.assert_array_equal(unpad(padded, x.shape[-1]), x)


def test_wider_array_is_not_padded():
    x = np.ones((2, 5))
    assert pad_to_dim(x, 3) is x


def test_unpad_beyond_the_width_is_an_error():
    with pytest.raises(ValueError, match="with 3 dimensions to 4"):
        unpad(np.zeros((2, 3)), 4)


def test_bool_mask():
    assert bool_mask(2, -1, 1) == (True, True, False, True)
    assert bool_mask() == ()
