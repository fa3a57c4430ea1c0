"""MuJoCo's renderer on machines without a screen, with or without a GPU."""

import atexit
import contextlib
import importlib
import importlib.util
import os
import sys
import weakref
from collections.abc import Mapping
from ctypes import ArgumentError
from typing import Any

import numpy as np

from torchpi.errors import MissingExtraError
from torchpi.extras import require


class OpenGLError(OSError):
    """This machine has no OpenGL that renders without a screen; the message names the packages to install."""


def _no_opengl(reason: Exception) -> OpenGLError:
    hint, device = "", os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if device is not None:
        hint = f" MUJOCO_EGL_DEVICE_ID is {device}; it counts from 0 the GPUs that EGL shows this process: unset it."
    return OpenGLError(
        f"No OpenGL that renders without a screen (MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: "
        f"{str(reason).rstrip('.')}).{hint} For EGL unset MUJOCO_GL and, on Debian or Ubuntu: apt-get install libegl1 "
        "libgl1-mesa-dri libopengl0. Or choose another backend of MuJoCo, for example MUJOCO_GL=osmesa with libosmesa6."
    )


def import_mujoco() -> Any:
    """Import MuJoCo, which chooses its rendering backend at import: EGL, unless the user has set MUJOCO_GL."""
    if sys.platform == "linux":  # on other systems MuJoCo's default renders without a screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    # Mesa's software renderer and Triton, which torch.compile imports, each contain an LLVM. The process crashes with a
    # segmentation fault if Triton is loaded second.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    try:
        return require("mujoco", "sim")
    except MissingExtraError:
        raise
    # PyOpenGL raises various errors without libEGL, and ArgumentError without libOpenGL; MuJoCo raises RuntimeError for
    # an unknown value of MUJOCO_GL.
    except (ArgumentError, AttributeError, ImportError, OSError, RuntimeError) as error:
        raise _no_opengl(error) from error


