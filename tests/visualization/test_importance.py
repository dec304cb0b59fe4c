"""The change of the outputs when a concept is removed, against patches of one image at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from concept_models import concept_model
from torch import nn

import deconvnet
from deconvnet.visualization import Projector
from deconvnet.visualization.experiments.importance import importance
from deconvnet.visualization.models.concept_model import ConceptModel

X = torch.rand(3, 3, 26, 26, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return concept_model()


UNITS = np.array(
    [
        [[0, 1, 5, 5], [2, 1, 6, 6]],
        [[1, 4, 5, 5], [-1, -1, -1, -1]],
        [[-1, -1, -1, -1], [-1, -1, -1, -1]],
    ]
)


def test_importance_is_the_divergence_from_the_outputs_without_the_concept(model):
    found = importance(Projector(model), list(X), "concepts", UNITS)
    for row, (concept, images) in enumerate([(1, [0, 2]), (4, [1]), (None, [])]):
        if concept is None:
            assert np.isnan(found.kl[row]) and found.classes[row] == -1
            continue
        x, net = X[images], model.dictionary
        own = deconvnet.patch(model.base, "4", net)(x).double().log_softmax(1)
        without = deconvnet.patch(model.base, "4", net, without=[concept])(x).double()
        without = without.log_softmax(1)
        kl = F.kl_div(without, own, log_target=True, reduction="batchmean")
        assert found.kl[row] == pytest.approx(float(kl.detach()), rel=1e-3, abs=1e-9)
        change = (without.exp() - own.exp()).mean(0).detach()
        assert found.classes[row] == int(change.abs().argmax())
        assert found.changes[row] == pytest.approx(float(change[found.classes[row]]), rel=1e-3)


def test_a_network_without_classes_has_no_importance(model):
    headless = ConceptModel(nn.Sequential(*model.base[:5]), "4", model.dictionary)
    assert importance(Projector(headless), list(X), "concepts", UNITS) is None
