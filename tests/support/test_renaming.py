"""Settings under their old names."""

import dataclasses
import inspect
import warnings

import pytest
import torch

import deconvnet
from deconvnet.support.renaming import current_name, renamed, with_current_names


@renamed(share="lam_ratio")
@dataclasses.dataclass(frozen=True)
class Inner:
    lam_ratio: float = 0.1


@renamed(coupling="rho", old="new")
@dataclasses.dataclass(frozen=True)
class Outer:
    rho: float = 1.0
    new: int = 2
    inner: Inner | None = None


def test_an_old_name_works_and_warns_with_the_new_one():
    with pytest.warns(FutureWarning, match="Outer: coupling is now called rho"):
        assert Outer(coupling=3.0) == Outer(rho=3.0)


def test_current_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataclasses.replace(Outer(3.0, new=1), rho=2.0) == Outer(2.0, 1)
        assert with_current_names({"rho": 1, "inner": {"lam_ratio": 2}}, Outer, "x") == {
            "rho": 1,
            "inner": {"lam_ratio": 2},
        }


def test_an_old_and_a_new_name_of_one_setting_are_refused():
    with pytest.raises(TypeError, match="coupling is the old name of rho; give rho alone"):
        Outer(coupling=3.0, rho=2.0)


def test_unknown_names_are_still_refused_by_the_constructor():
    with pytest.raises(TypeError, match="unknown"):
        Outer(unknown=1)


def test_the_signature_shows_current_names_alone():
    assert list(inspect.signature(Outer).parameters) == ["rho", "new", "inner"]


def test_nested_fields_of_a_file_come_under_their_current_names_in_their_order():
    fields = {"coupling": 3, "old": 4, "inner": {"share": 0.5}, "other": 1}
    with pytest.warns(FutureWarning, match=r"model.yaml.inner: share is now called lam_ratio"):
        current = with_current_names(fields, Outer, "model.yaml")
    assert list(current.items()) == [
        ("rho", 3),
        ("new", 4),
        ("inner", {"lam_ratio": 0.5}),
        ("other", 1),
    ]


def test_the_current_name_of_a_setting():
    assert current_name(Outer, "coupling") == current_name(Outer, "rho") == "rho"
    assert current_name(Outer, "unknown") == "unknown"


def test_a_class_with_old_names_of_its_own_knows_those_of_its_parent():
    @renamed(extra="more")
    @dataclasses.dataclass(frozen=True)
    class Child(Inner):
        more: int = 0

    with pytest.warns(FutureWarning):
        child = Child(share=0.3, extra=2)
    assert (child.lam_ratio, child.more) == (0.3, 2)
    assert current_name(Child, "share") == "lam_ratio" and Inner.RENAMED == {"share": "lam_ratio"}


def test_a_renamed_argument_of_a_function_works_under_its_old_name():
    images, filters = torch.rand(1, 1, 8, 8), torch.eye(3)[None, None] / 3**0.5
    solution = deconvnet.sparse_code(images, filters, lam_ratio=0.5)
    with pytest.warns(FutureWarning, match="sparse_code: share is now called lam_ratio"):
        assert torch.equal(deconvnet.sparse_code(images, filters, share=0.5).z, solution.z)
    with pytest.warns(FutureWarning) as warned:
        deconvnet.learn_online([images], 2, 3, share=0.5, memory=9.0)
    assert ["averaging_batches" in str(w.message) for w in warned] == [False, True]
    assert "share" not in inspect.signature(deconvnet.sparse_code).parameters
