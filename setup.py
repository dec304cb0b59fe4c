"""What pyproject.toml cannot say: configs/ is installed as the package deconvnet.configs, and the
description on an index has no links to files of the repository, which would lead nowhere there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PICTURE = r'!\[[^\]]*\]\((?!https?:)[^)]*\)|<img src="(?!https?:)[^>]*>'
LINK = r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)"


def description() -> str:
    """The README without pictures of the repository, and with paths in place of links to it."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    text = re.sub(PICTURE, "", text)
    text = re.sub(LINK, lambda m: m[1] if m[1] == m[2] else f"{m[1]} ({m[2]})", text)
    return re.sub(r"<p>\s*</p>\n*", "", text)


setup(
    packages=[*find_packages(include=["deconvnet", "deconvnet.*"]), "deconvnet.configs"],
    package_dir={"deconvnet.configs": "configs"},
    long_description=description(),
    long_description_content_type="text/markdown",
)
