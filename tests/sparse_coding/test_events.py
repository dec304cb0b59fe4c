"""Codes as events: a table of the non-zero coefficients, which files and maps give back exactly."""

import numpy as np
import pytest
import torch
from helpers import assert_refused

from deconvnet import Events, LayerSettings, Learned, SolverSettings, load, sparse_code
from deconvnet.operators.convolution import BOUNDARIES, deconvolve, map_size
from deconvnet.storage.network_files import save_network
from deconvnet.storage.ownership import ForeignFileError

ADMM = SolverSettings("admm", iterations=3)


def sparse_maps(*shape, dtype=torch.float32, density=0.1):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (z * (torch.rand(shape, generator=generator) < density)).to(dtype)


@pytest.fixture
def events():
    return Events.of_maps(sparse_maps(3, 4, 9, 7), filter_size=(3, 2), boundary="valid")


def test_events_are_the_non_zero_coefficients_in_the_order_of_the_maps(events):
    z = sparse_maps(3, 4, 9, 7).numpy()
    assert len(events) == np.count_nonzero(z)
    expected = [(*map(int, place), z[tuple(place)]) for place in np.argwhere(z)]
    assert events.to_numpy().tolist() == expected
    assert events.to_numpy().dtype.names == ("image", "map", "row", "column", "value")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_file_and_the_maps_give_every_bit_back(dtype, tmp_path):
    z = sparse_maps(2, 3, 5, 40_000, dtype=dtype, density=1e-3)
    events = Events.of_maps(z, filter_size=(1, 9), boundary="zero")
    events.save(tmp_path / "events.safetensors")
    loaded = Events.load(tmp_path / "events.safetensors")
    for back in (events, loaded):
        assert back.maps().dtype == dtype and torch.equal(back.maps(), z)
    assert (loaded.shape, loaded.filter_size, loaded.boundary) == (z.shape, (1, 9), "zero")
    assert torch.equal(loaded.column, events.column)


def test_a_file_takes_12_bytes_for_an_event_of_maps_of_usual_size(tmp_path):
    events = Events.of_maps(sparse_maps(1, 2, 100, 100))
    path = tmp_path / "events.safetensors"
    events.save(path)
    assert path.stat().st_size < 12 * len(events) + 1000


@pytest.mark.parametrize("z", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4)])
def test_maps_of_zeros_have_no_events(z, tmp_path):
    events = Events.of_maps(z)
    events.save(tmp_path / "none.safetensors")
    assert len(events) == 0 and len(events.to_numpy()) == 0
    assert Events.load(tmp_path / "none.safetensors").maps().shape == z.shape


def test_events_of_a_slice_of_the_images_are_those_of_its_maps(events):
    z = events.maps()
    for images in (slice(1, 3), slice(None, None, 2), slice(0, 0), slice(None, None, -1)):
        step = images.step or 1
        assert torch.equal(events.of_images(images).maps(), z.flip(0) if step < 0 else z[images])
    assert torch.equal(events.of_images(-1).maps(), z[2:])


