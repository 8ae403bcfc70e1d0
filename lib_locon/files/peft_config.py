"""PEFT's configuration of an adapter, for what its tensors do not say: scale, start, and a convention or two.

It stands in the metadata (`lora_adapter_metadata`, by recent diffusers; keys begin with the component), or beside the
file as `adapter_config.json`. A broken one is no reason to refuse the file: it becomes a sentence in the report. What
changes numbers and cannot be computed here refuses the modules that it is for, by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from lib_locon.errors import FileError
from lib_locon.files.name_patterns import Pattern, UnknownPattern
from lib_locon.files.pickled import ENDINGS as PICKLED
from lib_locon.files.reader import CONFIG_NAME
from lib_locon.files.regular import read_regular
from lib_locon.untrusted_json import parse

METADATA_KEY = "lora_adapter_metadata"
MAX_BYTES = 1 << 20
OWN_NAMES = ("adapter_model", "pytorch_lora_weights")
"""The names that PEFT and diffusers give the file that a configuration is for."""
ADAPTER_ENDINGS = (".safetensors", *PICKLED)
_PREFIX = "base_model.model."
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_READ_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
LONGEST_NAME = 500
"""Characters of a module's name that is compared with those of a configuration; a model's are shorter."""
MOST_PATTERN_TEXT = 20_000
MOST_PATTERN_WORK = 15_000_000
"""Characters of all regular expressions of a configuration, and steps that they may take over all modules."""
MOST_TERMS = 100
"""Of OFT's Neumann series; PEFT's default is 5."""
_PLAIN_STARTS = ("", "true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_COMPUTED_STARTS = ("pissa", "olora")
_CONVERT = "convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), which makes it plain"
_STARTS = {
    "corda": "CorDA took its start from training data that is not in the file",
    "lora_ga": "LoRA-GA took its start from gradients that are not in the file",
    "loftq": "LoftQ trained beside a quantised base that is not in the file",
    "pissa_niter": "PiSSA by an approximate SVD (pissa_niter) starts at random, so its start cannot be made again",
}
"""Start of `init_lora_weights` → why the trained weight cannot be computed. Of the others peft 0.21 knows, pissa and
olora are computed (`families.started`); the plain ones leave W alone."""
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
        settings, _ = self._of(written)
        return settings.refusal

    @property
    def refusals(self) -> str:
        """All that is refused, or of no use, in any of its components."""
        found = (sentence for settings in self.settings.values() for sentence in (settings.refusal, settings.no_scale))
        return "; ".join(filter(None, dict.fromkeys(found)))

    def markers(self, written: str, scale: float) -> dict[str, Tensor]:
        """Further tensors by suffix, as if the file held them. `scale` is the module's."""
        settings, module = self._of(written)
        table = settings.table
        markers: dict[str, float] = {}
        kind = table.get("peft_type")
        if table.get("use_cayley_neumann") is False:
            markers["oft_R.exact"] = 1.0
        if kind == "OFT" and table.get("num_cayley_neumann_terms") is not None:
            markers["oft_R.terms"] = float(table["num_cayley_neumann_terms"])
        if kind == "OFT" and table.get("coft"):
            markers["oft_R.limit"] = float(table.get("eps", _COFT_EPS))
        if kind == "IA3" and settings.feedforward is not None:
            markers["ia3_on_input"] = float(settings.feedforward.fits(module))
        if settings.start in _COMPUTED_STARTS:
            markers[f"start.{settings.start}"] = scale
        return {suffix: tensor(value) for suffix, value in markers.items()}

    def replaces(self, written: str) -> bool:
        """Tell whether plain weights and biases in the file stand in the place of the model's own."""
        settings, _ = self._of(written)
        return bool(settings.table.get("modules_to_save")) or settings.table.get("bias") in ("all", "lora_only")

    def _of(self, written: str) -> tuple[_Settings, str]:
        """The settings for a module, and its name in the model that PEFT wrapped."""
        module = written.removeprefix(_PREFIX)
        component, _, rest = module.partition(".")
        if component in self.settings or (component in _COMPONENTS and not written.startswith(_PREFIX)):
            return self.settings.get(component, self.settings.get("", _NONE)), rest.removeprefix(_PREFIX)
        return self.settings.get("", _NONE), module  # PEFT's own file: where it has a component, a pipeline was wrapped


