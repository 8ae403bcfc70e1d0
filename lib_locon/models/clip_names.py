"""Other names of a text encoder's modules. Adapters use Hugging Face's names, whatever class the model holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lib_locon.models.targets import View

_LEVELS = ("transformer.", "text_model.")
_RESBLOCKS = "transformer.resblocks."
_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_TOP = {"ln_final": "final_layer_norm", "token_embedding": "embeddings.token_embedding"}
_LAYERS = "encoder.layers."
_OF_LAYER = {theirs: ours for ours, theirs in _LAYER.items()}
_TO_OPEN_CLIP = {
    **{theirs: ours for ours, theirs in _TOP.items()},
    "embeddings.position_embedding": "positional_embedding",
}
_PROCESSOR = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""diffusers' first text encoder adapters speak of the projections as its UNet does."""
Views = Mapping[str, tuple[View, ...]]


def _without_levels(name: str) -> str:
    for level in _LEVELS:
        name = name.removeprefix(level)
    return name


def text_encoder_names(name: str) -> Iterator[str]:
    """The names by which adapters call the CLIP or T5 module `name` (its dotted name inside the component).

    The level `text_model` comes and goes with the version of the library that a trainer used.
    """
    bare = _without_levels(name)
    yield from dict.fromkeys((name, f"text_model.{bare}", bare))
    stem, _, projection = bare.rpartition(".")
    if stem.endswith(".self_attn") and projection in _PROCESSOR:
        for level in ("text_model.", ""):
            yield f"{level}{stem}.{_PROCESSOR[projection]}"


def open_clip_names(name: str) -> str | None:
    """Hugging Face's name of an OpenCLIP module, without `text_model`; None for what has none."""
    bare = name.removeprefix("model.")
    if bare in _TOP:
        return _TOP[bare]
    if bare.startswith(_RESBLOCKS):
        number, _, leaf = bare[len(_RESBLOCKS) :].partition(".")
        if leaf in _LAYER:
            return f"encoder.layers.{number}.{_LAYER[leaf]}"
    return None


def open_clip_spellings(name: str) -> Iterator[str]:
    """OpenCLIP's names of the Hugging Face module `name` (inside a text encoder); none for what has none."""
    bare = _without_levels(name)
    found = _TO_OPEN_CLIP.get(bare, "")
    if bare.startswith(_LAYERS):
        number, _, leaf = bare[len(_LAYERS) :].partition(".")
        found = f"{_RESBLOCKS}{number}.{_OF_LAYER[leaf]}" if leaf in _OF_LAYER else ""
    if found:
        yield from (found, f"model.{found}")


def fused_projections(bodies: Mapping[str, Views]) -> Iterator[tuple[str, Views]]:
    """(OpenCLIP's name, views) of each attention whose q, k and v the model holds apart, one below the other.

    Its parameters have names of their own there, which whole differences go by.
    """
    for body in bodies:
        stem, _, leaf = body.rpartition(".")
        parts = [bodies.get(f"{stem}.{name}") for name in ("q_proj", "k_proj", "v_proj")]
        bare = _without_levels(stem)
        if leaf == "q_proj" and bare.startswith(_LAYERS) and bare.endswith(".self_attn") and all(parts):
            there = [part for part in parts if part]
            shared = [parameter for parameter in there[0] if all(parameter in part for part in there)]
            views = {parameter: tuple(view for part in there for view in part[parameter]) for parameter in shared}
            number = bare[len(_LAYERS) :].partition(".")[0]
            fused = f"{_RESBLOCKS}{number}.attn.in_proj"
            yield fused, views
            yield from ((f"{fused}_{name}", {"weight": views[name]}) for name in ("weight", "bias") if name in views)


def open_clip_parts(name: str, views: Views, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Views]]:
    """(Hugging Face's name, views) for what OpenCLIP holds as bare parameters of the module `name`.

    q, k and v are row blocks of `in_proj_weight`; `text_projection` is stored the other way round. The latter serves
    both ways: for Hugging Face's module, OpenCLIP's name is yielded.
    """
    bare = name.removeprefix("model.")
    if "in_proj_weight" in views and bare.startswith(_RESBLOCKS):
        number = bare[len(_RESBLOCKS) :].partition(".")[0]
        for i, projection in enumerate(("q_proj", "k_proj", "v_proj")):
            parts = {
                parameter: (_third(views[f"in_proj_{parameter}"][0], i, shapes),)
                for parameter in ("weight", "bias")
                if f"in_proj_{parameter}" in views and shapes[views[f"in_proj_{parameter}"][0].path]
            }
            yield f"encoder.layers.{number}.self_attn.{projection}", parts
    if bare.rpartition(".")[2] == "text_projection" and "weight" in views:
        yield "model.text_projection", {"weight": (views["weight"][0]._replace(transposed=True),)}
    if "positional_embedding" in views:
        yield "embeddings.position_embedding", {"weight": views["positional_embedding"]}
    if "text_projection" in views and len(shapes[views["text_projection"][0].path]) > 1:
        yield "text_projection", {"weight": (views["text_projection"][0]._replace(transposed=True),)}


def _third(view: View, number: int, shapes: Mapping[str, tuple[int, ...]]) -> View:
    rows = shapes[view.path][0] // 3
    return view._replace(axis=0, start=number * rows, length=rows)
