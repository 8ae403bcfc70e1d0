"""One table of names, built from the model's own parameters: alias → target.

All names are compared with dots and underscores made equal, since most files use underscores only; this loses nothing:
the UNets and text encoders of all supported families have no two modules whose names become one (see the tests).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lib_locon.files.dialects import ENCODERS
from lib_locon.models.clip_names import (
    fused_projections,
    open_clip_names,
    open_clip_parts,
    open_clip_spellings,
    text_encoder_names,
)
from lib_locon.models.targets import Target, View
from lib_locon.models.transformer_names import transformer_names
from lib_locon.models.unet_names import SECOND_NAMES, diffusers_names, ldm_names
from lib_locon.patching.eight_bits import HARMLESS, SCALES

ROOTS: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("cond_stage_model.", "te1"),
    ("conditioner.embedders.0.", "te1"),
    ("conditioner.embedders.1.", "te2"),
    *((f"{root}{name}.", component) for root in ("text_encoders.", "") for name, component in ENCODERS.items()),
    ("unet.", "unet"),
    ("transformer.", "unet"),
    ("text_encoder.", "te1"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
)
"""Where the host (and a checkpoint file) keeps the parts of a model."""
_OF_A_HOST = (
    *(root for root, _ in ROOTS if root.startswith(("model.", "cond_stage_model.", "conditioner.", "text_encoders."))),
    "transformer.transformer_blocks.",
    "transformer.single_transformer_blocks.",
    "text_encoder.",
    "unet.",
)
"""What only a whole Stable Diffusion model has."""
COMPANIONS = frozenset({*SCALES, *HARMLESS, "weight_scale_2", "pre_quant_scale"})
"""Parameters beside a weight of few bits that belong to it: nothing that adapters name."""
_REFINER = "conditioner.embedders.0.model."
"""SDXL's refiner has the second text encoder only, in the first place."""
WHOLE = "model"
"""The component of a module that has none of these parts: a bare UNet, or any network at all."""
WRAPPERS = frozenset({"wrapped", "_orig_mod"})
"""Levels that the host's hijack and torch.compile put between a module and its name."""
Views = Mapping[str, tuple[View, ...]]
_LEVELS = (
    "_processor_",
    "__checkpoint_wrapped_module_",  # before the shorter one that is a part of it
    "_checkpoint_",
    "__fsdp_wrapped_module_",
    "__orig_mod_",
    "_base_layer_",
)
"""Levels that trainers and what they wrap a model in leave in the names of a file, underscored."""
_WRITTEN_TWICE = (
    "model_diffusion_model_",
    "diffusion_model_",
    "base_model_model_",
    "transformer_",
    "unet_",
    "module_",
)
"""Roots that some writers put behind a prefix which says the same."""


