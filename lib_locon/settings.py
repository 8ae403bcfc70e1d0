"""The extension's settings: one table, from which the host's settings page is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = "bool | int | str | tuple[str, ...]"
OWN_PAGE = ("locon", "LoCon adapters")
EXTRA_NETWORKS = ("extra_networks", "Extra Networks")
COMPATIBILITY = ("compatibility", "Compatibility")


@dataclass(frozen=True)
class Setting:
    """A setting: its key in the host's options, what the page says, what it is when nobody has set it, and its choices.

    Without choices it is a switch, a number, or a text of so many `lines`. `section` is where it stands on the page.
    """

    key: str
    label: str
    default: Value
    choices: tuple[str, ...] = ()
    lines: int = 0
    infotext: str = ""
    """Its name in images' texts, where it stands if it is not the default; the host takes it from there when pasted."""
    section: tuple[str, str] = OWN_PAGE

    def read(self, found: Any) -> Value:
        """What the host's options hold for it, made sound: another word than the choices counts as the default."""
        if isinstance(self.default, bool):
            return bool(found)
        if isinstance(self.default, int):
            is_number = isinstance(found, (int, float)) and math.isfinite(found)
            return max(0, int(found)) if is_number else self.default
        if isinstance(self.default, tuple):
            return tuple(word for word in self.choices if isinstance(found, (list, tuple)) and word in found)
        return self.default if not isinstance(found, str) or (self.choices and found not in self.choices) else found


ALLOW_PICKLE = Setting(
    "locon_allow_pickle",
    "Read pickled adapters (.pt, .ckpt, .bin) too: such a file can hold a program, so only from authors you trust",
    False,
)
SIDE_PATH = Setting(
    "locon_side_path",
    "Run adapters beside the layers instead of writing them into the weights, wherever their family allows it: slower "
    "images, but no copy of any weight is kept (weights in fp8 and other packed forms are always treated so)",
    False,
)
BASE_STORE = Setting(
    "locon_base_store",
    "Where the original weights are kept while adapters are in the model: auto or checkpoint (read back from the file "
    "where it holds the same numbers: next to no memory), ram (copies), device (copies beside the weights)",
    "auto",
    ("auto", "checkpoint", "ram", "device"),
)
FREE_UNUSED = Setting(
    "locon_free_unused",
    "Give the memory of copied original weights back as soon as no adapter uses them (the next one then takes longer)",
    False,
)
PRESETS = Setting(
    "locon_presets",
    "Your own presets for lbw= and lbwe= in tags, one a line: NAME:1,0,… (block weights) or NAME:blocks:elements:ratio",
    "",
    lines=6,
)
INFOTEXT = Setting(
    "locon_infotext",
    "Write into each image's text what was applied: adapters, strengths, and how many of their layers",
    True,
)
ROUNDING = Setting(
    "locon_rounding",
    "How the sum of several adapters is rounded: exact (once, in any order of the tags), or builtin (after each "
    "adapter, in the order of the tags, as the webui's built-in Lora does: for images that were made so)",
    "exact",
    ("exact", "builtin"),
    infotext="Locon rounding",
)
COMMENTS = Setting(
    "locon_comments",
    "What is said under each image (the log has all of it): all (a line for each adapter, and what is wrong), problems "
    "(only about what was not used, or not in full), nothing",
    "all",
    ("all", "problems", "nothing"),
)
COMPLETION = Setting(
    "locon_completion",
    "Complete adapters' names, keys and presets in the prompt boxes (off by itself where the tag-completion extension "
    "completes them)",
    True,
)
MISTAKES = Setting(
    "locon_mistakes", "Say below a prompt box what is wrong with an adapter's tag in it, while it is written", True
)
SETTINGS: tuple[Setting, ...] = (
    ALLOW_PICKLE,
    SIDE_PATH,
    BASE_STORE,
    FREE_UNUSED,
    ROUNDING,
    PRESETS,
    INFOTEXT,
    COMMENTS,
    COMPLETION,
    MISTAKES,
)
"""Our own."""

NO_ADAPTER = "None"
FILENAME = "Filename"
SD_LORA = Setting("sd_lora", "An adapter for every prompt that does not name it", NO_ADAPTER, section=EXTRA_NETWORKS)
PREFERRED_NAME = Setting(
    "lora_preferred_name",
    "What a click on an adapter's card writes: the name that its trainer gave it, or the file's",
    "Alias from file",
    ("Alias from file", FILENAME),
    section=EXTRA_NETWORKS,
)
ADD_HASHES = Setting(
    "lora_add_hashes_to_infotext", "Write the adapters' hashes into each image's text", True, section=EXTRA_NETWORKS
)
BUNDLED_TI = Setting(
    "lora_bundled_ti_to_infotext",
    "Write the names of textual inversions that came inside adapters into each image's text (where those of all others "
    "are written too)",
    True,
    section=EXTRA_NETWORKS,
)
SHOW_ALL = Setting(
    "lora_show_all",
    "Show the cards of adapters for other models than the loaded one too",
    False,
    section=EXTRA_NETWORKS,
)
HIDE_UNKNOWN = Setting(
    "lora_hide_unknown_for_versions",
    "With a model of these families, hide adapters of which it is not known what they were made for",
    (),
    ("SD1", "SD2", "SDXL"),
    section=EXTRA_NETWORKS,
)
IN_MEMORY = Setting(
    "lora_in_memory_limit",
    "How many adapters stay in memory, so that they need not be read again (those in use always do)",
    0,
    section=EXTRA_NETWORKS,
)
WARN_IN_CONSOLE = Setting(
    "lora_not_found_warning_console",
    "Say it as a warning in the console when an adapter is not there",
    False,
    section=EXTRA_NETWORKS,
)
WARN_IN_PAGE = Setting(
    "lora_not_found_gradio_warning", "Pop up a message when an adapter is not there", False, section=EXTRA_NETWORKS
)
FUNCTIONAL = Setting(
    "lora_functional",
    "Adapters beside the layers, as the additional-networks extension runs them",
    False,
    section=COMPATIBILITY,
)
BUILTIN_SETTINGS: tuple[Setting, ...] = (
    SD_LORA, PREFERRED_NAME, ADD_HASHES, BUNDLED_TI, SHOW_ALL, HIDE_UNKNOWN, IN_MEMORY, WARN_IN_CONSOLE, WARN_IN_PAGE,
    FUNCTIONAL,
)  # fmt: skip
"""The built-in Lora's, which are there without it too: same key, same meaning, same place on the page."""
