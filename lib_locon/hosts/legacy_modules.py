"""The layers of a loaded adapter under the built-in's names: what `networks.loaded_networks[…].modules` holds."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own name for it

from lib_locon.matching import Matched
from lib_locon.models.targets import View
from lib_locon.session import Session, Use

log = logging.getLogger("lib_locon")
_FUSED = ("_q_proj", "_k_proj", "_v_proj")


class NetworkModule:
    """One module of an adapter. A picture to look at: to change its factors has no effect on the model."""

    factors: ClassVar[Mapping[str, str]] = {}
    """Attribute → suffix in the file."""
    network: Any
    network_key: str
    sd_key: str
    sd_module: Any
    _items: tuple[Matched, ...]
    _now: Callable[[], Use]

    def __init__(
        self, network: Any, key: str, sd_module: Any, now: Callable[[], Use], items: tuple[Matched, ...]
    ) -> None:
        mine = {"network": network, "network_key": items[0].module, "sd_key": key, "sd_module": sd_module}
        vars(self).update(mine, _now=now, _items=items)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the model's weight."""
        weight = getattr(self.sd_module, "weight", None)
        return None if weight is None else tuple(weight.shape)

    @property
    def dim(self) -> int | None:
        """The rank."""
        return self._items[0].layer.family.rank or None

    @property
    def alpha(self) -> float | None:
        """As the file has it."""
        return self._items[0].layer.alpha

    @property
    def bias(self) -> Tensor | None:
        """What some old files add to the weight besides."""
        return self._tensors.get("bias")

    @property
    def scale(self) -> float | None:
        """The file's own, in the place of alpha / rank."""
        found = self._tensors.get("scale")
        return None if found is None else float(found)

    @property
    def dora_scale(self) -> Tensor | None:
        """Of a DoRA."""
        return self._tensors.get("dora_scale")

    @property
    def dora_norm_dims(self) -> int:
        """How many axes its norm goes over."""
        return len(self.shape or (0,)) - 1

    @property
    def ops(self) -> Callable[..., Tensor] | None:
        """What the model's layer does with a weight."""
        kinds: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: F.linear, nn.Conv2d: F.conv2d}
        return next((found for kind, found in kinds.items() if isinstance(self.sd_module, kind)), None)

    @property
    def extra_kwargs(self) -> dict[str, Any]:
        """And how."""
        layer = self.sd_module
        return {"stride": layer.stride, "padding": layer.padding} if isinstance(layer, nn.Conv2d) else {}

    def calc_scale(self) -> float:
        """alpha / rank."""
        return self._items[0].layer.scale

    def multiplier(self) -> float:
        """The strength at which it acts now, block weights included."""
        return self._now().strength_of(self._items[0])

    def calc_updown(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """What it adds to a weight that is `target`, at the strength of now, and what to the bias."""
        strength, found = self.multiplier(), {item.layer.parameter: item.layer for item in self._items}
        weight = found.get("weight")
        bias = found.get("bias")
        return (
            target.new_zeros(target.shape) if weight is None else weight.delta(target) * strength,
            None if bias is None else bias.delta(self.sd_module.bias.detach()) * strength,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y`, the layer's output for `x`, with what the adapter adds to it."""
        if self.ops is None:
            raise NotImplementedError(f"nothing runs beside a {type(self.sd_module).__name__}")
        weight, bias = self.calc_updown(self.sd_module.weight.detach())
        return y + self.ops(x, weight, bias, **self.extra_kwargs)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {key: tensor for item in self._items for key, tensor in item.layer.tensors().items()}

    def __getattr__(self, name: str) -> Any:
        suffix, tensors = type(self).factors.get(name), self._tensors
        if suffix is None:
            raise AttributeError(f"{self.network_key} of an adapter has no {name!r} here; it has {sorted(tensors)}")
        tensor = tensors.get(suffix)
        return tensor if tensor is None or not suffix.startswith("lora_") else _Holder(self, tensor)

    def __setattr__(self, name: str, value: object) -> None:
        if name in type(self).factors:  # a note of somebody else's changes nothing
            self._warn()
        object.__setattr__(self, name, value)

    def _warn(self) -> None:
        strengths = self._now().strengths
        if strengths.blocks is not None or strengths.elements is not None:
            return  # what lora-block-weight does to the factors here, the tag does already
        if not vars(self.network).get("_locon_warned"):
            vars(self.network)["_locon_warned"] = True
            what = "another extension changes the layers of %r itself, which is not used: write block weights into the"
            log.warning(f"{what} tag, <lora:NAME:1:lbw=…>", self.network.name)


class _Holder:
    """A factor that the built-in has as the weight of a layer."""

    weight: Tensor

    def __init__(self, owner: NetworkModule, weight: Tensor) -> None:
        vars(self).update(_owner=owner, weight=weight)

    def to(self, *_: object, **__: object) -> _Holder:
        """It stays where it is, and goes where its input is when it is used."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = vars(self)["_owner"].sd_module, self.weight.to(x.device, x.dtype)
        if not isinstance(layer, nn.Conv2d):
            return F.linear(x, weight.flatten(1))
        weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
        # the factor with the kernel goes over the image as the layer does, the other one point by point
        how: dict[str, Any] = {} if weight.shape[2:] == (1, 1) else {"stride": layer.stride, "padding": layer.padding}
        return F.conv2d(x, weight, **how)

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)["_owner"]._warn()
        object.__setattr__(self, name, value)


class NetworkModuleLora(NetworkModule):
    """LoRA and LoCon."""

    factors: ClassVar[Mapping[str, str]] = {
        "up_model": "lora_up.weight",
        "down_model": "lora_down.weight",
        "mid_model": "lora_mid.weight",
    }


class NetworkModuleHada(NetworkModule):
    """LoHa."""

    factors: ClassVar[Mapping[str, str]] = {f"w{n}{half}": f"hada_w{n}_{half}" for n in "12" for half in "ab"} | {
        "t1": "hada_t1",
        "t2": "hada_t2",
    }


class NetworkModuleLokr(NetworkModule):
    """LoKr."""

    factors: ClassVar[Mapping[str, str]] = {"w1": "lokr_w1", "w2": "lokr_w2", "t2": "lokr_t2"} | {
        f"w{n}{half}": f"lokr_w{n}_{half}" for n in "12" for half in "ab"
    }


class NetworkModuleFull(NetworkModule):
    """Whole differences."""

    factors: ClassVar[Mapping[str, str]] = {"weight": "diff", "ex_bias": "diff_b"}


class NetworkModuleNorm(NetworkModule):
    """Differences of norms."""

    factors: ClassVar[Mapping[str, str]] = {"w_norm": "w_norm", "b_norm": "b_norm"}


class NetworkModuleIa3(NetworkModule):
    """IA3."""

    factors: ClassVar[Mapping[str, str]] = {"w": "weight", "on_input": "on_input"}


class NetworkModuleOFT(NetworkModule):
    """OFT."""

    factors: ClassVar[Mapping[str, str]] = {"oft_blocks": "oft_blocks", "oft_diag": "oft_diag", "rescale": "rescale"}


class NetworkModuleGLora(NetworkModule):
    """GLoRA."""

    factors: ClassVar[Mapping[str, str]] = {
        "w1a": "a1.weight",
        "w1b": "b1.weight",
        "w2a": "a2.weight",
        "w2b": "b2.weight",
    }


_KINDS: tuple[tuple[str, type[NetworkModule]], ...] = (
    ("lora_up.weight", NetworkModuleLora),
    ("hada_w1_a", NetworkModuleHada),
    ("lokr_w1", NetworkModuleLokr),
    ("lokr_w1_a", NetworkModuleLokr),
    ("diff", NetworkModuleFull),
    ("diff_b", NetworkModuleFull),
    ("w_norm", NetworkModuleNorm),
    ("b_norm", NetworkModuleNorm),
    ("on_input", NetworkModuleIa3),
    ("oft_blocks", NetworkModuleOFT),
    ("oft_diag", NetworkModuleOFT),
    ("a1.weight", NetworkModuleGLora),
)


class LiveModules(Mapping[str, NetworkModule]):
    """`network_layer_name` → module, for what of the adapter acts on the model. Worked out when somebody asks."""

    def __init__(self, network: Any, now: Callable[[], Use], model: nn.Module, session: Session) -> None:
        self._network, self._now, self._session = network, now, session
        self._model = weakref.ref(model)

    def __getitem__(self, key: str) -> NetworkModule:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @cached_property
    def _found(self) -> dict[str, NetworkModule]:
        model = self._model()
        grouped: dict[str, list[Matched]] = defaultdict(list)
        owners: dict[str, nn.Module | None] = {}
        for item in self._session.match(self._now().adapter).matched:
            owner = _owner(model, item.view)
            key = _key(owner, item.view)
            owners[key] = owner
            grouped[key].append(item)
        return {key: self._module(key, owners[key], items) for key, items in grouped.items()}

    def _module(self, key: str, owner: nn.Module | None, items: list[Matched]) -> NetworkModule:
        items = sorted(items, key=lambda item: item.layer.parameter != "weight")
        suffixes = {suffix for item in items for suffix in item.layer.tensors()}
        kind = next((kind for suffix, kind in _KINDS if suffix in suffixes), NetworkModule)
        return kind(self._network, key, owner, self._now, tuple(items))


def _owner(model: nn.Module | None, view: View) -> nn.Module | None:
    try:
        return model.get_submodule(view.path.rpartition(".")[0]) if model is not None else None
    except AttributeError:
        return None


def _key(owner: nn.Module | None, view: View) -> str:
    path, _, parameter = view.path.rpartition(".")
    name = str(getattr(owner, "network_layer_name", path.replace(".", "_")))
    if parameter == "in_proj_weight" and view.length > 0:
        return name + _FUSED[min(view.start // view.length, 2)]
    return name
