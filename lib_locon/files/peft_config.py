"""What PEFT's configuration says of an adapter and its tensors do not: scale, start, and a convention or two.

It stands in the metadata (`lora_adapter_metadata`, by recent diffusers; keys begin with the component), or beside the
file as `adapter_config.json`. A broken one is no reason to refuse the file: it becomes a sentence in the report. What
changes numbers and cannot be computed here refuses the modules that it is for, by name.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from lib_locon.errors import FileError
from lib_locon.files.name_patterns import UnknownPattern, matches
from lib_locon.files.reader import CONFIG_NAME
from lib_locon.files.regular import read_regular
from lib_locon.files.untrusted_json import parse

METADATA_KEY = "lora_adapter_metadata"
MAX_BYTES = 1 << 20
OWN_NAMES = ("adapter_model", "pytorch_lora_weights")
"""What PEFT and diffusers call the file that a configuration is for."""
ADAPTER_ENDINGS = (".safetensors", ".bin", ".pt", ".ckpt")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_READ_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
_CONVERT = "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), which makes it plain"
_STARTS = {
    "corda": "CorDA took its start from training data that is not in the file",
    "lora_ga": "LoRA-GA took its start from gradients that are not in the file",
    "loftq": "LoftQ trained beside a quantised base that is not in the file",
    "pissa_niter": "PiSSA by an approximate SVD (pissa_niter) starts at random, so its start cannot be made again",
}
"""How `init_lora_weights` begins → why the trained weight cannot be computed. Of the others peft 0.21 knows, pissa and
olora are computed (`families.started`); gaussian, orthogonal, eva and mica begin at a ΔW of zero and leave W alone."""
_REFUSED = {
    "use_qalora": "QALoRA (inputs in groups)",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "alora_invocation_tokens": "an activated LoRA (aLoRA), which acts behind certain words only",
    "arrow_config": "Arrow's routing between adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layers that are there several times (layer_replication)",
    "megatron_config": "Megatron's parallel layers",
}
"""Settings of a LoRA that change its formula."""


@dataclass(frozen=True)
class PeftConfig:
    """Settings by component ("" for a file of one component). `note` is a sentence for the report."""

    settings: Mapping[str, _Settings] = field(default_factory=dict)
    note: str = ""

    def scale(self, written: str, rank: int | None) -> float | None:
        """alpha / r (or / √r with rank-stabilised LoRA) for the module `written` in the file; None: not said."""
        settings, module = self._of(written)
        alpha = _number(settings.by_pattern("alpha_pattern", module))
        if alpha is None:
            alpha = _number(settings.table.get("lora_alpha", settings.table.get("alpha")))
        own = settings.rank(module) or rank
        if alpha is None or not own or not own > 0:  # nor where it is NaN
            return None
        return alpha / (math.sqrt(own) if settings.table.get("use_rslora") else own)

    def refusal(self, written: str) -> str:
        """Why the module `written` in the file cannot be used; empty where nothing in the configuration forbids it."""
        settings, module = self._of(written)
        return settings.refusal(module)

    def markers(self, written: str, scale: float | None) -> dict[str, Tensor]:
        """Further tensors by suffix, as if the file held them. `scale` is the module's."""
        settings, module = self._of(written)
        table = settings.table
        markers: dict[str, Tensor] = {}
        if table.get("use_cayley_neumann") is False:
            markers["oft_R.exact"] = tensor(1.0)
        if table.get("peft_type") == "IA3":
            markers["ia3_on_input"] = tensor(float(_is_target(module, table.get("feedforward_modules"))))
        start = str(table.get("init_lora_weights", "")).lower()
        if start in ("pissa", "olora"):
            markers[f"start.{start}"] = tensor(1.0 if scale is None else scale)
        return markers

    def replaces(self, written: str) -> bool:
        """Whether plain weights and biases in the file stand in the place of the model's own."""
        settings, _ = self._of(written)
        return bool(settings.table.get("modules_to_save")) or settings.table.get("bias") in ("all", "lora_only")

    def _of(self, written: str) -> tuple[_Settings, str]:
        module = written.removeprefix("base_model.model.")
        component, _, rest = module.partition(".")
        if component in _COMPONENTS:
            module = rest.removeprefix("base_model.model.")
        return self.settings.get(component, self.settings.get("", _NONE)), module


class _Settings:
    """One configuration, with its patterns made quick to ask: there may be as many as modules."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table
        self._patterns = {name: _Patterns(table.get(name)) for name in ("alpha_pattern", "rank_pattern")}
        self._general = _general_refusal(table)

    def by_pattern(self, name: str, module: str) -> object:
        """The value for the module, by the first pattern in the file that fits it; None where none does."""
        return self._patterns[name].find(module)

    def rank(self, module: str) -> float | None:
        """The rank of the module; None where it is not said."""
        return _number(self.by_pattern("rank_pattern", module)) or _number(self.table.get("r"))

    def refusal(self, module: str) -> str:
        """As PeftConfig's."""
        unknown = next((found for each in self._patterns.values() if (found := each.unknown)), "")
        if unknown:
            return f"its configuration has a pattern of module names that is not understood here ({unknown})"
        del module
        return self._general


