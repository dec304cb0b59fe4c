"""The training images, and the codes that the finished layers inferred from them.

Every rank has its own images (`BatchSampler.own_images`). Their codes are held in memory or
inferred again whenever they are needed. Inference starts from zero maps and treats each image
separately, so both ways give the same codes and differ only in time.

The layers above need only pooled maps and switches, which take a fraction of the memory. Whole maps
are held for the few images that pictures choose from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deconvnet.images.holes import fill_holes
from deconvnet.images.preprocessing import Spread
from deconvnet.network.codes import ALL, Codes, join, join_codes
from deconvnet.network.layer import LayerProblem
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.validation import OnDemand
from deconvnet.training.layer_data import LayerData
from deconvnet.training.sampler import BatchSampler

# The most images that pictures choose from, and the bytes that their maps may take.
SHOWN_IMAGES, SHOWN_BYTES = 256, 2**28
# So many images are shown whatever they take.
LEAST_SHOWN = 8


@dataclass(frozen=True)
class ImageSource:
    """The training images: functions that read them and compute their digests.

    count: the number of images. read: the images (n, 3, H, W) of some indices (n,), in [0, 1], or
    arrays (n, C, H, W), and their frames (n, 4), or None if every picture fills its image.
    prefetch: is called with the next indices, if the images are on disk. digests: of the content of
    every image in order, hexadecimal. has_holes: NaN marks pixels that are not seen.
    """

    count: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    prefetch: Callable[[Tensor], None] | None = None
    digests: Callable[[], Sequence[str]] | None = None
    has_holes: bool = False

    @classmethod
    def from_tensor(
        cls,
        images: Tensor | OnDemand,
        frames: Tensor | None = None,
        digests: Callable[[], Sequence[str]] | None = None,
        *,
        has_holes: bool = False,
    ) -> ImageSource:
        """A source of images (N, 3, H, W) in memory, or of others with their digests."""

        def read(indices: Tensor) -> tuple[Tensor, Tensor | None]:
            chosen = images[indices] if isinstance(images, Tensor) else images.read(indices)
            return chosen, None if frames is None else frames[indices]

        return cls(images.shape[0], read, digests=digests, has_holes=has_holes)


class TrainingSet:
    """The images of all ranks and their codes, inferred by the finished layers of a network.

    chunk: images inferred at a time. hold: whether the codes of the images of this rank are held in
    memory. progress(done, total): is called after each chunk that `infer_next_layer` infers.
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
        # The codes of all own images with pooled maps, and of those that are shown with whole maps.
        self.codes: Codes | None = None
        self.whole_codes: Codes | None = None

    def __len__(self) -> int:
        return self.images.count

    def fit_preprocessing(self) -> None:
        """Fit the preprocessing to all images, of which each rank reads a part."""
        own_images = self._own(None)

        def parts() -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
            for chunk in self._chunks(own_images):
                yield self.read(chunk)

        self.net.preprocessing.fit_parts(parts, self.communicator)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The pixels, frames and mask of images, on the device; unseen pixels are interpolated."""
        pixels, frames = self.images.read(images)
        pixels = pixels.to(self.net.device)
        if not self.images.has_holes:
            return pixels, frames, None
        mask = ~pixels.isnan().any(1, keepdim=True)
        filled = fill_holes(pixels, mask)
        return filled if self.net.preprocessing.are_arrays else filled.clamp(0, 1), frames, mask

    def own_images(self, number: int) -> Tensor:
        """The indices, ascending, of the images of this rank while layer `number` learns."""
        return self._own(self.net.layer(number).settings.learning.batch_size)

    def hold_codes(self, own: Tensor, depth: int) -> None:
        """Set the images of this rank, and hold their codes of the lowest `depth` layers."""
        if not torch.equal(own, self.own):
            self.own, self.codes, self.whole_codes = own, None, None
        if not self.hold or self.codes is not None or not len(own):
            return
        pooled, whole = [], []
        for chunk in self._chunks(own):
            codes = self._infer(chunk, depth)
            pooled.append(codes.pooled_only())
            if (rows := torch.isin(chunk, self.shown)).any():
                whole.append(codes.select(rows))
        self.codes, self.whole_codes = join_codes(pooled), join_codes(whole) if whole else None

    @cached_property
    def shown(self) -> Tensor:
        """The indices of the images that pictures choose from, evenly spaced over all."""
        size = tuple(self.read(torch.arange(1))[0].shape[2:])
        bytes_of_maps = 4 * sum(map(math.prod, self.net.map_shapes(size)))
        count = max(LEAST_SHOWN, min(SHOWN_IMAGES, SHOWN_BYTES // bytes_of_maps))
        return self.sample_indices(count)

    def codes_of(self, images: Tensor, depth: int) -> Codes:
        """The codes of some images, of this rank or not, up to layer `depth`; if codes are held,
        without the maps before pooling.
        """
        codes, rows = self._lookup(images, depth)
        return codes.select(rows)

    def gather_codes(
        self, images: Tensor, depth: int, *, pooled_only: bool = False
    ) -> Codes | None:
        """`codes_of` images in ascending order, each inferred by its own rank; None on ranks other
        than 0. pooled_only: without the maps before pooling, which may be most of the memory.
        """
        own_images = images[torch.isin(images, self.own)]
        if pooled_only:
            chunks = self._chunks(own_images)
            codes = [self.codes_of(chunk, depth).pooled_only() for chunk in chunks]
        elif self.whole_codes is not None and torch.isin(own_images, self.shown).all():
            own_shown = self.shown[torch.isin(self.shown, self.own)]
            chosen = torch.isin(own_shown, own_images)
            codes = [self.whole_codes if chosen.all() else self.whole_codes.select(chosen)]
        else:
            codes = [self._infer(chunk, depth) for chunk in self._chunks(own_images)]
        parts = self.communicator.gather(
            (own_images, join_codes(codes).to("cpu") if codes else None)
        )
        if parts is None:
            return None
        parts = [part for part in parts if part[1] is not None]
        order = torch.cat([own_images for own_images, _ in parts]).argsort()
        codes = join_codes([codes for _, codes in parts])
        return (codes if len(parts) == 1 else codes.select(order)).to(self.net.device)

    def layer_data(self, number: int) -> LayerData:
        """The training data of layer `number`: the images of this rank, encoded by the layers
        below.
        """
        depth = number - 1

        def layer_input(images: Tensor) -> Tensor:
            codes, rows = self._lookup(images, depth)
            return self.net.layer_input(codes, number, rows)

        def problem(images: Tensor) -> LayerProblem:
            codes, rows = self._lookup(images, depth)
            return self.net.layer_problem(codes, number, rows)

        def seen(images: Tensor) -> Tensor:
            codes, rows = self._lookup(images, depth)
            return codes.mask[rows] > 0

        shape = layer_input(self.sample_indices(1)).shape[1:]
        prefetch = None if self.hold else self.images.prefetch
        data = LayerData(len(self), shape, self.net.device, layer_input, problem, prefetch)
        return replace(data, seen=seen) if self.images.has_holes and number == 1 else data

    def sample_indices(self, count: int) -> Tensor:
        """The indices of up to `count` images, evenly spaced over all."""
        return torch.linspace(0, len(self) - 1, min(count, len(self))).round().long()

    def infer_next_layer(self, number: int) -> Iterator[Codes]:
        """The codes of the images of this rank up to layer `number`, a chunk at a time; the maps of
        that layer are inferred, and held if codes are.
        """
        pooled, whole, done = [], [], 0
        for chunk in self._chunks(self.own):
            codes = self.net.infer_next_layer(self.codes_of(chunk, number - 1), chunk=self.chunk)
            if self.hold:
                pooled.append(codes.pooled_only().layers[-1])
                if (rows := torch.isin(chunk, self.shown)).any():
                    whole.append(codes.layers[-1].select(rows))
            yield codes
            done += len(chunk)
            if self.progress:
                self.progress(done, len(self.own))
        if pooled:
            self.codes = self.codes.with_layer(join(pooled))
        if whole:
            self.whole_codes = self.whole_codes.with_layer(join(whole))

    def pooled_spread(self, depth: int) -> Spread:
        """The spread of the pooled maps of layer `depth` over all images."""
        spread = Spread()
        for chunk in self._chunks(self.own):
            spread.add(self.codes_of(chunk, depth).layer(depth).pooled)
        return spread.shared(self.communicator)

    def _own(self, batch_size: int | None) -> Tensor:
        rank, world_size = self.communicator.rank, self.communicator.world_size
        return BatchSampler(len(self), batch_size, (), rank, world_size).own_images

    def _lookup(self, images: Tensor, depth: int) -> tuple[Codes, Tensor | slice]:
        """Codes that contain these images, and their rows in them."""
        images = images.cpu()
        if self.codes is None or not bool(torch.isin(images, self.own).all()):
            return self._infer(images, depth), ALL
        return self.codes, torch.searchsorted(self.own, images).to(self.net.device)

    def _infer(self, images: Tensor, depth: int) -> Codes:
        pixels, frames, mask = self.read(images)
        return self.net.infer(pixels, frames=frames, mask=mask, depth=depth, chunk=self.chunk)

    def _chunks(self, images: Tensor) -> Iterator[Tensor]:
        return iter(images.split(self.chunk) if len(images) else ())