@dataclass
class TargetTable:
    """What a model offers to adapters. Built from shapes alone, so that a checkpoint's header serves as well."""

    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each parameter by its dotted path."""
    aliases: dict[str, dict[str, Target]] = field(default_factory=dict)
    """Component → name with underscores → target."""
    collisions: list[str] = field(default_factory=list)

    @classmethod
    def of_model(cls, model: nn.Module) -> TargetTable:
        """From a live model."""
        return cls.of_shapes({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> TargetTable:
        """From parameter path → shape."""
        table = cls(shapes)
        for component, modules in _components(shapes).items():
            for body, (name, views) in modules.items():
                table._add_module(component, body, Target(component, name, views))
            bodies = {body: views for body, (_, views) in modules.items()}
            if component in ("unet", WHOLE):
                table._add_unet(component, bodies)
            if component != "unet":
                for alias, views in fused_projections(bodies):
                    table._add(component, [alias, f"model.{alias}"], Target(component, alias, views))
        table._share_text_encoders()
        return table

    def candidates(self, body: str, components: Iterable[str]) -> Iterator[Target]:
        """The targets that a file may mean by `body`, looked for in these components in this order."""
        names = list(spellings(underscored(body)))
        found: Target | None = None
        for component in (*components, WHOLE):
            aliases = self.aliases.get(component, {})
            target = next((aliases[name] for name in names if name in aliases), None)
            if target is not None and target is not found:  # one text encoder may have two numbers
                found = target
                yield target

    def find(self, body: str, components: Iterable[str]) -> Target | None:
        """The first of `candidates`."""
        return next(self.candidates(body, components), None)

    def has(self, components: Iterable[str]) -> bool:
        """Whether the model has any of these components."""
        return any(component in self.aliases for component in (*components, WHOLE))

    def modules(self) -> list[Target]:
        """Each module of the model once; neither its row blocks nor several modules in one are counted."""
        found = (target for names in self.aliases.values() for target in names.values())
        return list({t.name: t for t in found if all(len(views) == 1 for views in t.views.values())}.values())

    def _share_text_encoders(self) -> None:
        """Lets a text encoder answer to each number that trainers and hosts give it."""
        second, third = self.aliases.get("te2"), self.aliases.get("te3")
        if second and "te1" not in self.aliases and not _is_t5(second):
            # the only one of SDXL's refiner, and of SD2 where its file is laid out as SDXL's: the first for others
            self.aliases["te1"] = second
        # Flux has two text encoders: its T5 is the second one for most trainers and hosts, the third for others
        if third and not second:
            self.aliases["te2"] = third
        elif second and not third and _is_t5(second):
            self.aliases["te3"] = second

    def _add_module(self, component: str, body: str, target: Target) -> None:
        names = [body]
        if component != "unet":
            hugging_face = open_clip_names(body)
            names += [other for name in (body, hugging_face) if name for other in text_encoder_names(name)]
            names += open_clip_spellings(body)
            for part, views in open_clip_parts(body, target.views, self.shapes):
                self._add(component, text_encoder_names(part), Target(component, f"{target.name} ({part})", views))
            whole = {name.removeprefix("in_proj_"): view for name, view in target.views.items() if "in_proj_" in name}
            if whole:
                fused = [f"{body}.in_proj", f"{body.removeprefix('model.')}.in_proj"]
                self._add(component, fused, Target(component, target.name, whole))
        self._add(component, names, target)
        for parameter, view in target.views.items():
            if parameter not in ("weight", "bias"):  # a bare parameter has no module to name it by
                own = Target(component, f"{target.name}.{parameter}", {"weight": view})
                self._add(component, [f"{body}.{parameter}" if body else parameter], own)

    def _add_unet(self, component: str, bodies: Mapping[str, Views]) -> None:
        for body, alias in diffusers_names(bodies).items():
            self._add(component, [alias], self.aliases[component][underscored(body)])
        for body, alias in ldm_names(bodies).items():
            self._add(component, [alias], self.aliases[component][underscored(body)])
        for alias, other in SECOND_NAMES.items():
            target = self.aliases[component].get(underscored(alias))
            if target is not None:
                self.aliases[component].setdefault(underscored(other), target)
        bare = {f"{b}.{p}": {"weight": v} for b, views in bodies.items() for p, v in views.items() if p == "scale"}
        aliases = self.aliases[component]
        for names, views, whole in transformer_names({**bodies, **bare}, self.shapes):
            if not views:  # nothing of the module can be cut so
                continue
            target = next((aliases[known] for known in map(underscored, names) if known in aliases), None)
            if target is None:
                name = next(iter(views.values()))[0].path.rpartition(".")[0]
                target = Target(component, name if whole else f"{name} ({names[0]})", views)
            for name in names:
                aliases.setdefault(underscored(name), target)

    def _add(self, component: str, names: Iterable[str], target: Target) -> None:
        table = self.aliases.setdefault(component, {})
        for name in names:
            if table.setdefault(underscored(name), target) is not target:
                self.collisions.append(f"{component}: {name}")


def _is_t5(names: Iterable[str]) -> bool:
    return any(name.startswith("encoder_block_") for name in names)


def underscored(name: str) -> str:
    """A module's name in the one spelling in which names are compared."""
    return name.replace(".", "_")


def plain(name: str) -> str:
    """The underscored name without the levels that one trainer or another leaves in it."""
    for level in _LEVELS:
        name = name.replace(level, "_").removeprefix(level[1:])
    name = name.rstrip("_").removesuffix("_processor")
    return name.replace("text_model_text_model_", "text_model_")


def spellings(name: str) -> Iterator[str]:
    """The underscored name, then what it is without the quirks of one trainer or another."""
    yield name
    bare = plain(name)
    while True:
        yield bare
        if bare.endswith("_to_out"):
            yield f"{bare}_0"
        root = next((root for root in _WRITTEN_TWICE if bare.startswith(root)), "")
        if not root:
            return
        bare = bare.removeprefix(root)


def _components(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[str, Views]]]:
    """Component → module name inside it → (module name in the model, its parameters)."""
    found: dict[str, dict[str, tuple[str, dict[str, tuple[View, ...]]]]] = {}
    roots = _roots(shapes)
    for path in shapes:
        name, _, parameter = path.rpartition(".")
        if parameter in COMPANIONS:
            continue
        component, body = _place(name, roots)
        _, views = found.setdefault(component, {}).setdefault(body, (name, {}))
        views[parameter] = (View(path),)
    if roots == ROOTS and len(found) > 1:
        # beside a whole model's parts, the rest (decoder, noise schedules, averages) is nothing that adapters name
        found.pop(WHOLE, None)
    return {component: dict(modules) for component, modules in found.items()}


def _roots(shapes: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The roots that mean something in this model: `transformer.` is a common name in networks of any kind."""
    if any(_plain(path).startswith(_OF_A_HOST) for path in shapes):
        return ROOTS
    return tuple(pair for pair in ROOTS if pair[0] != "transformer.")


def _plain(name: str) -> str:
    return ".".join(level for level in name.split(".") if level not in WRAPPERS)


def _place(module: str, roots: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """(component, name inside it) of a module by its dotted name in the model."""
    name = _plain(module)
    for root, component in roots:
        if f"{name}.".startswith(root):
            return "te2" if f"{name}.".startswith(_REFINER) else component, name[len(root) :]
    return WHOLE, name
