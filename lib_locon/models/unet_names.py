"""The names of ldm's UNet modules in diffusers' spelling, worked out from the model's own blocks.

ldm numbers blocks through (`input_blocks.4.1`), diffusers by level and kind (`down_blocks.1.attentions.0`). Which
blocks have attention and where levels end differs between SD1, SD2, SDXL and the refiner, so it is read from the names
that the model has. Source of the rule: the structure of both classes; checked module by module in the tests.
"""

from __future__ import annotations

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
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"


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
