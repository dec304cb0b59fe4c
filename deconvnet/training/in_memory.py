"""Learning all layers in memory, without a run folder, for the scikit-learn estimator."""

from __future__ import annotations

from torch import Tensor

from deconvnet.monitoring.statistics import EpochStats
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer


def learn_layers(
    net: DeconvNet, y: Tensor, *, depth: int | None = None, seed: int = 0, chunk: int = 8
) -> list[EpochStats]:
    """Learn the lowest `depth` layers (None: all) from preprocessed images y (N, C, H, W).

    Returns the statistics of every epoch, layer after layer. `loop.train` learns the same filters
    and writes a run folder.
    """
    codes, history = Codes((), y, []), []
    for number in range(1, (net.depth if depth is None else depth) + 1):
        layer = net.layer(number)
        if number > 1:
            codes = net.infer_next_layer(codes, chunk=chunk)
            layer.fit_scale(codes.layers[-1].pooled)
        data = LayerData.from_codes(net, codes, number)
        trainer = LayerTrainer(layer, data, seed=seed, number=number, chunk=chunk)
        while not trainer.done:
            history += filter(None, [trainer.update()])
    return history
