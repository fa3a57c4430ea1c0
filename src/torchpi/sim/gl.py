"""MuJoCo's renderer, set up for a machine without a screen and without a GPU."""

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
    """This machine has no OpenGL that renders without a screen; the message says what to install."""


def _no_opengl(reason: Exception) -> OpenGLError:
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    counted = f" MUJOCO_EGL_DEVICE_ID is {device}; it counts from 0 the GPUs that EGL shows this process: unset it."
    return OpenGLError(
        f"No OpenGL that renders without a screen (MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: "
        f"{str(reason).rstrip('.')}).{'' if device is None else counted} For EGL unset MUJOCO_GL and, on Debian or "
        "Ubuntu: apt-get install libegl1 libgl1-mesa-dri libopengl0. Or choose another backend of MuJoCo, for example "
        "MUJOCO_GL=osmesa with libosmesa6."
    )


def import_mujoco() -> Any:
    """MuJoCo, which decides at import how it will render: with EGL, unless the user's MUJOCO_GL says otherwise."""
    if sys.platform == "linux":  # elsewhere its own choice needs no screen
        os.environ.setdefault("MUJOCO_GL", "egl")
    # Mesa's software renderer and Triton each bring an LLVM. Triton, which torch.compile imports, ends the process with
    # a segmentation fault if it comes second.
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")
    try:
        return require("mujoco", "sim")
    except MissingExtraError:
        raise
    # PyOpenGL finds no libEGL, or no libOpenGL (ArgumentError), and says so in its own way; MuJoCo does not know the
    # value of MUJOCO_GL.
    except (ArgumentError, AttributeError, ImportError, OSError, RuntimeError) as error:
        raise _no_opengl(error) from error


class Cameras:
    """Renders several views of one simulation, at any size, through one OpenGL context.

    MuJoCo's own `Renderer` has a context per size, each of which takes half a second to fill; and it frees its textures
    after its context, that is, in the context of another renderer where there is one, which shows garbage from then on.
    """

    def __init__(
        self, model: Any, cameras: Mapping[str, Any], *, effects: bool = False, hidden_group: int | None = None
    ) -> None:
        """Views of cameras, by the model's names for them or as MjvCamera; with the model's effects (shadows,
        reflections and smooth edges), which take five sixths of the time without a GPU; without a group of geometries,
        such as those for collisions."""
        self._model, self._effects, self._size = model, effects, (0, 0)
        self._hidden_group = hidden_group
        self._cameras = {name: _camera(model, camera) for name, camera in cameras.items()}
        self._free: weakref.finalize[..., Any] | None = None  # frees the context; None: there is none

    def render(self, data: Any, height: int, width: int | None = None) -> dict[str, np.ndarray]:
        """Each view as uint8 [height, width, 3]; square by default."""
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
        """Make an OpenGL context with the model's meshes and textures in it."""
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
        # At the interpreter's exit EGL ends before objects are deleted, so that freeing a context then prints errors.
        # Exit functions run in reverse order: this one, registered after EGL's, before it.
        self._free = weakref.finalize(self, _free, self._gl, self._mjr)
        self._free.atexit = False
        atexit.register(self._free)

    def project(self, data: Any, camera: str, points: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
        """The pixels, x and y [k, 2], of the simulation's points [k, 3] in a view; NaN behind the camera."""
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


_SCENE = "<mujoco><worldbody><camera name='view' pos='0 0 1'/></worldbody></mujoco>"


def rendering_problem() -> str | None:
    """The missing part and how to install it, found by rendering a small image; None: nothing is missing."""
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
