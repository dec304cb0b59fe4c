"""The training images, and the codes that the finished layers inferred from them.

Every rank has its own images (`BatchSampler.own`). Their codes are held in memory or inferred again
whenever they are needed. Inference starts from zero maps and treats each image separately, so both
ways give the same result and differ only in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.images.preprocessing import Spread
from deconvnet.network.codes import ALL, Codes, join, join_codes
from deconvnet.network.layer import LayerProblem
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.training.layer_trainer import LayerData
from deconvnet.training.sampler import BatchSampler

# Images, and the frames of the pictures in them or None, by indices.
Read = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class ImageSource:
    """Training images: how many, and how to get those (n, 3, H, W) of some indices (n,), with the
    frames (n, 4) of the pictures in them, or None where they fill their images.
    """

    count: int
    read: Read
    # told which images will be read next, for those that are read from a disk
    ahead: Callable[[Tensor], None] | None = None
    # a digest of the content of every image, hexadecimal, in their order
    digests: Callable[[], Sequence[str]] | None = None

    @classmethod
    def from_tensor(
        cls,
        images: Tensor,
        frames: Tensor | None = None,
        digests: Callable[[], Sequence[str]] | None = None,
    ) -> ImageSource:
        """Those of a tensor (N, 3, H, W) in memory."""

        def read(some: Tensor) -> tuple[Tensor, Tensor | None]:
            return images[some], None if frames is None else frames[some]

        return cls(len(images), read, digests=digests)


class TrainingSet:
    """The images of all ranks, seen through the layers of a network that have been learned.

    hold: keep what the layers found in the images of this rank in memory. progress(done, total)
    hears of every chunk of images whose maps are inferred for a new layer.
    """

    def __init__(
        self,
        net: DeconvNet,
        images: ImageSource,
        *,
        communicator: Communicator = SINGLE,
        chunk: int = 8,
        hold: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.net, self.images, self.communicator = net, images, communicator
        self.chunk, self.hold, self.progress = chunk, hold, progress
        self.own = torch.arange(0)
        self.codes: Codes | None = None

    def __len__(self) -> int:
        return self.images.count

    def fit_preprocessing(self) -> None:
        """Learn the preprocessing from all images, each rank from some of them."""
        own = BatchSampler(
            len(self), None, (), self.communicator.rank, self.communicator.world_size
        ).own

        def parts() -> Iterator[tuple[Tensor, Tensor | None]]:
            for some in self._chunks(own):
                images, frames = self.images.read(some)
                yield images.to(self.net.device), frames

        self.net.preprocessing.fit_parts(parts, self.communicator)

    def own_images(self, number: int) -> Tensor:
        """The images that are this rank's own while layer `number` learns, ascending."""
        batch_size = self.net.layer(number).settings.learning.batch_size
        return BatchSampler(
            len(self), batch_size, (), self.communicator.rank, self.communicator.world_size
        ).own

    def hold_codes(self, own: Tensor, depth: int) -> None:
        """Take these images for one's own, with the maps of the lowest `depth` layers."""
        if not torch.equal(own, self.own):
            self.own, self.codes = own, None
        if self.hold and self.codes is None and len(own):
            self.codes = join_codes([self._infer(some, depth) for some in self._chunks(own)])

    def codes_of(self, images: Tensor, depth: int) -> Codes:
        """What the lowest `depth` layers found in some images, own ones or not."""
        codes, rows = self._found(images, depth)
        return codes.select(rows)

    def gather_codes(self, images: Tensor, depth: int) -> Codes | None:
        """`codes_of` images, ascending, each from the rank whose own it is; for the first rank."""
        mine = images[torch.isin(images, self.own)]
        found = [self.codes_of(some, depth) for some in self._chunks(mine)]
        parts = self.communicator.gather((mine, join_codes(found).to("cpu") if found else None))
        if parts is None:
            return None
        parts = [part for part in parts if part[1] is not None]
        order = torch.cat([mine for mine, _ in parts]).argsort()
        return join_codes([codes for _, codes in parts]).select(order).to(self.net.device)

    def layer_data(self, number: int) -> LayerData:
        """What layer `number` stands on, in one's own images."""
        depth = number - 1

        def below(images: Tensor) -> Tensor:
            codes, rows = self._found(images, depth)
            return self.net.layer_input(codes, number, rows)

        def target(images: Tensor) -> LayerProblem:
            codes, rows = self._found(images, depth)
            return self.net.layer_problem(codes, number, rows)

        shape = below(self.sample_indices(1)).shape[1:]
        ahead = None if self.hold else self.images.ahead
        return LayerData(len(self), shape, self.net.device, below, target, ahead)

    def sample_indices(self, count: int) -> Tensor:
        """The numbers of so many images, evenly among all."""
        return torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()

    def infer_next_layer(self, number: int) -> Iterator[Codes]:
        """The codes of one's own images with the maps of one more layer, `number`, some at a
        time."""
        parts, done = [], 0
        for some in self._chunks(self.own):
            codes = self.net.infer_next_layer(self.codes_of(some, number - 1), chunk=self.chunk)
            if self.hold:
                parts.append(codes.layers[-1])
            yield codes
            done += len(some)
            if self.progress:
                self.progress(done, len(self.own))
        if parts:
            layers = (*self.codes.layers, join(parts))
            self.codes = Codes(layers, self.codes.y, self.codes.record)

    def pooled_spread(self, depth: int) -> Spread:
        """How large the pooled maps of a layer are, on all images."""
        spread = Spread()
        for some in self._chunks(self.own):
            spread.add(self.codes_of(some, depth).layer(depth).pooled)
        return spread.shared(self.communicator)

    def _found(self, images: Tensor, depth: int) -> tuple[Codes, Tensor | slice]:
        """Codes, and where in them these images stand."""
        images = images.cpu()
        if self.codes is None or not bool(torch.isin(images, self.own).all()):
            return self._infer(images, depth), ALL
        return self.codes, torch.searchsorted(self.own, images).to(self.net.device)

    def _infer(self, images: Tensor, depth: int) -> Codes:
        pixels, frames = self.images.read(images)
        return self.net.infer(pixels, frames=frames, depth=depth, chunk=self.chunk)

    def _chunks(self, images: Tensor) -> Iterator[Tensor]:
        return iter(images.split(self.chunk) if len(images) else ())
