"""The kind of a file that holds no adapter, from its first bytes or from the names of its tensors. Reads no file.

Asked only where nothing usable was found: a file with an adapter in it may hold any other names too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

_AGAIN = "download it again"
_PICTURE = f"is a picture, not a model: {_AGAIN}"
ARCHIVE = "is an archive: unpack it, and put the .safetensors file in it here"
STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull`, or download it again"),
    (
        b"PK\x03\x04",
        "is a zip or a pickled .pt file, not safetensors: unpack the zip; a pickled file is read by the endings .pt, "
        ".ckpt and .bin alone",
    ),
    *(
        (bytes([0x80, protocol]), "is a pickled .pt file, not safetensors: only .pt, .ckpt and .bin are read so")
        for protocol in range(2, 6)
    ),
    (b"GGUF", "is a GGUF file under another name: such files are not read here, get the adapter as safetensors"),
    *((magic, ARCHIVE) for magic in (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b", b"\xfd7zXZ\0")),
    *((magic, _PICTURE) for magic in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM")),
    (b"\x89HDF\r\n", "is an HDF5 file (Keras), which is not read here: get the adapter as safetensors"),
    (b"\x93NUMPY", "is a NumPy file, which is not read here: get the adapter as safetensors"),
    (b"ftrt", "is an engine of TensorRT, which is not read here: it belongs to the TensorRT extension"),
    (b"MZ", f"is a program for Windows, not a model: delete it, and {_AGAIN} from a place that you trust"),
    (b"\x7fELF", f"is a program for Linux, not a model: delete it, and {_AGAIN} from a place that you trust"),
    (b"%PDF", f"is a PDF document, not a model: {_AGAIN}"),
    (b"d8:announce", "is a torrent, not the file itself: open it with a program for torrents"),
)  # fmt: skip
"""First bytes → what the file is. Not for a file that begins as safetensors does."""
_WEB = (b"<!doctype", b"<html", b"<?xml")
_LOOKED_AT = 64
_MOST_NAMES, _MOST_LETTERS = 20_000, 300
"""Of the tensors that are looked at: more than any real file has."""
_WORDS = (
    (b"string_to_param", "string_to_param"),
    (b"activate_output", "768"),  # only a hypernetwork says how its last layer is activated
    (b"first_stage_model.", "model.diffusion_model.out.weight"),  # its VAE
)
"""A word in a pickle → a tensor's name that tells as much."""


def of_start(start: bytes) -> str:
    """The kind of a file by its first bytes, as the rest of a sentence about it; empty where they tell nothing.

    `start` are 64 of them, or all that there are.
    """
    for magic, sentence in STARTS:
        if start.startswith(magic):
            return sentence
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _PICTURE
    if start.lstrip().lower().startswith(_WEB):
        return "is a web page saved under a model's name: download it again, signed in where needed"
    if start[:1] == b"\x08" and start[2:3] in (b"\x12", b"\x3a"):
        return "is an ONNX model, which is not read here: get the adapter as safetensors"
    if len(start) >= _LOOKED_AT and not any(start):
        return f"begins with nothing but zeros: its download has not finished; {_AGAIN}"
    text = _text(start)
    return f"is a text, not a model (it begins with {text!r}): {_AGAIN}, signed in where needed" if text else ""


def _text(start: bytes) -> str:
    """The first words of a text; empty for what is none. A header's length always has a zero among its bytes."""
    if len(start) < 8:
        return ""
    text = start.decode("utf-8", "ignore")  # the last letter may be cut in two
    printable = all(letter.isprintable() or letter in "\r\n\t" for letter in text)
    return text[:40] if printable and len(text.encode()) > len(start) - 4 else ""


class Kind(NamedTuple):
    """A kind of file, as the rest of a sentence. Each of `patterns` must be found in a name of one of its tensors."""

    sentence: str
    patterns: tuple[str, ...]


