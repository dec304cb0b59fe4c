"""Networks by name have the right parameters and input; errors are one line."""

import io
import math
import pickle
import shutil
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torchvision import models as torchvision_models

from deconvnet.images.fit import Crop
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.weights import load_state_dict
from deconvnet.visualization.models.zfnet import ZFNet, limit_filters
from deconvnet.visualization.models.zoo import (
    LoadedModel,
    digest,
    load_model,
    save_model,
)

SMALL = "torchvision/squeezenet1_1"
CAFFE = {"mean": (103.939 / 255, 116.779 / 255, 123.68 / 255), "std": (1 / 255,), "order": "bgr"}
KINDS = [
    Normalization(),
    Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Normalization(**CAFFE),
    Normalization((0.3,), (0.4,), "grey"),
]

FACTORIES = """
import torch
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, classes=4):
        super().__init__(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))
        self(torch.zeros(1, 3, 6, 6))

def bad():
    raise OSError("its file\\nis not there")

ready = Tiny()
number = 3
text = lambda: "a text"
"""


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and no network to fill it from."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hub" / "checkpoints"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A name for the module above, which lies in the current folder only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_networks").mkdir()
    (tmp_path / "my_networks" / "small.py").write_text(FACTORIES)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    yield "my_networks.small:Tiny"
    for name in [key for key in sys.modules if key.startswith("my_networks")]:
        del sys.modules[name]


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def equal(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    return all(torch.equal(a, two.state_dict()[name]) for name, a in one.state_dict().items())


def refused(*parts, **arguments):
    with pytest.raises(ValueError) as caught:
        load_model(arguments.pop("spec"), **arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_torchvision_network_gets_the_input_that_its_weights_were_trained_on(name):
    subject = load_model(f"torchvision/{name}", weights="none")
    theirs = torchvision_models.get_model_weights(name).DEFAULT.transforms()
    exact = images(2, 3, subject.crop.size, subject.crop.size)
    x = subject.normalization.apply(exact)
    # Of an image of exactly the size of the crop, theirs are asked to resize nothing.
    theirs.resize_size = theirs.crop_size
    torch.testing.assert_close(x, theirs(exact), atol=1e-6, rtol=0)


def test_crop_and_normalisation_together_are_the_transforms_of_the_weights():
    weights = torchvision_models.SqueezeNet1_1_Weights.DEFAULT
    subject = load_model(SMALL, weights="none")
    square = images(3, 300, 300)
    x = subject.normalization.apply(subject.crop(square)[None])
    assert x.shape == (1, 3, 224, 224)
    torch.testing.assert_close(x[0], weights.transforms()(square), atol=1e-5, rtol=0)


def test_a_caffe_network_gets_blue_green_red_up_to_255():
    pixels = images(2, 3, 5, 6)
    x = Normalization(**CAFFE).apply(pixels)
    theirs = (pixels * 255).numpy()[:, ::-1] - np.array([103.939, 116.779, 123.68]).reshape(3, 1, 1)
    np.testing.assert_allclose(x.numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("normalization", KINDS, ids=lambda kind: f"{kind.order}{kind.std[0]:.3f}")
def test_a_change_of_the_input_is_converted_to_the_change_of_the_pixels(normalization):
    p, d = images(2, 3, 4, 5).double(), images(2, 3, 4, 5, seed=1).double() - 0.5
    change = normalization.apply(p + d) - normalization.apply(p)
    assert change.shape[1] == (1 if normalization.order == "grey" else 3)
    seen = d.mean(1, keepdim=True).expand_as(d) if normalization.order == "grey" else d
    torch.testing.assert_close(normalization.signed_rgb(change), seen)
    # What is nothing is grey, so the mean must not appear in it.
    assert not normalization.signed_rgb(torch.zeros_like(change)).any()


def test_pixels_are_taken_as_they_are_by_default():
    pixels = images(2, 3, 4, 5)
    assert torch.equal(Normalization().apply(pixels), pixels)
    assert torch.equal(Normalization().signed_rgb(pixels), pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "gbr"}, "order='gbr': choose rgb, bgr, grey"),
        ({"mean": (1, 2)}, "mean=(1.0, 2.0): order=rgb takes 1 or 3 numbers, not 2"),
        ({"mean": (1, 2, 3), "order": "grey"}, "order=grey takes 1 numbers, not 3"),
        ({"std": (1, 0, 1)}, "std=(1.0, 0.0, 1.0): must be finite and above 0"),
        ({"mean": (math.nan,)}, "mean=(nan,): must be finite"),
    ],
)
def test_an_invalid_normalisation_is_refused(arguments, message):
    with pytest.raises(ValueError) as caught:
        Normalization(**arguments)
    assert message in str(caught.value)


