"""How trainers spell the names. A dialect only renames: a file's key → (module name, suffix).

Two tables: `SUFFIX_ALIASES` turns other spellings of a suffix into ours, `PREFIXES` says which part of a model a
module's name speaks of. What remains, the body, is looked up among the names of the model itself (`lib_locon.models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lib_locon.families import SUFFIXES, UNSUPPORTED

SUFFIX_ALIASES: Mapping[str, str] = {
    "lora_B.weight": "lora_up.weight",  # PEFT: A is down, B is up
    "lora_A.weight": "lora_down.weight",
    "lora_B": "lora_up.weight",  # Mochi's trainers
    "lora_A": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}
_SUFFIXES: Mapping[str, str] = {**{suffix: suffix for suffix in (*SUFFIXES, *UNSUPPORTED)}, **SUFFIX_ALIASES}
_LONGEST = max(suffix.count(".") for suffix in _SUFFIXES) + 1
_PEFT_ONLY = ("lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector")
_PEFT = (*_PEFT_ONLY, "oft_R", "boft_", "ia3_l", "hada_w", "lokr_w")
"""How PEFT's parameters begin. It puts the adapter's name (`default`) behind them when it is told to leave it in."""
_HALVES = {"up.weight": "lora_up.weight", "down.weight": "lora_down.weight"}
"""Old diffusers: `…processor.to_q_lora.up.weight` is the `to_q` beside the processor."""
XLABS = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.qkv_lora": "linear1_qkv",
    "processor.proj_lora": "linear2",
}
"""XLabs' Flux adapters name the factors after what they change; `linear1_qkv` is the q, k, v part of `linear1`."""
_BFL_NORMS = ("query_norm.scale", "key_norm.scale")
"""BFL's control adapters hold these whole, in place of the model's; elsewhere a `scale` is one number."""

ANY = ("unet", "te1", "te2", "te3")


@dataclass(frozen=True)
class Dialect:
    """A prefix of module names, the tools that write it, and the parts of a model to look in, in this order.

    `renames` are suffixes that mean something else under this prefix. `rejected` is why such files are not read.
    """

    prefix: str
    name: str
    components: tuple[str, ...] = ANY
    renames: Mapping[str, str] = field(default_factory=dict)
    rejected: str = ""


ONETRAINER = {"oft_R.weight": "onetrainer.oft_R.weight"}
"""The meaning of suffixes in its files; without another mark, underscored names are one: PEFT writes none."""
_PARTS = {"unet.": "unet", "transformer.": "unet", "text_encoder.": "te1", "text_encoder_2.": "te2",
          "text_encoder_3.": "te3"}  # fmt: skip

