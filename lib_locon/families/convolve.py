"""A layer's own operation with another weight: what a branch runs its factors through.

A matrix (rows, n) stands for a Linear's weight and, with its columns as (in / groups, *kernel), for a convolution's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = (functional.conv1d, functional.conv2d, functional.conv3d)


def groups(layer: nn.Module) -> int:
    """Of a convolution; 1 for everything else."""
    return layer.groups if isinstance(layer, CONVS) else 1


def per_group(weight: Tensor, layer: nn.Module) -> Tensor:
    """The rows of `weight` once for each group, (groups·r, n): in ΔW every group's inputs meet the same `down`.

    A 1×1 `up` (out, r) after it needs no such copy: its rows are the outputs, and go by groups already.
    """
    count = groups(layer)
    return weight if count == 1 else weight.repeat(count, 1)


def apply_weight(x: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """`x` through the layer with `weight` (rows, n) in place of its own and no bias, its geometry kept."""
    if isinstance(layer, CONVS):
        # its own method rather than torch's function: the host switches padding modes at run time (tiling), and
        # extensions replace this method to pad in their own way
        out: Tensor = layer._conv_forward(x, weight.reshape(weight.shape[0], -1, *layer.kernel_size), None)
        return out
    return functional.linear(x, weight)


def apply_pointwise(x: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """`x` through `weight` (rows, channels / groups) at each place by itself."""
    if isinstance(layer, CONVS):
        dimensions = len(layer.kernel_size)
        shaped = weight.reshape(*weight.shape, *(1 for _ in range(dimensions)))
        return _POINTWISE[dimensions - 1](x, shaped, groups=layer.groups)
    return functional.linear(x, weight)


def channel_axis(x: Tensor, layer: nn.Module) -> int:
    """Which axis of an input or output of the layer its channels are; a batch axis may be missing."""
    return x.ndim - 1 - (len(layer.kernel_size) if isinstance(layer, CONVS) else 0)
