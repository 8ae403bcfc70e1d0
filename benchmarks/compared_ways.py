"""The ways to merge an adapter into a model that a user has from PyPI, behind one face; first the two of this project.

A way is made for one model and dtype with random weights. `load` makes one file ready, `apply` merges it, `change` asks
for another strength of what is merged, `remove` takes it back, `unload` forgets the file. What a way cannot do raises
:class:`Unable`, whose text says why.
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import lib_locon
from benchmarks import adapters
from benchmarks.memory import available
from benchmarks.models import random_model, save_checkpoint, skeleton
from lib_locon.models.table import TargetTable
from lib_locon.patching.store import BaseStore

_LEFT_OVER = 2 << 30


class Unable(Exception):
    """The way cannot do this here; the text says why."""


class Way(ABC):
    """One library's way. For people, `calls` says what each step calls, `note` what else there is to know."""

    name: ClassVar[str]
    package: ClassVar[str]
    calls: ClassVar[Mapping[str, str]]
    note: ClassVar[str]

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        self.folder = folder
        self.weights: dict[str, Tensor] = {}

    @classmethod
    def version(cls) -> str:
        """Of the library that does the work."""
        return importlib.metadata.version(cls.package)

    @abstractmethod
    def convert(self, file: Path) -> Path:
        """The same factors in a file of the names that this library reads; not timed."""

    @abstractmethod
    def load(self, file: Path) -> None: ...

    @abstractmethod
    def apply(self, strength: float) -> None: ...

    @abstractmethod
    def change(self, old: float, new: float) -> None: ...

    @abstractmethod
    def remove(self, strength: float) -> None: ...

    @abstractmethod
    def unload(self) -> None: ...


class OnTheTree(Way):
    """A way that takes any module tree: gets the same model, with SD1's names, as this project's own."""

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(model, dtype, folder)
        self.paths = adapters.trained(TargetTable.of_model(skeleton(model)))
        self.model: nn.Module = random_model(model, dtype)
        parameters = dict(self.model.named_parameters())
        self.weights = {name: parameters[path].detach() for name, path in self.paths.items()}

    def module(self, name: str) -> str:
        """The path of the module that kohya names so."""
        return self.paths[name].removesuffix(".weight")


class OursRam(OnTheTree):
    """`Session.apply` with copies of the touched weights in RAM, made anew for every loaded file."""

    name = "ours-ram"
    package = "torch"
    calls: ClassVar = {
        "load": "lib_locon.load, Session.match",
        "apply": "Session.apply([use])",
        "change": "Session.apply([use at the new strength])",
        "remove": "Session.apply(())",
        "again": "Session.apply([use])",
    }
    note = "Keeps a copy of the touched weights, which it makes anew after each `load` here."

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(model, dtype, folder)
        self.session = lib_locon.Session(self.model)

    @classmethod
    def version(cls) -> str:
        """Of this working copy."""
        return lib_locon.__version__

    def store(self) -> BaseStore:
        """A store that keeps nothing yet: each loaded file is a first use, and pays for keeping the base."""
        return BaseStore("ram")

    def convert(self, file: Path) -> Path:
        return file

    def load(self, file: Path) -> None:
        self.session.engine.store = self.store()
        self.adapter = lib_locon.load(file)
        self.session.match(self.adapter)

    def apply(self, strength: float) -> None:
        self.session.apply([lib_locon.Use(self.adapter, lib_locon.Strengths.both(strength))])

    def change(self, old: float, new: float) -> None:
        self.apply(new)

    def remove(self, strength: float) -> None:
        self.session.apply(())

    def unload(self) -> None:
        self.session.restore()
        self.session.engine.store = self.store()
        del self.adapter


class OursCheckpoint(OursRam):
    """The same with the base read back from the model's checkpoint file, which is proved on each first use."""

    name = "ours-checkpoint"
    note = "Reads the base from the checkpoint file (here in the system's cache) for each change; compares it once."

    def __init__(self, model: str, dtype: torch.dtype, folder: Path) -> None:
        super().__init__(model, dtype, folder)
        self.checkpoint = save_checkpoint(self.model, folder / "model.safetensors")

    def store(self) -> BaseStore:
        self.session.read_bases_from(self.checkpoint)
        return BaseStore("checkpoint", self.session.engine.store.source)


def need(extra: int, what: str) -> None:
    """Raises Unable where so many bytes more are not to be had with something left over: a system that runs out of
    memory ends processes, and not always the one that took it."""
    free = available()
    if free is not None and free < extra + _LEFT_OVER:
        least = (extra + _LEFT_OVER) / 2**30
        raise Unable(f"{what} needs {least:.1f} GiB, some of it for the system; {free / 2**30:.1f} GiB are free")


def fill(parts: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Gives modules of the meta device memory and random weights, as `random_model` does."""
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        part.to(dtype).to_empty(device=torch.device("cpu")).eval()
        for parameter in part.parameters():
            parameter.requires_grad_(False).uniform_(-0.05, 0.05, generator=generator)
