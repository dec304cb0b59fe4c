"""What callers hand over: arrays and numbers of every kind are used, or refused in one line."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import deconvnet
from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    learn_filters,
    learn_online,
    sparse_code,
)
from deconvnet.applications.restoration.noise import estimate_noise
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.filters.constraint import normalize
from deconvnet.operators.convolution import correlate, deconvolve, filter_gradient
from deconvnet.operators.linear import Deconvolution
from deconvnet.operators.pooling import max_pool
from deconvnet.operators.upsampling import BilinearUpsampling, ResizeConvolution
from deconvnet.sklearn import DeconvNetTransformer
from deconvnet.sparse_coding.prior import Prior, shrink
from deconvnet.sparse_coding.problem import METHODS, duality_gap
from deconvnet.sparse_coding.solve import lam_from_ratio, solve
from deconvnet.visualization.projection.projector import Projector

ONCE = LearningSettings(epochs=1)


@pytest.fixture(scope="module")
def pixels(textures):
    return textures(3, 1, 16, 18)


@pytest.fixture(scope="module")
def y(pixels):
    return pixels - pixels.mean((1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def f():
    f = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    return f / f.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def net():
    steps = PreprocessingSettings(color="grey", steps=["mean"])
    return DeconvNet([LayerSettings(4, 5, learning=ONCE)], steps)


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


class Subclass(torch.Tensor):
    """As the images of torchvision."""


ARRAYS = {
    "numpy": lambda y: y.numpy(),
    "numpy_float64": lambda y: y.numpy().astype("float64"),
    "other_byte_order": lambda y: y.numpy().astype(">f4"),
    "negative_strides": lambda y: y.flip(3).numpy()[..., ::-1],
    "fortran": lambda y: np.asfortranarray(y.numpy()),
    "read_only": lambda y: read_only(y.numpy()),
    "unaligned": lambda y: (
        np.frombuffer(b"x" + y.numpy().tobytes(), "u1")[1:].view("f4").reshape(y.shape)
    ),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "not_contiguous": lambda y: y.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda y: y[:1].expand(len(y), -1, -1, -1),
    "requires_grad": lambda y: y.clone().requires_grad_(),
    "parameter": lambda y: torch.nn.Parameter(y.clone()),
    "subclass": lambda y: y.clone().as_subclass(Subclass),
    "lazy_sign": lambda y: torch._neg_view(-y),
}


@pytest.fixture(scope="module")
def results(f):
    """results(plain): the maps, filters, codes and filters online of plain images, made once."""
    known = []

    def of(plain):
        for images, found in known:
            if images.dtype == plain.dtype and torch.equal(images, plain):
                return found
        learned = learn_filters(plain, 4, filter_size=5, lam=5.0, learning=ONCE)
        online = learn_online([plain], 4, filter_size=5, lam=5.0).filters
        maps = sparse_code(plain, f, lam=5.0).z
        known.append((plain, (maps, learned.filters, learned.encode(plain).z, online)))
        return known[-1][1]

    return of


@pytest.mark.parametrize("kind", ARRAYS)
def test_images_are_coded_and_learned_from_in_every_kind_of_array(pixels, y, f, net, kind, results):
    given = ARRAYS[kind](y)
    dtype = torch.float64 if kind == "numpy_float64" else torch.float32
    plain = torch.tensor(given.tolist(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sparse_code(given, f, lam=5.0)
        learned = learn_filters(given, 4, filter_size=5, lam=5.0, learning=ONCE)
        online = learn_online([given], 4, filter_size=5, lam=5.0)
        codes = net.infer(ARRAYS[kind](pixels))
    maps, filters, codes_of_plain, filters_online = results(plain)
    assert torch.equal(found.z, maps)
    for tensor in (found.z, found.residual, learned.filters, online.filters):
        assert type(tensor) is torch.Tensor
    assert found.z.requires_grad == (kind in ("requires_grad", "parameter"))
    assert not learned.filters.requires_grad and not online.filters.requires_grad
    assert torch.equal(learned.filters, filters)
    assert torch.equal(learned.encode(given).z, codes_of_plain)
    assert torch.equal(online.filters, filters_online)
    assert net.reconstruct(codes).shape == pixels.shape


@pytest.mark.parametrize("kind", ARRAYS)
def test_filters_and_states_are_taken_in_every_kind_of_array_and_left_as_they_are(y, f, kind):
    settings = SolverSettings("fista", iterations=12)
    given, state = ARRAYS[kind](f), ARRAYS[kind](torch.zeros(3, 4, 20, 22))
    plain = torch.tensor(given.tolist())
    before = [torch.tensor(each.tolist()) for each in (given, state)]
    found = sparse_code(y, given, lam=5.0)
    assert torch.equal(found.z, sparse_code(y, plain, lam=5.0).z)
    A = Deconvolution(plain)
    for method in METHODS:
        own = SolverSettings(method, iterations=2)
        warm = solve(A, y, lam=5.0, state=state, settings=own)
        assert torch.equal(warm.z, solve(A, y, lam=5.0, settings=own).z)
        assert warm.z.dtype == warm.state.dtype == y.dtype
    # What is asked of an operator is asked in its type.
    A = Deconvolution(plain.double() if kind == "numpy_float64" else plain)
    gap = duality_gap(A, ARRAYS[kind](y[:, :, :9, :9]), state[:, :, :13, :13], 5.0)
    assert gap.shape == (3,) and (gap > 0).all()
    assert lam_from_ratio(A, ARRAYS[kind](y), 0.1) > 0
    for each, expected in zip((given, state), before, strict=True):
        assert torch.equal(torch.tensor(each.tolist()), expected)
    A = Deconvolution(plain)
    assert solve(A, y, lam=5.0, state=found.z.double(), settings=settings).z.dtype == y.dtype


NO_TENSORS = {
    "numpy": (lambda x: x.numpy(), "must be a tensor, got ndarray: use torch.from_numpy"),
    "list": (lambda x: x.tolist(), "must be a tensor, got a list"),
    "None": (lambda x: None, "must be a tensor, got NoneType"),
    "text": (lambda x: "photo.png", "must be a tensor, got str"),
    "sparse": (lambda x: x.to_sparse(), "must be dense"),
    "complex": (lambda x: x.to(torch.complex64), "must be real"),
    "whole": (lambda x: x.long(), "must be floating, got torch.int64"),
    "bool": (lambda x: x > 0, "must be floating, got torch.bool"),
}
MATHEMATICS = {
    "deconvolve": lambda x: deconvolve(x, torch.ones(4, 1, 3, 3)),
    "filters": lambda x: deconvolve(torch.ones(1, 4, 9, 9), x),
    "correlate": lambda x: correlate(x, torch.ones(2, 4, 3, 3)),
    "filter_gradient": lambda x: filter_gradient(x, torch.ones(3, 1, 7, 7), 3),
    "max_pool": lambda x: max_pool(x, (1, 2, 2)),
    "shrink": lambda x: shrink(x, 1.0),
    "normalize": normalize,
    "operator": Deconvolution,
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("function", MATHEMATICS)
def test_functions_of_tensors_refuse_other_objects_with_a_one_line_error(function, kind):
    convert, message = NO_TENSORS[kind]
    with pytest.raises(ValueError, match=message) as error:
        MATHEMATICS[function](convert(torch.ones(3, 4, 9, 9)))
    assert "\n" not in str(error.value)


def test_functions_of_tensors_refuse_two_types_devices_and_shapes_that_do_not_fit(y, f):
    for call, message in {
        lambda: correlate(y.double(), f): r"y is torch.float64 and f torch.float32: .* f.to\(y\)",
        lambda: correlate(y.to("meta"), f): "y is on meta and f on cpu",
        lambda: deconvolve(y, torch.ones(1, 1, 0, 3)): "filters must have the shape",
        lambda: max_pool(y, 2): "pooling window 2: expected three",
        lambda: max_pool(y, (1, 2.5, 2)): "pooling window",
        lambda: max_pool(y[:, :, :0], (1, 2, 2)): "maps must have the shape",
        lambda: normalize(f[0]): "filters must have the shape",
        lambda: filter_gradient(y[0], y, 3): "four axes",
        lambda: shrink(y, "a"): "beta='a': must be a number",
        lambda: shrink(y, 1.0, "a"): "p='a': must be a number",
        lambda: Prior(group=1.5): "group=1.5: must be a whole number",
        lambda: Prior(weights="heavy"): "weights must be a tensor",
        lambda: Prior(weights=[1.0, -1.0]): "weights=-1.0: must be finite and not negative",
        lambda: sparse_code(y.to("meta"), f, lam=5.0): "images is on the device meta",
        lambda: solve(
            Deconvolution(f), y, lam=5.0, state=y, settings=SolverSettings()
        ): r"state of shape .* expected maps of \(3, 4, 20, 22\)",
        lambda: duality_gap(Deconvolution(f), y, y, 5.0): "z of shape",
        lambda: duality_gap(Deconvolution(f), y, f, "a"): "lam='a': must be a number",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    # autocast brings tensors of two types to one, and no image has no maps.
    with torch.autocast("cpu", torch.bfloat16):
        assert correlate(y.bfloat16(), f).dtype == torch.bfloat16
    assert correlate(y[:0], f).shape == (0, 4, 20, 22)


def test_networks_and_restorers_refuse_numbers_that_are_none_in_one_line(pixels, net):
    restorer = Restorer(net)
    for call, message in {
        lambda: net.layer("a"): "layer='a': this network has layers 1 to 1",
        lambda: net.layer(1.0): "layer=1.0: this network has layers 1 to 1",
        lambda: net.layer(0): "layer=0: this network has layers 1 to 1",
        lambda: net.layer(2): "layer=2: this network has layers 1 to 1",
        lambda: net.infer(pixels, depth=0.5): "depth=0.5: this network has layers 1 to 1",
        lambda: restorer.denoise(pixels, 0.1, depth="a"): "depth='a': must be a whole number",
        lambda: restorer.denoise(pixels, 0.1, depth=1.5): "depth=1.5: must be a whole number",
        lambda: restorer.denoise(pixels, 0.1, memory="a"): "memory='a': must be a number",
        lambda: restorer.denoise(pixels, 0.1, memory=None): "memory=None: must be a number",
        lambda: Restorer(net, strength="a"): "strength='a': must be a number",
        lambda: Restorer(net, psi=0): "psi=0.0: must be positive",
        lambda: estimate_noise(pixels[0]): r"images must have the shape \(N, C, H, W\)",
        lambda: estimate_noise((255 * pixels).byte()): "images must be float32 or float64",
        lambda: BilinearUpsampling(1, 2)(pixels.numpy()): "maps must be a tensor, got ndarray",
        lambda: ResizeConvolution(1, 1, 3, 2)(pixels.long()): "maps must be floating",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert len(Restorer(net, strength=np.float32(3)).denoise(pixels, 0.1, depth=np.int64(1))) == 1


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.double, torch.Tensor.half])
def test_filters_masks_and_weights_are_taken_in_every_kind_of_array(y, f, convert):
    f = f.half().float()
    mask, weights = (y > 0).float(), torch.tensor([1.0, 2.0, 1.0, 0.5])
    expected = sparse_code(y, f, lam=5.0, mask=mask, weights=weights)
    found = sparse_code(y, convert(f), lam=5.0, mask=convert(mask), weights=convert(weights))
    assert torch.equal(found.z, expected.z)
    as_bool = sparse_code(y, f, lam=5.0, mask=(y > 0).numpy(), weights=[1, 2, 1, 0.5])
    assert torch.equal(as_bool.z, expected.z)


BAD_IMAGES = {
    "list of tensors": (lambda y: list(y), "images must be .* a list of 3 tensors of .*stack"),
    "list of lists": (lambda y: y.tolist(), "images must be a tensor or a numpy array, got a list"),
    "text": (lambda y: "photo.jpg", "images must be a tensor or a numpy array, got str"),
    "none": (lambda y: None, "images must be a tensor or a numpy array, got NoneType"),
    "loader": (lambda y: DataLoader(y), "got DataLoader: batches are for learn_online"),
    "half": (lambda y: y.half(), r"got torch.float16: use images.float\(\)$"),
    "bfloat16": (lambda y: y.bfloat16(), r"got torch.bfloat16: use images.float\(\)$"),
    "uint8": (lambda y: y.byte(), r"got torch.uint8: use images.float\(\) / 255"),
    "numpy uint8": (lambda y: y.byte().numpy(), r"use images.astype\('float32'\) / 255"),
    "int": (lambda y: y.int(), r"got torch.int32: use images.float\(\)$"),
    "bool": (lambda y: y > 0, r"got torch.bool: use images.float\(\)$"),
    "complex": (lambda y: y + 1j, "images must be real, got torch.complex64"),
    "numpy complex": (lambda y: y.numpy() + 1j, "must be real numbers, got an array of complex64"),
    "objects": (lambda y: y.numpy().astype(object), "must be real numbers, got an array of object"),
    "strings": (lambda y: y.numpy().astype(str), "must be real numbers, got an array of <U"),
    "masked": (lambda y: np.ma.masked_less(y.numpy(), 0), "images is a masked array"),
    "sparse": (lambda y: y.to_sparse(), r"images must be dense.*images.to_dense\(\)"),
    "one image": (lambda y: y[0, 0], r"got \(16, 18\): use images\[None, None\]"),
    "grey images": (
        lambda y: y[:, 0],
        r"got \(3, 16, 18\): use .*images\[:, None\] for grey images",
    ),
    "no images": (lambda y: y[:0], r"images must not be empty, got the shape \(0, 1, 16, 18\)"),
    "no channels": (lambda y: y[:, :0], "images must not be empty|filters must have the shape"),
    "no pixels": (lambda y: y[..., :0], "images must not be empty"),
    "nan": (lambda y: y * math.nan, "must be finite"),
    "inf": (lambda y: y + math.inf, "must be finite"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_cannot_be_used_are_refused_by_what_would_be_right(y, f, net, kind):
    make, message = BAD_IMAGES[kind]
    given, learned = make(y), learn_online([y], 4, filter_size=5, lam=5.0)
    for door in (
        lambda: sparse_code(given, f, lam=5.0),
        lambda: sparse_code(given, f, lam=5.0, settings=SolverSettings()),
        lambda: learn_filters(given, 4, filter_size=5, lam=5.0, learning=ONCE),
        lambda: learned.encode(given),
        lambda: learned.learn_more(given),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            door()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", sorted({*BAD_IMAGES} - {"half", "bfloat16", "no channels"}))
def test_networks_and_restorers_refuse_images_that_cannot_be_used_in_one_line(y, net, kind):
    given = BAD_IMAGES[kind][0](y)
    restorer = Restorer(net)
    doors = [
        lambda: net.infer(given),
        lambda: restorer.denoise(given, 0.1),
        lambda: restorer.inpaint(given, torch.ones(1, 1, 16, 18)),
    ]
    if kind not in ("nan", "inf", "no images", "no pixels"):  # a model takes what it takes
        doors.append(lambda: Projector(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))).layers(given))
    for door in doors[1:] if kind == "nan" else doors:
        if kind in ("nan", "inf") and door is doors[2]:
            continue
        with pytest.raises(ValueError) as refused:
            door()
        assert "\n" not in str(refused.value)


BAD_ARGUMENTS = {
    "filters list": (dict(filters=[1.0]), "filters must be a tensor or a numpy array"),
    "no filters": (dict(filters=torch.ones(0, 1, 5, 5)), "filters must not be empty"),
    "filters of nothing": (dict(filters=torch.ones(4, 1, 0, 5)), "filters must not be empty"),
    "complex filters": (dict(filters=torch.ones(4, 1, 5, 5) * 1j), "filters must be real"),
    "mask list": (dict(mask=[1.0]), "mask must be a tensor or a numpy array, got a list"),
    "mask number": (dict(mask=1.0), "mask must be a tensor or a numpy array, got float"),
    "weights text": (dict(weights="dear"), "weights must be a tensor or a numpy array, got str"),
    "weights texts": (dict(weights=["dear"]), "weights must be numbers, got a list of 1 str"),
    "settings name": (dict(settings="fista"), r"settings='fista': use SolverSettings\('fista'\)"),
    "settings dict": (dict(settings=dict(gap=0.1)), r"must be SolverSettings\(...\)"),
    "lam 0": (dict(lam=0), "lam=0.0: must be positive and finite"),
    "lam negative": (dict(lam=-1.0), "lam=-1.0: must be positive and finite"),
    "lam inf": (dict(lam=math.inf), "lam=inf: must be positive and finite"),
    "lam nan": (dict(lam=math.nan), "lam=nan: must be positive and finite"),
    "lam text": (dict(lam="5"), "lam='5': must be a number"),
    "lam complex": (dict(lam=1j), "lam=1j: must be a number"),
    "lams": (dict(lam=torch.ones(2)), r"lam=Tensor of shape \(2,\): must be a number"),
    "lam_ratio text": (dict(lam=None, lam_ratio="a"), "lam_ratio='a': must be a number"),
    "lam_ratio nan": (dict(lam=None, lam_ratio=math.nan), r"lam_ratio=nan: must lie in \(0, 1\]"),
    "p text": (dict(p="1"), "p='1': must be a number"),
    "p nan": (dict(p=math.nan), "p=nan"),
    "group half": (dict(group=2.5), "group=2.5: must be a whole number from 1"),
    "chunk half": (dict(chunk=0.5), "chunk=0.5: must be a whole number from 1"),
    "boundary": (dict(boundary="same"), "boundary='same': choose"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
@pytest.mark.parametrize("method", ["coordinate", "admm"])
def test_arguments_of_the_wrong_kind_are_refused_in_one_line(y, f, kind, method):
    asked, message = BAD_ARGUMENTS[kind]
    asked = {"filters": f, "lam": 5.0, "settings": SolverSettings(method, iterations=2), **asked}
    with pytest.raises(ValueError, match=message) as refused:
        sparse_code(y, asked.pop("filters"), **asked)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "lam", [5, np.float32(5), np.int64(5), np.array(5.0), torch.tensor(5.0), torch.tensor([5.0])]
)
def test_a_number_may_come_from_numpy_or_torch(y, f, lam, tmp_path):
    found = sparse_code(y, f, lam=lam)
    assert found.lam == 5.0 and type(found.lam) is float
    assert torch.equal(found.z, sparse_code(y, f, lam=5.0).z)
    learned = learn_filters(y, np.int64(4), filter_size=torch.tensor(5), lam=lam, learning=ONCE)
    assert type(learned.settings.lam) is float and type(learned.settings.num_maps) is int
    learned.save(tmp_path / "learned.safetensors")
    solution = sparse_code(y, f, lam_ratio=np.float32(0.25))
    assert solution.lam == sparse_code(y, f, lam_ratio=0.25).lam


@pytest.mark.parametrize("method", METHODS)
def test_the_solvers_themselves_refuse_no_images_and_a_lam_that_is_no_number(y, f, method):
    asked = dict(settings=SolverSettings(method))
    with pytest.raises(ValueError, match="b must not be empty"):
        solve(Deconvolution(f), y[:0], lam=5.0, **asked)
    with pytest.raises(ValueError, match="lam=inf: must be positive and finite"):
        solve(Deconvolution(f), y, lam=math.inf, **asked)
    with pytest.raises(ValueError, match="b must be float32 or float64"):
        solve(Deconvolution(f), y.half(), lam=5.0, **asked)


SIZES = {
    "sides": (dict(filter_size=(5, 5, 5)), r"filter_size=\(5, 5, 5\): .*or two, \(rows, columns\)"),
    "no rows": (dict(filter_size=(0, 5)), r"filter_size=\(0, 5\): must be whole numbers from 1"),
    "float": (dict(filter_size=5.0), "filter_size=5.0: must be a whole number from 1"),
    "no maps": (dict(num_maps=0), "num_maps=0: must be at least 1"),
    "text": (dict(num_maps="many"), "num_maps='many'"),
    "missing": (dict(filter_size=None), "num_maps=4, filter_size=None: give both"),
    "solver": (dict(solver="fista"), r"solver='fista': use SolverSettings\('fista'\)"),
    "learning": (dict(learning=dict(epochs=1)), r"must be LearningSettings\(...\)"),
    "lam": (dict(lam=math.inf), "lam=inf: must be positive and finite"),
    "p": (dict(p="1"), "p='1': must be a number"),
}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("learn", [learn_filters, lambda y, **asked: learn_online([y], **asked)])
def test_sizes_and_settings_of_the_wrong_kind_are_refused_by_both_learners(y, learn, kind):
    asked, message = SIZES[kind]
    asked = {"num_maps": 4, "filter_size": 5, "lam": 5.0, **asked}
    with pytest.raises(ValueError, match=message) as refused:
        learn(y, **asked)
    assert "\n" not in str(refused.value)


def test_layers_are_refused_with_settings_of_the_wrong_kind():
    with pytest.raises(ValueError, match=r"solver='fista': use SolverSettings\('fista'\)"):
        LayerSettings(4, 5, solver="fista")
    with pytest.raises(ValueError, match="solver=None: must be SolverSettings"):
        LayerSettings(4, 5, solver=None)
    with pytest.raises(ValueError, match="learning=3: must be LearningSettings"):
        LayerSettings(4, 5, learning=3)
    with pytest.raises(ValueError, match="lam=inf: must be positive and finite"):
        LayerSettings(4, 5, lam=math.inf)


class Pairs(Dataset):
    """Images with labels, as torchvision's."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 2


