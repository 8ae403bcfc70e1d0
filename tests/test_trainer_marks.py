"""Files whose metadata decides what their tensors leave open. Expected values are the trainers' own formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.files.adapter import read_adapter
from lib_locon.report import AdapterReport

WIDTH, RANK, ALPHA = 8, 2, 1.0
QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"
MLP = "double_blocks.0.img_mlp.0"
NETWORK = {"ss_network_module": "networks.lora_flux", "ss_network_dim": str(RANK)}


def rand(*shape: int, seed: int = 1, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(**shapes: tuple[int, ...]) -> nn.Module:
    """Modules of these dotted names (`__` for a dot) with a weight each."""
    root = nn.Module()
    for number, (name, shape) in enumerate(shapes.items()):
        place = root
        *levels, last = name.split("__")
        for level in levels:
            if level not in place._modules:
                place.add_module(level, nn.Module())
            place = place._modules[level]  # type: ignore[assignment]
        made = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
        made.weight.data = rand(*shape, seed=100 + number, scale=1.0)
        place.add_module(last, made)
    return root


def flux() -> nn.Module:
    return model(
        double_blocks__0__img_attn__qkv=(3 * WIDTH, WIDTH),
        double_blocks__0__img_mlp__0=(4 * WIDTH, WIDTH),
        single_blocks__0__linear1=(7 * WIDTH, WIDTH),
    )


def changed(
    path: Path, net: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], AdapterReport]:
    """Weight's path → its change, and the adapter's report."""
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    report = lib_locon.Session(net).apply([lib_locon.Use(lib_locon.load(path))]).adapters[0]
    return {name: weight.detach() - before[name] for name, weight in net.named_parameters()}, report


# ---- kohya's split_qkv


def in_parts(name: str, rows: list[int], rank: int = RANK) -> tuple[dict[str, Tensor], Tensor]:
    """A module's tensors as the trainer joins them, and its ΔW by the parts themselves: alpha / rank of a part."""
    downs = [rand(rank, WIDTH, seed=i) for i in range(len(rows))]
    ups = [rand(count, rank, seed=10 + i) for i, count in enumerate(rows)]
    key = f"lora_unet_{name.replace('.', '_')}"
    tensors = {
        f"{key}.lora_down.weight": torch.cat(downs),
        f"{key}.lora_up.weight": torch.block_diag(*ups),
        f"{key}.alpha": torch.tensor(ALPHA),
    }
    return tensors, torch.cat([up @ down for up, down in zip(ups, downs, strict=True)]) * (ALPHA / rank)


@pytest.mark.parametrize("spelling", ["True", "true", True, 1])
def test_parts_of_a_fused_projection_have_the_strength_that_they_were_trained_with(
    spelling: object, tmp_path: Path
) -> None:
    tensors, wanted = {}, {}
    for name, rows in {QKV: [WIDTH] * 3, LINEAR1: [WIDTH, WIDTH, WIDTH, 4 * WIDTH], MLP: [4 * WIDTH]}.items():
        made, wanted[f"{name}.weight"] = in_parts(name, rows)
        tensors |= made
    metadata = {**NETWORK, "ss_network_args": json.dumps({"split_qkv": spelling})}
    found, report = changed(tmp_path / "a.safetensors", flux(), tensors, metadata)
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-4, atol=1e-5)
    assert sum("split_qkv" in note for note in report.notes) == 1
    # the header alone tells the same
    scales = [layer.scale for each in (True, False) for module in read_adapter(
        tmp_path / "a.safetensors", header_only=each).modules for layer in module.layers]  # fmt: skip
    assert scales[:3] == scales[3:] == [0.5, 0.5, 0.5]


def test_the_rank_of_a_part_may_be_an_argument_of_its_own(tmp_path: Path) -> None:
    tensors, wanted = in_parts(QKV, [WIDTH] * 3, rank=1)
    metadata = {**NETWORK, "ss_network_args": json.dumps({"split_qkv": "True", "img_attn_dim": "1"})}
    found, _ = changed(tmp_path / "a.safetensors", flux(), tensors, metadata)
    torch.testing.assert_close(found[f"{QKV}.weight"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "rank"),
    [({}, "2"), ({"split_qkv": "False"}, "2"), ({"split_qkv": "True"}, "6"), ({"split_qkv": "True"}, "Dynamic")],
)
def test_other_files_keep_alpha_by_the_rank_that_is_stored(
    arguments: dict[str, str], rank: str, tmp_path: Path
) -> None:
    tensors, in_training = in_parts(QKV, [WIDTH] * 3)
    metadata = {"ss_network_dim": rank, "ss_network_args": json.dumps(arguments)}
    found, report = changed(tmp_path / "a.safetensors", flux(), tensors, metadata)
    torch.testing.assert_close(found[f"{QKV}.weight"], in_training / 3, rtol=1e-4, atol=1e-5)
    assert not report.notes


