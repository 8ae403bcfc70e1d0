"""Layers with a low-rank branch of their own, for use without a host: y = base(x) + strength · alpha/r · up(down(x)).

They are torch's layers with two more parameters each, under the names that adapter files use, so that the state dict
without `weight` and `bias` is an adapter of the layer. The base is frozen; only the branch learns. At the start `up` is
zero: a new layer does what its base does.

`merge()` writes base + ΔW into the weight (summed in fp32, rounded once), `unmerge()` copies the base's bytes back. The
base is what is saved, moved and loaded, merged or not. A merged layer's factors get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_locon.arithmetic import exact_arithmetic, matrix
from lib_locon.errors import LoconError
from lib_locon.families.convolve import apply_pointwise, apply_weight, per_group


class _Factor(nn.Module):
    """Holds one factor as `.weight`, for the sake of its name."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, device=like.device, dtype=like.dtype))


class _Branched(nn.Module):
    """What the layers share: strength, alpha, merging. `weight` is the base layer's."""

    weight: Tensor
    pristine_weight: Tensor | None
    alpha: float
    rank: int
    strength: float

    def _start(self, rank: int, alpha: float | None, strength: float) -> None:
        """After the base has its parameters. Factors are made in the dtype and on the device of the weight."""
        if rank < 1:
            raise LoconError(f"the rank of a branch is at least 1, not {rank}")
        self.rank, self.strength = rank, strength
        # a number, though it is saved with the factors: a tensor on a GPU would be waited for at every forward
        self.alpha = float(rank if alpha is None else alpha)
        # a buffer, so that it is moved and converted with the weight; what is saved as `weight` is always the base
        self.register_buffer("pristine_weight", None, persistent=False)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self._make_factors()

    def _make_factors(self) -> None:
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight holds the sum now."""
        return self.pristine_weight is not None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """ΔW at strength 1, fp32 (fp64 for such a weight), in the shape of the weight."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Puts base + strength · ΔW into the weight. Always from the base: to merge again takes up new factors."""
        base = self.weight.detach().clone() if self.pristine_weight is None else self.pristine_weight
        with exact_arithmetic(base.device.type):
            delta = self.delta()
            total = torch.add(base.to(delta.dtype), delta, alpha=self.strength)
        self.pristine_weight = base  # before the first byte changes: `unmerge` will see to whatever happens
        self.weight.copy_(total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the weight its base back, byte for byte, by copy. Does nothing where nothing is merged."""
        if self.pristine_weight is not None:
            self.weight.copy_(self.pristine_weight)
            self.pristine_weight = None

    def _beside(self, output: Tensor, branch: Tensor) -> Tensor:
        return torch.add(output, branch.to(output.dtype), alpha=self.strength * self.scale)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}alpha"] = torch.tensor(self.alpha)
        if self.pristine_weight is not None:
            destination[f"{prefix}weight"] = self.pristine_weight

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.unmerge()  # what is loaded is a base
        key = f"{prefix}alpha"
        self.alpha = float(state_dict.get(key, self.alpha))
        super()._load_from_state_dict({k: v for k, v in state_dict.items() if k != key}, prefix, *rest)


class _Pair(_Branched):
    """Down and up as kohya names them: `lora_down` (r, in / groups, *k) and `lora_up` (out, r, 1, …)."""

    lora_down: _Factor
    lora_up: _Factor

    def _make_factors(self) -> None:
        out, *inputs = self.weight.shape
        self.lora_down = _Factor((self.rank, *inputs), self.weight)
        self.lora_up = _Factor((out, self.rank, *(1 for _ in inputs[1:])), self.weight)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))

    def delta(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        up, down = (matrix(factor.weight).to(wide) for factor in (self.lora_up, self.lora_down))
        return (up @ down).reshape(self.weight.shape) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's shapes and dtypes."""
        output: Tensor = super().forward(x)  # torch's layer, which follows in every subclass
        if self.merged:
            return output
        down, up = (matrix(factor.weight).to(x.dtype) for factor in (self.lora_down, self.lora_up))
        hidden = apply_weight(x, self, per_group(down, self))
        return self._beside(output, apply_pointwise(hidden, self, up.to(hidden.dtype)))


class LoRALinear(_Pair, nn.Linear):
    """A Linear with a branch."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float | None = None, strength: float = 1.0,
        **options: Any,
    ) -> None:  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, **options)
        self._start(rank, alpha, strength)

    @classmethod
    def of(cls, layer: nn.Linear, rank: int, alpha: float | None = None, strength: float = 1.0) -> LoRALinear:
        """Around a layer: its parameters are shared, not copied."""
        made = cls.__new__(cls)
        nn.Linear.__init__(made, layer.in_features, layer.out_features, device="meta")
        _share(made, layer)
        made._start(rank, alpha, strength)
        return made


_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)


class _Conv(_Pair):
    """A convolution with a branch: `lora_down` has its kernel and geometry, `lora_up` is 1×1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, rank: int, alpha: float | None = None,
        strength: float = 1.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._start(rank, alpha, strength)

    @classmethod
    def of(cls: type[C], layer: Any, rank: int, alpha: float | None = None, strength: float = 1.0) -> C:
        """Around a convolution of the same dimension: its parameters are shared, not copied."""
        made = cls.__new__(cls)
        super(_Conv, made).__init__(**{name: getattr(layer, name) for name in _GEOMETRY}, device="meta")
        _share(made, layer)
        made._start(rank, alpha, strength)
        return made


C = TypeVar("C", bound=_Conv)


class LoConConv1d(_Conv, nn.Conv1d):
    """A Conv1d with a branch."""


class LoConConv2d(_Conv, nn.Conv2d):
    """A Conv2d with a branch."""


class LoConConv3d(_Conv, nn.Conv3d):
    """A Conv3d with a branch."""


class LoRAEmbedding(_Branched, nn.Embedding):
    """An Embedding with `lora_embedding_A` (r, num) and `lora_embedding_B` (dim, r): a token adds B · A[:, token]."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rank: int, alpha: float | None = None, strength: float = 1.0,
        **options: Any,
    ) -> None:  # fmt: skip
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **options)
        self._start(rank, alpha, strength)

    @classmethod
    def of(cls, layer: nn.Embedding, rank: int, alpha: float | None = None, strength: float = 1.0) -> LoRAEmbedding:
        """Around a layer: its parameter is shared, not copied."""
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        options = {name: getattr(layer, name) for name in names}
        made = cls.__new__(cls)
        nn.Embedding.__init__(made, layer.num_embeddings, layer.embedding_dim, device="meta", **options)
        _share(made, layer)
        made._start(rank, alpha, strength)
        return made

    def _make_factors(self) -> None:
        if self.max_norm is not None:
            raise LoconError("an embedding with max_norm rewrites its own weight: no branch can stand beside it")
        number, size = self.weight.shape
        # as PEFT starts it: A is the one that is zero
        self.lora_embedding_A = nn.Parameter(self.weight.new_zeros(self.rank, number))
        self.lora_embedding_B = nn.Parameter(nn.init.normal_(self.weight.new_empty(size, self.rank)))

    def delta(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.lora_embedding_B.to(wide) @ self.lora_embedding_A.to(wide)).T * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        """(…) of int → (…, dim)."""
        output = nn.Embedding.forward(self, ids)
        if self.merged:
            return output
        hidden = functional.embedding(ids, self.lora_embedding_A.T.to(output.dtype))
        return self._beside(output, functional.linear(hidden, self.lora_embedding_B.to(output.dtype)))


def _share(made: nn.Module, layer: nn.Module) -> None:
    for name in made._parameters:
        setattr(made, name, getattr(layer, name))
    made.train(layer.training)
