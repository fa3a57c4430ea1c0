"""`torchpi demo`: the embedded policy in a simulator, or on packaged camera frames."""

from torchpi.demo.frames import demo_observation as demo_observation
from torchpi.demo.frames import demo_tasks as demo_tasks
