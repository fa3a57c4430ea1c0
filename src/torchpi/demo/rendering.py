"""Whether this machine can simulate and film."""

import importlib.util

from torchpi.data.extras import require
from torchpi.errors import MissingExtraError
from torchpi.sim.gl import NO_SIM, Cameras, OpenGLError, import_mujoco

_SCENE = "<mujoco><worldbody><camera name='view' pos='0 0 1'/></worldbody></mujoco>"


def rendering_problem() -> str | None:
    """What is missing and how to get it, found out by rendering a small picture; None: nothing is missing."""
    try:
        if importlib.util.find_spec("metaworld") is None:
            raise MissingExtraError(f"{NO_SIM} (there is no module metaworld).")
        require("av")
        mujoco = import_mujoco()
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
