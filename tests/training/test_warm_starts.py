"""Warm starts: states are read as they were assigned, in memory and in files, and files survive
kills, damage and full disks."""

import copy
import errno
import functools
import os

import pytest
import torch

from deconvnet import LayerSettings, LearningSettings, SolverSettings
from deconvnet.network.layer import Layer
from deconvnet.operators.pooling import max_pool, unpool
from deconvnet.storage.ownership import ForeignFileError
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.warm_starts import DiskWarmStarts, Placement, WarmStarts, merge_state_dicts

WINDOW = (2, 2, 2)


def test_states_are_read_as_they_were_assigned_for_any_images_in_any_order():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 5, 6, 7, generator=generator)
    z = unpool(*max_pool(z * (z.abs() > 1), WINDOW), z.shape)
    for window in (None, WINDOW):
        states = WarmStarts(torch.arange(5), window)
        assert states[torch.tensor([1, 2])] is None
        states[torch.tensor([3, 1])] = z[[3, 1]]
        # Images that have not been visited yet have zero maps.
        assert not states[torch.tensor([0, 2, 4])].any()
        assert torch.equal(states[torch.tensor([1, 3])], z[[1, 3]])
        states[torch.tensor([0, 4, 2])] = z[[0, 4, 2]]
        assert torch.equal(states[torch.arange(5)], z)
        state = states[torch.tensor([2])]
        state.zero_()
        assert torch.equal(states[torch.tensor([2])], z[2:3])
        again = WarmStarts(torch.arange(5), window)
        again.load_state_dict(states.state_dict(), torch.device("cpu"))
        assert torch.equal(again[torch.arange(5)], z)


def test_scalars_are_known_once_every_image_has_one():
    states = WarmStarts(torch.arange(4))
    assert states.scalar("step", torch.tensor([0])) is None
    states.set_scalar("step", torch.tensor([2, 0]), torch.tensor([0.2, 0.1]).view(2, 1, 1, 1))
    steps = states.scalar("step", torch.tensor([0, 2])).flatten().tolist()
    assert steps == pytest.approx([0.1, 0.2])
    assert states.scalar("step", torch.tensor([0, 1])) is None
    again = WarmStarts(torch.arange(4))
    again.load_state_dict(states.state_dict(), torch.device("cpu"))
    assert again.scalar("step", torch.tensor([2])).item() == pytest.approx(0.2)
    assert again.scalar("step", torch.tensor([3])) is None


@pytest.mark.parametrize("keep", [True, False])
def test_the_merged_states_of_all_ranks_are_those_of_all_images(keep):
    parts = [WarmStarts(torch.tensor(images)) for images in ([0, 3], [], [1, 2])]
    for part in parts[::2]:
        values = part.images.view(-1, 1, 1, 1).float()
        part.set_scalar("curvature", part.images, values)
        if keep:
            part[part.images] = values.expand(-1, 2, 3, 3)
    state = merge_state_dicts([part.state_dict() for part in parts])
    for images in ([0, 1], [2, 3]):
        subset = WarmStarts(torch.tensor(images))
        subset.load_state_dict(state, torch.device("cpu"))
        assert subset.scalar("curvature", subset.images).flatten().tolist() == images
        assert not keep or subset[subset.images][:, 0, 0, 0].tolist() == images


@pytest.mark.parametrize("window", [None, (1, 2, 2)])
def test_states_in_files_equal_those_in_memory(tmp_path, window):
    images = torch.tensor([1, 4, 5, 9])
    memory, files = WarmStarts(images, window), DiskWarmStarts(images, window, tmp_path / "states")
    assert files[images] is None
    for number in range(5):
        for part in (images[:2], images[3:]) if number == 0 else images.split(3):
            state = torch.randn(len(part), 3, 4, 6)
            memory[part] = files[part] = state
        files.next_pass()
        subset = images[[0, 3, 2]]
        assert torch.equal(files[subset], memory[subset])
    assert len(list((tmp_path / "states").iterdir())) == DiskWarmStarts.NUM_FILES
    files.close()