def test_an_index_selects_events(events):
    strong = events[events.value.abs() > 1]
    z = events.maps()
    assert torch.equal(strong.maps(), z * (z.abs() > 1))
    by_size = events[events.value.argsort()]
    assert torch.equal(by_size.maps(), z) and by_size.value[0] == z.min()
    assert torch.equal(events[:5].value, events.value[:5])
    assert torch.equal(torch.cat([event.value for event in events]), events.value)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_events_lie_where_their_filters_are_painted(boundary):
    """The filter is an impulse at its corner, and then at its centre."""
    h, w = filter_size = (4, 3)
    size = map_size((12, 10), filter_size, boundary)
    z = torch.zeros(1, 1, *size)
    z[0, 0, 5, 6] = z[0, 0, size[0] - 1, 4] = 1.0
    events = Events.of_maps(z, filter_size=filter_size, boundary=boundary)
    places = {(0, 0): events.corners(), ((h - 1) // 2, (w - 1) // 2): events.centres()}
    for (i, j), pixels in places.items():
        f = torch.zeros(1, 1, h, w)
        f[0, 0, i, j] = 1.0
        inside = [[row, column] for row, column in pixels.tolist() if row < 12]
        painted = deconvolve(z, f, boundary=boundary)[0, 0].nonzero().tolist()
        assert sorted(inside) == painted and len(pixels) == 2


def test_the_events_of_a_code_know_its_filters():
    images, filters = torch.randn(2, 1, 9, 9), torch.randn(3, 1, 3, 2)
    solution = sparse_code(images, filters, lam=1.0, boundary="zero", settings=ADMM)
    events = solution.events()
    assert (events.filter_size, events.boundary) == ((3, 2), "zero")
    assert len(events) > 0 and torch.equal(events.maps(), solution.z)
    learned = Learned(filters[..., :2, :], [], LayerSettings(3, 2, boundary="circular"))
    encoded = learned.encode(images, settings=ADMM)
    assert encoded.events().boundary == "circular"
    assert torch.equal(encoded.events().maps(), encoded.z)


def test_events_without_a_filter_size_have_no_place_in_the_image(events):
    anywhere = Events.of_maps(events.maps())
    for places in (anywhere.corners, anywhere.centres):
        with pytest.raises(ValueError, match="filter_size=None, boundary=None: must be given"):
            places()


INDEX = torch.tensor([0, 1])
TABLE = dict(image=INDEX, map=INDEX, row=INDEX, column=INDEX, value=torch.ones(2))
TABLE["shape"] = (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": INDEX + 1}, r"row from 1 to 2: must lie in 0 to 1, for maps of the shape"),
        ({"map": INDEX.float()}, "map must be integers, got torch.float32: use map.long()"),
        ({"value": torch.ones(3)}, r"value of shape \(3,\): must be \(M,\) like image"),
        ({"shape": (2, 2, 2)}, r"shape=\(2, 2, 2\): must be 4 whole numbers"),
        ({"filter_size": 3}, "filter_size=3: must be 2 whole numbers"),
        ({"boundary": "wrap"}, "boundary='wrap': choose"),
        ({"column": [0, 1]}, "column must be a tensor or a numpy array"),
    ],
)
def test_a_table_that_is_no_code_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Events(**{**TABLE, **change})
    assert "\n" not in str(caught.value)


def test_images_that_are_not_there_are_refused(events):
    with pytest.raises(ValueError, match="images=3: must lie in -3 to 2, for 3 images"):
        events.of_images(3)
    with pytest.raises(ValueError, match=r"z of shape \(2, 2\): expected maps"):
        Events.of_maps(torch.ones(2, 2))


def test_only_files_of_events_are_read_as_events(events, tmp_path):
    path = tmp_path / "events.safetensors"
    events.save(path)
    with pytest.raises(ValueError, match="holds events of a code, not a network; use deconvnet.Ev"):
        load(path)
    assert_refused(Learned.load, path, "holds no filters of Learned.save")
    save_network(path, {}, {"kind": "filters"})
    assert_refused(Events.load, path, "holds no events of Events.save")
    save_network(path, {"image": INDEX}, {"kind": "events"})
    with pytest.raises(ValueError, match="not events of this version"):
        Events.load(path)
    path.write_bytes(b"nothing")
    assert_refused(Events.load, path)


def test_foreign_files_and_values_that_are_not_finite_are_refused(events, tmp_path):
    path = tmp_path / "events.safetensors"
    path.write_text("mine")
    with pytest.raises(ForeignFileError):
        events.save(path)
    assert path.read_text() == "mine"
    endless = Events(**{**TABLE, "value": torch.tensor([1.0, torch.inf])})
    with pytest.raises(ValueError, match="events must be finite"):
        endless.save(tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        events.save(tmp_path / "new.csv")