def test_the_batches_of_a_data_loader_are_learned_from_and_labels_are_not_looked_at(y):
    expected = learn_online(y.split(1), 4, filter_size=5, lam=5.0).filters
    for batches in (
        DataLoader(y, batch_size=1),
        DataLoader(TensorDataset(y), batch_size=1),
        DataLoader(TensorDataset(y, torch.arange(3)), batch_size=1),
        DataLoader(TensorDataset(y, torch.ones(3, 16, 18)), batch_size=1),
        DataLoader(Pairs(y), batch_size=1),
        [(image, None) for image in y.split(1)],
        [image.numpy() for image in y.split(1)],
        (image for image in y.split(1)),
    ):
        assert torch.equal(learn_online(batches, 4, filter_size=5, lam=5.0).filters, expected)


def test_batches_without_images_are_left_out(y):
    expected = learn_online([y, y], 4, filter_size=5, lam=5.0)
    for empty in (y[:0], (y[:0], torch.arange(0)), y[:0].numpy(), torch.empty(0)):
        learned = learn_online([empty, y, empty, y], 4, filter_size=5, lam=5.0)
        assert torch.equal(learned.filters, expected.filters) and len(learned.history) == 2
    with pytest.raises(ValueError, match="batches: there are none, or all of them are empty"):
        learn_online([y[:0]], 4, filter_size=5, lam=5.0)


