"""Adapter files: random adapters of every family, then bent out of shape, in their tensors and their bytes.

The promises are those of `check`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lib_locon
from lib_locon.errors import FileError, PatchError
from lib_locon.facts import FileMetadata, read_facts
from lib_locon.families import ALPHA, FAMILIES, MAGNITUDES, SCALE
from lib_locon.families.base import Family
from lib_locon.files.adapter import Adapter
from lib_locon.files.dialects import split_key
from lib_locon.files.reader import DTYPES, FileIdentity, SafetensorsFile
from lib_locon.hosts.builtin_list import builtin_list
from lib_locon.hosts.web import encoded
from lib_locon.inspection import inspect
from lib_locon.library import Library
from tests.conftest import ZooModel
from tests.fuzz.limits import limited

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
STRANGE_NAMES = (
    "\u202eesrever",
    "tab\there",
    "\x1b[2J",
    "naïve.läyer",
    "名前",
    "a" * 5000,
    "",
    ".",
    "\x00",
    "\U0001f600",
)
Tensors = dict[str, Tensor]


# ---- sound adapters


def sizes_for(kind: type[Family], shape: tuple[int, ...], rng: random.Random) -> dict[str, int]:
    """A size for each axis name of the family, such that ΔW has this shape; kernels are under `*k`."""
    out, n, channels = shape[0], math.prod(shape[1:]), (shape[1] if len(shape) > 1 else 1)
    ranks = {name: rng.randint(1, 3) for name in ("r", "s", "r1", "r2", "nnz", "m")}
    a = rng.choice([i for i in range(1, out + 1) if out % i == 0])
    b = rng.choice([i for i in range(1, channels + 1) if channels % i == 0])
    sizes = {**ranks, "out": out, "n": n, "in": channels, "a": a, "b": b, "c": out // a, "one": 1, "two": 2}
    sizes["d"] = channels // b if "lokr_t2" in kind.suffixes() else n // b
    if kind.name in ("OFT", "BOFT"):
        side = n if "boft_R" in kind.suffixes() or "blocks" in " ".join(kind.specs().values()) else out
        block = rng.choice([i for i in range(2, side + 1) if side % i == 0] or [1])
        sizes |= {f"b{part}": block for part in range(4)}
        sizes |= {"b": block, "k": side // block, "d": side // block, "m": 1}
        sizes |= {"blocks": rng.choice([1, side // block]), "packed": max(1, block * (block - 1) // 2)}
    return sizes


def factors(kind: type[Family], shape: tuple[int, ...], rng: random.Random) -> Tensors:
    """Random tensors, suffix → tensor, of one family for a weight of this shape."""
    sizes = sizes_for(kind, shape, rng)
    made: Tensors = {}
    for suffix, spec in kind.specs().items():
        if suffix in kind.missing([s for s in kind.suffixes() if s != suffix]) or rng.random() < 0.5:
            axes: list[int] = []
            for name in spec.split():
                if name == "*k":
                    axes += shape[2:]
                else:
                    axes.append(rng.choice([shape[0], sizes["in"]]) if name.startswith("*") else sizes[name])
            made[suffix] = torch.tensor([rng.uniform(-1, 1) for _ in range(math.prod(axes))]).reshape(axes)
    if "bias_indices" in made:
        made["bias_indices"] = (made["bias_indices"].abs() * 4).to(torch.int16)
    return made


def sound(rng: random.Random, model: nn.Module) -> Tensors:
    """One to three modules of the model with an adapter each."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    made: Tensors = {}
    for name in rng.sample(sorted(parameters), rng.randint(1, 3)):
        module = name.removesuffix(".weight")
        kind = rng.choice(FAMILIES)
        prefix = rng.choice(["lora_unet_", "lycoris_", "base_model.model.", "oft_unet_", ""])
        own = factors(kind, parameters[name], rng)
        if rng.random() < 0.6:
            own["alpha"] = torch.tensor(rng.choice([1.0, 0.5, 4.0, 0.0, -1.0]))
        if rng.random() < 0.2:
            side = rng.choice([(parameters[name][0], 1), (1, *parameters[name][1:2])])
            own["dora_scale"] = torch.rand(side)
        if rng.random() < 0.2:
            sizes = [
                float(rng.choice([size, size, 2 * size, 0, -1, 2**40, math.nan, math.inf])) for size in parameters[name]
            ]
            own["reshape_weight"] = torch.tensor(sizes, dtype=torch.float64)
        made |= {f"{prefix}{module}.{suffix}": tensor for suffix, tensor in own.items()}
    return made


# ---- mutations of tensors