def eventful(textures):
    """(layer, images) of a training in which filters are drawn again and shifted after epochs."""
    learning = LearningSettings(epochs=6, batch_size=3)
    solver = SolverSettings("fista", iterations=10, training_iterations=2)
    settings = LayerSettings(6, 5, lam=2.0, pool=[1, 2, 2], solver=solver, learning=learning)
    layer = Layer(settings, 1, seeded_generator(0, 1))
    return layer, textures(8, 1, 14, 15) - 0.5


@functools.cache
def learned_without_a_stop(textures):
    layer, b = eventful(textures)
    trainer = LayerTrainer(layer, b)
    while not trainer.done:
        trainer.update()
    return layer.filters


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 8, 9, 11, 12])
def test_training_resumes_bit_by_bit_from_a_checkpoint_after_which_states_were_written(
    textures, tmp_path, monkeypatch, stop
):
    # States are shifted after the second and the fourth of six epochs of three batches.
    monkeypatch.setattr("deconvnet.training.layer_trainer.RECENTER_EVERY", 2)
    expected = learned_without_a_stop(textures)

    layer, b = eventful(textures)
    trainer = LayerTrainer(layer, b, placement=Placement(folder=tmp_path))
    for _ in range(stop):
        trainer.update()
    state, filters = copy.deepcopy(trainer.state_dict()), layer.filters.clone()
    # A kill before the checkpoint at the end of the epoch loses at most these updates.
    for _ in range(3 - stop % 3):
        trainer.update()
    trainer.close()

    layer.filters.copy_(filters)
    again = LayerTrainer(layer, b, placement=Placement(folder=tmp_path), state=state)
    while not again.done:
        again.update()
    assert torch.equal(layer.filters, expected)


@pytest.mark.parametrize("shifted", [(), (1,), (2,), (1, 2)])
def test_states_that_a_checkpoint_refers_to_are_not_overwritten_until_the_next(tmp_path, shifted):
    images = torch.arange(4)
    files = DiskWarmStarts(images, None, tmp_path)

    def epoch(number, parts):
        for part in parts:
            files[part] = torch.randn(len(part), 1, 2, 2)
        files.next_pass()
        if number in shifted:
            files[images] = torch.randn(4, 1, 2, 2)
        files.next_pass()

    epoch(0, images.split(2))
    epoch(1, images.split(2))
    # A checkpoint in the middle of the third epoch; what comes after it is lost.
    files[images[:2]] = torch.randn(2, 1, 2, 2)
    state, expected = files.state_dict(), files[images]
    epoch(2, [images[2:]])
    again = DiskWarmStarts(images, None, tmp_path)
    again.load_state_dict(state, torch.device("cpu"))
    assert torch.equal(again[images], expected)
    # Files that are truncated or full of holes do not have the states.
    for path in tmp_path.iterdir():
        os.truncate(path, 0)
        os.truncate(path, 64 + 4 * (16 + 16))
    again.load_state_dict(state, torch.device("cpu"))
    assert again[images].count_nonzero() == 0 and set(again.passes.tolist()) == {-1}


def test_images_whose_states_are_missing_start_from_the_beginning(textures, tmp_path, caplog):
    layer, b = eventful(textures)
    trainer = LayerTrainer(layer, b, placement=Placement(folder=tmp_path / "there"))
    for _ in range(4):
        trainer.update()
    state = trainer.state_dict()
    again = LayerTrainer(layer, b, placement=Placement(folder=tmp_path / "elsewhere"), state=state)
    assert "does not have the states of 8 images that the checkpoint refers to" in caplog.text
    assert again.warm_starts[torch.tensor([0, 7])].count_nonzero() == 0
    while not again.done:
        again.update()


