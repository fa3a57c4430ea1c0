"""MuJoCo's renderer, set up for a machine without a screen and without a GPU."""

import contextlib
import os
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

NO_SIM = "simulation needs the extra 'sim': pip install 'torchpi[sim]'"
NO_OPENGL = (
    "no OpenGL that renders without a screen ({reason}). On Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri. "
    "Or choose another backend of MuJoCo, for example MUJOCO_GL=osmesa with libosmesa6"
)


def import_mujoco() -> types.ModuleType:
    """MuJoCo, which decides at import how it will render: with EGL, unless the user's MUJOCO_GL says otherwise.

    Raises:
        ModuleNotFoundError: it is not installed.
        RuntimeError: the chosen OpenGL can't be loaded.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{NO_SIM} ({error})") from error
    # PyOpenGL finds no libEGL and says so in its own way.
    except (AttributeError, ImportError, OSError) as error:
        raise RuntimeError(NO_OPENGL.format(reason=error)) from error
    return mujoco


class Cameras:
    """Renders several views of one simulation, at any size.

    Shadows, reflections and multisampling are off: without a GPU they take five sixths of the time.
    """

    def __init__(self, model: Any, cameras: Mapping[str, Any]) -> None:
        """
        Args:
            model: MuJoCo's model; its off-screen buffer is set up here.
            cameras: per view, a camera of the model by name, or an MjvCamera.
        """
        self._model, self._cameras = model, dict(cameras)
        model.vis.quality.offsamples = 0
        self._renderers: dict[int, Any] = {}

    def render(self, data: Any, size: int) -> dict[str, np.ndarray]:
        """Each view as uint8 [size, size, 3].

        Raises:
            RuntimeError: no OpenGL.
        """
        if size not in self._renderers:
            self._renderers[size] = self._new_renderer(size)
        renderer, images = self._renderers[size], {}
        for name, camera in self._cameras.items():
            renderer.update_scene(data, camera)
            images[name] = renderer.render()
        return images

    def _new_renderer(self, size: int) -> Any:
        mujoco = import_mujoco()
        self._model.vis.global_.offwidth = max(self._model.vis.global_.offwidth, size)
        self._model.vis.global_.offheight = max(self._model.vis.global_.offheight, size)
        try:
            renderer = mujoco.Renderer(self._model, size, size)
        except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
            raise RuntimeError(NO_OPENGL.format(reason=error)) from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        return renderer

    def close(self) -> None:
        """Free the renderers."""
        for renderer in self._renderers.values():
            with contextlib.suppress(AttributeError):  # of one that is half built
                renderer.close()
        self._renderers.clear()
