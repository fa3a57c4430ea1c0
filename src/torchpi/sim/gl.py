"""MuJoCo's renderer, set up for a machine without a screen and without a GPU."""

import atexit
import importlib
import os
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchpi.errors import MissingExtraError
from torchpi.extras import require

NO_OPENGL = (
    "No OpenGL that renders without a screen ({reason}). On Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri. "
    "Or choose another backend of MuJoCo, for example MUJOCO_GL=osmesa with libosmesa6."
)


def _no_opengl(error: Exception) -> str:
    return NO_OPENGL.format(reason=f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {str(error).rstrip('.')}")


class OpenGLError(OSError):
    """This machine has no OpenGL that renders without a screen; the message says what to install."""


def import_mujoco() -> Any:
    """MuJoCo, which decides at import how it will render: with EGL, unless the user's MUJOCO_GL says otherwise."""
    if sys.platform == "linux":  # elsewhere its own choice needs no screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        return require("mujoco", "sim")
    except MissingExtraError:
        raise
    # PyOpenGL finds no libEGL and says so in its own way; MuJoCo does not know the value of MUJOCO_GL.
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        raise OpenGLError(_no_opengl(error)) from error


class Cameras:
    """Renders several views of one simulation, at any size, through one OpenGL context.

    MuJoCo's own `Renderer` has a context per size, each of which takes half a second to fill; and it frees its textures
    after its context, that is, in the context of another renderer where there is one, which shows garbage from then on.
    """

    def __init__(self, model: Any, cameras: Mapping[str, Any], *, effects: bool = False) -> None:
        """
        Args:
            model: MuJoCo's model.
            cameras: per view, a camera of the model by name, or an MjvCamera.
            effects: shadows, reflections and smooth edges, as the model has them. Without a GPU they take five sixths
                of the time.
        """
        self._model, self._effects = model, effects
        self._cameras = {name: _camera(model, camera) for name, camera in cameras.items()}
        self._context: _Context | None = None

    def render(self, data: Any, height: int, width: int | None = None) -> dict[str, np.ndarray]:
        """Each view as uint8 [height, width, 3]; square by default."""
        if self._context is None:
            self._context = _Context(self._model, effects=self._effects)
        context, width = self._context, width or height
        return {name: context.render(data, camera, height, width) for name, camera in self._cameras.items()}

    def project(self, data: Any, camera: str, points: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
        """The pixels of points [k, 3] of the simulation in a view of that size: x and y, [k, 2].

        Points behind the camera come out as NaN.
        """
        mujoco = import_mujoco()
        scene = mujoco.MjvScene(self._model, maxgeom=1)
        mujoco.mjv_updateCamera(self._model, data, self._cameras[camera], scene)
        eyes = scene.camera  # two, for stereo; a plain image is taken from between them
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
        """Free the renderer."""
        if self._context is not None:
            self._context.close()
            self._context = None


def _camera(model: Any, camera: Any) -> Any:
    mujoco = import_mujoco()
    if isinstance(camera, mujoco.MjvCamera):
        return camera
    fixed = mujoco.MjvCamera()
    fixed.type = mujoco.mjtCamera.mjCAMERA_FIXED
    fixed.fixedcamid = model.camera(camera).id
    return fixed


class _Context:
    """An OpenGL context with one model's meshes and textures in it."""

    def __init__(self, model: Any, *, effects: bool) -> None:
        self._mujoco = mujoco = import_mujoco()
        self._model, self._size = model, (0, 0)
        if not effects:
            model.vis.quality.offsamples = 0  # read when the context is made
        try:
            self._gl = _new_gl(mujoco)
            self._gl.make_current()
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
            raise OpenGLError(_no_opengl(error)) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._option = mujoco.MjvOption()
        if not effects:
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._scene.flags[flag] = False
        # At the interpreter's exit EGL ends before objects are deleted, so that freeing a context then prints errors.
        # Exit functions run in reverse order: this one, registered after EGL's, before it.
        self._free = weakref.finalize(self, _free, self._gl, self._mjr)
        self._free.atexit = False
        atexit.register(self._free)

    def render(self, data: Any, camera: Any, height: int, width: int) -> np.ndarray:
        mujoco = self._mujoco
        self._gl.make_current()
        if height > self._size[0] or width > self._size[1]:
            self._size = (max(height, self._size[0]), max(width, self._size[1]))
            mujoco.mjr_resizeOffscreen(self._size[1], self._size[0], self._mjr)
        category = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._option, None, camera, category, self._scene)
        rectangle, image = mujoco.MjrRect(0, 0, width, height), np.empty((height, width, 3), np.uint8)
        mujoco.mjr_render(rectangle, self._scene, self._mjr)
        mujoco.mjr_readPixels(image, None, rectangle, self._mjr)
        return np.ascontiguousarray(image[::-1])  # OpenGL counts rows from below

    def close(self) -> None:
        self._free()
        atexit.unregister(self._free)


def _new_gl(mujoco: types.ModuleType) -> Any:
    backend: Any = getattr(mujoco, "GLContext", None)
    if os.environ.get("MUJOCO_GL", "").lower() == "egl":  # whatever MuJoCo chose, which may have been imported earlier
        backend = importlib.import_module("mujoco.egl").GLContext
    if backend is None:
        raise RuntimeError("This turns rendering off.")
    # One that could not be built would print errors as it is deleted, for lack of this attribute.
    deletable = type("GLContext", (backend,), {"_context": None})
    return deletable(64, 64)  # the size of a window, which an off-screen context does not have


def _free(gl: Any, mjr: Any) -> None:
    gl.make_current()  # what is freed now is this context's
    mjr.free()
    gl.free()
