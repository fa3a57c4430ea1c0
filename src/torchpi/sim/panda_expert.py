"""Scripted expert for a Franka arm in robosuite and LIBERO: lifts an object, or puts it in or on another.

It reads the simulation's state. Units are metres and radians, in the world frame with z up. A grasp is a pose of the
grip site, whose x axis is the line between the fingers and whose z axis points down.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

OPEN, CLOSED = -1.0, 1.0
_POSITION, _ROTATION = 0.05, 0.5  # change of the controller's goal by an action of 1
_READY = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])  # rotation of the grip site at a yaw of 0
_YAWS = np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75, 90])
_MAX_WIDTH = 0.07  # of an object held between the fingers; wider ones, such as bowls, are held by the rim
_PAD_DEPTH = 0.012  # least height of the grip site over the surface under the object: pads reach 4 mm further down
# Points of the open gripper in the grip site's frame.
_FINGERS = np.array([(x, y, z) for x in (-0.055, -0.042, 0.042, 0.055) for y in (-0.01, 0.01) for z in (0.004, -0.02)])
_HAND = np.array(
    [(x, y, z) for x in np.linspace(-0.1, 0.1, 5) for y in (-0.03, 0, 0.03) for z in (-0.031, -0.06, -0.1)]
)
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Boxes of the collision geometry."""

    centers: np.ndarray
    """[n, 3]"""
    rotations: np.ndarray
    """[n, 3, 3], from a box's frame to the world's."""
    sizes: np.ndarray
    """Half of each edge, [n, 3]."""

    @property
    def corners(self) -> np.ndarray:
        """[n, 8, 3]"""
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
        return self.centers[:, None] + np.einsum("nij,nj,jk->nki", self.rotations, self.sizes, signs)

    def count_inside(self, points: np.ndarray) -> int:
        """Number of points [k, 3] that are inside a box, or within 2 mm of it."""
        local = np.einsum("nij,nki->nkj", self.rotations, points - self.centers[:, None])
        return int((np.abs(local) <= self.sizes[:, None] + 2e-3).all(-1).any(0).sum())

    def top_along(self, start: np.ndarray, end: np.ndarray, reach: float) -> float:
        """Highest corner of the boxes that are horizontally within `reach` of a path; -inf if there are none."""
        points = start[:2] + np.linspace(0, 1, 20)[:, None] * (end[:2] - start[:2])
        corners = self.corners
        low, high = corners[..., :2].min(1)[:, None] - reach, corners[..., :2].max(1)[:, None] + reach
        near = ((points > low) & (points < high)).all(-1).any(1)
        return float(corners[near][..., 2].max(initial=-np.inf))


@dataclasses.dataclass(frozen=True)
class Grasp:
    """Pose of the grip site, pointing down."""

    position: np.ndarray
    yaw: float

    @property
    def rotation(self) -> np.ndarray:
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ _READY

    def collisions(self, boxes: Boxes, heights: tuple[float | int, ...]) -> int:
        """Weighted number of the gripper's points in boxes, summed over its heights above the grasp."""

        def count(points: np.ndarray) -> int:
            world = points @ self.rotation.T + self.position
            return sum(boxes.count_inside(world + np.array([0, 0, height])) for height in heights)

        return 3 * count(_FINGERS) + count(_HAND)


def grasps_of(corners: np.ndarray, deeper: float = 0.0) -> list[tuple[float, Grasp]]:
    """Candidate grasps of an object with box corners [k, 3], each with the cost of its yaw and width."""
    low, high = corners.min(0), corners.max(0)
    grasps = []
    for yaw in _YAWS:
        axes = np.array([[-np.sin(yaw), np.cos(yaw)], [np.cos(yaw), np.sin(yaw)]])  # along the fingers, and across
        along = corners[:, :2] @ axes.T
        middle, width = (along.min(0) + along.max(0)) / 2 @ axes, np.ptp(along[:, 0])
        cost = abs(yaw) / np.deg2rad(15) + 20 * (width - 0.03)
        floor = low[2] + _PAD_DEPTH
        if width <= _MAX_WIDTH:
            z = max(high[2] - 0.026, min((low[2] + high[2]) / 2, high[2] - 0.012)) - deeper
            grasps.append((cost, Grasp(np.append(middle, max(z, floor)), yaw)))
            continue
        rim = corners[corners[:, 2] > high[2] - 0.012, :2]
        radius = np.median(np.linalg.norm(rim - middle, axis=1)) - 2e-3
        for side in (-radius, radius):
            position = np.append(middle + side * axes[0], max(high[2] - 0.013 - deeper, floor))
            grasps.append((cost + 10, Grasp(position, yaw)))  # used only if no other grasp is possible
    return grasps