BAD_BATCHES = {
    "tensor": (lambda y: y, r"batches is one array of the shape \(3, 1, 16, 18\): .*split"),
    "array": (lambda y: y.numpy(), "batches is one array of the shape"),
    "number": (lambda y: 3, "batches must be an iterable of images, got int"),
    "images": (lambda y: [y, list(y)], "batch 2 is a list of 3 tensors"),
    "two": (lambda y: [(y, y)], "batch 1 is a tuple of 2 tensors"),
    "nothing": (lambda y: [()], "batch 1 is a tuple of 0"),
    "dict": (lambda y: [{"image": y, "label": 0}], "batch 1 is a dict of 'image', 'label': give"),
    "text": (lambda y: "photos", "batch 1 must be a tensor or a numpy array, got str"),
    "half": (lambda y: [y.half()], "batch 1 must be float32 or float64, got torch.float16"),
    "small": (lambda y: [y, y[..., :4, :4]], "batch 2: images of 4x4 are smaller than the 5x5"),
    "small first": (lambda y: [y[..., :4]], "batch 1: images of 16x4 are smaller than the 5x5"),
    "channels": (
        lambda y: [y, y.repeat(1, 2, 1, 1)],
        "batch 2: images of 2 channels, but the first ones had 1",
    ),
    "one image": (lambda y: list(y), r"batch 1 must have the shape \(N, C, H, W\)"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_batches_that_cannot_be_used_are_refused_by_their_number(y, kind):
    make, message = BAD_BATCHES[kind]
    with pytest.raises(ValueError, match=message) as refused:
        learn_online(make(y), 4, filter_size=5, lam=5.0)
    assert "\n" not in str(refused.value)


def test_restorers_accept_arrays_and_refuse_other_objects(pixels, net):
    restorer = Restorer(net).fit([image.numpy() for image in pixels])
    mask = (torch.arange(18) % 4 > 0).expand(1, 1, 16, 18)
    (expected,) = restorer.denoise(pixels, 0.1)
    for sigma in (np.float32(0.1), [0.1] * 3, np.full(3, 0.1), torch.full((3,), 0.1)):
        (found,) = restorer.denoise(pixels.numpy(), sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (painted,) = restorer.inpaint(pixels.numpy(), mask.numpy())
    assert torch.equal(painted, restorer.inpaint(pixels, mask.float())[0])
    assert torch.equal(estimate_noise(pixels.numpy()), estimate_noise(pixels))
    for call, message in (
        (lambda: restorer.denoise(pixels, [0.1, 0.2]), r"sigma of the shape \(2,\)"),
        (lambda: restorer.denoise(pixels, "loud"), "sigma must be a tensor"),
        (lambda: restorer.inpaint(pixels, [[1]]), "mask must be a tensor or a numpy array"),
        (lambda: Restorer("run"), "net must be a DeconvNet, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_projectors_take_arrays(pixels):
    projector = Projector(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)))
    found = projector(pixels.numpy(), "0", [(0, 1, 2, 3)])
    assert torch.equal(found.images, projector(pixels, "0", [(0, 1, 2, 3)]).images)


def test_the_transformer_takes_tensors_and_lists(pixels):
    X = pixels[:, 0].double().numpy()
    asked = dict(num_maps=4, filter_size=5, epochs=1, device="cpu")
    expected = DeconvNetTransformer(**asked).fit_transform(X)
    for given in (
        torch.from_numpy(X),
        torch.from_numpy(X).requires_grad_(),
        X.tolist(),
        np.asfortranarray(X),
    ):
        model = DeconvNetTransformer(**asked)
        assert np.array_equal(model.fit(given).transform(given), expected)
    assert isinstance(model.inverse_transform(torch.from_numpy(expected)), np.ndarray)
    coarse = torch.from_numpy(X).bfloat16()
    assert model.transform(coarse).shape == expected.shape
    for bad in (X[:0], X * math.nan, X + 1j, "photos", None, [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError):
            DeconvNetTransformer(**asked).fit(bad)


def test_reconstruction_of_what_are_no_codes_is_refused(net, pixels):
    with pytest.raises(
        ValueError, match="codes must be the Codes that `infer` returns, got Tensor"
    ):
        net.reconstruct(pixels)


def test_solutions_of_images_without_anything_in_them_are_printed(f):
    settings = SolverSettings("coordinate", gap=0.01)
    for method in ("coordinate", "admm", "fista"):
        settings = SolverSettings(method, gap=0.01)
        found = sparse_code(torch.zeros(2, 1, 12, 12), f, lam=5.0, settings=settings)
        assert str(found).endswith("iterations, at most 0.00% above the minimum")


def test_results_are_shown_in_a_line_without_their_numbers(pixels, y, f):
    layers = [
        LayerSettings(4, 5, lam=3.0, pool=[1, 2, 2], learning=ONCE),
        LayerSettings(6, 3, learning=ONCE),
    ]
    net = DeconvNet(layers, PreprocessingSettings(color="grey", steps=["mean"]))
    codes = net.infer(pixels)
    learned = learn_filters(y, 4, filter_size=5, lam=5.0, learning=ONCE)
    assert repr(sparse_code(y, f, lam=5.0)).startswith("Solution(3 images, maps 4x20x22, ")
    assert repr(learned).startswith("Learned(4 filters 1x5x5, lam=5, 1 in the history, objective ")
    shown = repr(codes.layer(1))
    assert re.fullmatch(
        r"LayerCodes\(3 images, maps 4x20x22, pooled to 4x10x11, [\d.]+% non-zero\)", shown
    )
    assert repr(codes).startswith("Codes(3 images 1x16x18\n  layer 1: LayerCodes(3 images")
    assert "4 filters 1x5x5, lam=3, p=1, pool=[1, 2, 2]" in repr(net)
    assert "6 filters 4x3x3" in repr(net)
    for value in (codes, learned, net, codes.layers[0]):
        assert "tensor(" not in repr(value) and len(repr(value)) < 400


def test_the_version_is_that_of_the_project():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'version = { attr = "deconvnet.__version__" }' in text
    assert re.fullmatch(r"\d+\.\d+\.\d+", deconvnet.__version__)
