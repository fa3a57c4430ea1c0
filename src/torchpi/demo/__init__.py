"""The embedded policy at work: `torchpi demo`, and the camera frames that come with it."""

from torchpi.demo.frames import demo_observation, demo_tasks

__all__ = ["demo_observation", "demo_tasks"]
