"""The lam of a layer that is computed when the layer begins to learn."""

import logging

import pytest
from helpers import StopAt, assert_same_network, no_pictures

from deconvnet import DeconvNet, LayerSettings, LearningSettings, SolverSettings, load
from deconvnet.monitoring.monitor import Monitor
from deconvnet.sparse_coding.solve import lam_from_ratio
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder

LEARNING = LearningSettings(epochs=2, batch_size=3)
SCHEDULE = SolverSettings("half_quadratic", beta_factor=1e3, iterations=2)
FAST = SolverSettings(iterations=5, training_iterations=2)


@pytest.fixture(scope="module")
def images(textures):
    return textures(3, 3, 16, 16)


def network():
    """A layer whose schedule is in units of a lam by ratio, below one that chooses its lam."""
    layers = [
        LayerSettings(
            *(2, 3),
            lam_ratio=0.2,
            lam_max_quantile=0.5,
            pool=[1, 2, 2],
            solver=SCHEDULE,
            learning=LEARNING,
        ),
        LayerSettings(2, 3, lam="auto", solver=FAST, learning=LEARNING),
    ]
    return DeconvNet(layers)


def run(folder, images, monitor=None):
    net = network()
    with no_pictures():
        train(net, images, RunFolder(folder, {}), monitor or Monitor(folder, progress=False))
    return net


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("computed")
    return folder, run(folder, images)


def test_the_network_file_holds_the_lams_that_were_computed(finished):
    folder, net = finished
    for loaded in (net, load(folder), load(folder / "network.safetensors")):
        for layer, trained in zip(loaded.layers, net.layers, strict=True):
            assert layer.settings == trained.settings and layer.settings.lam_ratio is None
            assert layer.lam == trained.lam > 0


def test_a_lam_ratio_refers_to_the_initial_filters_and_the_layer_input(finished, images):
    net, initial = finished[1], network()
    initial.preprocessing.load_state_dict(net.preprocessing.state_dict())
    codes = initial.infer(images, depth=0)
    layer = initial.layer(1)
    LayerTrainer(layer, codes.y)
    assert net.layer(1).lam == lam_from_ratio(layer.operator(), codes.y, 0.2, lam_max_quantile=0.5)


def test_lam_auto_draws_its_choice(finished):
    assert (finished[0] / "pictures" / "layer2-lam.png").is_file()
    assert not (finished[0] / "pictures" / "layer1-lam.png").exists()


def test_filters_that_predict_nothing_choose_no_lam(images):
    settings = LayerSettings(2, 9, lam="auto", learning=LearningSettings(epochs=1))
    settings.learning.init = "random"  # past the check of the settings
    net = DeconvNet([settings])
    with pytest.raises(ValueError, match="model.layer1.lam=auto: the initial filters predict no"):
        train(net, images, monitor=Monitor(progress=False))


def test_a_run_that_computed_its_lams_resumes_bit_by_bit(finished, images, tmp_path, caplog):
    """In layer 2, after both lams have been computed."""
    caplog.set_level(logging.INFO)
    with pytest.raises(Interrupted), StopAt(tmp_path, ("update", 3)) as monitor:
        run(tmp_path, images, monitor)
    resumed = run(tmp_path, images)
    for number, layer in enumerate(resumed.layers, 1):
        assert caplog.text.count(f"layer {number}: lam={layer.lam:.6g}") == 1
    assert_same_network(resumed, finished[1])
    assert [layer.settings for layer in resumed.layers] == [
        layer.settings for layer in finished[1].layers
    ]


def test_a_layer_that_has_not_learned_has_no_lam_yet(images):
    net = network()
    assert "lam=0.2 lambda_max" in repr(net.layer(1)) and "lam=auto" in repr(net.layer(2))
    with pytest.raises(ValueError, match=r"lam_ratio=0.2: lam is computed when the layer begins"):
        net.infer(images, depth=1)
    with pytest.raises(ValueError, match="lam=auto: lam is computed when the layer begins"):
        _ = net.layer(2).lam


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.0, "lam_ratio": 0.1}, "lam=1.0, lam_ratio=0.1: give one of the two; with"),
        (
            {"lam": 1.0, "lam_max_quantile": 0.5},
            "lam_max_quantile=0.5: needs lam_ratio or lam=auto",
        ),
        ({"lam_ratio": 0.1, "lam_max_quantile": 0}, r"lam_max_quantile=0: must lie in \(0, 1\]"),
        ({"lam_ratio": 0.0}, r"lam_ratio=0.0: must lie in \(0, 1\]"),
        ({"lam_ratio": "x"}, "lam_ratio='x': must be a number"),
        ({"lam_ratio": 0.1, "p": 0.5}, "lam_ratio=0.1: needs p=1, got p=0.5"),
        ({"lam": "automatic"}, "lam='automatic': must be a number, or auto"),
        (
            {"lam": "auto", "p": 0.5},
            "lam=auto: needs p=1, target=maps and pooling=after, got p=0.5",
        ),
        ({"lam": "auto", "target": "image"}, "lam=auto: needs p=1, target=maps"),
        ({"lam": "auto", "pool": [1, 2, 2], "pooling": "in_loop"}, "pooling=in_loop"),
        (
            {"lam": "auto", "learning": LearningSettings(init="random")},
            "lam=auto: random initial filters predict no hidden pixels; use learning.init=patches",
        ),
    ],
)
def test_a_lam_that_cannot_be_computed_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        LayerSettings(4, 3, **settings)
    assert "\n" not in str(caught.value)


def test_without_lam_and_lam_ratio_lam_is_2():
    assert LayerSettings(4, 3).lam == 2.0
