"""The ament_python package; `colcon build` runs this."""

from glob import glob

from setuptools import setup

NAME = "torchpi_ros2"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", glob("launch/*.launch.py")),
        (f"share/{NAME}/config", glob("config/*.yaml")),
    ],
    install_requires=["setuptools", "numpy", "pillow", "pyyaml", "torchpi-client"],
    zip_safe=True,
    description="Controls a robot with a π₀ or π₀.₅ policy server: cameras and joint states in, joint commands out",
    license="Apache-2.0",
    python_requires=">=3.10",
    entry_points={"console_scripts": ["control = torchpi_ros2.node:main"]},
)
