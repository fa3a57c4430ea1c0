"""ROS 2 node that controls a robot with a policy server: sensors in, commands out, based on torchpi-client."""