def test_images_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixels must be \(N, 3, H, W\), got \(2, 1, 4, 4\)"):
        Normalization().apply(images(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"images must be \(N, 1, H, W\), got \(3, 4, 4\)"):
        Normalization((0.5,), (0.5,), "grey").signed_rgb(images(3, 4, 4))


def test_random_networks_are_the_same_for_a_seed_and_leave_the_generator_alone(tiny):
    for spec in (SMALL, tiny):
        state = torch.random.get_rng_state()
        one, two = (load_model(spec, weights=weights) for weights in ("none", None))
        assert torch.equal(torch.random.get_rng_state(), state)
        other = load_model(spec, weights="none", seed=1)
        assert equal(one.module, two.module) and one.digest == two.digest
        assert not equal(one.module, other.module) and one.digest != other.digest
        assert not one.module.training and one.labels is None
        assert len(one.digest) == 16 and one.digest == digest(one.module)


def test_the_digest_depends_on_every_value_and_on_buffers():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    found = {digest(net)}
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] += 1e-6
        found.add(digest(net))
        net[1].running_mean[1] = 1
        found.add(digest(net))
    assert len(found) == 3


def test_pretrained_weights_on_this_machine_are_found_with_their_labels(no_network):
    own = torchvision_models.squeezenet1_1()
    no_network.mkdir(parents=True)
    torch.save(own.state_dict(), no_network / "squeezenet1_1-b8a52dc0.pth")
    for weights in ("default", "DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        subject = load_model(SMALL, weights=weights)
        assert equal(subject.module, own)
        assert subject.weights == "IMAGENET1K_V1" and subject.name == SMALL
        assert subject.labels[:2] == ("tench", "goldfish") and len(subject.labels) == 1000
    # The same file lying somewhere else is known by its name.
    elsewhere = (no_network / "squeezenet1_1-b8a52dc0.pth").rename(
        no_network.parent / "squeezenet1_1-b8a52dc0.pth"
    )
    subject = load_model(SMALL, weights=elsewhere)
    assert equal(subject.module, own) and len(subject.labels) == 1000
    assert load_model(SMALL, weights=elsewhere, labels=["a", "b"]).labels == ("a", "b")


def test_weights_that_cannot_be_downloaded_are_named_with_what_to_do(no_network):
    refused(
        *(f"model={SMALL}", "IMAGENET1K_V1", "no network in this test"),
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth at "
        f"{no_network / 'squeezenet1_1-b8a52dc0.pth'}",
        *("weights=FILE", "weights=none"),
        spec=SMALL,
    )


def test_a_damaged_file_in_the_cache_is_one_line(no_network):
    no_network.mkdir(parents=True)
    (no_network / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"half a download")
    refused(no_network / "squeezenet1_1-b8a52dc0.pth", "weights=none", spec=SMALL)


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "state_dict", "model", "parallel", "compiled", "safe", "backbone", "ema"),
        "model_state",
    ],
)
def test_parameters_are_loaded_from_every_wrapper(tmp_path, kind):
    own = torchvision_models.squeezenet1_1(num_classes=7).state_dict()
    content = {
        "plain": own,
        "state_dict": {"epoch": 3, "state_dict": own},
        "model": {"model": own, "optimizer": {"lr": 1.0}},
        "parallel": {"state_dict": {f"module.{name}": t for name, t in own.items()}},
        "compiled": {f"module._orig_mod.{name}": t for name, t in own.items()},
        "backbone": {
            "state_dict": {f"net.backbone.{name}": t for name, t in own.items()}
            | {"net.neck.0.weight": torch.ones(2)}
        },
        "ema": {"ema": {"decay": 0.999, "module": own}, "epoch": 3},
        "model_state": {"model_state": {f"net.{name}": t for name, t in own.items()}},
        "safe": own,
    }[kind]
    file = tmp_path / ("weights.safetensors" if kind == "safe" else "weights.pth")
    (safetensors.torch.save_file if kind == "safe" else torch.save)(content, file)
    subject = load_model(SMALL, weights=file, options={"num_classes": 7})
    assert subject.weights == file.name and subject.labels is None
    for name, tensor in subject.module.state_dict().items():
        assert torch.equal(tensor, own[name])


