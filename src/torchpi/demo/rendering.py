"""A test of the simulator, the renderer and the video encoder."""

from torchpi.extras import require
from torchpi.sim.gl import Cameras, OpenGLError, import_mujoco

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
        cameras = Cameras(model, {"view": "view"})
        try:
            cameras.render(data, 16)
        finally:
            cameras.close()
    except (ModuleNotFoundError, OpenGLError) as error:
        return str(error)
    return None
