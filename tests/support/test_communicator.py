"""The result does not depend on how many processes share the work, nor on how it is divided."""

import threading
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import pytest
import torch
from helpers import no_pictures

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
)
from deconvnet.filters.update import Diverged
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.layer import Layer
from deconvnet.support.communicator import Communicator
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.loop import train
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.session import UNLIMITED, Limits
from deconvnet.training.training_set import ImageSource
from deconvnet.visualization.evolution.evolution import load_evolution

ADMM = SolverSettings(iterations=8, training_iterations=3)
FISTA = SolverSettings("fista", iterations=8, training_iterations=3)


class Meeting:
    """Where threads that play ranks exchange what they have; `calls` counts the sums."""

    def __init__(self, count):
        self.barrier, self.values, self.calls = threading.Barrier(count), [None] * count, 0

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait(60)
        values = list(self.values)
        self.barrier.wait(60)
        return values


@dataclass(frozen=True)
class Threads(Communicator):
    """Ranks that are threads of this process: the same calls without the cost of processes."""

    meeting: Meeting | None = field(default=None, compare=False)

    def all_reduce_sum(self, *tensors):
        if self.is_main:
            self.meeting.calls += 1
        parts = self.meeting.exchange(self.rank, [tensor.double() for tensor in tensors])
        return [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]

    def all_gather(self, value):
        return self.meeting.exchange(self.rank, value)

    def gather(self, value):
        values = self.meeting.exchange(self.rank, value)
        return values if self.is_main else None

    def broadcast(self, value):
        return self.meeting.exchange(self.rank, value)[0]