class Servo:
    """Proportional controller of the gripper, with a small integral term against the joints' friction."""

    def __init__(self) -> None:
        self._integral = np.zeros(3)

    def __call__(
        self, error: np.ndarray, rotation: np.ndarray, gripper: float, *, speed: float, gain: float = 1.6
    ) -> np.ndarray:
        """The action [7] that reduces a position error and a remaining rotation vector; speed is at most 1."""
        near = np.abs(error) < 0.03
        self._integral = np.where(near, self._integral + 0.25 * error, 0.8 * self._integral).clip(-0.02, 0.02)
        move = (gain * error + self._integral) / _POSITION
        move *= min(1.0, speed / max(np.abs(move).max(), 1e-9))  # keeps the direction
        turn = (rotation / _ROTATION).clip(-0.25, 0.25) * (np.linalg.norm(rotation) > 0.01)
        return np.concatenate([move, turn, [gripper]])


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Rotation vector (axis times angle) of a rotation matrix [3, 3] of less than half a turn."""
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sin, cos = np.linalg.norm(axis) / 2, (np.trace(rotation) - 1) / 2
    return axis * (np.arctan2(sin, cos) / max(2 * sin, 1e-9))


class Expert:
    """The expert for one episode of a robosuite environment, starting from its current state."""

    def __init__(
        self, env: Any, relation: Literal["up", "in", "on"], body: int, target: Any, target_body: int, over: float = 0.0
    ) -> None:
        """Lift a body ("up"), or put it in or on a target.

        Args:
            target: MuJoCo's view of a body or site; the goal of the object's origin is `over` metres above its origin.
            target_body: id of the target's body.
        """
        self._env, self._relation, self._body = env, relation, body
        self._target, self._target_body, self._over = target, target_body, over
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._site = self._model.site("gripper0_grip_site").id
        self._servo = Servo()
        self._actions = self._episode()

    def action(self) -> np.ndarray:
        """The next action [7] of the current phase, from the robot's current state."""
        return next(self._actions).clip(-1, 1).astype(np.float32)

    def _episode(self) -> Iterator[np.ndarray]:
        for attempt in range(_TRIES):
            grasp = self._choose(deeper=0.004 * attempt)
            start = self._object_position[2]
            yield from self._pick(grasp)
            if self._object_position[2] < start + 0.02:
                yield from self._stay(OPEN, 8)
            elif self._relation == "up":
                yield from self._stay(CLOSED, 10**9)
            else:
                yield from self._place()
            if self._env._check_success():
                break
        yield from self._stay(OPEN, 10**9)

    def _choose(self, deeper: float) -> Grasp:
        """The grasp with the lowest cost, which counts collisions at the object's position and at the goal."""
        goal = self._goal()
        obstacles = self._boxes(without=(self._body,))
        shift = goal - self._object_position + [0, 0, 0.02]
        around_goal = self._boxes(without=(self._body, self._target_body))
        object_corners = self._boxes(only=self._body).corners.reshape(-1, 3)

        def cost(grasp: Grasp) -> float:
            placed = dataclasses.replace(grasp, position=grasp.position + shift)
            hits = grasp.collisions(obstacles, (0, 0.02, 0.05, 0.09))
            hits += placed.collisions(around_goal, (0.01, 0.05, 0.09))
            return hits + float(np.linalg.norm(grasp.position[:2] - [-0.2, 0]))

        return min(grasps_of(object_corners, deeper), key=lambda item: item[0] + cost(item[1]))[1]

    def _pick(self, grasp: Grasp) -> Iterator[np.ndarray]:
        self._rotation, boxes, start = grasp.rotation, self._boxes(), self._position
        top = self._boxes(only=self._body).corners[..., 2].max()
        above = grasp.position * [1, 1, 0] + [0, 0, max(top + 0.07, grasp.position[2] + 0.06)]
        clear_height = boxes.top_along(start, above, 0.05) + 0.05
        if clear_height > start[2]:
            waypoint = start + 0.3 * (above - start)
            yield from self._go(np.append(waypoint[:2], max(clear_height, above[2])), OPEN, near=0.02)
        yield from self._go(above, OPEN, near=0.02)
        yield from self._go(grasp.position, OPEN, near=0.005, speed=0.6, gain=2.0)
        self._offset, fingers = grasp.position - self._object_position, self._fingers()
        for step in range(14):
            yield from self._stay(CLOSED, 1)
            moved, fingers = np.abs(self._fingers() - fingers).max(), self._fingers()
            if step >= 6 and moved < 2e-4:
                break
        goal, hanging = self._goal(), self._position[2] - self._boxes(only=self._body).corners[..., 2].min()
        obstacle_top = self._boxes(without=(self._body,)).top_along(self._position, goal, 0.1)
        lift_height = max(grasp.position[2] + 0.08, obstacle_top + hanging + 0.025, goal[2] + 0.04)
        yield from self._go(np.append(grasp.position[:2], lift_height), CLOSED, near=0.02, speed=0.7)

    def _place(self) -> Iterator[np.ndarray]:
        height = self._position[2]
        yield from self._carry(height, near=0.012, speed=0.8)
        goal_height = self._goal()[2]
        if self._relation == "in":  # as deep as the hand fits, which is 31 mm above the grip site
            rim = self._boxes(only=self._target_body).corners[..., 2].max()
            held = self._object_position[2] - self._position[2]
            yield from self._carry(max(goal_height + 0.035, rim - 0.02 + held), near=0.005, speed=0.6, of_object=True)
        else:
            yield from self._carry(goal_height + 0.04, near=0.012, speed=0.8, of_object=True)
            yield from self._carry(goal_height - 0.004, near=0.003, speed=0.4, of_object=True)
        for _ in range(8):  # stay centred on the object while opening: it would hang on a finger that touches it
            error = (self._object_position + self._offset - self._position) * [1, 1, 0]
            yield self._servo(error, self._turn(), OPEN, speed=0.3)
        yield from self._go(self._position + np.array([0, 0, 0.12]), OPEN, near=0.02)

    def _go(
        self, target: np.ndarray, gripper: float, *, near: float, speed: float = 1.0, gain: float = 1.6
    ) -> Iterator[np.ndarray]:
        for _ in range(80):
            error = target - self._position
            if np.linalg.norm(error) < near:
                return
            yield self._servo(error, self._turn(), gripper, speed=speed, gain=gain)

    def _carry(self, height: float, *, near: float, speed: float, of_object: bool = False) -> Iterator[np.ndarray]:
        """Carry the object horizontally to the goal, with the gripper, or the object itself, at a height."""
        for _ in range(60):
            across = self._goal()[:2] - self._object_position[:2]
            rise = height - (self._object_position if of_object else self._position)[2]
            if np.linalg.norm(self._object_position + self._offset - self._position) > 0.05:
                return  # the object was dropped
            arrived = np.linalg.norm(across) < 0.012 and abs(rise) < near
            if arrived or (self._relation == "on" and of_object and self._env._check_success()):
                return
            yield self._servo(np.append(across, rise), self._turn(), CLOSED, speed=speed)

    def _stay(self, gripper: float, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            yield np.array([0, 0, 0, 0, 0, 0, gripper])

    def _turn(self) -> np.ndarray:
        return rotation_vector(self._rotation @ self._data.site_xmat[self._site].reshape(3, 3).T)

    @property
    def _position(self) -> np.ndarray:
        return self._data.site_xpos[self._site].copy()

    @property
    def _object_position(self) -> np.ndarray:
        return self._data.xpos[self._body].copy()

    def _fingers(self) -> np.ndarray:
        return self._data.qpos[self._env.robots[0]._ref_gripper_joint_pos_indexes].copy()

    def _goal(self) -> np.ndarray:
        """Goal of the object's origin."""
        return self._target.xpos + np.array([0, 0, self._over])

    def _boxes(self, *, only: int | None = None, without: tuple[int, ...] = ()) -> Boxes:
        """Collision boxes of one body's tree, or of everything except the robot and the trees of some bodies."""
        model, data = self._model, self._data
        roots = model.body_rootid[model.geom_bodyid]
        chosen = (model.geom_type == 6) & ((model.geom_contype | model.geom_conaffinity) != 0)  # 6: mjGEOM_BOX
        if only is not None:
            chosen &= roots == model.body_rootid[only]
        else:
            robot = model.body_rootid[model.site_bodyid[self._site]]
            chosen &= ~np.isin(roots, [robot, *(model.body_rootid[body] for body in without)])
        return Boxes(data.geom_xpos[chosen], data.geom_xmat[chosen].reshape(-1, 3, 3), model.geom_size[chosen])
