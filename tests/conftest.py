"""What several test files share: one small model with every kind of layer, and writers of files, sound and broken."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_locon.arithmetic import rounded_product
from lib_locon.models.targets import View
from lib_locon.patching.plan import Adder, LowRank, Patch

# The same examples on every machine; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

collect_ignore = [] if "LOCON_SECOND_DEVICE" in os.environ else ["second_device"]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
Tensors = Mapping[str, Tensor]
Zoo = Callable[..., nn.Module]
MakePatch = Callable[..., Patch]
WriteAdapter = Callable[..., Path]
WriteRaw = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """How sums are split, and so how they round, depends on the number of threads; such small models gain nothing."""
    torch.set_num_threads(1)


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two workers make the sums, however small."""
    monkeypatch.setattr("lib_locon.patching.crew.WORTHWHILE", 0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["alone", "crew"])
def hands(request: pytest.FixtureRequest) -> None:
    """The caller makes the sums, or two workers do."""
    if request.param == "crew":
        request.getfixturevalue("crew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: where two processes share the tests, the other one makes the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Skips what a torch as old as the webui's cannot do itself on the CPU: run a layer in fp16."""
    try:
        return (yield)
    except RuntimeError as error:
        if TORCH < (2, 3) and "not implemented for 'Half'" in str(error):
            pytest.skip(f"this torch has no such kernel for the CPU: {error}")
        raise


class ZooModel(nn.Module):
    """Each kind of layer once. `fused` holds q, k and v, 8 rows each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.fused = nn.Linear(12, 24)
        self.conv1d = nn.Conv1d(4, 8, 3)
        self.conv2d = nn.Conv2d(4, 8, 3)
        self.conv1x1 = nn.Conv2d(4, 8, 1)
        self.conv3d = nn.Conv3d(4, 6, 2)
        self.embedding = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.group = nn.GroupNorm(2, 8)


class Whole:
    """A ΔW of the tests' own, from `delta(base)`, added row by row as the engine asks for it."""

    def delta(self, base: Tensor) -> Tensor:
        raise NotImplementedError

    def adder(self, base: Tensor) -> Adder:
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        rows = self.delta(base.to(dtype)).reshape(base.shape[0], -1)

        def add(total: Tensor, augend: Tensor, pristine: Tensor, start: int, strength: float) -> None:
            assert pristine.shape == total.shape
            torch.add(augend, rows[start : start + len(total)], alpha=strength, out=total)

        return add

    def low_rank(self, device: torch.device) -> LowRank | None:
        return None

    def unscaled(self, weight: Tensor) -> tuple[Tensor, float] | None:
        return None

    def bound(self) -> float:
        return math.inf


@dataclass(frozen=True, eq=False)
class Known(Whole):
    """A ΔW that the test knows: whole, or as up · down."""

    whole: Tensor | None
    up: Any = None
    down: Any = None

    def delta(self, base: Tensor) -> Tensor:
        if self.whole is None:
            return (self.up @ self.down).to(base.device, base.dtype).reshape(base.shape)
        return self.whole.to(base.device, base.dtype)

    def bound(self) -> float:
        if self.whole is not None:
            return float(self.whole.abs().max())
        return float(self.up.shape[1] * self.up.abs().max() * self.down.abs().max())

    def low_rank(self, device: torch.device) -> LowRank | None:
        return None if self.whole is not None else (self.up.to(device), self.down.to(device), 1.0)

    def unscaled(self, weight: Tensor) -> tuple[Tensor, float] | None:
        if self.whole is not None:
            return None
        return rounded_product(self.up.to(weight.dtype), self.down.to(weight.dtype)).reshape(weight.shape), 1.0


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """zoo(dtype=fp32, seed=0) -> a model with weights that are multiples of 1/512 below 4 in size."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        model = ZooModel().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-2048, 2048, parameter.shape, generator=generator) / 512)
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def patch() -> MakePatch:
    """patch(path, whole | up=, down=, strength=1, source="a", axis=, start=, length=, transposed=) -> Patch."""

    def make(path: str, whole: Tensor | None = None, **options: Any) -> Patch:
        known = Known(whole, options.pop("up", None), options.pop("down", None))
        strength, source = options.pop("strength", 1.0), options.pop("source", "a")
        return Patch(source, View(path, **options), strength, known)

    return make


@pytest.fixture(scope="session")
def write_adapter() -> WriteAdapter:
    """write_adapter(path, {module: {suffix: tensor}}, metadata=None, prefix="lora_unet_") -> path, by safetensors."""

    def write(
        path: Path, modules: Mapping[str, Tensors], metadata: dict[str, str] | None = None, prefix: str = "lora_unet_"
    ) -> Path:
        flat = {f"{prefix}{name}.{suffix}": t for name, group in modules.items() for suffix, t in group.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.clone().contiguous() for key, tensor in flat.items()}, path, metadata)
        return path

    return write


@pytest.fixture(scope="session")
def write_raw() -> WriteRaw:
    """write_raw(path, header, data=b"", length=None) -> path: any bytes as a header, any number as its length."""

    def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    return write
