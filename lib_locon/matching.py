"""An adapter and a model's table of names → patches, and what did not match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from lib_locon.errors import ShapeError, Unusable
from lib_locon.families.layer import Layer
from lib_locon.families.rows import RowsLayer
from lib_locon.files import kinds
from lib_locon.files.adapter import Adapter, Module, Unmatched
from lib_locon.models.base_family import base_family, other_family
from lib_locon.models.blocks import place_of
from lib_locon.models.table import TargetTable
from lib_locon.models.targets import Target, View
from lib_locon.patching.sidepath import SidePath

Unwritable = Callable[[View, Layer], "str | None"]
"""Says why a weight cannot be changed by a layer; None where it can."""
WRONG_SHAPE = "wrong shape"
MOST_GROWTH = 16
"""How many times its size a weight may grow for `reshape_weight`; Flux's tools need 2 to 6."""
FIRST_LAYERS = frozenset({"input_blocks.0.0", "conv_in", "img_in", "x_embedder", "x_embedder.proj", "pos_embed.proj"})
"""The layers that read a latent image, by their names inside UNet or transformer. Families of models that read more
beside it (inpainting, depth, instruct-pix2pix, Flux Fill and Control) have wider ones, the latent's channels first."""


@dataclass(frozen=True, eq=False)
class Matched:
    """A layer of an adapter (or some of its rows) and the weight it changes."""

    module: str
    component: str
    view: View
    layer: Layer

    @property
    def reshape(self) -> tuple[int, ...]:
        """The shape to which the whole weight must grow first; empty where it stays."""
        return self.layer.reshape


@dataclass(frozen=True, eq=False)
class Match:
    """All of an adapter against one model. `total` counts modules; `matched` counts layers (a bias is one more)."""

    matched: tuple[Matched, ...]
    unmatched: tuple[Unmatched, ...]
    total: int
    notes: tuple[str, ...] = ()
    made_for: str = ""
    """The adapter's base family, worked out where nothing of it fits."""

    @cached_property
    def used(self) -> int:
        """How many modules change something."""
        return len({item.module for item in self.matched})

    @cached_property
    def families(self) -> Mapping[str, int]:
        """What a user calls the family → layers of it, the commonest first."""
        return dict(Counter(item.layer.label for item in self.matched).most_common())


def match_model(adapter: Adapter, table: TargetTable, side: SidePath) -> Match:
    """As `match`, with a live model, and a note where what it holds of the sum is less than others do."""
    judge = side.judge()
    found = match(adapter, table, judge)
    # here, for it is asked once for an adapter and not at each change of a set
    count = len(judge.rounded.intersection(item.view.path for item in found.matched))
    return replace(found, notes=(*found.notes, *rounds(count)))


def rounds(count: int) -> tuple[str, ...]:
    """The note that so many weights are summed in 8 bits; none for none."""
    if count == 1:
        return ("1 weight is stored in 8 bits: its sum is rounded to 8 bits again",)
    return (f"{count} weights are stored in 8 bits: their sums are rounded to 8 bits again",) if count else ()


def match(
    adapter: Adapter, table: TargetTable, unwritable: Unwritable | None = None, *, may_grow: bool = False
) -> Match:
    """Never raises for a part of a file: what cannot be used is in `unmatched`, key and reason.

    `may_grow` is for whoever can enlarge a weight where the adapter asks for it: a live model cannot, a file can.
    Factors that are not numbers are left out here: one NaN would make black images of the whole model. (Factors on the
    meta device are not looked into.)
    """
    families = other_family(adapter, table)
    if families is not None:
        made_for, held = families
        why = tuple(Unmatched(module.name.written, f"this model is {held}") for module in adapter.modules)
        return Match((), why, len(adapter.modules), made_for=made_for)
    matched: list[Matched] = []
    unmatched = list(adapter.unknown)
    for module in adapter.modules:
        unmatched += module.unread
        if not module.layers:
            continue
        attempts = [
            _on_target(module, target, _Model(table, unwritable, may_grow))
            for target in table.candidates(module.name.body, module.name.dialect.components)
        ]
        if not attempts:
            unmatched.append(Unmatched(module.name.written, _why_not_found(module, table)))
            continue
        # a bare name can mean either text encoder: the one where more of it fits is meant
        found, failed = max(attempts, key=lambda attempt: len(attempt[0]))
        matched += found
        unmatched += failed
    if matched:
        return Match(tuple(matched), tuple(unmatched), len(adapter.modules), adapter.notes)
    # of what it holds as an adapter: plain weights beside that are no sign of a checkpoint
    kind = kinds.of_names(f"{module.name.written}.lora" for module in adapter.modules if module.layers)
    notes = (*adapter.notes, f"the file {kind}") if kind else adapter.notes
    return Match((), tuple(unmatched), len(adapter.modules), notes, base_family(adapter))


