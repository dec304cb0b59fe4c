"""Can the codes of a layer stand for its activations? What a network does with the reconstruction.

The activations of the layer are replaced by what the codes reconstruct, by the mean of each channel
and by zero, and the outputs of the network are compared with those that it has on its own. A small
reconstruction error alone says little: the part that is missing may be what the network uses.

N images · C channels and H, W positions of the layer · K maps, the concepts
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from deconvnet.network.network import DeconvNet
from deconvnet.sparse_coding.problem import duality_gap
from deconvnet.visualization.projection.layer_form import first_tensor
from deconvnet.visualization.projection.model_isolation import isolated
from deconvnet.visualization.projection.patching import Patch

RECONSTRUCTION, MEAN, ZERO = "reconstruction", "mean", "zero"
NAMES = {
    RECONSTRUCTION: "its reconstruction",
    MEAN: "the mean of each channel",
    ZERO: "zero",
}


@dataclass(frozen=True)
class OutputChange:
    """How far the outputs of a network with one layer replaced are from its own.

    change: ||y' - y|| / ||y|| over the outputs y of all images. Of outputs (N, classes), else None:
    agreement, the fraction of images with the same largest output; kl, the mean over the images of
    the Kullback-Leibler divergence of the class probabilities from those of the network on its own,
    in nats; and, if the classes of the images are known, accuracy, of the network with the
    replacement.
    """

    change: float
    agreement: float | None = None
    kl: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Faithfulness:
    """What the codes of a layer keep of its activations, and of the outputs of the network.

    outputs: by replacement (reconstruction, mean, zero), the change of the outputs; accuracy: of
    the network on its own, if known. fvu: fraction of variance unexplained, the squared error of
    the reconstruction over that of the mean of each channel. l0_position, l0_image: non-zero
    coefficients for each position of the layer, and for each image, on average. active_images: for
    each map, the number of images with a non-zero coefficient. gap, largest_gap: mean and maximum
    over the images of the duality gap relative to the objective, which bounds how far the codes
    (before a refit) are from the minimum; None if the prior is not convex.
    """

    layer: str
    filter_shape: tuple[int, int]
    num_images: int
    outputs: dict[str, OutputChange]
    accuracy: float | None
    fvu: float
    l0_position: float
    l0_image: float
    active_images: tuple[int, ...]
    gap: float | None
    largest_gap: float | None

    @property
    def num_maps(self) -> int:
        return len(self.active_images)

    @property
    def dead(self) -> int:
        """The number of maps that are zero in all images."""
        return sum(count == 0 for count in self.active_images)

    @property
    def recovered(self) -> float | None:
        """The share of the divergence under zero ablation that the reconstruction avoids: 1 is the
        network itself, 0 is no better than zeros."""
        zero, own = self.outputs[ZERO].kl, self.outputs[RECONSTRUCTION].kl
        return None if zero is None or own is None or zero == 0 else 1 - own / zero

    def as_dict(self) -> dict:
        """The values as JSON takes them."""
        derived = {"dead": self.dead, "num_maps": self.num_maps, "recovered": self.recovered}
        return {**asdict(self), **derived, "active_images": list(self.active_images)}

    def __str__(self) -> str:
        """A table of at most 80 columns."""
        size = "x".join(map(str, self.filter_shape))
        lines = [
            f"layer {self.layer}: {self.num_maps:,} concepts of {size}, on {self.num_images:,} "
            "images",
            "",
            f"{'in place of the layer':26}{'top-1 agrees':>13}{'accuracy':>11}{'KL, nats':>12}"
            f"{'outputs change':>17}",
        ]
        for name, text in NAMES.items():
            if name in self.outputs:
                lines.append(_row(text, self.outputs[name]))
        lines.append(_row("the layer itself", self._itself))
        gap = "not known: the prior is not convex"
        if self.gap is not None:
            gap = f"{self.gap:.2%} on average, {self.largest_gap:.2%} at most"
        lines += [
            "",
            f"{'variance unexplained':26}{self.fvu:.4f}",
            f"{'non-zero coefficients':26}{self.l0_position:.1f} of {self.num_maps:,} per "
            f"position, {self.l0_image:,.0f} per image",
            f"{'dead concepts':26}{self.dead:,} of {self.num_maps:,}",
            f"{'above the minimum':26}{gap}",
        ]
        if self.recovered is not None:
            lines.append(f"{'KL of zero recovered':26}{self.recovered:.2%}")
        return "\n".join(lines)

    @property
    def _itself(self) -> OutputChange:
        known = self.outputs[RECONSTRUCTION].agreement is not None
        return OutputChange(0.0, *((1.0, 0.0) if known else (None, None)), self.accuracy)


def comparison(results: dict[float, Faithfulness]) -> str:
    """A table of what is kept with each lam, of at most 80 columns."""
    lines = [
        f"{'lam':>8}{'non-zero per position':>23}{'unexplained':>13}{'top-1 agrees':>14}"
        f"{'KL, nats':>11}{'dead':>8}"
    ]
    for lam, result in results.items():
        own = result.outputs[RECONSTRUCTION]
        agreement = "-" if own.agreement is None else f"{own.agreement:.1%}"
        kl = "-" if own.kl is None else f"{own.kl:.4f}"
        lines.append(
            f"{lam:8.4g}{result.l0_position:23.1f}{result.fvu:13.4f}{agreement:>14}{kl:>11}"
            f"{result.dead:8,}"
        )
    return "\n".join(lines)


def with_lam(net: DeconvNet, lam: float) -> DeconvNet:
    """A copy of a network whose last layer infers its maps with another lam."""
    net = copy.deepcopy(net)
    layer = net.layer(net.depth)
    layer.settings = replace(layer.settings, lam=lam, lam_ratio=None)
    return net


def faithfulness(
    model: nn.Module,
    layer: str,
    net: DeconvNet,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    chunk: int = 8,
) -> Faithfulness:
    """What a network keeps of its outputs if a layer is replaced by its reconstruction.

    model, layer, net, chunk: as of `patch`; the model runs in evaluation mode. batches: its inputs
    (N, C, H, W), as it takes them, or pairs with the classes (N,) of the images, such as those of a
    DataLoader. The mean is that of the training activations, which a network with the preprocessing
    step channel_mean stores; without it, that row is missing.
    """
    patches = {
        RECONSTRUCTION: Patch(model, layer, net, chunk=chunk),
        ZERO: Patch(model, layer, 0.0),
    }
    if "channel_mean" in net.preprocessing.settings.steps:
        patches[MEAN] = Patch(model, layer, net.preprocessing.channel_mean)
    changes, codes = {name: _Changes() for name in patches}, _CodeSums(net)
    with isolated(patches[RECONSTRUCTION].forward_pass.model), torch.no_grad():
        for batch in batches:
            x, classes = batch if isinstance(batch, tuple | list) else (batch, None)
            own = first_tensor(model(x))
            for name, patch in patches.items():
                changes[name].add(own, first_tensor(patch(x)), classes)
            codes.add(patches[RECONSTRUCTION])
    if codes.images == 0:
        raise ValueError("batches: there are no images")
    return Faithfulness(
        layer,
        net.layer(net.depth).settings.filter_shape,
        codes.images,
        {name: changes[name].result() for name in NAMES if name in changes},
        changes[ZERO].own_accuracy(),
        **codes.result(),
    )


class _Changes:
    """Sums over images of how far outputs are from those of the network on its own."""

    def __init__(self) -> None:
        self.images, self.known, self.is_table = 0, 0, True
        self.error = self.energy = self.kl = 0.0
        self.agreeing = self.right = self.own_right = 0

    def add(self, own: Tensor, changed: Tensor, classes: Tensor | None) -> None:
        own, changed = own.double(), changed.double()
        self.images += len(own)
        self.error += float((changed - own).square().sum())
        self.energy += float(own.square().sum())
        self.is_table &= own.dim() == 2 and own.shape[1] > 1
        if not self.is_table:
            return
        log_p, log_q = log_probabilities(own), log_probabilities(changed)
        self.kl += float(divergences(log_p, log_q).sum())
        top, own_top = changed.argmax(1), own.argmax(1)
        self.agreeing += int((top == own_top).sum())
        if classes is not None:
            classes = classes.to(top)
            self.known += len(classes)
            self.right += int((top == classes).sum())
            self.own_right += int((own_top == classes).sum())

    def own_accuracy(self) -> float | None:
        return self.own_right / self.known if self.known and self.is_table else None

    def result(self) -> OutputChange:
        change = math.sqrt(self.error / self.energy) if self.energy else 0.0
        if not self.is_table:
            return OutputChange(change)
        accuracy = self.right / self.known if self.known else None
        return OutputChange(change, self.agreeing / self.images, self.kl / self.images, accuracy)


class _CodeSums:
    """Sums over images of reconstruction errors, non-zero coefficients and duality gaps."""

    def __init__(self, net: DeconvNet) -> None:
        self.net, self.settings = net, net.layer(net.depth).settings
        self.images = self.positions = self.nonzero = 0
        self.error, self.gaps = 0.0, []
        channels = net.preprocessing.channels
        self.sums, self.squares = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
        self.active = torch.zeros(self.settings.num_maps, dtype=torch.long)

    def add(self, patch: Patch) -> None:
        """Include the images of the last forward pass of a patch."""
        a, z = patch.activations.double(), patch.codes.layer(self.net.depth).z
        self.images += len(a)
        self.positions += a[:, 0].numel()
        self.error += float((a - patch.patched).square().sum())
        self.sums += a.sum((0, 2, 3)).cpu()
        self.squares += a.square().sum((0, 2, 3)).cpu()
        nonzero = z != 0
        self.nonzero += int(nonzero.sum())
        self.active += nonzero.flatten(2).any(2).sum(0).cpu()
        if self.settings.prior.convex:
            self.gaps += self._relative_gaps(patch).tolist()

    def _relative_gaps(self, patch: Patch) -> Tensor:
        """(N,): the duality gaps of the codes of the highest layer, as shares of the objectives."""
        number, codes = self.net.depth, patch.codes
        problem, layer = self.net.layer_problem(codes, number), self.net.layer(number)
        solver = layer.settings.solver
        found, gap = codes.layer(number), None
        if solver.refit:  # it is the codes before it that are near the minimum
            found = layer.infer(problem, settings=replace(solver, refit=False))
            # With filters of 1x1 the solver's bound is tighter, that of each position by itself.
            gap = found.gap
        if gap is None:
            A, prior = problem.T @ layer.operator(), layer.settings.prior
            gap = duality_gap(A, problem.b, found.z, layer.lam, prior)
        objective = found.objective
        return gap / torch.where(objective > 0, objective, torch.ones_like(objective))

    def result(self) -> dict:
        variance = float((self.squares - self.sums.square() / self.positions).sum())
        return {
            "fvu": self.error / variance if variance > 0 else math.nan,
            "l0_position": self.nonzero / self.positions,
            "l0_image": self.nonzero / self.images,
            "active_images": tuple(self.active.tolist()),
            "gap": sum(self.gaps) / len(self.gaps) if self.gaps else None,
            "largest_gap": max(self.gaps) if self.gaps else None,
        }


def log_probabilities(outputs: Tensor) -> Tensor:
    """(N, classes): logarithms of class probabilities, from logits or, if every row of outputs is
    non-negative and sums to 1, from probabilities."""
    sums = outputs.sum(1)
    if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        return outputs.clamp(min=torch.finfo(outputs.dtype).tiny).log()
    return outputs.log_softmax(1)


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,): the Kullback-Leibler divergence of q from p, in nats, never below zero by rounding."""
    return (log_p.exp() * (log_p - log_q)).sum(1).clamp(min=0)


def _row(name: str, change: OutputChange) -> str:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    kl = "-" if change.kl is None else f"{change.kl:.4f}"
    return (
        f"{name:26}{percent(change.agreement):>13}{percent(change.accuracy):>11}{kl:>12}"
        f"{change.change:>17.1%}"
    )
