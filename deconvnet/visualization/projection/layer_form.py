"""How the output of a module holds maps: its tensor among others, and its maps in that tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deconvnet.visualization.projection.token_grids import TokenGrid


@dataclass(frozen=True)
class LayerForm:
    """How the output of a module holds maps (N, K, H, W): as they are or as a vector (N, K); as (N,
    H, W, K) if `maps_last`; as tokens (N, T, K) if it has a grid.
    """

    maps_last: bool = False
    grid: TokenGrid | None = None

    def maps(self, y: Tensor) -> Tensor:
        """The maps (N, K, H, W) in an output y; maps of vectors have one position."""
        if y.dim() == 2:
            return y[:, :, None, None]
        if self.grid is not None:
            return self.grid.maps(y)
        return y.movedim(3, 1) if self.maps_last else y

    def with_maps(self, y: Tensor, maps: Tensor) -> Tensor:
        """An output y with other maps; tokens beside the grid stay."""
        if self.grid is not None:
            return self.grid.tokens_with(y, maps)
        return maps.movedim(1, 3) if self.maps_last else maps.reshape(y.shape)


def first_tensor(output: object) -> Tensor | None:
    """The output of a module, or the first tensor of several."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, dict) else output
    if isinstance(values, list | tuple):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def with_first_tensor(output: object, y: Tensor) -> object:
    """The output of a module with y in place of its first tensor."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, dict):
        first = next(key for key, value in output.items() if isinstance(value, Tensor))
        changed = {key: y if key == first else value for key, value in output.items()}
        return type(output)(**changed) if type(output) is not dict else changed
    first = next(n for n, value in enumerate(output) if isinstance(value, Tensor))
    values = [y if n == first else value for n, value in enumerate(output)]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