def test_a_file_of_another_network_is_refused_with_the_names_that_differ(tmp_path):
    own = torchvision_models.squeezenet1_1(num_classes=7).state_dict()
    own["extra.weight"] = own.pop("features.0.weight")
    torch.save(own, tmp_path / "weights.pt")
    refused(
        *(f"weights={tmp_path / 'weights.pt'}", "missing: features.0.weight;"),
        *("unexpected: extra.weight;", "classifier.1.bias (7 in the file, 1000 in the network)"),
        spec=SMALL,
        weights=str(tmp_path / "weights.pt"),
    )


def test_a_file_that_holds_a_network_twice_is_refused_with_both_names(tmp_path):
    own = torchvision_models.squeezenet1_1().state_dict()
    twice = {f"{kind}.{name}": t for kind in ("student", "teacher") for name, t in own.items()}
    torch.save(twice, tmp_path / "weights.pt")
    refused(
        "holds this network 2 times, under student., teacher.; save the state_dict() of one",
        spec=SMALL,
        weights=tmp_path / "weights.pt",
    )


def test_files_without_parameters_are_refused_in_one_line(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "number.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.safetensors").write_text("these are words")
    for name, reason in (
        *(("whole.pth", "may run code"), ("list.pt", "not a state_dict")),
        *(("number.pt", "not a state_dict"), ("empty.pt", "is empty")),
        *(("text.safetensors", "not a file of weights"), ("absent.pt", "no such file")),
    ):
        refused(f"weights={tmp_path / name}: ", reason, spec=SMALL, weights=tmp_path / name)


