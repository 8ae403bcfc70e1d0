"""The host's settings: values by name, each described by an OptionInfo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ._absent import absent

__getattr__ = absent(__name__)


@dataclass
class OptionInfo:
    """A setting's default and how the settings page shows it; there is no settings page here."""

    default: object = None
    label: str = ""
    component: object = None
    component_args: object = None
    onchange: Callable[[], object] | None = None
    section: tuple[str, str] | None = None
    refresh: Callable[[], object] | None = None
    comment_after: str = ""
    infotext: str | None = None
    """Its name in images' texts; a pasted text that has it asks for the setting."""

    def info(self, text: str) -> OptionInfo:
        """Adds an explanation behind the label."""
        self.comment_after += f" ({text})"
        return self


class Options:
    """`data` holds the values that were set, `data_labels` all settings there are; read as attributes."""

    data: dict[str, object]
    data_labels: dict[str, OptionInfo]

    def __init__(self, data_labels: dict[str, OptionInfo]) -> None:
        self.__dict__.update(data={}, data_labels=data_labels)

    def add_option(self, key: str, info: OptionInfo) -> None:
        """Makes a setting known. Its default goes into `data`, unlike that of one put into `data_labels` directly."""
        self.data_labels[key] = info
        self.data.setdefault(key, info.default)

    def set(self, key: str, value: object) -> bool:
        """Sets a known setting and says whether it changed. Raises KeyError for an unknown one, as the host does."""
        info = self.data_labels[key]
        if self.data.get(key) == value:
            return False
        self.data[key] = value
        if info.onchange is not None:
            info.onchange()
        return True

    def cast_value(self, key: str, value: object) -> object:
        """A text of a pasted image in the setting's type."""
        kind = type(self.data_labels[key].default)
        return False if kind is bool and value == "False" else kind(value)

    def values(self) -> dict[str, object]:
        """All settings as they are now. The stand-in's own."""
        return {key: getattr(self, key) for key in self.data_labels}

    def __getattr__(self, key: str) -> object:
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(f"the headless stand-in for the webui has no setting {key!r}")

    def __setattr__(self, key: str, value: object) -> None:
        if key not in self.data and key not in self.data_labels:
            raise AttributeError(f"the headless stand-in for the webui has no setting {key!r}")
        self.data[key] = value