def test_factors_that_are_not_in_parts_are_read_by_their_rank_and_it_is_said(tmp_path: Path) -> None:
    tensors, _ = in_parts(QKV, [WIDTH] * 3)
    key = f"lora_unet_{QKV.replace('.', '_')}"
    tensors[f"{key}.lora_up.weight"] = up = rand(3 * WIDTH, 3 * RANK, seed=5)
    metadata = {**NETWORK, "ss_network_args": json.dumps({"split_qkv": "True"})}
    found, report = changed(tmp_path / "a.safetensors", flux(), tensors, metadata)
    expected = up @ tensors[f"{key}.lora_down.weight"] * (ALPHA / (3 * RANK))
    torch.testing.assert_close(found[f"{QKV}.weight"], expected, rtol=1e-4, atol=1e-5)
    assert "its factors have no parts" in " ".join(report.notes)


# ---- kohya's OFT for Flux


def rotated(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """Block by block: Rᵀ · W, R by Cayley's formula of Q, ‖Q‖ at most alpha · rows."""
    q = blocks - blocks.transpose(1, 2)
    limit, norm = alpha * len(weight), float(q.norm())
    q = q * ((min(norm, limit) + 1e-8) / (norm + 1e-8))
    size, rows = blocks.shape[1], []
    for number, block in enumerate(q):
        rotation = (torch.eye(size) + block) @ torch.linalg.inv(torch.eye(size) - block)
        rows.append(rotation.T @ weight[number * size : (number + 1) * size])
    return torch.cat(rows)


@pytest.mark.parametrize("alpha", [1.0, 1e-2])
def test_each_part_of_a_projection_has_a_rotation_of_its_own(alpha: float, tmp_path: Path) -> None:
    net = flux()
    weight = net.get_submodule(LINEAR1).weight.detach().clone()
    rows = [WIDTH, WIDTH, WIDTH, 4 * WIDTH]
    blocks = [rand(4, count // 4, count // 4, seed=i, scale=0.2) for i, count in enumerate(rows)]
    tensors = {f"oft_unet_single_blocks_0_linear1.oft_blocks.{i}": part for i, part in enumerate(blocks)}
    tensors["oft_unet_single_blocks_0_linear1.alpha"] = torch.tensor(alpha)
    found, report = changed(tmp_path / "a.safetensors", net, tensors, {})
    parts = [rotated(part, turn, alpha) for part, turn in zip(weight.split(rows), blocks, strict=True)]
    torch.testing.assert_close(found[f"{LINEAR1}.weight"], torch.cat(parts) - weight, rtol=1e-4, atol=1e-5)
    assert report.families == {"OFT": 1}


def test_parts_meet_the_projections_of_a_model_that_holds_them_apart(tmp_path: Path) -> None:
    net = model(
        transformer_blocks__0__attn__to_q=(WIDTH, WIDTH),
        transformer_blocks__0__attn__to_k=(WIDTH, WIDTH),
        transformer_blocks__0__attn__to_v=(WIDTH, WIDTH),
        transformer_blocks__0__attn__add_q_proj=(WIDTH, WIDTH),
        single_transformer_blocks__0__proj_out=(WIDTH, WIDTH),
    )
    blocks = [rand(2, WIDTH // 2, WIDTH // 2, seed=i) for i in range(3)]
    tensors = {f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{i}": part for i, part in enumerate(blocks)}
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    found, _ = changed(tmp_path / "a.safetensors", net, tensors, {})
    for name, part in zip(("to_q", "to_k", "to_v"), blocks, strict=True):
        path = f"transformer_blocks.0.attn.{name}.weight"
        expected = rotated(before[path], part, 1e9) - before[path]
        torch.testing.assert_close(found[path], expected, rtol=1e-4, atol=1e-5)


def test_a_list_of_rotations_with_a_gap_is_left_out_with_the_reason(tmp_path: Path) -> None:
    tensors = {f"oft_unet_{QKV.replace('.', '_')}.oft_blocks.{i}": rand(2, 4, 4, seed=i) for i in (0, 2)}
    tensors |= in_parts(MLP, [4 * WIDTH])[0]
    _, report = changed(tmp_path / "a.safetensors", flux(), tensors, {})
    assert "a part of its list of rotations is missing" in str(report)


# ---- OneTrainer's OFT


def one_trainer(weight: Tensor, packed: Tensor, size: int, *, scaled: bool) -> Tensor:
    """By its module's forward: a convolution's kernel is W·R, a linear layer's input is turned, which is W·Rᵀ."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = torch.zeros(len(packed), size, size)
    q[:, rows, columns] = packed / (2 * (size - 1) ** 0.5) if scaled else packed
    q = q - q.transpose(1, 2)
    turn = torch.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    blocks = weight.reshape(len(weight), -1, size)
    turned = [
        block @ (each if weight.ndim == 4 else each.T) for block, each in zip(blocks.unbind(1), turn, strict=True)
    ]
    return torch.stack(turned, 1).reshape(weight.shape)


@pytest.mark.parametrize("mark", ["metadata", "marker", "none"])
@pytest.mark.parametrize("form", ["lora_unet_{}", "unet.{}", "diffusion_model.{}", "{}"])
def test_a_convolution_turns_as_its_trainer_turned_it_under_every_name(form: str, mark: str, tmp_path: Path) -> None:
    net = model(conv=(6, 4, 3, 3), linear=(6, 12))
    weights = {name: module.weight.detach().clone() for name, module in net.named_children()}
    tensors, wanted = {}, {}
    for name, weight in weights.items():
        packed = rand(weight[0].numel() // 4, 6, seed=len(name))
        tensors[f"{form.format(name)}.oft_R.weight"] = packed
        if mark == "marker":
            tensors[f"{form.format(name)}.oft_R.scaled_oft"] = torch.tensor(1.0)
        # without any mark, dotted names are PEFT's: its convolutions turn as linear layers do
        peft = mark == "none" and not form.startswith("lora_unet_")
        flat = weight.flatten(1) if peft else weight
        wanted[name] = one_trainer(flat, packed, 4, scaled=mark == "marker").reshape(weight.shape)
    metadata = {"ot_branch": "master", "ot_revision": "23df383"} if mark == "metadata" else {}
    found, _ = changed(tmp_path / "a.safetensors", net, tensors, metadata)
    for name, weight in weights.items():
        torch.testing.assert_close(found[f"{name}.weight"], wanted[name] - weight, rtol=1e-4, atol=1e-5)


# ---- rank-stabilised scales that stand in the metadata alone


@pytest.mark.parametrize("on", [True, False])
def test_glora_has_the_scale_that_lycoris_trained_with(on: bool, tmp_path: Path) -> None:
    net = model(linear=(6, 12))
    trained = GLoRAModule("x", net.linear, lora_dim=4, alpha=2, rs_lora=on)
    for number, parameter in enumerate(trained.parameters()):
        parameter.data = rand(*parameter.shape, seed=number)
    tensors = {f"lora_unet_linear.{key}": tensor for key, tensor in trained.state_dict().items()}
    expected = trained.get_diff_weight(1.0)[0].detach()
    metadata = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": str(on)})}
    found, report = changed(tmp_path / "a.safetensors", model(linear=(6, 12)), tensors, metadata)
    torch.testing.assert_close(found["linear.weight"], expected.reshape(6, 12), rtol=1e-4, atol=1e-5)
    assert any("rs_lora" in note for note in report.notes) == on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 10000])
def test_a_whole_lokr_has_the_scale_that_lycoris_trained_with(dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    net = model(linear=(6, 12))
    trained = LokrModule("x", net.linear, lora_dim=dim, alpha=1, factor=2, rs_lora=True, full_matrix=True)
    for number, parameter in enumerate(trained.parameters()):
        parameter.data = rand(*parameter.shape, seed=number, scale=0.01).to(dtype).float()
    tensors = {f"lora_unet_linear.{key}": tensor.to(dtype) for key, tensor in trained.state_dict().items()}
    expected = trained.get_weight((6, 12)).detach()
    metadata = {"ss_network_dim": str(dim), "ss_network_args": json.dumps({"algo": "lokr", "rs_lora": "True"})}
    found, report = changed(tmp_path / "a.safetensors", model(linear=(6, 12)), tensors, metadata)
    torch.testing.assert_close(found["linear.weight"], expected.reshape(6, 12), rtol=1e-3, atol=1e-5)
    assert any("rs_lora" in note for note in report.notes)
