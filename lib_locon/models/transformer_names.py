"""SD3 (mmdit) and Flux: diffusers' names against those of the original code, which the webui and checkpoints use.

The originals fuse projections: one of their modules is several of diffusers', one below the other. Each row says so
once, and serves both ways: a split adapter on a fused model (a row block) and a fused adapter on a split one (a stack).
Source of the pairs: the structure of both implementations; sizes follow from the shares of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lib_locon.models.targets import View

QKV = (1, 1, 1)
HALVES = (1, 1)
Views = Mapping[str, tuple[View, ...]]


@dataclass(frozen=True)
class Pair:
    """`original` is `diffusers`, in this order of rows, with these shares of them. `i` stands for the block."""

    original: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...] = (1,)


def _attention(original: str, block: str, names: tuple[str, str, str], attention: str = "attn") -> Pair:
    return Pair(original, tuple(f"{block}.{attention}.{name}" for name in names), QKV)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_OWN = ("to_q", "to_k", "to_v")
_T = "transformer_blocks.i"
_S = "single_transformer_blocks.i"

SD3 = (
    _attention("joint_blocks.i.x_block.attn.qkv", _T, _OWN),
    _attention("joint_blocks.i.context_block.attn.qkv", _T, _ADDED),
    _attention("joint_blocks.i.x_block.attn2.qkv", _T, _OWN, "attn2"),
    Pair("joint_blocks.i.x_block.attn.proj", (f"{_T}.attn.to_out.0",)),
    Pair("joint_blocks.i.x_block.attn2.proj", (f"{_T}.attn2.to_out.0",)),
    Pair("joint_blocks.i.context_block.attn.proj", (f"{_T}.attn.to_add_out",)),
    Pair("joint_blocks.i.x_block.mlp.fc1", (f"{_T}.ff.net.0.proj",)),
    Pair("joint_blocks.i.x_block.mlp.fc2", (f"{_T}.ff.net.2",)),
    Pair("joint_blocks.i.context_block.mlp.fc1", (f"{_T}.ff_context.net.0.proj",)),
    Pair("joint_blocks.i.context_block.mlp.fc2", (f"{_T}.ff_context.net.2",)),
    Pair("joint_blocks.i.x_block.adaLN_modulation.1", (f"{_T}.norm1.linear",)),
    Pair("joint_blocks.i.context_block.adaLN_modulation.1", (f"{_T}.norm1_context.linear",)),
    Pair("joint_blocks.i.x_block.attn.ln_q", (f"{_T}.attn.norm_q",)),
    Pair("joint_blocks.i.x_block.attn.ln_k", (f"{_T}.attn.norm_k",)),
    Pair("joint_blocks.i.x_block.attn2.ln_q", (f"{_T}.attn2.norm_q",)),
    Pair("joint_blocks.i.x_block.attn2.ln_k", (f"{_T}.attn2.norm_k",)),
    Pair("joint_blocks.i.context_block.attn.ln_q", (f"{_T}.attn.norm_added_q",)),
    Pair("joint_blocks.i.context_block.attn.ln_k", (f"{_T}.attn.norm_added_k",)),
    Pair("x_embedder.proj", ("pos_embed.proj",)),
    Pair("context_embedder", ("context_embedder",)),
    Pair("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Pair("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Pair("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    Pair("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    Pair("final_layer.linear", ("proj_out",)),
)
FLUX = (
    _attention("double_blocks.i.img_attn.qkv", _T, _OWN),
    _attention("double_blocks.i.txt_attn.qkv", _T, _ADDED),
    Pair("double_blocks.i.img_attn.proj", (f"{_T}.attn.to_out.0",)),
    Pair("double_blocks.i.txt_attn.proj", (f"{_T}.attn.to_add_out",)),
    Pair("double_blocks.i.img_mlp.0", (f"{_T}.ff.net.0.proj",)),
    Pair("double_blocks.i.img_mlp.2", (f"{_T}.ff.net.2",)),
    Pair("double_blocks.i.txt_mlp.0", (f"{_T}.ff_context.net.0.proj",)),
    Pair("double_blocks.i.txt_mlp.2", (f"{_T}.ff_context.net.2",)),
    Pair("double_blocks.i.img_mod.lin", (f"{_T}.norm1.linear",)),
    Pair("double_blocks.i.txt_mod.lin", (f"{_T}.norm1_context.linear",)),
    Pair("double_blocks.i.img_attn.norm.query_norm.scale", (f"{_T}.attn.norm_q",)),
    Pair("double_blocks.i.img_attn.norm.key_norm.scale", (f"{_T}.attn.norm_k",)),
    Pair("double_blocks.i.txt_attn.norm.query_norm.scale", (f"{_T}.attn.norm_added_q",)),
    Pair("double_blocks.i.txt_attn.norm.key_norm.scale", (f"{_T}.attn.norm_added_k",)),
    Pair("single_blocks.i.linear1", (*(f"{_S}.attn.{name}" for name in _OWN), f"{_S}.proj_mlp"), (1, 1, 1, 4)),
    Pair("single_blocks.i.linear2", (f"{_S}.proj_out",)),
    Pair("single_blocks.i.modulation.lin", (f"{_S}.norm.linear",)),
    Pair("single_blocks.i.norm.query_norm.scale", (f"{_S}.attn.norm_q",)),
    Pair("single_blocks.i.norm.key_norm.scale", (f"{_S}.attn.norm_k",)),
    Pair("img_in", ("x_embedder",)),
    Pair("txt_in", ("context_embedder",)),
    Pair("final_layer.linear", ("proj_out",)),
    *(
        Pair(f"{original}.{layer}", (f"time_text_embed.{diffusers}_embedder.{linear}",))
        for original, diffusers in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
        for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    ),
)
_SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
"""diffusers has shift and scale the other way round here: the halves of the rows change places."""
_LAST_CONTEXT = Pair("joint_blocks.i.context_block.adaLN_modulation.1", (f"{_T}.norm1_context.linear",))
"""And so it has in SD3's last context block, which has no output of its own."""
_LINEAR1_QKV = Pair("single_blocks.i.linear1_qkv", tuple(f"{_S}.attn.{name}" for name in _OWN), QKV)
"""XLabs adapts q, k and v of Flux' `linear1`, and not the rest of it."""


