"""The embedded policy at work: `torchpi demo`, and the camera frames that come with it."""

from torchpi.demo.frames import demo_observation as demo_observation
from torchpi.demo.frames import demo_tasks as demo_tasks
