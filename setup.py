"""What pyproject.toml cannot say: configs/ is installed as the package deconvnet.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["deconvnet", "deconvnet.*"]), "deconvnet.configs"],
    package_dir={"deconvnet.configs": "configs"},
)