_PATCHES = ("img_in", "x_embedder", "img_in.proj")
"""The layer that reads Flux' latent image, as BFL, diffusers and OneTrainer's own format call it."""


def transformer_names(
    targets: Mapping[str, Views], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, ...], Views, bool]]:
    """(further names, views, whether they are the whole of one module) for an SD3 or Flux transformer.

    `targets` are the views by dotted name inside the component. OneTrainer's own format keeps q, k and v apart under
    the fused layer's name, and numbers them: `img_attn.qkv.0`.
    """
    if any(name.startswith(("joint_blocks.", "double_blocks.")) for name in targets):
        yield from _split_names(targets, shapes)
    elif any(name.startswith("transformer_blocks.0.attn.add_q_proj") for name in targets):
        yield from _fused_names(targets, shapes)


def _split_names(
    targets: Mapping[str, Views], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, ...], Views, bool]]:
    rows = {pair.original: pair for pair in (SD3 if any(n.startswith("joint_") for n in targets) else FLUX)}
    last = max((int(name.split(".")[1]) for name in targets if name.startswith("joint_blocks.")), default=-1)
    for name, views in targets.items():
        template, number = _template(name)
        if name in _SWAPPED:
            yield (_SWAPPED[name],), _swapped(views, shapes), False
        elif template == _LAST_CONTEXT.original and number == str(last):
            yield (_LAST_CONTEXT.diffusers[0].replace(".i.", f".{number}."),), _swapped(views, shapes), False
        elif template in rows:
            pair = rows[template]
            parts = _parts(views, pair.shares, shapes)
            for i, other in enumerate(pair.diffusers):
                whole = len(pair.diffusers) == 1
                one = views if whole else {parameter: (pieces[i],) for parameter, pieces in parts.items()}
                names = (other.replace(".i.", f".{number}."),)
                yield names if whole else (*names, f"{name}.{i}"), one, whole
            if name == _PATCHES[0]:
                yield _PATCHES, views, True
            if template == "single_blocks.i.linear1":
                qkv = {parameter: pieces[:1] for parameter, pieces in _parts(views, (3, 4), shapes).items()}
                yield (_LINEAR1_QKV.original.replace(".i.", f".{number}."),), qkv, False


def _fused_names(
    targets: Mapping[str, Views], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, ...], Views, bool]]:
    numbers = sorted({_template(name)[1] for name in targets} - {""}, key=int)
    flux = any(name.startswith("single_transformer_blocks.") for name in targets)
    for pair in (*FLUX, _LINEAR1_QKV) if flux else SD3:
        for number in numbers if ".i." in pair.original else [""]:
            original = pair.original.replace(".i.", f".{number}.")
            parts = [targets.get(other.replace(".i.", f".{number}.")) for other in pair.diffusers]
            stacked = [part for part in parts if part is not None]
            if len(stacked) == len(parts):
                shared = [name for name in stacked[0] if all(_has_rows(part.get(name), shapes) for part in stacked)]
                views = {name: tuple(view for part in stacked for view in part[name]) for name in shared}
                swapped = pair == _LAST_CONTEXT and number == numbers[-1]
                whole = len(parts) == 1 and not swapped
                yield (original,), _swapped(views, shapes) if swapped else views, whole
            if pair.original != _LINEAR1_QKV.original and len(parts) > 1:
                for i, part in enumerate(parts):
                    yield (pair.diffusers[i].replace(".i.", f".{number}."), f"{original}.{i}"), part or {}, True
    if flux and _PATCHES[1] in targets:
        yield _PATCHES, targets[_PATCHES[1]], True
    for original, other in _SWAPPED.items():
        if other in targets:
            yield (original,), _swapped(targets[other], shapes), False


def _template(name: str) -> tuple[str, str]:
    """The name with its block's number as `i`, and that number."""
    segments = name.split(".")
    if len(segments) > 1 and segments[1].isdigit():
        return ".".join([segments[0], "i", *segments[2:]]), segments[1]
    return name, ""


def _parts(views: Views, shares: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Views:
    """Each parameter that has such rows cut into row blocks by these shares."""
    return {
        parameter: tuple(_cut(view[0], shares, shapes))
        for parameter, view in views.items()
        if _has_rows(view, shapes) and shapes[view[0].path][0] % sum(shares) == 0
    }


def _has_rows(views: tuple[View, ...] | None, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether the parameter is there and has axes: a scale beside a weight may have none."""
    return views is not None and all(shapes[view.path] for view in views)


def _cut(view: View, shares: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[View]:
    unit, start = shapes[view.path][0] // sum(shares), 0
    for share in shares:
        yield view._replace(axis=0, start=start, length=share * unit)
        start += share * unit


def _swapped(views: Views, shapes: Mapping[str, tuple[int, ...]]) -> Views:
    """The two halves of the rows, the second one first."""
    return {parameter: tuple(reversed(pieces)) for parameter, pieces in _parts(views, HALVES, shapes).items()}