class _Settings:
    """One configuration, with its names and patterns made quick to ask: there may be as many as modules."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table
        self.start = str(table.get("init_lora_weights", "")).lower()
        self._patterns = {name: _Patterns(table.get(name)) for name in ("alpha_pattern", "rank_pattern")}
        self._targets = _targets(table)
        odd = [name for name in ("lora_alpha", "alpha") if table.get(name) is not None and _number(table[name]) is None]
        self.no_scale = f"{odd[0]} in its configuration is no number that can be used; {_AS_ONE}" if odd else ""
        self.feedforward: _Endings | None = None
        self._refusal = _general_refusal(table)
        if table.get("peft_type") == "IA3" and table.get("feedforward_modules") is not None:
            try:
                self.feedforward = _Endings(table["feedforward_modules"])
            except UnknownPattern as error:
                self._refusal = self._refusal or _not_understood(error)

    @property
    def refusal(self) -> str:
        """Why no module can be used; empty where nothing forbids it."""
        unknown = (_not_understood(found.unknown) for found in self._patterns.values() if found.unknown)
        return self._refusal or next(unknown, "")

    def by_pattern(self, name: str, module: str) -> object:
        """The value for the module, by the first pattern in the file that fits it; None where none does."""
        return self._patterns[name].find(module)

    def rank(self, module: str) -> float | None:
        """The rank of the module; None where it is not said."""
        return _number(self.by_pattern("rank_pattern", module)) or _number(self.table.get("r"))

    def is_for(self, module: str) -> bool:
        """Tell whether the module is a target; true where these are not listed, or by a pattern beyond ours."""
        if isinstance(self._targets, Pattern):
            return self._targets.work > MOST_PATTERN_WORK or self._targets.fits(module[:LONGEST_NAME], whole=True)
        return self._targets is None or any(end in self._targets for end in _ends(module))

    def has_rank(self, module: str, rank: int | None) -> bool:
        """Tell whether a file of this configuration can have this rank there; None is one that does not show."""
        stated = self.rank(module)
        # a start that is made from W has no more ranks than W
        return rank is None or stated is None or rank == stated or (self.start in _COMPUTED_STARTS and rank < stated)


def _general_refusal(table: Mapping[str, Any]) -> str:
    kind = table.get("peft_type", "LORA")
    if kind not in _READ_TYPES:
        known = isinstance(kind, str) and kind.isidentifier()
        return f"PEFT's {kind[:40]} is not supported" if known else "its configuration has no known peft_type"
    return {"LORA": _lora_refusal, "OFT": _oft_refusal}.get(kind, lambda _: "")(table)


def _lora_refusal(table: Mapping[str, Any]) -> str:
    start = str(table.get("init_lora_weights", "")).lower()
    for name, why in _STARTS.items():
        if start.startswith(name):
            return f"init_lora_weights={start[:40]}: {why}; {_CONVERT}"
    if start not in (*_PLAIN_STARTS, *_COMPUTED_STARTS):
        return f"init_lora_weights={start[:40]} is not known here; if its start is not zero, {_CONVERT}"
    found = next((what for name, what in _REFUSED.items() if table.get(name)), "")
    return f"{found} is not supported" if found else ""


def _oft_refusal(table: Mapping[str, Any]) -> str:
    terms = table.get("num_cayley_neumann_terms")
    if terms is not None and (not isinstance(terms, int) or not 1 <= terms <= MOST_TERMS):
        return f"num_cayley_neumann_terms in its configuration is no number from 1 to {MOST_TERMS}"
    eps = _number(table.get("eps", _COFT_EPS))
    return "eps in its configuration is no positive number" if table.get("coft") and not (eps and eps > 0) else ""


_COFT_EPS = 6e-5
"""PEFT's default."""


def _not_understood(why: object) -> str:
    return f"its configuration has a pattern of module names that is not understood here ({why})"


def _ends(module: str) -> Iterator[str]:
    """The name and what follows each of its dots. None of a name that no model has: of thousands of dots, these would
    be the square of its length."""
    while module and len(module) <= LONGEST_NAME:
        yield module
        module = module.partition(".")[2]


def _targets(table: Mapping[str, Any]) -> frozenset[str] | Pattern | None:
    """The modules that an adapter may have, each a whole name or what follows a dot, or a pattern for the whole."""
    modules, parameters = table.get("target_modules"), table.get("target_parameters")
    if modules and isinstance(modules, str) and modules != "all-linear" and not parameters:
        try:
            return Pattern(modules)
        except UnknownPattern:
            return None
    if not (modules and isinstance(modules, list)):
        return None
    behind = [str(name).rpartition(".")[0] for name in parameters] if isinstance(parameters, list) else []
    return None if "" in behind else frozenset(map(str, [*modules, *behind]))


