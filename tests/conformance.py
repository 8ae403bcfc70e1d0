"""The conformance table: every family and layer kind, at several strengths and dtypes, against its own trainer's code.

    python -m tests.conformance          writes docs/conformance.md

A cell is one adapter on one layer, taken the whole way: a safetensors file with the trainer's keys → `load` →
`Session.apply` on a real torch layer → its weight, compared with `tests.oracles`, which does not import lib_locon.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.files.dialects import SUFFIX_ALIASES
from lib_locon.files.hints import rank_of
from tests.oracles import naive
from tests.oracles.cases import Case, all_cases

DOCUMENT = Path(__file__).parents[1] / "docs" / "conformance.md"
STRENGTHS = (1.0, 0.5, 0.0, -1.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP32_NOISE = 1e-5
KINDS = {
    "linear": "Linear",
    "conv1d": "Conv1d",
    "conv2d_1x1": "Conv2d 1×1",
    "conv2d_3x3": "Conv2d 3×3",
    "conv3d": "Conv3d",
    "embedding": "Embedding",
    "layernorm": "LayerNorm",
    "groupnorm": "GroupNorm",
}
FAMILIES = {
    # oracle's name: (ours, what A1111's built-in, ComfyUI and Forge do with it; from their sources, or run where said)
    "lora": ("LoRA, LoCon", "right", "right", "right"),
    "tucker": ("LoCon Tucker", "right", "right", "right"),
    "sparse": ("LoRA + residual", "drops the residual", "drops the residual", "drops the residual"),
    "loha": ("LoHa", "right", "fails on 4-D factors (OneTrainer)", "fails on 4-D factors"),
    "loha_tucker": ("LoHa Tucker", "right", "right", "right"),
    "lokr": ("LoKr, LoKr Tucker", "right", "Tucker in 4-D only", "Tucker in 4-D only"),
    "dora_lora": ("DoRA LoRA", "output side wrong by 65–120 %", "output side off by ~15 %", "output side off by ~15 %"),
    "dora_tucker": ("DoRA LoCon Tucker", "output side wrong", "output side off", "output side off"),
    "dora_loha": ("DoRA LoHa", "output side wrong", "output side off", "output side off"),
    "dora_loha_tucker": ("DoRA LoHa Tucker", "output side wrong", "output side off", "output side off"),
    "dora_lokr": ("DoRA LoKr", "output side wrong", "output side off", "output side off"),
    "full": ("Full", "`diff_b` alone refuses the whole file", "right", "right"),
    "norm": ("Norm", "one of two keys refuses the whole file", "right", "right"),
    "ia3": ("IA3 (LyCORIS)", "convolutions on the output side fail", "not read", "not read"),
    "glora": ("GLoRA", "new layout fails, old one without alpha/rank", "right", "right"),
    "oft": ("OFT (LyCORIS)", "right", "strength squared, constraint and rescale wrong", "not read"),
    "boft": ("BOFT (LyCORIS)", "right", "strength to a power, constraint wrong", "not read"),
    "tlora": ("T-LoRA", "not read", "not read", "not read"),
    "peft_oft": ("OFT (PEFT)", "not read", "not read", "not read"),
    "peft_boft": ("BOFT (PEFT)", "not read", "not read", "not read"),
    "peft_ia3": ("IA3 (PEFT)", "not read", "not read", "not read"),
}


def layer_for(case: Case) -> nn.Module:
    """A real torch layer that holds the case's base weight, and a bias that is not zero."""
    shape = tuple(case.base.shape)
    if case.kind == "embedding":
        layer: nn.Module = nn.Embedding(*shape)
    elif case.kind == "linear":
        layer = nn.Linear(shape[1], shape[0])
    elif case.kind == "layernorm":
        layer = nn.LayerNorm(shape)
    elif case.kind == "groupnorm":
        layer = nn.GroupNorm(1, shape[0])
    else:
        conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
        layer = conv(shape[1], shape[0], shape[2:])
    with torch.no_grad():
        layer.weight.copy_(case.base)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(case.config.get("base_bias", torch.linspace(-1, 1, layer.bias.numel())))
    return layer


def write_files(case: Case, folder: Path) -> Path:
    """The adapter as its trainer writes it: PEFT's has a configuration beside it."""
    path = folder / "adapter.safetensors"
    module = "lora_unet_layer" if case.source == "lycoris" else "base_model.model.layer"
    save_file({key: tensor.contiguous() for key, tensor in case.prefixed(module).items()}, path)
    if case.source == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(peft_settings(case)))
    return path


