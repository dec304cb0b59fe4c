"""The public names of the package load when they are used, not when the package is imported."""

import subprocess
import sys

import pytest

from deconvnet import visualization


def test_every_public_name_is_defined_where_the_package_says():
    assert set(visualization.__all__) == set(visualization.MODULES)
    for name in visualization.__all__:
        value = getattr(visualization, name)
        assert value.__module__ == f"deconvnet.visualization.{visualization.MODULES[name]}", name
        assert name in dir(visualization)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'projektor'"):
        visualization.projektor  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys, deconvnet.visualization\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