ENCODERS = {"clip_l": "te1", "clip_h": "te1", "clip_g": "te2", "t5xxl": "te3", "t5": "te3"}
"""ComfyUI and OneTrainer name text encoders by their architecture; clip_h is SD2's only one."""
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Levels that torch puts around a whole network: before its prefix too, where a trainer saves what it wrapped."""

PREFIXES: tuple[Dialect, ...] = (
    Dialect("lora_unet__", "Wan", rejected="Wan's video models are not supported"),
    Dialect("lora_prior_unet_", "Stable Cascade", rejected="Stable Cascade is not supported"),
    Dialect("lora_prior_te_", "Stable Cascade", rejected="Stable Cascade is not supported"),
    Dialect("lora_unet_", "kohya", ("unet",), ONETRAINER),
    Dialect("lora_te1_", "kohya", ("te1",), ONETRAINER),
    Dialect("lora_te2_", "kohya", ("te2",), ONETRAINER),
    Dialect("lora_te3_", "kohya", ("te3",), ONETRAINER),
    Dialect("lora_te_", "kohya", ("te1", "te2"), ONETRAINER),
    Dialect("lora_transformer_", "OneTrainer", ("unet",), ONETRAINER),
    Dialect("oft_unet_", "kohya OFT", ("unet",), {"oft_blocks": "kohya_oft_blocks"}),
    Dialect("lycoris_text_encoder_2_", "LyCORIS", ("te2",)),
    Dialect("lycoris_text_encoder_3_", "LyCORIS", ("te3",)),
    Dialect("lycoris_text_encoder_", "LyCORIS", ("te1",)),
    Dialect("lycoris_", "LyCORIS"),
    *(Dialect(f"{part}base_model.model.", "PEFT", (component,)) for part, component in _PARTS.items()),
    *(Dialect(f"base_model.model.{part}", "PEFT", (component,)) for part, component in _PARTS.items()),
    Dialect("base_model.model.", "PEFT"),
    *(Dialect(part, "diffusers", (component,)) for part, component in _PARTS.items()),
    Dialect("model.diffusion_model.", "ldm", ("unet",)),
    Dialect("diffusion_model.", "ldm", ("unet",)),
    *(
        Dialect(f"{root}{name}.", "ComfyUI", (component,))
        for root in ("text_encoders.", "")
        for name, component in ENCODERS.items()
    ),
    Dialect("cond_stage_model.", "ldm", ("te1",)),
    Dialect("conditioner.embedders.0.", "sgm", ("te1", "te2")),
    Dialect("conditioner.embedders.1.", "sgm", ("te2",)),
)
BARE = Dialect("", "bare names")


@dataclass(frozen=True)
class ModuleName:
    """A module as a file names it: `written` in full, its dialect, and the body after the prefix."""

    written: str
    dialect: Dialect
    body: str


def split_key(key: str) -> tuple[str, str] | None:
    """(module as written, suffix in our spelling); None where no known suffix ends the key.

    The longest suffix wins; module paths with dots in them exist, so the first dot says nothing.
    """
    if key.endswith(_BFL_NORMS):
        return key, "set_weight"
    segments = key.split(".")
    # one segment comes last: `weight` alone is a suffix too (IA3), and would cut the longer spellings short
    return (
        _known_suffix(segments, range(min(_LONGEST, len(segments) - 1), 1, -1))
        or _attention_processor(segments)
        or _named_adapter(segments)
        or _known_suffix(segments, range(min(1, len(segments) - 1), 0, -1))
    )


def _known_suffix(segments: list[str], counts: range) -> tuple[str, str] | None:
    for count in counts:
        suffix = _SUFFIXES.get(".".join(segments[-count:]))
        if suffix is not None:
            return ".".join(segments[:-count]), suffix
    return None


def _attention_processor(segments: list[str]) -> tuple[str, str] | None:
    suffix = _HALVES.get(".".join(segments[-2:]))
    if suffix is None or len(segments) < 3:
        return None
    xlabs = XLABS.get(".".join(segments[-4:-2]))
    if xlabs is not None:
        return ".".join([*segments[:-4], xlabs]), suffix
    module = segments[-3]
    return (".".join([*segments[:-3], module[: -len("_lora")]]), suffix) if module.endswith("_lora") else None


def _named_adapter(segments: list[str]) -> tuple[str, str] | None:
    """`<module>.lora_A.<adapter>.weight`, `<module>.hada_w1_a.<adapter>`."""
    at = next((i for i in range(1, len(segments) - 1) if segments[i].startswith(_PEFT)), None)
    if at is None:
        return None
    spelled = ".".join([segments[at], *segments[at + 2 :]])
    return (".".join(segments[:at]), _SUFFIXES[spelled]) if spelled in _SUFFIXES else None


def is_peft(key: str) -> bool:
    """Whether a file's key is in PEFT's own spelling."""
    return key.startswith("base_model.model.") or any(part.startswith(_PEFT_ONLY) for part in key.split("."))


def module_name(written: str) -> ModuleName:
    """Finds the dialect by the prefix."""
    name = written
    while True:
        for dialect in PREFIXES:
            if name.startswith(dialect.prefix):
                return ModuleName(written, dialect, name[len(dialect.prefix) :])
        inside = next((name[len(level) :] for level in _WRAPPERS if name.startswith(level)), None)
        if inside is None:
            return ModuleName(written, BARE, name)
        name = inside
