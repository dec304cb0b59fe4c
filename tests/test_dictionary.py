"""Dictionary learning without a network: streams of batches, refusals, and what encodes."""

import os
import signal

import pytest
import torch
from torch.testing import assert_close

from deconvnet import LearningSettings, SolverSettings, learn_filters, learn_online, sparse_code
from deconvnet.network import Layer, LayerSettings, seeded
from deconvnet.solvers import lam_of_share


@pytest.fixture
def images(textures):
    y = textures(8, 1, 24, 24)
    return y - y.mean((1, 2, 3), keepdim=True)


def test_learning_from_a_stream_lowers_the_objective_of_images_that_it_has_not_seen(images):
    stream = [images[n : n + 2] for n in (0, 2, 4)] * 4
    first = learn_online(stream[:1], 6, 5, lam=5.0)
    learned = learn_online(iter(stream), 6, 5, lam=5.0)
    assert len(learned.history) == 12
    unseen = images[6:]
    assert learned.encode(unseen).objective.sum() < 0.99 * first.encode(unseen).objective.sum()
    lengths = torch.linalg.vector_norm(learned.filters, dim=(1, 2, 3))
    assert_close(lengths, torch.ones(6))


def test_encode_uses_the_lam_and_the_prior_of_the_learning(images):
    quick = LearningSettings(epochs=1)
    asked = dict(boundary="circular", non_negative=True, group=2)
    learned = learn_filters(images, 4, 5, lam=3.0, learning=quick, **asked)
    expected = sparse_code(images, learned.filters, lam=3.0, **asked)
    found = learned.encode(images)
    assert torch.equal(found.z, expected.z) and found.lam == 3.0 and (found.z >= 0).all()


def test_a_share_is_that_of_the_filters_that_learning_starts_from(images):
    layer = Layer(LayerSettings(4, 5), 1, seeded(0, 1))
    layer.initialize(images, seeded(0, 1, 1))
    learned = learn_online([images], 4, 5, share=0.25)
    expected = lam_of_share(layer.operator(), images, 0.25)
    assert learned.settings.lam == pytest.approx(expected, rel=1e-5)


def test_filters_that_start_anew_keep_the_norm_that_is_asked_for(images):
    color = images.repeat(1, 2, 1, 1)
    # So sparse that most filters stay unused.
    planes = LearningSettings(norm="plane")
    learned = learn_online([color] * 3, 12, 5, share=0.9, learning=planes)
    assert learned.history[-1].dead > 0
    lengths = torch.linalg.vector_norm(learned.filters, dim=(2, 3))
    assert_close(lengths, torch.ones(12, 2))


@pytest.mark.parametrize("learn", [learn_filters, lambda y, *a, **k: learn_online([y], *a, **k)])
def test_what_does_not_go_together_is_refused_before_anything_is_learned(images, learn):
    with pytest.raises(ValueError, match="share=None: give one of the two"):
        learn(images, 4, 5)
    with pytest.raises(ValueError, match="learning.zero_mean=True: filter_size=1"):
        learn(images, 4, 1, lam=1.0, learning=LearningSettings(zero_mean=True))
    with pytest.raises(ValueError, match="solver.gap=0.1: needs p=1"):
        learn(images, 4, 5, lam=1.0, p=0.5, solver=SolverSettings(gap=0.1))
    with pytest.raises(ValueError, match="group=3: must divide"):
        learn(images, 4, 5, lam=1.0, group=3)


def test_a_stream_is_refused_without_batches_or_with_one_that_is_not_finite(images):
    with pytest.raises(ValueError, match="batches: there are none"):
        learn_online([], 4, 5, lam=1.0)
    with pytest.raises(ValueError, match="batch 2: must be finite"):
        learn_online([images, images * float("nan")], 4, 5, lam=1.0)
    with pytest.raises(ValueError, match="memory=0: must be at least 1 batch"):
        learn_online([images], 4, 5, lam=1.0, memory=0)


def test_filters_that_require_gradients_code_images_as_others_do(images):
    f = learn_online([images], 4, 5, lam=3.0).filters
    expected = sparse_code(images, f, lam=3.0).z
    assert torch.equal(sparse_code(images, torch.nn.Parameter(f), lam=3.0).z, expected)


def test_images_of_whole_numbers_and_of_half_precision_are_refused_by_name(images):
    for given, name in ((images.int(), "int32"), (images.half(), "float16")):
        with pytest.raises(
            ValueError, match=f"images must be float32 or float64, got torch.{name}"
        ):
            sparse_code(given, torch.ones(4, 1, 5, 5), lam=1.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(images):
    from deconvnet import coordinates

    coordinates._pool(1).submit(int).result()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        coordinates._pool(1).submit(int).result()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
