"""Rubbish in place of images, settings and files of networks: one line that says so, and nothing
else.

FUZZ_EXAMPLES=1000 in the environment tries 1000 of each kind.
"""

import io
import json
import os
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, load
from deconvnet.cli.errors import raised_in
from deconvnet.cli.read_settings import _inside, read_settings, register
from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.decoding import read_image
from deconvnet.images.sources import DataSettings
from deconvnet.storage.network_files import save_network

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)),
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def one_line(error):
    text = str(error)
    assert text and "\n" not in text, text


@st.composite
def pictures(draw):
    """(suffix, bytes) of a small image of some kind, perhaps of several frames."""
    kind, suffix = draw(
        st.sampled_from(
            [("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("TIFF", ".tif"), ("BMP", ".bmp"),
             ("WEBP", ".webp"), ("PPM", ".ppm")]
        )
    )  # fmt: skip
    modes = {
        "PNG": ["L", "RGB", "RGBA", "P", "1", "I;16", "LA"],
        "TIFF": ["L", "RGB", "RGBA", "F", "CMYK", "1"],
        "GIF": ["P", "L"],
        "JPEG": ["L", "RGB", "CMYK"],
        "WEBP": ["RGB", "RGBA"],
    }.get(kind, ["RGB"])
    mode = draw(st.sampled_from(modes))
    width, height = draw(st.tuples(*[st.sampled_from([1, 2, 7, 8, 33, 600])] * 2))
    picture = Image.new(mode, (width, height), 1 if mode in ("1", "L", "P", "F") else None)
    several = kind in ("GIF", "TIFF", "WEBP") and draw(st.booleans())
    more = dict(save_all=True, append_images=[picture, picture]) if several else {}
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return suffix, file.getvalue()


@st.composite
def damaged(draw, whole):
    """Some bytes of a file changed, cut off, doubled or put in."""
    data = bytearray(draw(whole) if hasattr(whole, "example") else whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "double"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and data:
            data[at] = draw(st.sampled_from([0, 255, 127]))
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif how == "double":
            data += data[at:]
    return bytes(data)


@st.composite
def image_files(draw):
    suffix, data = draw(pictures())
    return suffix, draw(damaged(data))


@fuzz
@given(image_files())
def test_a_damaged_image_is_read_or_refused_in_one_line(tmp_path_factory, found):
    suffix, data = found
    path = tmp_path_factory.getbasetemp() / f"image{suffix}"
    path.write_bytes(data)
    try:
        image = read_image(path)
    except ValueError as error:
        one_line(error)
        assert str(path) in str(error)
    else:
        assert image.shape[0] == 3 and image.dtype == torch.float32
        assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    # The file is there as it was.
    assert path.read_bytes() == data


@fuzz
@given(st.lists(image_files(), min_size=1, max_size=3), st.data())
def test_a_damaged_shard_gives_images_or_one_line(tmp_path_factory, files, data):
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for number, (suffix, content) in enumerate(files):
            info = tarfile.TarInfo(f"{number}{suffix}")
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    (folder / "a.tar").write_bytes(data.draw(damaged(buffer.getvalue())))
    asked = DataSettings(source="shards", path=str(folder), size=16, max_images=None, stream=True)
    try:
        stream = stream_images(asked)
        images, _ = stream.read(torch.arange(len(stream)))
    except ValueError as error:
        one_line(error)
    else:
        assert images.shape[1:] == (3, 16, 16) and images.isfinite().all()


@fuzz
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\0"), max_size=20))
def test_a_file_of_any_name_is_read_or_named_in_one_line(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    try:
        (folder / f"{name}.png").write_bytes(b"rubbish")
    except OSError:
        return
    try:
        load_images(DataSettings(source="folder", path=str(folder), size=16))
    except ValueError as error:
        one_line(error)
    else:
        raise AssertionError("rubbish was read")


KEYS = [
    *("name", "layers", "seed", "device", "resume", "chunk", "memory", "patience", "progress"),
    *("data.name", "data.source", "data.size", "data.fit", "data.scale", "data.max_images"),
    *("data.path", "data.stream", "data.workers", "data.split", "data", "model", "preprocessing"),
    *(
        "preprocessing.color",
        "preprocessing.steps",
        "preprocessing.contrast_size",
        "preprocessing.scale",
    ),
    *(f"model.layer1.{key}" for key in ("num_maps", "filter_size", "lam", "p", "group", "pool")),
    *(f"model.layer1.{key}" for key in ("connectivity", "boundary", "target", "pooling", "scale")),
    *(f"model.layer1.solver.{key}" for key in ("method", "iterations", "tolerance", "relaxation")),
    *(
        f"model.layer1.learning.{key}"
        for key in ("epochs", "batch_size", "update", "averaging_epochs")
    ),
    *("model.layer9.lam", "hydra.run.dir", "nonsense", "model.layer1", "+experiment", "~model"),
]
VALUES = [
    *("0", "-1", "1", "2", "7", "1e9", "1e400", "-0.5", "nan", ".nan", "inf", "null", "true", "''"),
    *("[]", "[1]", "[1,2,2]", "[0,0,0]", "{}", "{a:1}", "abc", "../x", "/etc", "a/b", "~", "???"),
    *("${seed}", "${nothing}", "${oc.env:HOME}", "99999999999999999999", "rgb", "crop", "iccv2011"),
]


@pytest.fixture(scope="module")
def schemas():
    register()


@pytest.mark.usefixtures("schemas")
@fuzz
@given(
    st.lists(
        st.one_of(
            st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES)),
            st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=8)),
            st.text(max_size=12),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_settings_are_read_or_refused_in_one_line(overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            cfg = compose("train", overrides)
            found = read_settings(cfg)
        except (HydraException, OmegaConfBaseException):
            # What Hydra says `launch` makes one line of.
            return
        except (TypeError, AttributeError, AssertionError) as error:
            assert raised_in(error, ("hydra", "omegaconf"))
            return
        except ValueError as error:
            one_line(error)
            return
    assert found.layer_settings()
    assert found.seed >= 0 and found.chunk >= 1


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "~/x", "..", "a\nb", ""])
def test_the_name_of_a_run_leads_nowhere_else(name, tmp_path):
    with pytest.raises(ValueError, match="must be the name of a folder inside runs") as error:
        _inside(name)
    one_line(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(bytes, tensors, settings) of a network file."""
    net = DeconvNet([LayerSettings(3, 3), LayerSettings(2, 3)], PreprocessingSettings())
    path = tmp_path_factory.mktemp("whole") / "network.safetensors"
    net.save(path)
    return path.read_bytes(), *net.to_parts()


def loaded(folder, data):
    path = folder / "network.safetensors"
    path.write_bytes(data)
    try:
        net = load(path)
    except ValueError as error:
        one_line(error)
        assert str(path) in str(error)
        return None
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    return net


@fuzz
@given(data=st.data())
def test_a_damaged_network_file_is_refused_in_one_line(tmp_path_factory, whole, data):
    content = data.draw(damaged(whole[0]))
    net = loaded(tmp_path_factory.getbasetemp(), content)
    assert (net is None) == (content != whole[0])


@fuzz
@given(data=st.data())
def test_a_file_of_other_settings_than_its_tensors_is_refused_in_one_line(
    tmp_path_factory, whole, data
):
    """As of one who makes files: the digest is right, what it is of is not."""
    _, tensors, given_settings = whole
    tensors, asked = dict(tensors), json.loads(json.dumps(given_settings))
    odd = st.sampled_from(
        [0, -1, 1, 5, 10**9, 10**30, 0.5, 1e308, None, True, "abc", [], [1, 2, 2], {}, [10**9] * 3]
    )
    for _ in range(data.draw(st.integers(1, 2))):
        what = data.draw(st.sampled_from(["layer", "solver", "preprocessing", "tensor", "whole"]))
        if what == "tensor":
            name = data.draw(st.sampled_from(sorted(tensors)))
            how = data.draw(st.sampled_from(["gone", "shape", "type", "added"]))
            if how == "gone":
                tensors.pop(name, None)
            elif how == "shape":
                tensors[name] = torch.ones(data.draw(st.lists(st.integers(0, 4), max_size=5)))
            elif how == "type":
                tensors[name] = torch.ones(2, dtype=torch.int8)
            else:
                tensors["more"] = torch.ones(1)
            continue
        layers = asked.get("layers")
        layer = layers[0] if isinstance(layers, list) and layers else {}
        place = {
            "layer": layer,
            "solver": layer.get("solver", {}) if isinstance(layer, dict) else {},
            "preprocessing": asked.get("preprocessing", {}),
            "whole": asked,
        }[what]
        if isinstance(place, dict) and place:
            place[data.draw(st.sampled_from(sorted(place)))] = data.draw(odd)
    folder = tmp_path_factory.getbasetemp()
    save_network(folder / "made.safetensors", tensors, asked)
    loaded(folder, (folder / "made.safetensors").read_bytes())


def test_absurd_sizes_are_refused_before_memory_is_asked_for(tmp_path, whole):
    _, tensors, asked = whole
    for key in ("num_maps", "filter_size"):
        wrong = json.loads(json.dumps(asked))
        wrong["layers"][0][key] = 10**9
        save_network(tmp_path / "network.safetensors", tensors, wrong)
        with pytest.raises(ValueError, match=f"{key}=1000000000: must be at most"):
            load(tmp_path / "network.safetensors")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_images_of_extreme_shapes_are_fitted_or_refused(tmp_path, size, fit):
    Image.fromarray(np.full(size, 128, np.uint8)).save(tmp_path / "a.png")
    asked = DataSettings(source="folder", path=str(tmp_path), size=32, fit=fit)
    if fit == "pad" and size != (1, 1):
        with pytest.raises(ValueError, match="both must be at least 8") as error:
            load_images(asked)
        one_line(error.value)
    else:
        found = load_images(asked).images
        assert found.shape == (1, 3, 32, 32) and (found - 128 / 255).abs().max() < 1e-6
    assert asdict(asked)["size"] == 32


def test_only_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("L", (16, 16), level) for level in (51, 102, 204)]
    for suffix in ("gif", "tif", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        more = dict(lossless=True) if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **more)
        assert (read_image(path) - 0.2).abs().max() < 0.01
