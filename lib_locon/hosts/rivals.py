"""Other extensions that take our tags. Imported only inside the host or its stand-in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from modules import extensions, extra_networks

log = logging.getLogger("lib_locon")


class Rivals(extra_networks.ExtraNetwork):  # type: ignore[misc]
    """Notices who answers for our tags in our place. The host calls every network at each `activate`, this one last."""

    def __init__(self, make: Callable[[], Any], release: Callable[[], object]) -> None:
        super().__init__("_locon")  # no tag that anybody writes
        self.asked = False
        """Whether the tags came to us since the last look: a rival may hand them on."""
        self._make, self._release = make, release
        self._ours: object = None
        self._told: object = None

    def take_over(self) -> None:
        """Makes us the handler of both tags, and says in whose place."""
        before = extra_networks.extra_network_registry.get("lora")
        whose = extension_of(before) if before is not None and before is not self._ours else ""
        self._ours = network = self._make()
        self._told = None
        extra_networks.register_extra_network(network)
        extra_networks.register_extra_network_alias(network, "lyco")
        extra_networks.register_extra_network(self)
        place = f", in the place of the extension {whose}" if whose else ""
        log.info("sd-webui-locon answers for <lora:…> and <lyco:…>%s", place)

    def activate(self, p: Any, params_list: Sequence[Any]) -> None:
        """Looks who has the tags now."""
        del p, params_list
        rival = extra_networks.extra_network_registry.get("lora")
        asked, self.asked = self.asked, False
        if rival is self._ours:
            return
        if rival is not self._told:
            self._told, whose = rival, extension_of(rival)
            what = "and hands them on to sd-webui-locon" if asked else "sd-webui-locon applies none of them"
            log.warning("the extension %s answers for <lora:…> now; %s", whose, what)
        if not asked:
            self._release()  # what is in the model is no longer ours to change

    def deactivate(self, p: Any) -> None:
        """Nothing to do."""


def extension_of(handler: object) -> str:
    """The folder of the extension that a handler of tags is from."""
    codes = [getattr(value, "__code__", None) for kind in type(handler).__mro__ for value in vars(kind).values()]
    file = next((code.co_filename for code in codes if code is not None), "")
    found = extensions.find_extension(file) if file else None
    return str(found.name) if found is not None else file or type(handler).__name__
