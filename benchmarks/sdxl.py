"""SDXL's parameters by rule: dotted path → shape, 2,567,463,684 of them in the UNet.

The second text encoder stands under Hugging Face's names, one module for each of q, k and v, as trainers see it.
"""

from __future__ import annotations

from collections.abc import Iterator

Parameter = tuple[str, tuple[int, ...]]

CHANNELS, MULTIPLIERS, DEPTHS, BLOCKS = 320, (1, 2, 4), (0, 2, 10), 2
CONTEXT, EXTRA, TIME = 2048, 2816, 1280
TE1 = (768, 12, 3072)  # width, layers, width inside the MLP
TE2 = (1280, 32, 5120)


def shapes() -> dict[str, tuple[int, ...]]:
    """The whole model without its autoencoder."""
    found = {f"model.diffusion_model.{name}": shape for name, shape in _unet()}
    for number, sizes in enumerate((TE1, TE2)):
        root = f"conditioner.embedders.{number}.transformer."
        found.update({root + name: shape for name, shape in _clip(*sizes)})
    found["conditioner.embedders.1.transformer.text_projection.weight"] = (TE2[0], TE2[0])
    return found


def _affine(name: str, *shape: int) -> Iterator[Parameter]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _resnet(name: str, inputs: int, outputs: int) -> Iterator[Parameter]:
    yield from _affine(f"{name}.in_layers.0", inputs)
    yield from _affine(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.emb_layers.1", outputs, TIME)
    yield from _affine(f"{name}.out_layers.0", outputs)
    yield from _affine(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.skip_connection", outputs, inputs, 1, 1)


def _transformer(name: str, width: int, depth: int) -> Iterator[Parameter]:
    yield from _affine(f"{name}.norm", width)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", CONTEXT)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, context)
            yield f"{block}.{attention}.to_v.weight", (width, context)
            yield from _affine(f"{block}.{attention}.to_out.0", width, width)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _affine(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", width)
    yield from _affine(f"{name}.proj_in", width, width)
    yield from _affine(f"{name}.proj_out", width, width)


def _block(name: str, inputs: int, outputs: int, depth: int) -> Iterator[Parameter]:
    yield from _resnet(f"{name}.0", inputs, outputs)
    if depth:
        yield from _transformer(f"{name}.1", outputs, depth)


def _unet() -> Iterator[Parameter]:
    for name, inputs in (("time_embed", CHANNELS), ("label_emb.0", EXTRA)):
        yield from _affine(f"{name}.0", TIME, inputs)
        yield from _affine(f"{name}.2", TIME, TIME)
    yield from _affine("input_blocks.0.0", CHANNELS, 4, 3, 3)
    width, number, kept = CHANNELS, 1, [CHANNELS]
    for level, multiplier in enumerate(MULTIPLIERS):
        for _ in range(BLOCKS):
            yield from _block(f"input_blocks.{number}", width, CHANNELS * multiplier, DEPTHS[level])
            width, number = CHANNELS * multiplier, number + 1
            kept.append(width)
        if level + 1 < len(MULTIPLIERS):
            yield from _affine(f"input_blocks.{number}.0.op", width, width, 3, 3)
            number += 1
            kept.append(width)
    yield from _block("middle_block", width, width, DEPTHS[-1])
    yield from _resnet("middle_block.2", width, width)
    yield from _way_up(width, kept)
    yield from _affine("out.0", CHANNELS)
    yield from _affine("out.2", 4, CHANNELS, 3, 3)


def _way_up(width: int, kept: list[int]) -> Iterator[Parameter]:
    number = 0
    for level in reversed(range(len(MULTIPLIERS))):
        outputs = CHANNELS * MULTIPLIERS[level]
        for index in range(BLOCKS + 1):
            yield from _block(f"output_blocks.{number}", width + kept.pop(), outputs, DEPTHS[level])
            width = outputs
            if level and index == BLOCKS:
                yield from _affine(f"output_blocks.{number}.{2 if DEPTHS[level] else 1}.conv", width, width, 3, 3)
            number += 1


def _clip(width: int, layers: int, inner: int) -> Iterator[Parameter]:
    yield "text_model.embeddings.token_embedding.weight", (49408, width)
    yield "text_model.embeddings.position_embedding.weight", (77, width)
    for number in range(layers):
        layer = f"text_model.encoder.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{name}", width, width)
        yield from _affine(f"{layer}.mlp.fc1", inner, width)
        yield from _affine(f"{layer}.mlp.fc2", width, inner)
        yield from _affine(f"{layer}.layer_norm1", width)
        yield from _affine(f"{layer}.layer_norm2", width)
    yield from _affine("text_model.final_layer_norm", width)
