"""`<type:arguments>` in prompts, and who answers for each type."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import errors
from ._absent import absent

if TYPE_CHECKING:
    from .util import MassFileLister

__getattr__ = absent(__name__)

log = logging.getLogger(__name__)
_TAG = re.compile(r"<(\w+):([^>]+)>")


@dataclass
class ExtraNetworkParams:
    """One tag's arguments. One with exactly one `=` is named; any other is positional."""

    items: list[str] = field(default_factory=list)
    positional: list[str] = field(init=False, default_factory=list)
    named: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for item in self.items:
            key, *values = item.split("=")
            if len(values) == 1:
                self.named[key] = values[0]
            else:
                self.positional.append(item)


TagData = Mapping[str, Sequence[ExtraNetworkParams]]


class ExtraNetwork:
    """Answers for one type of tag."""

    def __init__(self, name: str) -> None:
        self.name = name

    def activate(self, p: object, params_list: Sequence[ExtraNetworkParams]) -> None:
        """Called for each batch, before its conditioning is computed; with an empty list when no tag is there."""
        raise NotImplementedError

    def deactivate(self, p: object) -> None:
        """Called at the end of a job whose last batch had tags."""
        raise NotImplementedError


extra_network_registry: dict[str, ExtraNetwork] = {}
extra_network_aliases: dict[str, ExtraNetwork] = {}


def initialize() -> None:
    """Forgets all registrations. The host does so after the scripts are loaded, before it builds the page."""
    extra_network_registry.clear()
    extra_network_aliases.clear()


def register_extra_network(extra_network: ExtraNetwork) -> None:
    """The last one to register for a name answers for it."""
    extra_network_registry[extra_network.name] = extra_network


def register_extra_network_alias(extra_network: ExtraNetwork, alias: str) -> None:
    """A second name, in a table of its own: who replaces the network under its name has not replaced it here."""
    extra_network_aliases[alias] = extra_network


def register_default_extra_networks() -> None:
    """The host registers hypernetworks here; the small model has none, so their tags count as unknown."""


def activate(p: Any, extra_network_data: TagData) -> None:
    """Hands each network its tags, and an empty list to each that has none. What they raise is printed, no more.

    Then tells the job's scripts.
    """
    found = _lookup(extra_network_data)
    activated: list[ExtraNetwork] = []
    for network, params_list in found:
        with errors.reported(f"activating extra network {network.name} with arguments {params_list}"):
            network.activate(p, params_list)
            activated.append(network)
    for network in list(extra_network_registry.values()):
        # one that failed above is called again: the host goes by who succeeded
        if network not in activated:
            with errors.reported(f"activating extra network {network.name}"):
                network.activate(p, [])
    if getattr(p, "scripts", None) is not None:
        p.scripts.after_extra_networks_activate(
            p, batch_number=p.iteration, prompts=p.prompts, seeds=p.seeds, extra_network_data=extra_network_data
        )


def deactivate(p: object, extra_network_data: TagData) -> None:
    """Tells the networks of these tags, then all others, that the job is over."""
    tagged = [network for network, _ in _lookup(extra_network_data)]
    for network in [*tagged, *(other for other in extra_network_registry.values() if other not in tagged)]:
        with errors.reported(f"deactivating extra network {network.name}"):
            network.deactivate(p)


def parse_prompt(prompt: str) -> tuple[str, dict[str, list[ExtraNetworkParams]]]:
    """The prompt without its tags, and type → arguments of each tag."""
    found: dict[str, list[ExtraNetworkParams]] = {}

    def take(match: re.Match[str]) -> str:
        found.setdefault(match[1], []).append(ExtraNetworkParams(match[2].split(":")))
        return ""

    end = prompt.rfind(">") + 1  # none ends behind it, and the pattern would look there from each `<` for an end
    return _TAG.sub(take, prompt[:end]) + prompt[end:], found


def parse_prompts(prompts: Iterable[str]) -> tuple[list[str], dict[str, list[ExtraNetworkParams]]]:
    """All prompts without their tags; only the tags of the first one count."""
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return [text for text, _ in parsed], parsed[0][1] if parsed else {}


def get_user_metadata(filename: str | None, lister: MassFileLister | None = None) -> Any:
    """What the user wrote about a file: the JSON beside it, whatever it holds; {} where it cannot be read."""
    path = str(Path(filename or "").with_suffix(".json"))
    with errors.reported(f"reading extra network user metadata from {path}"):
        if filename and (lister.exists(path) if lister else Path(path).exists()):
            return json.loads(Path(path).read_text(encoding="utf8"))
    return {}


def _lookup(extra_network_data: TagData) -> list[tuple[ExtraNetwork, list[ExtraNetworkParams]]]:
    """Network → tags under all its names. A name in the registry wins over the same name as an alias."""
    found: list[tuple[ExtraNetwork, list[ExtraNetworkParams]]] = []
    for name, params_list in extra_network_data.items():
        network = extra_network_registry.get(name) or extra_network_aliases.get(name)
        if network is None:
            log.info("Skipping unknown extra network: %s", name)
            continue
        known = next((params for other, params in found if other is network), None)
        if known is None:
            found.append((network, list(params_list)))
        else:
            known.extend(params_list)
    return found
