"""Marks that trainers leave in a file: kohya's split projections, LyCORIS' rs_lora, OneTrainer's and kohya's rotations.

Expected values are the trainers' own formulas, written out part by part or number by number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_locon.files.adapter import read_adapter
from lib_locon.report import AdapterReport
from lib_locon.session import Session, Use
from tests.oracles import naive
from tests.oracles.model_tables import network

W = 8
"""The width of the transformers below."""
ROOT = "model.diffusion_model."
QKV, SINGLE = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
FUSED = {QKV: (3 * W, W), SINGLE: (7 * W, W), "double_blocks.0.img_attn.proj": (W, W)}
SPLIT = {
    **{f"transformer_blocks.0.attn.{name}": (W, W) for name in ("to_q", "to_k", "to_v", "add_q_proj")},
    **{f"single_transformer_blocks.0.attn.{name}": (W, W) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp": (4 * W, W),
}


def rand(*shape: int, seed: int = 1, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(weights: Mapping[str, tuple[int, ...]], root: str = ROOT) -> nn.Module:
    return network({f"{root}{name}.weight": shape for name, shape in weights.items()})


class Applied:
    """A file on a model: its report, and what it changed each weight by."""

    def __init__(
        self, model: nn.Module, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        session = Session(model)
        self.report: AdapterReport = session.apply([Use(read_adapter(path))]).adapters[0]
        self.changes = {name: parameter - before[name] for name, parameter in model.named_parameters()}
        session.restore()
        whole, header = (
            [
                [(layer.scale, layer.alpha, layer.note, layer.label, layer.family.rank) for layer in module.layers]
                for module in read_adapter(path, header_only=only).modules
            ]
            for only in (False, True)
        )
        assert whole == header  # a card says what the run does

    def of(self, name: str) -> Tensor:
        return next(change for path, change in self.changes.items() if path.endswith(f"{name}.weight"))


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


# ---- kohya's split_qkv


def kohya(alpha: str = "2.0", **arguments: object) -> dict[str, str]:
    """The header of a Flux adapter of kohya."""
    return {
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "4",
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
    }


def split_pair(parts: Sequence[int], rank: int, alpha: float) -> tuple[dict[str, Tensor], Tensor]:
    """A fused module as the trainer saves it, and the change that it trained: each part's own, at alpha / rank."""
    downs = [rand(rank, W, seed=10 + i) for i in range(len(parts))]
    ups = [rand(rows, rank, seed=20 + i) for i, rows in enumerate(parts)]
    tensors = {
        "lora_down.weight": torch.cat(downs),
        "lora_up.weight": torch.block_diag(*ups),
        "alpha": torch.tensor(alpha),
    }
    return tensors, torch.cat([alpha / rank * up @ down for up, down in zip(ups, downs, strict=True)])


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def flat(name: str, prefix: str = "lora_unet_") -> str:
    return prefix + name.replace(".", "_")


@pytest.mark.parametrize("spelling", ["True", "true", True, 1])
def test_q_k_v_that_were_trained_apart_have_the_scale_of_one_part(path: Path, spelling: object) -> None:
    qkv, trained_qkv = split_pair([W] * 3, 4, 2.0)
    single, trained_single = split_pair([W, W, W, 4 * W], 4, 2.0)
    plain = {"lora_down.weight": rand(4, W), "lora_up.weight": rand(W, 4), "alpha": torch.tensor(2.0)}
    proj = "double_blocks.0.img_attn.proj"
    tensors = {**under(flat(QKV), qkv), **under(flat(SINGLE), single), **under(flat(proj), plain)}
    found = Applied(model_of(FUSED), path, tensors, kohya(split_qkv=spelling))
    assert close(found.of(QKV), trained_qkv)
    assert close(found.of(SINGLE), trained_single)
    assert close(found.of(proj), 0.5 * plain["lora_up.weight"] @ plain["lora_down.weight"])
    assert str(found.report).count("kohya's split_qkv") == 1


