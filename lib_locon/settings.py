"""The extension's settings: one table, from which the host's settings page is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting: its key in the host's options, what the page says, what it is when nobody has set it, and its choices.

    Without choices it is a switch; another word than the choices counts as the default.
    """

    key: str
    label: str
    default: bool | str
    choices: tuple[str, ...] = ()


ALLOW_PICKLE = Setting(
    "locon_allow_pickle",
    "Read adapters in pickled files (.pt, .ckpt) too: such a file can hold a program, so only from authors you trust",
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
SETTINGS: tuple[Setting, ...] = (ALLOW_PICKLE, SIDE_PATH, BASE_STORE)