def _general_refusal(table: Mapping[str, Any]) -> str:
    kind = table.get("peft_type", "LORA")
    if kind not in _READ_TYPES:
        return (
            f"PEFT's {kind} is not supported" if isinstance(kind, str) else "its configuration has no known peft_type"
        )
    if kind != "LORA":
        return ""
    start = str(table.get("init_lora_weights", "")).lower()
    for name, why in _STARTS.items():
        if start.startswith(name):
            return f"init_lora_weights={start}: {why}; {_CONVERT}"
    found = next((what for name, what in _REFUSED.items() if table.get(name)), "")
    return f"{found} is not supported" if found else ""


class _Patterns:
    """Module patterns with their values, in the file's order."""

    def __init__(self, table: object) -> None:
        self._literal: defaultdict[str, list[tuple[int, str, bool, object]]] = defaultdict(list)
        """By the last part of the name: place, name, whether it must be the whole, value."""
        self._others: list[tuple[int, str, object]] = []
        self.unknown = ""
        """The first pattern that is beyond what is read here."""
        for place, (pattern, value) in enumerate(table.items() if isinstance(table, Mapping) else ()):
            text = str(pattern).removesuffix("$")
            name, whole = text.removeprefix("^").replace("\\.", "."), text.startswith("^")
            if all(char.isalnum() or char in "._-" for char in name):
                # PEFT's dot fits any character; in a name that is written out, one stands there
                self._literal[name.rpartition(".")[2]].append((place, name, whole, value))
                continue
            try:
                matches(str(pattern), "")
            except UnknownPattern as error:
                self.unknown = self.unknown or str(error)
            else:
                self._others.append((place, str(pattern), value))

    def find(self, module: str) -> object:
        """The value of the first that fits."""
        found = [
            (place, value)
            for place, name, whole, value in self._literal.get(module.rpartition(".")[2], ())
            if module == name or (not whole and module.endswith(f".{name}"))
        ]
        found += [(place, value) for place, pattern, value in self._others if matches(pattern, module)]
        return min(found, key=lambda item: item[0])[1] if found else None


def read_config(path: Path, metadata: Mapping[str, str], ranks: Mapping[str, int | None] | None) -> PeftConfig:
    """The configuration that belongs to the adapter at `path`; an empty one where there is none. Never raises.

    `ranks` are the modules of a file in PEFT's own spelling, each with its rank where one shows; None for other files,
    for which a configuration beside them is another's.
    """
    try:
        if METADATA_KEY in metadata:
            components = _by_component(_table(metadata[METADATA_KEY]))
            return PeftConfig({component: _Settings(table) for component, table in components.items()})
    except ValueError as error:
        return PeftConfig(note=f"its metadata {METADATA_KEY} cannot be read ({error}); {_AS_ONE}")
    beside = path.with_name(CONFIG_NAME)
    if ranks is None or not os.path.lexists(beside):
        return PeftConfig()
    try:
        table = _table(read_regular(beside, MAX_BYTES).decode())
    except (FileError, ValueError) as error:
        return PeftConfig(note=f"its {CONFIG_NAME} cannot be read ({error}); {_AS_ONE}")
    config = PeftConfig({"": _Settings(table)}, f"read with the {CONFIG_NAME} beside it")
    why = _is_anothers(path, config, ranks)
    return PeftConfig(note=f"the {CONFIG_NAME} beside it is another adapter's ({why}); {_AS_ONE}") if why else config


_AS_ONE = "scales without an alpha count as 1"


def _is_anothers(path: Path, config: PeftConfig, ranks: Mapping[str, int | None]) -> str:
    """Why the configuration in its folder cannot be the file's own; empty where it can."""
    for written, rank in ranks.items():
        settings, module = config._of(written)
        targets = settings.table.get("target_modules")
        if isinstance(targets, list) and targets and not _is_target(module, targets):
            return f"it is for {', '.join(map(str, targets[:4]))}, this file has {module[-80:]}"
        stated = settings.rank(module)
        if rank is not None and stated is not None and rank != stated:
            return f"it is of rank {stated:g}, this file has {rank}"
    if path.stem not in OWN_NAMES:
        try:
            count = _adapters_in(str(path.parent), path.parent.stat().st_mtime_ns)
        except OSError:
            count = 1
        if count > 1:
            return f"there are {count} adapters in this folder, and this one has not the name that PEFT gives"
    return ""


@lru_cache(maxsize=1000)
def _adapters_in(folder: str, changed: int) -> int:
    """How many files in a folder may be adapters; listed once, as long as the folder stays as it is."""
    del changed
    return sum(name.lower().endswith(ADAPTER_ENDINGS) for name in os.listdir(folder))  # noqa: PTH208  names alone


def _table(text: str) -> dict[str, Any]:
    table = parse(text)
    if not isinstance(table, dict):
        raise ValueError("no JSON object")
    return table


def _by_component(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        component, name = (component, name) if component in _COMPONENTS else ("", key)
        settings.setdefault(component, {})[name] = value
    return settings


def _is_target(module: str, names: object) -> bool:
    """Whether the module is among `names`, which PEFT compares with the whole path or its last part."""
    if isinstance(names, str):
        return module.endswith(names.rsplit(".*", 1)[-1].lstrip(".\\"))
    if isinstance(names, list):
        return any(module == name or module.endswith(f".{name}") for name in names)
    return False


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:  # JSON's whole numbers have no limit
        return None


_NONE = _Settings({})
