"""`within_limits`: clipping, refusing or sending actions beyond the robot's limits."""

import numpy as np
import pytest

from torchpi.errors import ActionError
from torchpi.robots import Embodiment, get_embodiment
from torchpi.robots.limits import within_limits


def arm(**fields):
    return Embodiment.generic(
        "arm",
        cameras={"base_0_rgb": "front"},
        state=["x"],
        actions=["x", "y", "z"],
        limits={"x": {"low": -0.1, "high": 0.1}, "y": {"high": 1e300}},
        **fields,
    )


def test_actions_beyond_the_limits_are_clipped_and_counted():
    sent, clipped = within_limits(np.array([[0.2, 9.0, -5.0], [-0.05, -1e30, 5.0], [-7.0, 0.0, 0.0]]), arm())
    assert clipped == 2
    assert sent.dtype == np.float32
    np.testing.assert_array_equal(sent[:, 1:], np.array([[9, -5], [-1e30, 5], [0, 0]], np.float32))
    # Rounding to float32 must not exceed the limit either.
    assert (np.abs(sent[:, 0].astype(np.float64)) <= 0.1).all()
    assert sent[0, 0] == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("beyond_limits", ["clip", "refuse"])
def test_action_at_the_limit_is_neither_refused_nor_counted(beyond_limits):
    sent, clipped = within_limits(np.array([[0.1, 0.0, 0.0], [-0.1, 0.0, 0.0]]), arm(beyond_limits=beyond_limits))
    assert clipped == 0
    assert (np.abs(sent[:, 0].astype(np.float64)) <= 0.1).all()


def test_actions_within_the_limits_are_sent_bit_for_bit():
    actions = np.random.default_rng(0).uniform(-0.099, 0.099, (4, 3))
    sent, clipped = within_limits(actions, arm())
    assert clipped == 0
    assert sent.tobytes() == actions.astype(np.float32).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_non_finite_action_error_names_the_dimension(bad):
    actions = np.zeros((5, 3))
    actions[2:, 1] = bad
    with pytest.raises(ActionError, match=r"y is not finite in 3 of 5 steps, at step 2 it is"):
        within_limits(actions, arm())


def test_embodiment_may_refuse_actions_beyond_its_limits():
    robot = arm(beyond_limits="refuse")
    assert Embodiment.from_dict(robot.to_dict()) == robot
    assert within_limits(np.zeros((2, 3)), robot)[1] == 0
    with pytest.raises(ActionError, match=r"x is beyond the robot's limits in 1 of 2 steps.*-0\.1 to 0\.1"):
        within_limits(np.array([[0, 0, 0], [0.2, 0, 0]]), robot)
    with pytest.raises(ValueError, match="expected one of clip, refuse, send"):
        arm(beyond_limits="ignore")
    assert "beyond_limits" not in arm().to_dict()  # the default is left out, as in older files


def test_openpis_robots_get_unclipped_but_finite_actions():
    actions = np.full((2, 8), 3.0)
    assert within_limits(actions, get_embodiment("droid")) == (pytest.approx(actions), 0)
    with pytest.raises(ActionError, match="not finite"):
        within_limits(actions * np.inf, get_embodiment("droid"))