class Cameras:
    """Renders several cameras of one simulation, at any size, through one OpenGL context.

    MuJoCo's own `Renderer` needs a context per size, each of which takes half a second to fill. It also frees its
    textures after its context, and therefore in the context of another renderer, if there is one, whose images are
    garbage from then on.
    """

    def __init__(
        self, model: Any, cameras: Mapping[str, Any], *, effects: bool = False, hidden_group: int | None = None
    ) -> None:
        """Set the cameras and the level of detail.

        Args:
            cameras: name of each view to the model's name of the camera, or an MjvCamera.
            effects: render shadows, reflections and smooth edges, which take five sixths of the time without a GPU.
            hidden_group: a group of geometries to hide, such as those for collisions.
        """
        self._model, self._effects, self._size = model, effects, (0, 0)
        self._hidden_group = hidden_group
        self._cameras = {name: _camera(model, camera) for name, camera in cameras.items()}
        self._free: weakref.finalize[..., Any] | None = None  # frees the context, if there is one

    def render(self, data: Any, height: int, width: int | None = None) -> dict[str, np.ndarray]:
        """Render each view as uint8 [height, width, 3], square by default."""
        mujoco, width = import_mujoco(), width or height
        if self._free is None:
            self._make_context(mujoco)
        self._gl.make_current()
        if height > self._size[0] or width > self._size[1]:
            self._size = (max(height, self._size[0]), max(width, self._size[1]))
            mujoco.mjr_resizeOffscreen(self._size[1], self._size[0], self._mjr)
        rectangle, views = mujoco.MjrRect(0, 0, width, height), {}
        for name, camera in self._cameras.items():
            category, image = mujoco.mjtCatBit.mjCAT_ALL, np.empty((height, width, 3), np.uint8)
            mujoco.mjv_updateScene(self._model, data, self._option, None, camera, category, self._scene)
            mujoco.mjr_render(rectangle, self._scene, self._mjr)
            mujoco.mjr_readPixels(image, None, rectangle, self._mjr)
            views[name] = np.ascontiguousarray(image[::-1])  # OpenGL counts rows from below
        return views

    def _make_context(self, mujoco: Any) -> None:
        """Make an OpenGL context that contains the model's meshes and textures."""
        if not self._effects:
            self._model.vis.quality.offsamples = 0  # read when the context is made
        try:
            self._gl = _new_gl(mujoco)
            self._gl.make_current()
            self._mjr = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (AttributeError, ImportError, RuntimeError, ValueError, mujoco.FatalError) as error:
            raise _no_opengl(error) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._scene, self._option = mujoco.MjvScene(self._model, maxgeom=10_000), mujoco.MjvOption()
        if self._hidden_group is not None:
            self._option.geomgroup[self._hidden_group] = 0
        if not self._effects:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._scene.flags[flag] = False
        # EGL shuts down at the interpreter's exit before objects are deleted, and freeing a context then prints errors.
        # Exit functions run in reverse order, so this one runs before that of EGL, which was registered earlier.
        self._free = weakref.finalize(self, _free, self._gl, self._mjr)
        self._free.atexit = False
        atexit.register(self._free)

    def project(self, data: Any, camera: str, points: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
        """Project points [k, 3] of the simulation to pixels (x, y) of a view, [k, 2]; NaN behind the camera."""
        mujoco = import_mujoco()
        scene = mujoco.MjvScene(self._model, maxgeom=1)
        mujoco.mjv_updateCamera(self._model, data, self._cameras[camera], scene)
        eyes = scene.camera  # two, for stereo; a plain image is taken from their midpoint
        position = np.mean([eye.pos for eye in eyes], axis=0)
        forward, up, near = eyes[0].forward, eyes[0].up, eyes[0].frustum_near
        offset = np.asarray(points, np.float64) - position
        depth = offset @ forward
        scale = near / np.where(depth > 0, depth, np.nan)
        bottom, top = eyes[0].frustum_bottom, eyes[0].frustum_top
        pixels = height / (top - bottom)  # per unit of length on the near plane
        x = offset @ np.cross(forward, up) * scale * pixels + (width or height) / 2
        y = (top - offset @ up * scale) * pixels
        return np.stack([x, y], axis=-1)

    def close(self) -> None:
        if self._free is not None:
            self._free()
            atexit.unregister(self._free)
            self._free, self._size = None, (0, 0)


def _camera(model: Any, camera: Any) -> Any:
    mujoco = import_mujoco()
    if isinstance(camera, mujoco.MjvCamera):
        return camera
    fixed = mujoco.MjvCamera()
    fixed.type = mujoco.mjtCamera.mjCAMERA_FIXED
    fixed.fixedcamid = model.camera(camera).id
    return fixed


def _new_gl(mujoco: Any) -> Any:
    backend: Any = getattr(mujoco, "GLContext", None)
    # MuJoCo may have been imported before MUJOCO_GL was set, and then uses another backend.
    if os.environ.get("MUJOCO_GL", "").lower() == "egl":
        backend = importlib.import_module("mujoco.egl").GLContext
    if backend is None:
        raise RuntimeError("This turns rendering off.")
    # Without this attribute, a context whose construction has failed prints errors when it is deleted.
    deletable = type("GLContext", (backend,), {"_context": None})
    return deletable(64, 64)  # the size of a window, which an off-screen context ignores


def _free(gl: Any, mjr: Any) -> None:
    gl.make_current()  # the calls below act on the current context
    mjr.free()
    gl.free()


_SCENE = "<mujoco><worldbody><camera name='view' pos='0 0 1'/></worldbody></mujoco>"


def rendering_problem() -> str | None:
    """Try to render a small image; return what is missing and how to install it, or None if nothing is."""
    try:
        mujoco = import_mujoco()
        require("metaworld", "sim")
        require("av", "data")
        model = mujoco.MjModel.from_xml_string(_SCENE)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with contextlib.closing(Cameras(model, {"view": "view"})) as cameras:
            cameras.render(data, 16)
    except (ModuleNotFoundError, OpenGLError) as error:
        return str(error)
    return None