def mutated(rng: random.Random, tensors: Tensors) -> Tensors:
    """The same with zero to three things changed."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if tensors:
            key = rng.choice(sorted(tensors))
            rng.choice(MUTATIONS)(rng, tensors, key)
    return tensors


def _drop(rng: random.Random, tensors: Tensors, key: str) -> None:
    del tensors[key]


def _dtype(rng: random.Random, tensors: Tensors, key: str) -> None:
    tensors[key] = tensors[key].float().to(rng.choice(list(DTYPES.values())))


def _reshape(rng: random.Random, tensors: Tensors, key: str) -> None:
    flat = tensors[key].flatten()
    halves = [i for i in range(1, flat.numel() + 1) if flat.numel() % i == 0] or [1]
    first = rng.choice(halves)
    shapes = ([-1], [first, -1], [-1, first], [1, -1], [-1, 1, 1], [1, -1, 1], [first, -1, 1, 1], [1] * 9 + [-1])
    if flat.numel():
        tensors[key] = flat.reshape(rng.choice(shapes))


def _values(rng: random.Random, tensors: Tensors, key: str) -> None:
    flat = tensors[key].flatten().double()
    if flat.numel():
        flat[rng.randrange(flat.numel())] = rng.choice([math.nan, math.inf, -math.inf, 1e300, 1e30, 0.0, -7.0, 40000.0])
        tensors[key] = flat.reshape(tensors[key].shape)


def _sizes(rng: random.Random, tensors: Tensors, key: str) -> None:
    shape = [rng.choice([0, 1, size, size + 1, 2 * size]) for size in tensors[key].shape]
    tensors[key] = torch.ones(rng.choice([shape, shape[1:], [*shape, 1], [2, *shape]]))


def _swap(rng: random.Random, tensors: Tensors, key: str) -> None:
    other = rng.choice(sorted(tensors))
    tensors[key], tensors[other] = tensors[other], tensors[key]


def _transpose(rng: random.Random, tensors: Tensors, key: str) -> None:
    if tensors[key].ndim > 1:
        tensors[key] = tensors[key].transpose(0, -1)


def _rename(rng: random.Random, tensors: Tensors, key: str) -> None:
    module, _, suffix = key.partition(".")
    kinds = sorted({suffix for kind in FAMILIES for suffix in kind.suffixes()})
    name = rng.choice(STRANGE_NAMES)
    new = rng.choice([f"{name}.{suffix}", f"{module}.{name}", f"{module}.{rng.choice(kinds)}", f"x{key}", name])
    tensors[new] = tensors.pop(key)


def _extra(rng: random.Random, tensors: Tensors, key: str) -> None:
    kinds = sorted({suffix for kind in FAMILIES for suffix in kind.suffixes()})
    module = key.partition(".")[0]
    tensors[f"{module}.{rng.choice([*kinds, 'dora_scale', 'scale', 'alpha', 'lora_E'])}"] = tensors[key].clone()


MUTATIONS: tuple[Callable[[random.Random, Tensors, str], None], ...] = (
    _drop, _dtype, _reshape, _values, _sizes, _swap, _transpose, _rename, _extra,
)  # fmt: skip


# ---- bytes


def serialized(rng: random.Random, tensors: Mapping[str, Tensor], broken: bool) -> bytes:
    """A safetensors file of them; `broken`: something in the header or the bytes is not as it should be."""
    header: dict[str, Any] = {"__metadata__": metadata(rng)} if rng.random() < 0.5 else {}
    data = b""
    for key, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    if broken and rng.random() < 0.7:
        _break_header(rng, header)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    whole = len(text).to_bytes(8, "little") + text + data
    return _break_bytes(rng, whole, len(text) + 8) if broken and rng.random() < 0.5 else whole


STRANGE_JSON = (
    '{"a": {"b": 3, "c": NaN}}',
    '{"a": {"\\ud800": 3}}',
    '{"a": {"b": ' + "9" * 4300 + "}}",
    '{"a": {"b": ' + "9" * 9000 + "}}",
    '{"a":' * 600 + "1" + "}" * 600,
    "[" * 90 + "]" * 90,
    "{" + "x" * 9000,
)
"""Values of the metadata that a list or a page is made of."""


def metadata(rng: random.Random) -> dict[str, Any]:
    number = rng.choice([1, 8, 0, -1, 1e400, 10**400, math.nan, "8", None, [], True])
    config = {"r": number, "lora_alpha": rng.choice([1, number]), "use_rslora": rng.random() < 0.5}
    config |= {"alpha_pattern": rng.choice([{}, {"linear": number}, [], "x"]), "peft_type": rng.choice(["IA3", "LORA"])}
    config |= {"use_cayley_neumann": rng.random() < 0.5, "feedforward_modules": rng.choice([None, "l", ["conv2d"]])}
    return {
        rng.choice(["lora_adapter_metadata", "ss_network_args", "ss_output_name"]): json.dumps(config),
        "ss_network_args": rng.choice(["{}", "[]", "{", "None", '{"wd_on_output": 3}', "[" * 2000]),
        rng.choice(["ss_tag_frequency", "ssmd_cover_images", "ss_bucket_info", "other"]): rng.choice(STRANGE_JSON),
    }


def _break_header(rng: random.Random, header: dict[str, Any]) -> None:
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return
    entry = header[rng.choice(keys)]
    strange = (None, True, -1, 0, 2**31, 2**63, 2**70, 1.0, math.nan, "F32", [], {}, [1] * 100, [0, 2**62, 2**62])
    place = rng.choice(["dtype", "shape", "data_offsets", "one size", "one offset", "key", "metadata"])
    if place == "one size" and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(strange)
    elif place == "one offset":
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, -1, 1, 4, 8, 2**33])
    elif place == "key":
        header[rng.choice(["\ud800", "x\ud800.alpha", *STRANGE_NAMES])] = entry
    elif place == "metadata":
        header["__metadata__"] = rng.choice([*strange, {"a": 1}, {"a": "\ud800"}, {"ss_output_name": "\x1b[31m"}])
    elif place in entry:
        entry[place] = rng.choice(strange)


def _break_bytes(rng: random.Random, whole: bytes, data_start: int) -> bytes:
    content = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(content), data_start + 1))
        content[at] = rng.choice([rng.randrange(256), *b'0123456789-"[]{},:.eE '])
    return bytes(content[: rng.randrange(len(content))]) if rng.random() < 0.3 else bytes(content)


# ---- promises


def check(path: Path) -> str:
    """What became of the file. Raises where a promise is broken: by any exception that is not meant for users.

    The promises: a FileError of one short line that names the file, or an adapter; all of the file's names are used or
    reported; lists can show it; what does not fit is found before any weight is touched; weights are finite; the base
    comes back.
    """
    _check_lists(path)
    try:
        json.dumps(inspect(path).as_json())
        adapter = lib_locon.load(path)
    except FileError as error:
        text = str(error)
        if str(path) not in text or len(text) > 3000 or not text.isprintable():
            raise AssertionError(f"not a sentence for users: {text[:3000]!r}") from error
        return "refused"
    _check_nothing_dropped(adapter)
    model = ZooModel().eval()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    session = lib_locon.Session(model)
    try:
        report = session.apply([lib_locon.Use(adapter)])
    except PatchError as error:
        _check_base(model, base)
        raise AssertionError("found only while patching, where it costs the other adapters too") from error
    if _sane(adapter) and not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise AssertionError(f"weights that are not finite: {report}")
    if any(not line.isprintable() for text in report.lines() for line in text.splitlines()):
        raise AssertionError(f"a report that is no plain text: {report.lines()!r}")
    session.restore()
    _check_base(model, base)
    return "used" if report.adapters[0].used else "matches nothing"


def _check_lists(path: Path) -> None:
    """Check that whatever lists and pages show of the file can be sent."""
    metadata = FileMetadata(FileIdentity.of(path))
    for told in (asdict(read_facts(path)), builtin_list(Library([path.parent])), dict(metadata)):
        json.dumps(told, ensure_ascii=False).encode()
        json.loads(encoded(told))


def _check_base(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, base[name]):
            raise AssertionError(f"{name} is not the base again")


def _sane(adapter: Adapter) -> bool:
    """Whether no number is so large that a product of a few of them could overflow."""
    layers = [layer for module in adapter.modules for layer in module.layers]
    tensors = [tensor for layer in layers for tensor in layer.tensors().values()]
    return all(abs(layer.scale) < 1e3 for layer in layers) and all(
        bool((tensor.float().abs() < 1e3).all()) for tensor in tensors
    )


def _check_nothing_dropped(adapter: Adapter) -> None:
    """Each name in the file is a layer's, or reported."""
    said = {item.key for item in adapter.unknown}
    modules = {module.name.written: module for module in adapter.modules}
    for module in adapter.modules:
        said |= {item.key for item in module.unread}
    for key in set(SafetensorsFile(adapter.identity.path).entries) - said:
        written, suffix = split_key(key) or key.rsplit(".", 1)
        module = modules[written.removesuffix(".base_layer")]
        suffix = module.name.dialect.renames.get(suffix, suffix)
        used = {suffix for layer in module.layers for suffix in layer.family.tensors()}
        beside = suffix in (*MAGNITUDES, ALPHA, SCALE, "reshape_weight") and (module.layers or module.unread)
        used |= {name.removeprefix("set_") for name in used}  # PEFT's weights and biases in the place of the model's
        if suffix not in used and not beside and not module.name.dialect.rejected:
            raise AssertionError(f"{key!r} was dropped without a word")


class AdapterFiles:
    """Files of one to three modules; four in ten are broken in their header or their bytes."""

    def run(self, rng: random.Random, folder: Path) -> str:
        """Writes the file of this case, and checks it."""
        tensors = mutated(rng, sound(rng, ZooModel()))
        content = serialized(rng, tensors, broken=rng.random() < 0.4)
        path = folder / "case.safetensors"
        path.write_bytes(content)
        with limited(len(content)):
            return check(path)
