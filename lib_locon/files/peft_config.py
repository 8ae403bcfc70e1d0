"""What PEFT's configuration says of an adapter and its tensors do not: scale, and a convention or two.

It stands in the metadata (`lora_adapter_metadata`, by recent diffusers; keys begin with the component), or beside the
file as `adapter_config.json`. A broken one is no reason to refuse the file: it becomes a sentence in the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from lib_locon.files.reader import CONFIG_NAME

METADATA_KEY = "lora_adapter_metadata"
MAX_BYTES = 1 << 20
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class PeftConfig:
    """Settings by component ("" for a file of one component). `note` is a sentence for the report."""

    settings: Mapping[str, Mapping[str, Any]]
    note: str = ""

    def scale(self, written: str, rank: int | None) -> float | None:
        """alpha / r (or / √r with rank-stabilised LoRA) for the module `written` in the file; None: not said."""
        settings, module = self._of(written)
        alpha = _number(_by_pattern(settings.get("alpha_pattern", {}), module))
        if alpha is None:
            alpha = _number(settings.get("lora_alpha", settings.get("alpha")))
        own = _number(_by_pattern(settings.get("rank_pattern", {}), module)) or _number(settings.get("r")) or rank
        if alpha is None or not own or not own > 0:  # nor where it is NaN
            return None
        return alpha / (math.sqrt(own) if settings.get("use_rslora") else own)

    def markers(self, written: str) -> dict[str, Tensor]:
        """Further tensors by suffix, as if the file held them."""
        settings, module = self._of(written)
        markers: dict[str, Tensor] = {}
        if settings.get("use_cayley_neumann") is False:
            markers["oft_R.exact"] = tensor(1.0)
        if settings.get("peft_type") == "IA3":
            markers["ia3_on_input"] = tensor(float(_is_target(module, settings.get("feedforward_modules"))))
        return markers

    def _of(self, written: str) -> tuple[Mapping[str, Any], str]:
        module = written.removeprefix("base_model.model.")
        component, _, rest = module.partition(".")
        if component in _COMPONENTS:
            module = rest.removeprefix("base_model.model.")
        return self.settings.get(component, self.settings.get("", {})), module


def read_config(path: Path, metadata: Mapping[str, str], by_peft: bool) -> PeftConfig:
    """The configuration that belongs to the adapter at `path`; an empty one where there is none. Never raises.

    One beside the file counts only when the file is `by_peft`: in a folder of many adapters it is another's.
    """
    beside = path.with_name(CONFIG_NAME)
    try:
        if METADATA_KEY in metadata:
            components = _by_component(_table(metadata[METADATA_KEY]))
            return PeftConfig({component: _with_patterns(settings) for component, settings in components.items()})
        if by_peft and beside.is_file():
            with beside.open("rb") as file:
                table = _with_patterns(_table(file.read(MAX_BYTES).decode()))
            return PeftConfig({"": table}, f"read with the {CONFIG_NAME} beside it")
    except (OSError, ValueError, RecursionError) as error:
        where = f"metadata {METADATA_KEY}" if METADATA_KEY in metadata else CONFIG_NAME
        return PeftConfig({}, f"its {where} cannot be read ({error}); scales without an alpha count as 1")
    return PeftConfig({})


def _table(text: str) -> dict[str, Any]:
    table = json.loads(text)
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


def _with_patterns(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, **{name: _patterns(settings.get(name)) for name in ("alpha_pattern", "rank_pattern")}}


def _patterns(table: object) -> dict[str, tuple[int, object]]:
    """Pattern → (its place in the file, value), for `_by_pattern`: there may be as many as modules.

    They are compared as text where PEFT would run a regular expression: a file must not choose what we execute. Of its
    language only what PEFT itself writes is known: `^name`, `name$` and `\\.`.
    """
    found: dict[str, tuple[int, object]] = {}
    for place, (pattern, value) in enumerate(table.items() if isinstance(table, Mapping) else ()):
        found.setdefault(str(pattern).removesuffix("$").replace("\\.", "."), (place, value))
    return found


def _by_pattern(patterns: Mapping[str, tuple[int, object]], module: str) -> object:
    """PEFT's rule: a pattern matches a whole module path or its end, at a dot; the first that does is taken."""
    parts = module.split(".")
    names = (f"^{module}", *(".".join(parts[i:]) for i in range(len(parts))))
    found = [patterns[name] for name in names if name in patterns]
    return min(found, key=lambda item: item[0])[1] if found else None


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