class _Endings:
    """IA³'s `feedforward_modules`: ends of names, or an expression for the whole. Raises UnknownPattern."""

    def __init__(self, names: object) -> None:
        self._pattern = Pattern(names) if isinstance(names, str) else None
        self._names = tuple(map(str, names)) if isinstance(names, list) else ()

    def fits(self, module: str) -> bool:
        """Tell whether the module is one of them."""
        if self._pattern is not None:
            return self._pattern.fits(module[:LONGEST_NAME], whole=True)
        return module.endswith(self._names)


class _Patterns:
    """Module patterns with their values, in the file's order."""

    def __init__(self, table: object) -> None:
        self._ends: dict[str, tuple[int, object]] = {}
        """Name, whole or behind a dot → place, value."""
        self._wholes: dict[str, tuple[int, object]] = {}
        self._others: list[tuple[int, Pattern, object]] = []
        self.unknown = ""
        """The first pattern that is beyond what is read here."""
        length = 0
        for place, (pattern, value) in enumerate(table.items() if isinstance(table, Mapping) else ()):
            text = str(pattern).removesuffix("$")
            name = text.removeprefix("^").replace("\\.", ".")
            if all(char.isalnum() or char in "._-" for char in name):
                # PEFT's dot fits any character; in a name that is written out, one stands there
                (self._wholes if text.startswith("^") else self._ends).setdefault(name, (place, value))
                continue
            length += len(pattern)
            try:
                if length > MOST_PATTERN_TEXT:
                    raise UnknownPattern(f"more than {MOST_PATTERN_TEXT} characters of them")
                self._others.append((place, Pattern(pattern), value))
            except UnknownPattern as error:
                self.unknown = str(error)
                return

    def find(self, module: str) -> object:
        """The value of the first that fits."""
        found = [self._ends[end] for end in _ends(module) if end in self._ends]
        found += [self._wholes[module]] if module in self._wholes else []
        first = min(found, key=lambda item: item[0]) if found else (math.inf, None)
        if len(module) > LONGEST_NAME or self.unknown:
            return first[1]
        for place, pattern, value in self._others:
            if place < first[0] and pattern.fits(module):
                return value
        if sum(pattern.work for _, pattern, _ in self._others) > MOST_PATTERN_WORK:
            self.unknown = "they take too long"
        return first[1]


def read_config(path: Path, metadata: Mapping[str, str], ranks: Mapping[str, int | None] | None) -> PeftConfig:
    """The configuration that belongs to the adapter at `path`; an empty one where there is none. Never raises.

    `ranks` are the modules of a file in PEFT's own spelling, each with its rank where one shows; None for other files,
    for which a configuration beside them is another's.
    """
    try:
        if METADATA_KEY in metadata:
            components = _by_component(_table(metadata[METADATA_KEY]))
            config = PeftConfig({component: _Settings(table) for component, table in components.items()})
            why = _other_rank(config, ranks or {})
            return PeftConfig(note=f"its metadata {METADATA_KEY} does not fit it ({why}); {_AS_ONE}") if why else config
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
    for written in ranks:
        settings, module = config._of(written)
        # behind it stand the layers within a target (an attention's out_proj), and a second parameter's
        if not settings.is_for(module.partition(".base_layer")[0]):
            listed = settings.table["target_modules"]
            targets = listed[:80] if isinstance(listed, str) else ", ".join(str(name)[:80] for name in listed[:4])
            return f"it is for {targets}, this file has {module[-80:]}"
    if why := _other_rank(config, ranks):
        return why
    if path.stem not in OWN_NAMES:
        try:
            count = _adapters_in(str(path.parent), path.parent.stat().st_mtime_ns)
        except OSError:
            count = 1
        if count > 1:
            return f"there are {count} adapters in this folder, and this one has not the name that PEFT gives"
    return ""


def _other_rank(config: PeftConfig, ranks: Mapping[str, int | None]) -> str:
    """The first rank that a file of this configuration cannot have, in words."""
    for written, rank in ranks.items():
        settings, module = config._of(written)
        if not settings.has_rank(module, rank):
            return f"it is of rank {settings.rank(module):g}, this file has {rank}"
    return ""


@lru_cache(maxsize=1000)
def _adapters_in(folder: str, changed: int) -> int:
    """The number of files in a folder that may be adapters; listed once, as long as the folder stays as it is."""
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


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    except OverflowError:  # JSON's whole numbers have no limit
        return None


_NONE = _Settings({})