def peft_settings(case: Case, module: str = "layer") -> dict[str, object]:
    """What PEFT's configuration says of the case."""
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in case.tensors.items()}
    rank = rank_of({SUFFIX_ALIASES.get(suffix, suffix): shape for suffix, shape in shapes.items()}) or 1
    return {
        "r": rank,
        "lora_alpha": float(case.config.get("scale", 1.0)) * rank,
        "use_cayley_neumann": case.config.get("use_cayley_neumann", True),
        "peft_type": "IA3" if case.family == "peft_ia3" else "LORA",
        "feedforward_modules": [module] if case.config.get("feedforward") else [],
    }


def wrong_cells(case: Case, folder: Path) -> Iterator[str]:
    """A line for each strength and dtype at which the weight (or bias) is not what the oracle says."""
    adapter = lib_locon.load(write_files(case, folder))
    for dtype in DTYPES:
        model = nn.ModuleDict({"layer": layer_for(case)}).to(dtype)
        layer = model["layer"]
        base = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        expected = _expected(case, base)
        session = lib_locon.Session(model)
        for strength in STRENGTHS:
            report = session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(strength))])
            if (report.adapters[0].used, report.adapters[0].unmatched) != (1, ()):
                yield f"{case.name}: {report}"
            for name, parameter in layer.named_parameters():
                if _differs(parameter.detach(), base[name], strength * expected[name]):
                    yield f"{case.name} at {strength} in {dtype}: {name} is wrong"


def _expected(case: Case, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The full-strength change of each parameter in float64.

    The library's own number in fp32; from the rounded base (by the loop-level reference) in half precision, since some
    families read the base.
    """
    exact = case.delta.double()
    if base["weight"].dtype != torch.float32:
        exact = naive.delta(case.family, case.tensors, base["weight"].double(), case.config)
    bias = case.bias_delta
    if bias is not None and "base_bias" in case.config:
        bias = bias.double() / case.config["base_bias"].double() * base["bias"].double()
    changes = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in base.items()}
    return {**changes, "weight": exact, **({} if bias is None else {"bias": bias.double()})}


def _differs(got: Tensor, base: Tensor, change: Tensor) -> bool:
    if not change.any():
        return not torch.equal(got, base)
    exact = base.double() + change
    noise = FP32_NOISE * (base.abs().max().double() + change.abs().max())
    step = torch.finfo(got.dtype).eps / 2  # rounded once
    return bool(((got.double() - exact).abs() > noise + step * exact.abs()).any())


def document() -> str:
    """docs/conformance.md. Counts only, so that it is the same on every machine."""
    cells: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    with tempfile.TemporaryDirectory() as folder:
        for case in all_cases():
            wrong = len(list(wrong_cells(case, Path(folder))))
            cells[case.family, case.kind][0] += len(STRENGTHS) * len(DTYPES)
            cells[case.family, case.kind][1] += wrong
    strengths = ", ".join(f"{strength:g}" for strength in STRENGTHS)
    total, wrong = (sum(cell[i] for cell in cells.values()) for i in (0, 1))
    lines = [
        "# Conformance",
        "",
        "Written by `python -m tests.conformance`; the tests write it again and compare.",
        "",
        "A number is how many weights were compared and right: adapters made by `lycoris-lora` 4.1.3 and `peft` 0.21.2",
        f"(variants of a family included), at strengths of {strengths}, in fp32, fp16 and bf16.",
        "fp32 is compared with the library's own result, half precision with a loop-level reference in float64,",
        "rounded once. Strength means W + s · (W′ − W) for all. `✗` marks cells with a wrong weight.",
        "",
        f"{total - wrong} of {total} right. An empty cell: the library has no such layer (T-LoRA on convolutions",
        "is refused with a note). Forms that no library writes on demand are in `tests/test_rare_families.py`, what",
        "metadata decides (split_qkv, rs_lora, OneTrainer) in `tests/test_trainer_marks.py`, and PEFT's configurations",
        "(starts, patterns, modules saved whole), against PEFT's own merged weights, in `tests/test_peft_config.py`.",
        "",
        f"| family | {' | '.join(KINDS.values())} |",
        f"| --- |{' --- |' * len(KINDS)}",
    ]
    for family, (name, *_) in FAMILIES.items():
        row = [_cell(cells.get((family, kind))) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += [
        "",
        "## The same families elsewhere",
        "",
        "What other loaders are documented to do with them (A1111's built-in Lora of v1.10.1 by running its classes",
        "against LyCORIS; ComfyUI of 2025-10 and Forge of 2025-06 by reading).",
        "",
        "| family | A1111 built-in | ComfyUI | Forge |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in FAMILIES.values()),
    ]
    return "\n".join(lines) + "\n"


def _cell(counts: list[int] | None) -> str:
    if counts is None:
        return ""
    total, wrong = counts
    return f"✗ {wrong} of {total}" if wrong else str(total)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf8")
