"""UNet modules in the two spellings, ldm's and diffusers', each worked out from the other and the model's own blocks.

ldm numbers blocks through (`input_blocks.4.1`), diffusers by level and kind (`down_blocks.1.attentions.0`). Which
blocks have attention and where levels end differs between SD1, SD2, SDXL and the refiner, so it is read from the names
that the model has. Source of the rule: the structure of both classes; checked module by module in the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

_FIXED = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
SECOND_NAMES = {
    "add_embedding.linear_1": "class_embedding.linear_1",
    "add_embedding.linear_2": "class_embedding.linear_2",
}
"""By diffusers' name: some trainers hold that embedding in the place for classes."""
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_LDM_FIXED = {alias: name for name, alias in _FIXED.items()}
_LDM_FIXED |= {second: _LDM_FIXED[first] for first, second in SECOND_NAMES.items()}
_LDM_RESNET = {alias: name for name, alias in _RESNET.items()}
_SAMPLERS = ("downsamplers", "upsamplers")
_KINDS = {"in_layers": "resnets", "emb_layers": "resnets", "out_layers": "resnets", "skip_connection": "resnets",
          "op": "downsamplers", "conv": "upsamplers"}  # fmt: skip


def diffusers_names(modules: Collection[str]) -> dict[str, str]:
    """ldm module name → diffusers module name, for every module of a UNet that has one.

    `modules` are the dotted names below `diffusion_model.` of the modules that own parameters.
    """
    blocks = dict(_blocks(modules))
    return {name: alias for name in modules if (alias := _alias(name, blocks)) is not None}


def _alias(name: str, blocks: dict[str, str]) -> str | None:
    if name in _FIXED:
        return _FIXED[name]
    segments = name.split(".")
    depth = 2 if segments[0] == "middle_block" else 3
    block, leaf = blocks.get(".".join(segments[:depth])), ".".join(segments[depth:])
    if block is None:
        return None
    if ".resnets." in block:
        return f"{block}.{_RESNET[leaf]}" if leaf in _RESNET else None
    return f"{block}.conv" if leaf == "op" else f"{block}.{leaf}"


def _blocks(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """(ldm block, diffusers block) for all three stages of the UNet."""
    yield from _stage("input_blocks", "down_blocks", modules)
    yield from _stage("output_blocks", "up_blocks", modules)
    yield from _middle(modules)


def _middle(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """The middle block's children in order; a model may have no attention there."""
    kinds: dict[int, str] = {}
    for name in modules:
        stage, *rest = name.split(".")
        if stage == "middle_block" and len(rest) > 1 and rest[0].isdigit():
            kinds[int(rest[0])] = _KINDS.get(rest[1], "attentions")
    count: Counter[str] = Counter()
    for child in sorted(kinds):
        kind = kinds[child]
        yield f"middle_block.{child}", f"mid_block.{kind}.{count[kind]}"
        count[kind] += 1


def _stage(ldm: str, diffusers: str, modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Walks the numbered blocks in order. A level ends with the resampling layer, in either direction."""
    kinds: dict[tuple[int, int], str] = {}
    for name in modules:
        stage, *rest = name.split(".")
        if stage == ldm and len(rest) > 2:
            kinds[int(rest[0]), int(rest[1])] = _KINDS.get(rest[2], "attentions")
    level, layer = 0, -1
    for number, child in sorted(kinds):
        kind = kinds[number, child]
        if kind == "resnets":
            layer += 1
        yield f"{ldm}.{number}.{child}", f"{diffusers}.{level}.{kind}.{0 if kind in _SAMPLERS else layer}"
        if kind in _SAMPLERS:
            level, layer = level + 1, -1


def ldm_names(modules: Collection[str]) -> dict[str, str]:
    """diffusers module name → ldm module name, for every module of a UNet that has one.

    `modules` are the dotted names inside a diffusers UNet of the modules that own parameters.
    """
    blocks = dict(_ldm_blocks(modules))
    return {name: alias for name in modules if (alias := _ldm_alias(name, blocks)) is not None}


def _ldm_alias(name: str, blocks: dict[str, str]) -> str | None:
    if name in _LDM_FIXED:
        return _LDM_FIXED[name]
    segments = name.split(".")
    depth = 3 if segments[0] == "mid_block" else 4
    block, leaf = blocks.get(".".join(segments[:depth])), ".".join(segments[depth:])
    if block is None:
        return None
    kind = segments[depth - 2]
    if kind == "resnets":
        return f"{block}.{_LDM_RESNET[leaf]}" if leaf in _LDM_RESNET else None
    if kind in _SAMPLERS:
        return f"{block}.{'op' if kind == 'downsamplers' else 'conv'}" if leaf == "conv" else None
    return f"{block}.{leaf}"


def _ldm_blocks(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """(diffusers block, ldm block) for all three stages of the UNet."""
    found: dict[str, dict[int, dict[str, set[int]]]] = {"down_blocks": {}, "up_blocks": {}}
    middle: dict[str, set[int]] = {}
    for name in modules:
        stage, *rest = name.split(".")
        if stage == "mid_block" and len(rest) > 2 and rest[1].isdigit():
            middle.setdefault(rest[0], set()).add(int(rest[1]))
        elif stage in found and len(rest) > 3 and rest[0].isdigit() and rest[2].isdigit():
            found[stage].setdefault(int(rest[0]), {}).setdefault(rest[1], set()).add(int(rest[2]))
    yield from _ldm_levels("down_blocks", "input_blocks", found["down_blocks"], 1)
    yield from _ldm_levels("up_blocks", "output_blocks", found["up_blocks"], 0)
    # resnets stand around the attentions: 0, then attention and resnet in turn
    resnets, attentions = sorted(middle.get("resnets", ())), sorted(middle.get("attentions", ()))
    in_order = [("resnets", number) for number in resnets[:1]]
    for place in range(max(len(resnets) - 1, len(attentions))):
        in_order += [("attentions", number) for number in attentions[place : place + 1]]
        in_order += [("resnets", number) for number in resnets[place + 1 : place + 2]]
    for child, (kind, number) in enumerate(in_order):
        yield f"mid_block.{kind}.{number}", f"middle_block.{child}"


def _ldm_levels(
    diffusers: str, ldm: str, levels: dict[int, dict[str, set[int]]], first: int
) -> Iterator[tuple[str, str]]:
    """Numbers the layers of all levels through. On the way down a resampler is a block of its own, on the way up it is
    the last child of the last one."""
    number = first
    for level in sorted(levels):
        kinds = levels[level]
        layers = 1 + max((*kinds.get("resnets", ()), *kinds.get("attentions", ())), default=-1)
        for kind, child in (("resnets", 0), ("attentions", 1)):
            for layer in kinds.get(kind, ()):
                yield f"{diffusers}.{level}.{kind}.{layer}", f"{ldm}.{number + layer}.{child}"
        number += layers
        if "downsamplers" in kinds:
            yield f"{diffusers}.{level}.downsamplers.0", f"{ldm}.{number}.0"
            number += 1
        if "upsamplers" in kinds:
            yield f"{diffusers}.{level}.upsamplers.0", f"{ldm}.{number - 1}.{2 if 'attentions' in kinds else 1}"