def _why_not_found(module: Module, table: TargetTable) -> str:
    components = module.name.dialect.components
    if not table.has(components):
        return f"the model has no {' or '.join(components)}"
    return "the model has no module of this name"


@dataclass(frozen=True)
class _Model:
    table: TargetTable
    unwritable: Unwritable | None
    may_grow: bool


def _on_target(module: Module, target: Target, model: _Model) -> tuple[list[Matched], list[Unmatched]]:
    found: list[Matched] = []
    failed: list[Unmatched] = []
    for layer in module.layers:
        views = target.views.get(layer.parameter)
        if views is None and layer.family.optional:
            continue
        try:
            pieces = list(_pieces(layer, views or (), target, model))
        except Unusable as reason:
            failed.append(Unmatched(module.name.written, str(reason)))
        except ShapeError as error:
            failed.append(Unmatched(module.name.written, f"{WRONG_SHAPE}: {error}"))
        else:
            found += [Matched(module.name.written, target.component, view, piece) for view, piece in pieces]
    return found, failed


def _pieces(layer: Layer, views: tuple[View, ...], target: Target, model: _Model) -> Iterator[tuple[View, Layer]]:
    """The views that the layer changes, each with what of the layer is for it. Raises ShapeError and Unusable."""
    if not views:
        raise Unusable(f"the model's {target.name} has no {layer.parameter}")
    for view in views:
        if model.unwritable and (reason := model.unwritable(view, layer)):
            raise Unusable(reason)
    table = model.table
    shapes = [view.shape(table.shapes[view.path]) for view in views]
    if layer.reshape and layer.reshape != shapes[0]:
        _check_growth(layer, shapes, model)
        yield views[0], layer
    elif len(views) == 1:
        narrow = _first_inputs(layer, views[0], shapes[0], target.component)
        layer.check(narrow.shape(table.shapes[narrow.path]))
        yield narrow, layer
    else:
        yield from _stacked(layer, views, shapes)
    if not layer.finite():  # last: it reads the factors, which only what fits is worth
        raise Unusable("not finite: its numbers are NaN or infinite")


def _stacked(layer: Layer, views: tuple[View, ...], shapes: list[tuple[int, ...]]) -> Iterator[tuple[View, Layer]]:
    """A fused adapter's rows, each part for the projection that the model holds by itself."""
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    layer.check(whole)
    start = 0
    for view, shape in zip(views, shapes, strict=True):
        if layer.needs_base:
            family = layer.family.rows(start, shape[0]) if layer.plain else None
            if family is None:
                raise Unusable(f"{layer.label} on a fused projection needs it whole, and the model holds it in parts")
            yield view, replace(layer, family=family)
        else:
            yield view, RowsLayer.of(layer, whole, start, shape[0])
        start += shape[0]


def _check_growth(layer: Layer, shapes: list[tuple[int, ...]], model: _Model) -> None:
    asked = " × ".join(map(str, layer.reshape))
    if len(shapes) > 1 or len(layer.reshape) != len(shapes[0]) or any(map(int.__lt__, layer.reshape, shapes[0])):
        raise ShapeError(f"it asks for a weight of {asked}, which does not hold the {shapes[0]} that are there")
    if not model.may_grow:
        raise Unusable(f"it needs its weight enlarged to {asked}, which `bake` can do and a loaded model cannot")
    if prod(layer.reshape) > MOST_GROWTH * prod(shapes[0]):
        raise Unusable(f"it asks for a weight of {asked}, more than {MOST_GROWTH} times what is there")
    layer.check(layer.reshape)


def _first_inputs(layer: Layer, view: View, shape: tuple[int, ...], component: str) -> View:
    """The part of a first layer's weight that the adapter was trained on: all of it, or the first of its inputs.

    The further inputs are left as they are, which is a ΔW filled with zeros. Raises ShapeError where the adapter is for
    more inputs than the layer has.
    """
    if len(shape) < 2 or view.length >= 0 or layer.family.shape()[0] not in (None, shape[0]):
        return view
    inputs = layer.family.inputs(prod(shape[2:]))
    if inputs in (None, shape[1]) or place_of(component, view.path).layer not in FIRST_LAYERS:
        return view
    if inputs > shape[1]:
        raise ShapeError(
            f"its ΔW is for {inputs} inputs, this layer has {shape[1]} (an adapter for a model that reads more than an "
            "image, such as inpainting, Fill or Control?)"
        )
    return view._replace(axis=1, start=0, length=inputs)
