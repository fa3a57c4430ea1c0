"""ros2 launch torchpi_ros2 control.launch.py config:=robot.yaml [use_sim_time:=true]."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue


def generate_launch_description() -> LaunchDescription:
    """Launch the node. It is not restarted: a run ends for a reason, and the robot is then held."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("config", description="The node's YAML file."),
            DeclareLaunchArgument("use_sim_time", default_value="false", description="Follow the simulation's /clock."),
            Node(
                package="torchpi_ros2",
                executable="control",
                output="screen",
                emulate_tty=True,
                parameters=[
                    {
                        "config": ParameterValue(LaunchConfiguration("config"), value_type=str),
                        "use_sim_time": ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool),
                    }
                ],
            ),
        ]
    )