def in_numpy(save, array):
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML or XML page"),
        (b"\n  <html><head>", "an HTML or XML page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "an HTML or XML page"),
        (b"", "is empty"),
        (bytes(5000), "begins with zeros"),
        (b'{"weight_map": {"a": "model-1.safetensors"}}', "JSON"),
        (b'{       "a": 1}', "JSON"),
        (b"[1, 2]", "JSON"),
        (b"these are words", "not a file of weights: it begins with b'these are wo'"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"half a download", "not a file of weights"),
        (pickle.dumps(print), "not written by torch.save"),
        (pickle.dumps({"a": 1}), "not written by torch.save"),
        (pickle.dumps({"a": 1}, protocol=2), "cannot be read"),
        (lambda path: path.write_bytes(in_numpy(np.save, np.zeros(3))), "a NumPy array"),
        (
            lambda path: path.write_bytes(in_numpy(np.savez, np.zeros(3))),
            r"NumPy arrays \(.npz\)",
        ),
        (lambda path: zipped(path, **{"a.txt": "b"}), r"a zip archive of something else \(a.txt\)"),
        (lambda path: torch.jit.script(nn.Conv2d(1, 1, 1)).save(path), "a TorchScript archive"),
        (lambda path: torch.save(nn.Conv2d(1, 1, 1), path), "may run code"),
        (
            lambda path: torch.save(nn.ReLU(), path, _use_new_zipfile_serialization=False),
            "may run code",
        ),
        (tarred, "a tar archive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_not_weights_is_identified(tmp_path, content, says, suffix):
    path = tmp_path / f"net{suffix}"
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_state_dict(path)
    message = str(error.value)
    assert message.startswith(f"weights={path}: ") and "\n" not in message
    assert ("may run code" in message) == (says == "may run code")


def test_a_truncated_file_is_reported(tmp_path):
    own = nn.Conv2d(3, 8, 3).state_dict()
    for name, save in (
        ("net.pt", torch.save),
        ("net.safetensors", safetensors.torch.save_file),
        ("old.pt", lambda t, path: torch.save(t, path, _use_new_zipfile_serialization=False)),
    ):
        save(own, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(
            ValueError, match="cannot be read and may be truncated; download it again"
        ):
            load_state_dict(tmp_path / name)


def test_files_of_weights_are_identified_by_content_not_by_name(tmp_path):
    own = nn.Conv2d(3, 2, 3).state_dict()
    safetensors.torch.save_file(own, tmp_path / "a.pt")
    torch.save(own, tmp_path / "b.safetensors")
    torch.save(own, tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({}, tmp_path / "none.pt")
    for name in ("a.pt", "b.safetensors", "c.bin"):
        found = load_state_dict(tmp_path / name)
        assert found.keys() == own.keys() and all(torch.equal(found[n], own[n]) for n in own)
    assert load_state_dict(tmp_path / "none.pt") == {}


def test_old_formats_are_not_read_by_versions_that_could_run_code(tmp_path, monkeypatch):
    own = nn.Conv2d(3, 2, 3).state_dict()
    torch.save(own, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(own, tmp_path / "new.pt")
    for version in ("2.2.0", "2.5.1+cu121"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(ValueError, match="cannot read safely"):
            load_state_dict(tmp_path / "old.pt")
        assert load_state_dict(tmp_path / "new.pt").keys() == own.keys()
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert load_state_dict(tmp_path / "old.pt").keys() == own.keys()


def test_only_functions_that_can_build_networks_are_called(tiny, tmp_path, monkeypatch):
    called = tmp_path / "called"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile.py").write_text(
        "import functools, os, subprocess\nfrom pathlib import Path\nfrom os import mkdir\n"
        "from my_networks.small import Tiny\nmake = functools.partial(os.mkdir)\n"
        "from torchvision.models import squeezenet1_1\n"
        "small = functools.partial(squeezenet1_1, num_classes=7)\n"
        "nets = functools.partial(Tiny)\ndef net(classes=3):\n    return Tiny(classes)\n"
    )
    for spec in ("os:mkdir", "subprocess:run", "os.path:join", "hostile:mkdir", "hostile:make"):
        path = {"path": str(called)} if "mkdir" in spec or "make" in spec else {}
        refused(f"model={spec}: ", spec=spec, options=path)
        assert not called.exists()
    refused("hostile imports it from pathlib, which builds no networks", spec="hostile:Path")
    assert load_model("hostile:net", options={"classes": 4}).module[3].out_features == 4
    assert load_model("hostile:Tiny").module[0].out_channels == 5
    # What others have written makes networks too, where a module only passes it on.
    assert load_model("hostile:small").module.classifier[1].out_channels == 7
    assert type(load_model("hostile:squeezenet1_1").module).__name__ == "SqueezeNet"


def test_counts_of_batches_may_be_missing(tmp_path):
    own = torchvision_models.shufflenet_v2_x0_5().state_dict()
    kept = {name: t for name, t in own.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "old.pth")
    subject = load_model("torchvision/shufflenet_v2_x0_5", weights=tmp_path / "old.pth")
    assert torch.equal(subject.module.state_dict()["conv1.0.weight"], own["conv1.0.weight"])


def test_googlenet_transforms_its_input_for_weights_that_were_trained_so(tmp_path):
    options = {"init_weights": False}  # which takes seconds
    own = load_model("torchvision/googlenet", weights="none", options=options).module
    assert not own.transform_input
    for name, changes in (("googlenet-1378be20.pth", True), ("my-own.pth", False)):
        torch.save(own.state_dict(), tmp_path / name)
        found = load_model("torchvision/googlenet", weights=tmp_path / name, options=options)
        assert found.module.transform_input is changes


def test_wrong_names_get_suggestions(tmp_path):
    refused("model=torchvision/vg16:", "vgg16", spec="torchvision/vg16")
    refused("model=resnet18:", "did you mean torchvision/resnet18?", spec="resnet18")
    refused("model=xyz: give torchvision/NAME, timm/NAME, package.module:factory", spec="xyz")
    refused("weights=IMAGENET1K_V2:", "IMAGENET1K_V1", spec=SMALL, weights="IMAGENET1K_V2")
    refused("num_clases", spec=SMALL, weights="none", options={"num_clases": 3})
    refused(f"model={tmp_path}/absent.pt: no such file", spec=tmp_path / "absent.pt")


def test_a_network_of_ones_own_is_found_by_its_import_path(tiny, tmp_path):
    before = list(sys.path)
    made = load_model(tiny)
    assert sys.path == before
    assert made.normalization == Normalization() and made.crop is None and made.labels is None
    assert made.module[0].out_channels == 5 and made.name == tiny and made.weights == "as built"
    ready = load_model("my_networks.small:ready")
    assert ready.module is sys.modules["my_networks.small"].ready and not ready.module.training
    torch.save(ready.module.state_dict(), tmp_path / "ready.pth")
    assert load_model(tiny, weights="ready.pth").digest == ready.digest
    assert load_model(tiny, options={"classes": 9}).module[3].out_features == 9
    subject = load_model(tiny, **CAFFE, crop=Crop(8, 6), labels=["cat", "dog"])
    assert subject.normalization == Normalization(**CAFFE) and subject.crop == Crop(8, 6)
    assert subject.labels == ("cat", "dog")


def test_a_wrong_import_path_is_refused_in_one_line(tiny):
    refused("absent_module cannot be imported: No module", spec="absent_module:net")
    refused("broken_module cannot be imported: division", spec="broken_module:net")
    refused("has no 'Tinny'; did you mean Tiny", spec="my_networks.small:Tinny")
    refused("neither a network nor callable", spec="my_networks.small:number")
    refused("returned str, must be a torch.nn.Module", spec="my_networks.small:text")
    refused("cannot be built: its file is not there", spec="my_networks.small:bad")
    refused("options {'sides': 3}", "sides", spec=tiny, options={"sides": 3})
    refused("weights=IMAGENET1K_V1:", "takes a file", spec=tiny, weights="IMAGENET1K_V1")


def test_parts_of_a_normalisation_can_be_given(tiny):
    own = load_model(SMALL, weights="none", mean=[0.5, 0.5, 0.5]).normalization
    assert own == Normalization((0.5, 0.5, 0.5), (0.229, 0.224, 0.225))
    assert load_model(tiny, order="grey").normalization == Normalization(order="grey")
    refused("order=rgb takes 1 or 3 numbers, not 2", spec=tiny, mean=[1, 2])


def test_a_timm_network_gets_the_input_that_its_weights_were_trained_on():
    timm = pytest.importorskip("timm")
    subject = load_model("timm/resnet18", weights="none")
    assert subject.crop == Crop(235, 224, "bicubic")
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    expected = timm.data.resolve_data_config({}, model=subject.module)
    theirs = timm.data.create_transform(**{**expected, "crop_pct": 1})(Image.fromarray(pixels))
    x = subject.normalization.apply(torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None])
    torch.testing.assert_close(x[0], theirs, atol=1e-5, rtol=0)
    grey = load_model("timm/resnet18", weights="none", options={"in_chans": 1})
    assert grey.normalization.order == "grey"
    assert grey.module(grey.normalization.apply(images(1, 3, 64, 64))).shape == (1, 1000)


def test_wrong_names_and_weights_of_timm_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    refused("model=timm/resnet188:", "resnet18", spec="timm/resnet188")
    refused("weights=a1_in2k:", "a1_in1k", spec="timm/resnet18", weights="a1_in2k")
    refused("weights=a1_in2k:", "a1_in1k", spec="timm/resnet18.a1_in2k")
    refused("cannot be built with options {'depths': 3}", spec="timm/resnet18", weights="none",
            options={"depths": 3})  # fmt: skip
    # The hub would try for most of a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("timm/resnet18.a2_in1k and give weights=FILE", spec="timm/resnet18.a2_in1k")


def test_a_missing_timm_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("model=timm/resnet18 needs timm (pip install timm)", spec="timm/resnet18")


@pytest.fixture
def zfnet():
    torch.manual_seed(7)
    return LoadedModel(
        ZFNet(1, 3, size=24, width=4),
        *("shapes", "trained", Normalization((0.3,), (0.4,), "grey"), Crop(24, 24)),
        labels=("round", "square", "long"),
        training={"epoch": 3},
    )


def test_a_saved_network_is_loaded_by_its_path_alone(tmp_path, zfnet):
    path = tmp_path / "epoch-003.safetensors"
    save_model(path, zfnet)
    again = load_model(path)
    assert equal(again.module, zfnet.module) and not again.module.training
    for key in ("name", "normalization", "crop", "labels", "training"):
        assert getattr(again, key) == getattr(zfnet, key)
    assert again.weights == path.name and again.digest == digest(zfnet.module)
    x = again.normalization.apply(images(2, 3, 24, 24))
    assert torch.equal(again.module(x), zfnet.module.eval()(x))
    assert load_network(path)[1]["training"] == {"epoch": 3}
    random = load_model(path, weights="none")
    assert not equal(random.module, zfnet.module) and random.labels == zfnet.labels


def test_a_file_of_another_network_is_refused_with_a_remedy(tmp_path, zfnet):
    path = tmp_path / "net.safetensors"
    save_model(path, zfnet)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    refused("flipped.safetensors: damaged", spec=tmp_path / "flipped.safetensors")
    tensors, settings = load_network(path)
    save_network(tmp_path / "layers.safetensors", tensors, {"layers": []})
    refused("deconvnet.load", spec=tmp_path / "layers.safetensors")
    settings |= {"arguments": {"sides": 1}}
    save_network(tmp_path / "new.safetensors", tensors, settings)
    refused("not a network of this version", spec=tmp_path / "new.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "bare.pth")
    for name in ("bare.safetensors", "bare.pth"):
        refused("torchvision/NAME", f"weights={tmp_path / name}", spec=tmp_path / name)
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("lfs.safetensors: a Git LFS pointer", spec=tmp_path / "lfs.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>404</html>")
    refused("page.safetensors: an HTML or XML page", spec=tmp_path / "page.safetensors")
    refused("leave options out", spec=path, options={"classes": 3})
    refused("weights=V1", spec=path, weights="V1")
    with pytest.raises(ValueError, match="only a ZFNet can be saved, not Conv2d"):
        save_model(path, LoadedModel(nn.Conv2d(1, 1, 1), "a", "b"))


@pytest.mark.parametrize("size", [24, 28, 33, 64])
def test_strides_halve_the_maps_of_a_network_of_any_size(size):
    net = ZFNet(3, 5, size=size, width=4)
    sides, x = {}, images(2, 3, size, size)
    for name, layer in net.named_children():
        x = layer(x)
        sides[name] = x.shape[2] if x.ndim == 4 else None
    assert x.shape == (2, 5)
    for name, halvings in (("conv1", 1), ("norm1", 2), ("conv2", 2), ("pool2", 3), ("conv5", 3)):
        assert sides[name] == math.ceil(size / 2**halvings)
    assert sides["pool5"] == math.ceil(size / 16)


def test_only_filters_above_the_limit_are_scaled_back():
    net = ZFNet(3, 5, size=24, width=4)
    with torch.no_grad():
        net.conv1.weight[0] *= 10
        net.conv1.weight[1] *= 0.01
    before = net.conv1.weight.detach().clone()
    limit_filters(net, 0.1)
    after = net.conv1.weight.detach()
    torch.testing.assert_close(after[0].square().mean().sqrt(), torch.tensor(0.1))
    direction = nn.functional.cosine_similarity(after[0].flatten(), before[0].flatten(), 0)
    assert direction > 0.999999
    assert torch.equal(after[1], before[1])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of two classes, bright and dark images, 10 of each."""
    folder = tmp_path_factory.mktemp("shapes")
    noise = np.random.default_rng(0)
    for name, low in (("bright", 140), ("dark", 0)):
        (folder / name).mkdir()
        for index in range(10):
            pixels = noise.integers(low, low + 110, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def train(script, folder, shapes, *arguments):
    small = ["data.size=16", "width=2", "batch=4", "progress=false", "shift=1", "max_images=null"]
    small += ["checkpoints=[1]", "learning_rate=0.1", "held_out=0.3", "dropout=0"]
    where = ["data=folder", f"data.path={shapes}", "name=net"]
    return script(folder, "train_cnn.py", *where, *small, *arguments)


def test_a_network_is_trained_by_one_command_and_loaded_by_its_file(tmp_path, script, shapes):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        result = train(script, folder, shapes, "epochs=8", "color=rgb")
        assert result.code == 0 and result.err == "", result
    assert "14 images of 2 classes to train and 6 to test, 16x16" in result.out
    rows = [line.split() for line in result.out.splitlines() if line.endswith(".safetensors")]
    assert [row[0] for row in rows] == ["1", "8"] and rows[-1][2] == "100.0%"
    one, two = (load_model(folder / "runs/net/epoch-008.safetensors") for folder in folders)
    assert one.digest == two.digest  # the same seed
    assert one.digest != load_model(folders[0] / "runs/net/epoch-001.safetensors").digest
    assert one.labels == ("bright", "dark") and one.crop == Crop(16, 16)
    assert (folders[0] / "runs/net/pictures/conv1-008.png").is_file()
    seen = [one.crop(torch.full((3, 20, 20), level)) for level in (0.8, 0.2)]
    scores = one.module(one.normalization.apply(torch.stack(seen)))
    assert scores.argmax(1).tolist() == [0, 1]
    again = train(script, folders[0], shapes)
    assert again.code == 1 and "runs/net already has a network" in again.err


@pytest.mark.parametrize("name", ["pictures/conv1-002.png", "train_cnn.log", ".hydra/config.yaml"])
def test_files_of_others_in_the_run_folder_stop_the_training_before_it_begins(
    tmp_path, script, shapes, name
):
    path = tmp_path / "runs/net" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    result = train(script, tmp_path, shapes, "epochs=2")
    assert result.code == 1 and result.err.count("\n") == 1, result
    assert name in result.err and "not as deconvnet wrote it" in result.err
    assert path.read_text() == "precious" and "epoch   loss" not in result.out


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("name=.", ["name='.': must be the name of a folder inside runs"]),
        ("color=blue", ["color='blue': choose grey or rgb"]),
        ("+epoch=3", ["epoch: no such setting; did you mean epochs?"]),
        ("epochs=0", ["epochs=0: must be at least 1"]),
        ("data=photographs", ["not used with data.source=photographs"]),
        ("data=photographs data.path=null", ["data.source=photographs: has no classes"]),
    ],
)
def test_wrong_settings_of_the_training_are_named_in_one_line(
    tmp_path, script, shapes, argument, parts
):
    result = train(script, tmp_path, shapes, *argument.split())
    assert result.code == 1 and result.err.count("\n") == 1, result
    for part in parts:
        assert part in result.err


def test_images_of_one_class_are_refused_in_one_line(tmp_path, script, shapes):
    shutil.copytree(shapes / "bright", tmp_path / "images" / "bright")
    result = train(script, tmp_path, tmp_path / "images")
    assert result.code == 1 and result.err.count("\n") == 1, result
    assert "10 images are of the class bright; there must be" in result.err