_CONTROLNET = "it belongs in the folder of the ControlNet extension, models/ControlNet"
_EMBEDDING = "it belongs in the folder embeddings, and its name in the prompt without a tag"
_CHECKPOINT = "it belongs in the folder models/Stable-diffusion"
_PLAIN = r"(?!.*lora)(?!.*hada)(?!.*lokr).*\.(weight|bias|scale)$"
KINDS: tuple[Kind, ...] = (
    Kind(
        "is a LoRA in cloneofsimo's first format, which numbers its layers and does not name them, and is not read: "
        "look for it in another format",
        (r"^(unet|text_encoder):\d+:(up|down)$",),
    ),
    Kind(f"is a Control-LoRA (a ControlNet), not an adapter for prompts: {_CONTROLNET}", (r"^lora_controlnet$",)),
    Kind(f"is a ControlNet-LLLite, not an adapter for prompts: {_CONTROLNET}", (r"^lllite_",)),
    Kind(f"is a PuLID, not an adapter for prompts: {_CONTROLNET}", (r"^(pulid_ca|id_adapter_attn)",)),
    Kind(f"is an IP-Adapter, not an adapter for prompts: {_CONTROLNET}", (r"(^|\.)ip_adapter|^image_proj\.",)),
    Kind(
        "is EasyControl's, which reads a second image: it works in that project's own programs only",
        (r"\.\w*(q|k|v|proj)_loras\.\d+\.(up|down)\.",),
    ),
    Kind(
        f"is a SparseCtrl, a ControlNet for AnimateDiff, not an adapter: {_CONTROLNET}",
        (r"motion_modules", r"controlnet_|^input_hint_block"),
    ),
    Kind(
        "is a motion LoRA, which changes AnimateDiff's motion module and not the model of images: it works with the "
        "AnimateDiff extension only",
        (r"motion_modules\..*lora",),
    ),
    Kind(
        "is a motion module of AnimateDiff's, not an adapter: it belongs in the folder model of the AnimateDiff "
        "extension",
        (r"motion_modules\.",),
    ),
    Kind(
        f"is a ControlNet, not an adapter: {_CONTROLNET}",
        (r"^control_model\.|(^|\.)controlnet_\w+\.|^(input_hint_block|zero_convs|control_add_embedding)\.",),
    ),
    Kind(f"is a whole checkpoint, not an adapter: {_CHECKPOINT}", (rf"^model\.diffusion_model\.{_PLAIN}",)),
    Kind("is a VAE, not an adapter: it belongs in the folder models/VAE", (r"^(first_stage_model|vae)\.",)),
    Kind(
        "is a VAE, not an adapter: it belongs in the folder models/VAE",
        (r"^encoder\.(conv_in|down|mid)\w*\.", r"^decoder\.(conv_in|up|mid)\w*\."),
    ),
    Kind(
        f"is a textual inversion (an embedding), not an adapter: {_EMBEDDING}",
        (r"^(emb_params|clip_l|clip_g|\*|<[^>]+>)$|^string_to_(param|token)\b",),
    ),
    Kind(
        "is a hypernetwork, not an adapter: it belongs in the folder models/hypernetworks, and is named by "
        "<hypernet:NAME:1>",
        (r"^(320|640|768|1024|1280)(\.[01]\.|$)",),
    ),
    Kind(
        f"is a T2I-Adapter, not an adapter for prompts: {_CONTROLNET}",
        (r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?block[12]\.",),
    ),
    Kind(
        "is an upscaler, not an adapter: it belongs in the folder models/ESRGAN",
        (r"^(module\.|params\.|params_ema\.)?(conv_first\.|body\.\d+\.rdb\d\.|RRDB_trunk\.|model\.1\.sub\.\d+\.)",),
    ),
    Kind(
        f"is the network of a checkpoint alone (a UNet or a transformer), not an adapter: {_CHECKPOINT}",
        (
            r"^(unet\.|transformer\.|diffusion_model\.)?(input_blocks|down_blocks|double_blocks|joint_blocks|single_blocks|"
            rf"(single_)?transformer_blocks)\.\d+{_PLAIN}",
        ),
    ),
    Kind(
        "is a CLIP for images, not an adapter: the ControlNet extension loads it for an IP-Adapter",
        (r"^(vision_model|visual)\.",),
    ),
    Kind(
        "is a text encoder, not an adapter: it belongs in the folder models/text_encoder",
        (
            r"^((\w+\.)?text_model\.encoder\.layers|encoder\.block|(\w+\.)?transformer\.resblocks|model\.layers)\.\d+\."
            + _PLAIN,
        ),
    ),
    Kind(
        "is an adapter for a language model: a model of images has no layers of these names",
        (r"(^|\.)model\.layers\.\d+\.(self_attn|mlp)\.",),
    ),
    Kind(
        "is an adapter for a video model, which this webui does not load",
        (r"(^|[._])blocks[._]\d+[._](self|cross)_attn[._][qkvo]\b",),
    ),
)  # fmt: skip
"""The more special ones first."""


def of_names(names: Iterable[str]) -> str:
    """The kind of a file with these tensors, as the rest of a sentence; empty where the names tell nothing."""
    # names are anybody's, and there may be a million of them, or one of a million letters
    some = [name[:_MOST_LETTERS] for name in islice(names, _MOST_NAMES)]
    for sentence, patterns in KINDS:
        if all(any(re.search(pattern, name) for name in some) for pattern in patterns):
            return sentence
    return ""


def of_table(table: Mapping[Any, Any]) -> str:
    """The same of a table that holds more than tensors: tables in it, and keys that are no names."""
    inner = ((key, value if isinstance(value, Mapping) else {"": None}) for key, value in table.items())
    return of_names(f"{key}.{below}".rstrip(".") for key, tables in inner for below in tables)


def of_program(pickled: bytes) -> str:
    """The same of a pickle that is not opened, by words that stand in it."""
    return next((of_names([name]) for word, name in _WORDS if word in pickled), "")