def together(count, work):
    """The results of work(communicator) in every rank."""
    meeting, results, errors = Meeting(count), [None] * count, []

    def one(rank):
        try:
            results[rank] = work(Threads(rank, count, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results


def network(kind):
    learning = dict(epochs=2, batch_size=3)
    if kind == "maps":
        layers = [
            LayerSettings(4, 5, pool=[1, 2, 2], solver=ADMM, learning=LearningSettings(**learning)),
            LayerSettings(5, 3, solver=ADMM, learning=LearningSettings(**learning)),
        ]
    else:
        learning |= dict(update="cg") if kind == "image, cg" else {}
        common = dict(solver=FISTA, learning=LearningSettings(**learning))
        layers = [
            LayerSettings(4, 5, pool=[2, 2, 2], pooling="in_loop", **common),
            LayerSettings(5, 3, lam=5.0, target="image", **common),
        ]
    return DeconvNet(layers, PreprocessingSettings("grey", steps=["mean", "whiten"]))


@pytest.fixture(scope="module")
def images(textures):
    return textures(5, 3, 20, 20)


def learned(kind, images, folder, count=1, limits=UNLIMITED):
    """(networks of all ranks, results of the first)."""

    def work(communicator):
        net = network(kind)
        run = RunFolder(folder, {}) if communicator.is_main else None
        place = folder if communicator.is_main else None
        with Monitor(place, progress=False) as monitor:
            return net, train(net, images, run, monitor, communicator=communicator, limits=limits)

    learned_by_rank = together(count, work) if count > 1 else [work(Communicator())]
    return [net for net, _ in learned_by_rank], learned_by_rank[0][1]


@pytest.fixture(scope="module", params=["maps", "image", "image, cg"])
def alone(request, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    nets, results = learned(request.param, images, folder)
    return request.param, folder, nets[0], results


def same_results(results, expected):
    for one, other in zip(results, expected, strict=True):
        left, right = ({**asdict(result), "seconds": 0} for result in (one, other))
        assert left == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("count", [3, 7])
def test_any_number_of_ranks_learns_the_same_filters_bit_by_bit(alone, images, tmp_path, count):
    kind, folder, net, results = alone
    # Three ranks keep their states in the same files.
    limits = Limits(memory=0, disk=1) if count == 3 else UNLIMITED
    # Seven ranks, two of them without an image, draw the pictures of one kind of network.
    draws = count == 3 or kind == "maps"
    with nullcontext() if draws else no_pictures():
        nets, shared_results = learned(kind, images, tmp_path, count, limits)
    for other in nets:
        for key, tensor in net.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key
    same_results(shared_results, results)
    for number in (1, 2):
        name = f"evolution/layer{number}.npz"
        left, right = (load_evolution(place / name) for place in (tmp_path, folder))
        assert torch.equal(left.tiles, right.tiles) and torch.equal(left.boxes, right.boxes)
    if not draws:
        return
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == sorted(path.name for path in (tmp_path / "pictures").iterdir())
    for name in pictures:
        left, right = ((place / "pictures" / name).read_bytes() for place in (folder, tmp_path))
        assert left == right, name


def test_any_number_of_ranks_learns_the_same_filters_from_images_with_holes(images):
    """One image has no holes, and one is all hole."""
    seen = torch.rand(5, 1, 20, 20, generator=torch.Generator().manual_seed(5)) < 0.6
    seen[1], seen[3] = True, False
    holes = images.where(seen, torch.nan)

    def work(communicator):
        net = network("image")
        net.preprocessing.settings.steps[:] = ["mean", "contrast"]
        source = ImageSource.from_tensor(holes, has_holes=True)
        with Monitor(progress=False) as monitor:
            return net, train(net, source, None, monitor, communicator=communicator)

    with no_pictures():  # for all threads together, since it replaces functions
        net, results = work(Communicator())
        shared = together(3, work)
    for other, shared_results in shared:
        for key, tensor in net.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key
        same_results(shared_results, results)


@pytest.mark.parametrize(
    "limits", [Limits(chunk=1), Limits(hold_codes=False, memory=0, disk=1)], ids=["chunk", "disk"]
)
def test_the_chunk_and_where_codes_are_kept_make_no_difference(alone, images, tmp_path, limits):
    kind, _, net, results = alone
    with no_pictures():
        nets, same = learned(kind, images, tmp_path, limits=limits)
    for key, tensor in net.state_dict().items():
        assert torch.equal(nets[0].state_dict()[key], tensor), key
    same_results(same, results)


def layer_of(**learning):
    settings = LayerSettings(
        4, 5, solver=ADMM, learning=LearningSettings(**{"epochs": 3, "batch_size": 3, **learning})
    )
    return Layer(settings, 3, seeded_generator(0, 1))


def shared(b, communicator, state=None, layer=None):
    return LayerTrainer(layer or layer_of(), b, communicator=communicator, state=state)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("stop", [1, 3])
def test_training_resumes_with_another_number_of_ranks_bit_by_bit(images, first, second, stop):
    def begin(communicator):
        trainer = shared(images, communicator)
        for _ in range(stop):
            trainer.update()
        return trainer.state_dict(), trainer.layer.filters

    def finish(communicator):
        layer = layer_of()
        layer.filters.copy_(filters)
        trainer = shared(images, communicator, state, layer)
        history = []
        while not trainer.done:
            history.append(trainer.update())
        return trainer.layer.filters, [stats for stats in history if stats]

    def whole(communicator):
        trainer = shared(images, communicator)
        history = []
        while not trainer.done:
            history.append(trainer.update())
        return trainer.layer.filters, [stats for stats in history if stats]

    state, filters = together(first, begin)[0]
    expected, history = together(1, whole)[0]
    for learned_filters, stats in together(second, finish):
        assert torch.equal(learned_filters, expected)
        left, right = (
            {**epoch.numbers, "seconds_per_image": 0} for epoch in (stats[-1], history[-1])
        )
        assert left == pytest.approx(right, rel=1e-9)


def test_all_ranks_learn_that_one_was_asked_to_stop(images):
    def work(communicator):
        trainer = shared(images, communicator)
        trainer.update()
        before = trainer.stopping
        trainer.update(stop=communicator.rank == 2)
        return before, trainer.stopping

    assert together(3, work) == 3 * [(False, True)]


def test_all_ranks_stop_before_the_update_if_one_of_them_diverges(images):
    def work(communicator):
        own = images.clone()
        trainer = shared(own, communicator)
        trainer.update()
        before = trainer.layer.filters.clone()
        own[trainer.sampler.batch(0, 1)[:1] if communicator.rank == 1 else []] = float("nan")
        with pytest.raises(Diverged, match="not finite"):
            trainer.update()
        return torch.equal(trainer.layer.filters, before)

    assert together(2, work) == [True, True]


@pytest.mark.parametrize("number", [7, 21])
def test_an_update_sends_one_message_whose_size_depends_on_the_filters_alone(textures, number):
    b = textures(number, 3, 20, 20)

    def work(communicator):
        trainer = shared(b, communicator)
        before = communicator.meeting.calls
        sizes = []
        all_reduce_sum = Threads.all_reduce_sum

        def recorded(self, *tensors):
            sizes.append(sum(8 * tensor.numel() for tensor in tensors))
            return all_reduce_sum(self, *tensors)

        if communicator.is_main:
            Threads.all_reduce_sum = recorded
        try:
            communicator.meeting.barrier.wait(60)
            trainer.update()
            trainer.update()
        finally:
            Threads.all_reduce_sum = all_reduce_sum
        return communicator.meeting.calls - before, trainer.message_bytes, set(sizes)

    calls, message, sizes = together(2, work)[0]
    assert calls == 2 and sizes == {message}
    # 4 filters of 3 planes of 5x5, the correlations of their maps, two flags.
    assert message == 8 * (4 * 3 * 25 + 4 * 4 * 81 + 2)


def test_a_rank_reads_only_its_own_images(images):
    def work(communicator):
        asked = set()

        def problem(part):
            asked.update(part.tolist())
            return LayerData.from_tensor(images).problem(part)

        trainer = shared(LayerData.from_tensor(images, problem), communicator)
        while not trainer.done:
            trainer.update()
        return asked

    found = together(3, work)
    assert set.union(*found) == set(range(5))
    assert sum(map(len, found)) == 5