@pytest.mark.parametrize("window", [None, (1, 2, 2)])
def test_images_whose_states_are_damaged_or_of_another_run_start_from_the_beginning(
    tmp_path, caplog, window
):
    images, state = torch.arange(3), torch.randn(3, 2, 4, 4)
    files = DiskWarmStarts(images, window, tmp_path, "one")
    files[images] = state
    saved, expected = files.state_dict(), files[images]
    (path,) = (path for path in tmp_path.iterdir() if path.stat().st_size > 64)
    size = (path.stat().st_size - 64) // 3
    data = bytearray(path.read_bytes())
    data[64 + size + size // 2] ^= 4
    path.write_bytes(data)
    again = DiskWarmStarts(images, window, tmp_path, "one")
    again.load_state_dict(saved, torch.device("cpu"))
    states = again[images]
    assert torch.equal(states[[0, 2]], expected[[0, 2]]) and states[1].count_nonzero() == 0
    assert "damaged or of another run" in caplog.text
    other = DiskWarmStarts(images, window, tmp_path, "two")
    other.load_state_dict(saved, torch.device("cpu"))
    assert other[images].count_nonzero() == 0


@pytest.mark.parametrize("window", [None, (1, 2, 2)])
def test_states_that_a_checkpoint_holds_in_memory_are_imported_into_files(tmp_path, window):
    images = torch.tensor([1, 4, 5])
    memory = WarmStarts(images, window)
    memory[images] = torch.randn(3, 2, 4, 4)
    memory.set_scalar("step", images, torch.rand(3, 1, 1, 1))
    files = DiskWarmStarts(images[1:], window, tmp_path)
    files.load_state_dict(memory.state_dict(), torch.device("cpu"))
    assert torch.equal(files[images[1:]], memory[images[1:]])
    assert torch.equal(files.scalar("step", images[1:]), memory.scalar("step", images[1:]))
    empty = DiskWarmStarts(images, window, tmp_path / "empty")
    empty.load_state_dict(WarmStarts(images, window).state_dict(), torch.device("cpu"))
    assert empty[images] is None


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_users_file_in_the_place_of_states_is_left_alone(tmp_path, kind):
    other, path = tmp_path / "thesis.txt", tmp_path / "states" / "0.states"
    other.write_bytes(b"thesis")
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"mine")
    with pytest.raises(ForeignFileError, match="in the way"):
        DiskWarmStarts(torch.arange(2), None, tmp_path / "states")
    assert other.read_bytes() == b"thesis" and path.is_dir() == (kind == "folder")


def test_a_full_disk_is_a_one_line_error_and_short_writes_are_completed(tmp_path, monkeypatch):
    files, one = DiskWarmStarts(torch.arange(2), None, tmp_path), torch.tensor([1])
    state, write = torch.randn(1, 2, 3, 3), os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, data, place: write(file, data[:7], place))
    files[one] = state
    assert torch.equal(files[one], state)

    def full(file, data, place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left on device: the states of .* make room"):
        files[one] = state


def test_a_rank_loads_the_states_of_its_own_images():
    z = torch.randn(6, 2, 3, 3)
    states = WarmStarts(torch.arange(6))
    states[torch.arange(6)] = z
    own = WarmStarts(torch.tensor([1, 4, 5]))
    own.load_state_dict(states.state_dict(), torch.device("cpu"))
    assert torch.equal(own[torch.tensor([5, 1])], z[[5, 1]])


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_holds_only_the_coefficients_that_are_not_zero(tmp_path, window, ranks):
    """Of all ranks, of which the maps of one may be dense, and for files too."""
    z = torch.randn(5, 4, 6, 7, generator=torch.Generator().manual_seed(1))
    z[0] *= z[0].abs() > 2
    z[1:] *= z[1:].abs() > 2.5 if ranks == 1 else 1
    if window:
        z = unpool(*max_pool(z, window), z.shape)
    parts = []
    for rank in range(ranks):
        part = WarmStarts(torch.arange(rank, 5, ranks), window)
        part[part.images] = z[part.images]
        parts.append(part.state_dict())
    state = merge_state_dicts(parts)
    if ranks == 1:
        held = sum(tensor.nbytes for tensor in state["kept"].values())
        assert held < z.nbytes / 4 and held < sum(part.nbytes for part in part.tensors) / 4
    for again in (
        WarmStarts(torch.tensor([1, 3]), window),
        DiskWarmStarts(torch.tensor([1, 3]), window, tmp_path),
        WarmStarts(torch.arange(5), window),
    ):
        again.load_state_dict(state, torch.device("cpu"))
        assert torch.equal(again[again.images], z[again.images])
        again.close()
    # Maps that are not sparse are stored as they are.
    whole = WarmStarts(torch.arange(5))
    whole[whole.images] = torch.randn(5, 4, 6, 7)
    assert torch.equal(whole.state_dict()["kept"][0], whole[whole.images])