def test_the_rank_of_a_part_may_be_its_modules_own(path: Path) -> None:
    qkv, trained = split_pair([W] * 3, 5, 2.0)
    metadata = kohya(split_qkv="True", img_attn_dim="5")
    assert close(Applied(model_of(FUSED), path, under(flat(QKV), qkv), metadata).of(QKV), trained)


def test_alpha_zero_is_the_rank_of_a_part(path: Path) -> None:
    qkv, trained = split_pair([W] * 3, 4, 4.0)
    assert close(Applied(model_of(FUSED), path, under(flat(QKV), qkv), kohya("0", split_qkv="True")).of(QKV), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_alpha_is_still_the_trainers(path: Path, dtype: torch.dtype) -> None:
    qkv, _ = split_pair([W] * 3, 4, 0.3)
    stored = {suffix: tensor.to(dtype) for suffix, tensor in qkv.items()}
    found = Applied(model_of(FUSED), path, under(flat(QKV), stored), kohya("0.3", split_qkv="True"))
    whole = stored["lora_up.weight"].double() @ stored["lora_down.weight"].double()
    assert close(found.of(QKV), float(stored["alpha"]) / 4 * whole)


def test_sd3s_projections_are_split_too(path: Path) -> None:
    name = "joint_blocks.0.x_block.attn.qkv"
    qkv, trained = split_pair([W] * 3, 2, 3.0)
    metadata = {**kohya("3.0", split_qkv="True"), "ss_network_module": "networks.lora_sd3"}
    assert close(Applied(model_of({name: (3 * W, W)}), path, under(flat(name), qkv), metadata).of(name), trained)


def test_a_model_that_holds_q_k_v_apart_gets_the_same_change(path: Path) -> None:
    qkv, trained = split_pair([W] * 3, 4, 2.0)
    found = Applied(model_of(SPLIT, ""), path, under(flat(QKV), qkv), kohya(split_qkv="True"))
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert close(found.changes[f"transformer_blocks.0.attn.{name}.weight"], trained[i * W : (i + 1) * W])


@pytest.mark.parametrize(
    ("metadata", "mentioned"),
    [
        (kohya(split_qkv="False"), 0),
        (kohya(), 0),
        ({}, 0),
        (kohya("12.0", split_qkv="True"), 1),  # made anew by a tool that wrote its own alpha and kept the metadata
        (kohya("Dynamic", split_qkv="True"), 0),  # resized
        ({"ss_network_args": "[" * 10000}, 0),
        ({"ss_network_args": "[1]"}, 0),
    ],
)
def test_without_the_trainers_word_alpha_is_of_the_whole_rank(
    path: Path, metadata: dict[str, str], mentioned: int
) -> None:
    qkv, trained = split_pair([W] * 3, 4, 2.0)
    found = Applied(model_of(FUSED), path, under(flat(QKV), qkv), metadata)
    assert close(found.of(QKV), trained / 3)
    assert str(found.report).count("split_qkv") == mentioned


@pytest.mark.parametrize("row", [0, W - 1, W, 2 * W - 1, 2 * W, 3 * W - 1])
def test_a_pair_that_was_trained_on_as_one_keeps_alpha_over_its_rank(path: Path, row: int) -> None:
    qkv, _ = split_pair([W] * 3, 4, 2.0)
    column = (row // W * 4 + 4) % 12  # of the next part
    qkv["lora_up.weight"][row, column] = 0.5
    found = Applied(model_of(FUSED), path, under(flat(QKV), qkv), kohya(split_qkv="True"))
    assert close(found.of(QKV), 2 / 12 * qkv["lora_up.weight"] @ qkv["lora_down.weight"])
    assert "alpha / rank there" in str(found.report)


def test_a_rank_that_is_no_multiple_of_the_parts_is_no_split_one(path: Path) -> None:
    tensors = {"lora_down.weight": rand(4, W), "lora_up.weight": rand(3 * W, 4), "alpha": torch.tensor(2.0)}
    found = Applied(model_of(FUSED), path, under(flat(QKV), tensors), kohya(split_qkv="True"))
    assert close(found.of(QKV), 0.5 * tensors["lora_up.weight"] @ tensors["lora_down.weight"])


# ---- LyCORIS' rs_lora


def lycoris(alpha: float = 3.0, module: str = "lycoris.kohya", **arguments: str) -> dict[str, str]:
    return {
        "ss_network_module": module,
        "ss_network_dim": "4",
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({"rs_lora": "True", **arguments}),
    }


LINEAR = "input_blocks.1.1.proj_in"


def linear(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Applied:
    return Applied(model_of({LINEAR: (6, W)}), path, under(flat(LINEAR), tensors), metadata)


def test_rs_loras_glora_is_divided_by_the_root_of_its_rank(path: Path) -> None:
    tensors = {"a1.weight": rand(W, 4), "a2.weight": rand(4, W, seed=2), "b1.weight": rand(6, 4, seed=3),
               "b2.weight": rand(4, W, seed=4)}  # fmt: skip
    model = model_of({LINEAR: (6, W)})
    base = model.get_parameter(f"{ROOT}{LINEAR}.weight").clone()
    full = base @ tensors["a1.weight"] @ tensors["a2.weight"] + tensors["b1.weight"] @ tensors["b2.weight"]
    stored = under(flat(LINEAR), {**tensors, "alpha": torch.tensor(3.0)})
    found = Applied(model, path, stored, lycoris(algo="glora"))
    assert close(found.of(LINEAR), 3 / 2 * full)
    assert "rs_lora" in str(found.report)
    for other in (lycoris(algo="glora", rs_lora="False"), lycoris(module="networks.lora"), {}):
        found = Applied(model, path, stored, other)
        assert close(found.of(LINEAR), 3 / 4 * full) and "rs_lora" not in str(found.report)


@pytest.mark.parametrize(
    ("stored", "metadata", "scale"),
    [
        (6.0, lycoris(), 1.5),  # alpha · √rank is stored: alpha / rank is right
        (3.0, lycoris(), 1.5),  # alpha itself is stored, as before July 2024
        (5.0, lycoris(conv_alpha="5"), 2.5),
        (6.0, lycoris(conv_alpha="6"), 1.5),  # either could be meant: the rule that every loader knows
        (3.0, lycoris(algo="dylora"), 0.75),
        (7.0, lycoris(), 1.75),  # nobody's: a tool has changed it
    ],
)
def test_rs_lora_of_low_rank_products(path: Path, stored: float, metadata: dict[str, str], scale: float) -> None:
    tensors = {"lora_up.weight": rand(6, 4), "lora_down.weight": rand(4, W, seed=2), "alpha": torch.tensor(stored)}
    found = linear(path, tensors, metadata)
    assert close(found.of(LINEAR), scale * tensors["lora_up.weight"] @ tensors["lora_down.weight"])


@pytest.mark.parametrize(
    ("stored", "metadata", "scale"),
    [(8.0, lycoris(), 2.0), (4.0, lycoris(), 2.0), (9.0, lycoris(), 1.0), (8.0, lycoris(rs_lora="false"), 1.0)],
)
def test_rs_loras_lokr_of_two_whole_halves_has_the_root_of_its_dim(
    path: Path, stored: float, metadata: dict[str, str], scale: float
) -> None:
    w1, w2 = rand(2, 2, scale=0.5), rand(3, 4, seed=2, scale=0.5)
    found = linear(path, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(stored)}, metadata)
    assert close(found.of(LINEAR), scale * torch.kron(w1, w2))


# ---- OneTrainer's rotations

CONV, BLOCK = "input_blocks.1.0.in_layers.2", 4
NAMES = {
    "legacy": "lora_unet_down_blocks_0_resnets_0_conv1",
    "kohya": flat(CONV),
    "diffusers": "unet.down_blocks.0.resnets.0.conv1",
    "comfy": f"diffusion_model.{CONV}",
    "original": CONV,
}
HEADER = {"ot_branch": "master", "ot_revision": "23df383"}


def turned(weight: Tensor, packed: Tensor, scaled: bool, by_trainer: bool) -> Tensor:
    """W·R − W of each block of inputs, number by number (`by_trainer`), or PEFT's W·Rᵀ − W."""
    rows = weight.reshape(len(weight), -1).double()
    out = torch.zeros_like(rows)
    for k in range(rows.shape[1] // BLOCK):
        values = packed[min(k, len(packed) - 1)].double() / (2 * (BLOCK - 1) ** 0.5 if scaled else 1)
        q = torch.zeros(BLOCK, BLOCK, dtype=torch.float64)
        order = [(i, j) for i in range(BLOCK) for j in range(i + 1, BLOCK)]
        for (i, j), value in zip(order, values, strict=True):
            q[i, j], q[j, i] = value, -value
        rotation = torch.eye(BLOCK, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        columns = slice(k * BLOCK, (k + 1) * BLOCK)
        out[:, columns] = rows[:, columns] @ (rotation if by_trainer else rotation.T)
    return (out - rows).reshape(weight.shape)


@pytest.fixture(scope="module")
def convolution() -> nn.Module:
    # the names of a whole UNet's first blocks, which is what aliases are made from
    return model_of(
        {CONV: (W, W, 3, 3), "input_blocks.0.0": (W, 4, 3, 3), "input_blocks.2.0.in_layers.2": (W, W, 3, 3)}
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_a_convolution_of_onetrainer_turns_its_way_under_all_names(
    path: Path, convolution: nn.Module, names: str, scaled: bool, shared: bool
) -> None:
    weight = convolution.get_parameter(f"{ROOT}{CONV}.weight").clone()
    packed = rand(1 if shared else 9 * W // BLOCK, BLOCK * (BLOCK - 1) // 2, scale=0.3)
    tensors = {"oft_R.weight": packed, **({"oft_R.scaled_oft": torch.tensor(True)} if scaled else {})}
    found = Applied(convolution, path, under(NAMES[names], tensors), HEADER)
    expected = turned(weight, packed, scaled, by_trainer=True)
    assert close(found.of(CONV), expected)
    assert not close(expected, turned(weight, packed, scaled, by_trainer=False))


def test_the_marker_of_scaled_oft_is_onetrainers_word_without_metadata(path: Path, convolution: nn.Module) -> None:
    weight = convolution.get_parameter(f"{ROOT}{CONV}.weight").clone()
    packed = rand(9 * W // BLOCK, BLOCK * (BLOCK - 1) // 2, scale=0.3)
    marked = {"oft_R.weight": packed, "oft_R.scaled_oft": torch.tensor(True)}
    found = Applied(convolution, path, under(NAMES["diffusers"], marked))
    assert close(found.of(CONV), turned(weight, packed, True, by_trainer=True))


@pytest.mark.parametrize(("names", "by_trainer"), [("legacy", True), ("diffusers", False), ("comfy", False)])
def test_without_a_mark_the_names_decide(path: Path, convolution: nn.Module, names: str, by_trainer: bool) -> None:
    weight = convolution.get_parameter(f"{ROOT}{CONV}.weight").clone()
    packed = rand(9 * W // BLOCK, BLOCK * (BLOCK - 1) // 2, scale=0.3)
    found = Applied(convolution, path, under(NAMES[names], {"oft_R.weight": packed}))
    assert close(found.of(CONV), turned(weight, packed, False, by_trainer))


def test_one_rotation_of_the_inputs_turns_q_k_v_that_are_held_apart(path: Path) -> None:
    model = model_of(SPLIT, "")
    base = torch.cat([model.get_parameter(f"transformer_blocks.0.attn.{n}.weight") for n in ("to_q", "to_k", "to_v")])
    packed = rand(W // BLOCK, BLOCK * (BLOCK - 1) // 2, scale=0.3)
    found = Applied(model, path, under(f"diffusion_model.{QKV}", {"oft_R.weight": packed}), HEADER)
    expected = naive.peft_oft({"oft_R.weight": packed}, base)
    got = torch.cat([found.changes[f"transformer_blocks.0.attn.{n}.weight"] for n in ("to_q", "to_k", "to_v")])
    assert close(got, expected) and found.report.used == 1


# ---- kohya's rotations of Flux, part by part


def split_rotation(parts: Sequence[int], alpha: float, blocks: int = 2) -> dict[str, Tensor]:
    made = {f"oft_blocks.{i}": rand(blocks, rows // blocks, rows // blocks, seed=30 + i, scale=0.4)
            for i, rows in enumerate(parts)}  # fmt: skip
    return {**made, "alpha": torch.tensor(alpha)}


def part_by_part(tensors: Mapping[str, Tensor], weight: Tensor, parts: Sequence[int]) -> Tensor:
    """Each part is kohya's OFT of its own rows: its own blocks, and a limit of alpha · these rows."""
    changes, start = [], 0
    for i, rows in enumerate(parts):
        own = {"oft_blocks": tensors[f"oft_blocks.{i}"], "alpha": tensors["alpha"]}
        changes.append(naive.oft(own, weight[start : start + rows], {"kohya": True}))
        start += rows
    return torch.cat(changes)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 100.0])  # nothing turns; parts limited; free
@pytest.mark.parametrize(
    ("name", "parts"),
    [(QKV, [W] * 3), (SINGLE, [W, W, W, 4 * W]), ("double_blocks.0.img_attn.proj", [W])],
)
def test_kohyas_flux_oft_turns_each_part_by_itself(path: Path, name: str, parts: list[int], alpha: float) -> None:
    model, tensors = model_of(FUSED), split_rotation(parts, alpha)
    weight = model.get_parameter(f"{ROOT}{name}.weight").clone()
    found = Applied(model, path, under(flat(name, "oft_unet_"), tensors))
    assert found.report.families == {"OFT": 1} and found.report.unmatched == ()
    assert close(found.of(name), part_by_part(tensors, weight, parts))


def test_its_parts_turn_q_k_v_and_the_mlp_of_a_model_that_holds_them_apart(path: Path) -> None:
    model, parts = model_of(SPLIT, ""), [W, W, W, 4 * W]
    stem = "single_transformer_blocks.0."
    held = [f"{stem}attn.to_q.weight", f"{stem}attn.to_k.weight", f"{stem}attn.to_v.weight", f"{stem}proj_mlp.weight"]
    tensors = split_rotation(parts, 0.02)
    expected = part_by_part(tensors, torch.cat([model.get_parameter(name) for name in held]), parts)
    found = Applied(model, path, under(flat(SINGLE, "oft_unet_"), tensors))
    assert found.report.unmatched == ()
    assert close(torch.cat([found.changes[name] for name in held]), expected)


def test_one_rotation_of_all_rows_is_refused_where_q_k_v_are_apart(path: Path) -> None:
    tensors = {"oft_blocks": rand(2, 12, 12), "alpha": torch.tensor(0.1)}
    tensors = {
        **under(flat(QKV, "oft_unet_"), tensors),
        **under("transformer_blocks.0.attn.to_q", {"diff": rand(W, W)}),
    }
    report = Applied(model_of(SPLIT, ""), path, tensors).report
    assert report.used == 1 and "needs it whole" in report.unmatched[0].reason


@pytest.mark.parametrize("lost", ["oft_blocks.0", "oft_blocks.1", "oft_blocks.2"])
def test_a_part_that_is_missing_spoils_its_module_only(path: Path, lost: str) -> None:
    tensors = split_rotation([W] * 3, 1.0)
    del tensors[lost]
    proj = split_rotation([W], 1.0)
    name = flat("double_blocks.0.img_attn.proj", "oft_unet_")
    found = Applied(model_of(FUSED), path, {**under(flat(QKV, "oft_unet_"), tensors), **under(name, proj)})
    assert found.report.used == 1 and not found.of(QKV).any()
    assert all(flat(QKV, "oft_unet_") in item.key for item in found.report.unmatched)
    why = {
        "oft_blocks.0": "oft_blocks.0 missing",
        "oft_blocks.1": "not all of the parts before it",
        "oft_blocks.2": "wrong shape",
    }
    assert all(why[lost] in item.reason for item in found.report.unmatched) and found.report.unmatched
