"""Weights of 8 bits with a scale beside them, in checkpoint files and in models that hold them as they are stored.

The truth: stored · scale, plus the adapter's ΔW, divided by the scale and rounded once in the weight's own format.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.__main__ import main
from lib_locon.models.base_family import model_family
from lib_locon.models.table import TargetTable
from lib_locon.patching.stored_scale import RoundingCost, decode, encode, is_known_layout, stretched
from tests.test_names_both_ways import network

OUT, IN, RANK = 48, 16, 2
NAMES = {
    "flux": ("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv"),
    "flux_q": ("double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_k"),
    "sd3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv"),
    "sdxl": (
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    ),
}
"""Module of the checkpoint, and the adapter's name for it (or for a third of its rows)."""


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale_of(shape: tuple[int, ...]) -> Tensor:
    """Positive numbers of this shape."""
    return 0.001 * (1 + rand(*shape, seed=3).abs()) if shape else torch.tensor(0.002)


def as_stored(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = value / scale
    return numbers.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else numbers.to(dtype)


def by_rows(scale: Tensor) -> Tensor:
    """The scale of each number of a weight (OUT, IN), written out."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(OUT, IN)
    if scale.ndim == 1:
        return scale[:, None].expand(OUT, IN)
    rows, columns = OUT // scale.shape[0], IN // scale.shape[1]
    return torch.tensor([[float(scale[i // rows, j // columns]) for j in range(IN)] for i in range(OUT)])


def adapter(path: Path, module: str, rows: int, size: float) -> Tensor:
    """Writes a LoRA for so many rows; returns its ΔW."""
    up, down = rand(rows, RANK, seed=7) * size, rand(RANK, IN, seed=8)
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, path)
    return up @ down


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return code, out, error


SHAPES = [(), (1,), (OUT,), (OUT, 1), (1, IN), (4, 2), (OUT, IN)]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_a_bake_adds_to_what_the_numbers_stand_for_and_rounds_once(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, written = NAMES["flux"]
    scale = scale_of(shape)
    stored = as_stored(0.1 * rand(OUT, IN), by_rows(scale), dtype)
    tensors = {f"{module}.weight": stored, f"{module}.{name}": scale, f"{module}.input_scale": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "base.safetensors")
    delta = adapter(tmp_path / "a.safetensors", written, OUT, 0.2)
    code, out, error = run(
        "bake", tmp_path / "base.safetensors", "--prompt", "<lora:a:1>", "--lora-dir", tmp_path, "-o",
        tmp_path / "out.safetensors", "--json", "--lossy", capsys=capsys,
    )  # fmt: skip
    assert code == 0, error
    new = load_file(tmp_path / "out.safetensors")
    limit = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    wanted = ((stored.float() * by_rows(scale) + delta) / by_rows(scale)).clamp(-limit, limit)
    wanted = wanted.round() if dtype == torch.int8 else wanted
    same = new[f"{module}.weight"].float() == wanted.to(dtype).float()
    assert same.float().mean() > 0.99  # the last bit of the sum before it is rounded
    assert all(torch.equal(new[key], value) for key, value in tensors.items() if not key.endswith(".weight"))
    notes = json.loads(out)["adapters"][0]["notes"]
    assert notes[0] == "1 weight is stored in 8 bits: its sum is rounded to 8 bits again"
    effective = new[f"{module}.weight"].float() * by_rows(scale)
    before = stored.float() * by_rows(scale)
    share = float((effective - before - delta).norm() / delta.norm())
    assert f"an error of {share:.0%} of the change" in notes[1]


@pytest.mark.parametrize("model", NAMES)
def test_a_change_that_the_format_cannot_hold_is_refused_with_the_reason(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, written = NAMES[model]
    scale = torch.tensor(0.01)
    stored = as_stored(rand(OUT, IN), scale, torch.float8_e4m3fn)
    save_file({f"{module}.weight": stored, f"{module}.scale_weight": scale}, tmp_path / "base.safetensors")
    adapter(tmp_path / "a.safetensors", written, OUT // 3 if model == "flux_q" else OUT, 0.005)
    arguments = ["bake", tmp_path / "base.safetensors", "--prompt", "<lora:a:1>", "--lora-dir", tmp_path, "-o"]
    code, _, error = run(*arguments, tmp_path / "out.safetensors", capsys=capsys)
    assert code == 2
    assert "in 8 bits with a scale" in error and "--lossy" in error
    assert not (tmp_path / "out.safetensors").exists()
    code, out, error = run(*arguments, tmp_path / "out.safetensors", "--lossy", capsys=capsys)
    assert code == 0 and "an error of" in out
    adapter(tmp_path / "a.safetensors", written, OUT // 3 if model == "flux_q" else OUT, 1e-6)
    code, out, error = run(*arguments, tmp_path / "out.safetensors", "--lossy", "--force", capsys=capsys)
    assert code == 0 and "an error of 100% of the change of 1 weight: every number was rounded back" in out


@pytest.mark.parametrize("model", NAMES)
def test_inspect_says_that_sums_are_rounded(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, written = NAMES[model]
    stored = rand(OUT, IN).to(torch.float8_e4m3fn)
    save_file({f"{module}.weight": stored, f"{module}.scale_weight": torch.tensor(0.1)}, tmp_path / "base.safetensors")
    adapter(tmp_path / "a.safetensors", written, OUT // 3 if model == "flux_q" else OUT, 1)
    code, out, _ = run(
        "inspect", tmp_path / "a.safetensors", "--base", tmp_path / "base.safetensors", capsys=capsys
    )  # fmt: skip
    assert code == 0 and "1/1 modules" in out and "rounded to 8 bits again" in out


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float8_e4m3fn, torch.ones(5)),
        (torch.float8_e4m3fn, torch.ones(7, 2)),
        (torch.float8_e4m3fn, torch.ones(OUT, IN // 8).to(torch.uint8)),
        (torch.uint8, torch.tensor(1.0)),
        (torch.int8, None),
    ],
)
def test_a_layout_that_is_not_known_is_left_out_with_the_reason(
    dtype: torch.dtype, scale: Tensor | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, written = NAMES["flux"]
    beside = {} if scale is None else {f"{module}.weight_scale": scale}
    save_file({f"{module}.weight": torch.ones(OUT, IN).to(dtype), **beside}, tmp_path / "base.safetensors")
    adapter(tmp_path / "a.safetensors", written, OUT, 1)
    arguments = ["--prompt", "<lora:a:1>", "--lora-dir", tmp_path, "-o", tmp_path / "out.safetensors"]
    code, _, error = run("bake", tmp_path / "base.safetensors", *arguments, capsys=capsys)
    assert code == 2 and "the checkpoint stores it as" in error
    assert ("a scale of a layout that is not known" in error) == (scale is not None and scale.numel() > 1)


def test_a_plain_tensor_keeps_its_way() -> None:
    # what has no scale and more than 8 bits never goes through fp32 and back
    cost = RoundingCost()
    assert not str(cost) and cost.share == 0


# ---- models that hold the numbers and their scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_session_does_the_same_and_gives_the_bytes_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    module, written = NAMES["flux"]
    scale = scale_of(shape)
    model = network({f"{module}.weight": (OUT, IN)})
    place = model.get_submodule(module)
    place.scale_weight = nn.Parameter(scale, requires_grad=False)
    stored = as_stored(0.1 * rand(OUT, IN), by_rows(scale), torch.float8_e4m3fn)
    place.weight = nn.Parameter(stored.clone(), requires_grad=False)
    delta = adapter(tmp_path / "a.safetensors", written, OUT, 0.2)
    session = lib_locon.Session(model)
    report = session.apply([lib_locon.Use(lib_locon.load(tmp_path / "a.safetensors"))])
    wanted = ((stored.float() * by_rows(scale) + delta) / by_rows(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (place.weight.float() == wanted.float()).float().mean() > 0.99
    share = float(((place.weight.float() - stored.float()) * by_rows(scale) - delta).norm() / delta.norm())
    assert f"rounding to 8 bits makes an error of {share:.0%} of the change of 1 weight" in str(report)
    session.restore()
    assert torch.equal(place.weight.view(torch.uint8), stored.view(torch.uint8))


# ---- parameters without axes in the table of names


@pytest.mark.parametrize(
    "shapes",
    [
        {"double_blocks.0.img_attn.qkv.weight": (48, 16), "double_blocks.0.img_attn.qkv.input_scale": ()},
        {"single_blocks.0.linear1.weight": (112, 16), "single_blocks.0.linear1.weight_scale": (1,),
         "double_blocks.0.img_mod.lin.weight": (6, 6)},
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (48, 16),
         "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight": ()},
        {"transformer_blocks.0.attn.add_q_proj.weight": (16, 16),
         "single_transformer_blocks.0.attn.to_q.weight": (16, 16),
         "norm_out.linear.weight": (32, 16), "norm_out.linear.weight_scale": (), "norm_out.linear.comfy_quant": (40,)},
        {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (48, 16),
         "cond_stage_model.model.logit_scale": (), "scaled_fp8": (0,)},
    ],
    ids=["flux", "single", "sd3", "diffusers", "openclip"],
)  # fmt: skip
def test_a_parameter_without_axes_breaks_no_table(shapes: dict[str, tuple[int, ...]]) -> None:
    table = TargetTable.of_shapes(shapes)
    model_family(table)
    found = [target for names in table.aliases.values() for target in names.values() if "weight" in target.views]
    assert found and not table.collisions


def test_a_scale_is_cut_into_no_rows() -> None:
    shapes = {"double_blocks.0.img_attn.qkv.weight": (48, 16), "double_blocks.0.img_attn.qkv.scale_weight": (1,)}
    target = TargetTable.of_shapes(shapes).find("transformer_blocks.0.attn.to_k", ("unet",))
    assert target is not None and list(target.views) == ["weight"]


def test_layouts() -> None:
    known = [shape for shape in (*SHAPES, (7,), (5, 2), (OUT, IN, 1), (2, OUT, IN), (0,)) if
             is_known_layout(shape, torch.float32, (OUT, IN))]  # fmt: skip
    assert known == SHAPES
    assert not is_known_layout((), torch.uint8, (OUT, IN))
    for shape in SHAPES:
        assert torch.equal(stretched(scale_of(shape), (OUT, IN)).expand(OUT, IN), by_rows(scale_of(shape)))


def test_rounding_keeps_within_the_range_of_the_format() -> None:
    value = torch.tensor([1000.0, -1000.0, 1.0])
    assert encode(value, torch.tensor(1.0), torch.float8_e4m3fn).tolist() == [448, -448, 1]
    assert encode(value, torch.tensor(2.0), torch.int8).tolist() == [127, -127, 0]
    assert decode(encode(value, torch.tensor(4.0), torch.float8_e4m3fn), torch.tensor(4.0)).tolist() == [1024, -1024, 1]
