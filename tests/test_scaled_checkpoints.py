"""Weights of 8 bits with a scale beside them: checkpoint files through the command line, and models through a session.

Every stored number is 16 at first, and the adapter adds so many of its row's (or column's) scale that the sum's stored
number can be told by hand: fp8 (e4m3) holds 16, 18, 20, … between 16 and 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.__main__ import main
from lib_locon.models.table import TargetTable
from lib_locon.patching.eight_bits import stretched

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter

FP8 = torch.float8_e4m3fn
OUT, IN = 12, 8
UNET = "model.diffusion_model."
NAMES = {
    "SDXL": (
        f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
    "SD3": (f"{UNET}joint_blocks.0.x_block.mlp.fc1", "lora_unet_joint_blocks_0_x_block_mlp_fc1"),
    "Flux": ("double_blocks.0.img_mlp.0", "lora_unet_double_blocks_0_img_mlp_0"),
    "Flux in diffusers' names": (
        "transformer_blocks.0.attn.add_q_proj",
        "transformer.transformer_blocks.0.attn.add_q_proj",
    ),
}
"""Family → a module's name in a checkpoint, and in an adapter."""
MODULE, ADAPTED = NAMES["Flux"]
ROWS = torch.tensor([0.125, 0.25, 0.5] * 4)
COLUMNS = torch.tensor([0.125, 0.25] * 4)
ONE = torch.tensor(0.125)


def stored(dtype: torch.dtype = FP8, *shape: int) -> Tensor:
    return torch.full(shape or (OUT, IN), 16.0).to(dtype)


def lora(steps: float, rows: Tensor = ONE, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Adds so many scales to each number: those of its row, or of its column."""
    up = rows.expand(OUT) if columns is None else torch.ones(OUT)
    down = torch.ones(IN) if columns is None else columns
    return {"lora_up.weight": steps * up[:, None].clone(), "lora_down.weight": down[None, :].clone()}


class Desk:
    """A checkpoint of some tensors, an adapter `a`, and the command."""

    def __init__(self, folder: Path, write: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder, self._write, self._capsys = folder, write, capsys
        self.base, self.out = folder / "base.safetensors", folder / "out.safetensors"

    def adapter(self, groups: dict[str, dict[str, Tensor]]) -> Path:
        return self._write(self._folder / "loras" / "a.safetensors", groups, prefix="")

    def bake(
        self, tensors: dict[str, Tensor], groups: dict[str, dict[str, Tensor]], *more: str, **metadata: str
    ) -> tuple[str, dict[str, Any] | None, dict[str, Tensor]]:
        """stderr, the report on the adapter and what was changed at all, the new tensors."""
        save_file(tensors, self.base, metadata or None)
        self.adapter(groups)
        folder = ("--lora-dir", str(self._folder / "loras"))
        code = main(
            ["bake", str(self.base), "--prompt", "<lora:a:1>", *folder, "-o", str(self.out), "--json", "--force", *more]
        )
        stdout, stderr = self._capsys.readouterr()
        if code:
            assert not self.out.exists()
            return stderr, None, {}
        found = json.loads(stdout)
        return stderr, {**found["adapters"][0], "changed": found["changed"]}, load_file(self.out)

    def inspect(self) -> dict[str, Any]:
        code = main(["inspect", str(self._folder / "loras" / "a.safetensors"), "--base", str(self.base), "--json"])
        assert code == 0
        found: dict[str, Any] = json.loads(self._capsys.readouterr().out)["adapters"][0]["match"]
        return found


@pytest.fixture
def desk(tmp_path: Path, write_adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, write_adapter, capsys)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


# ---- files


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale(desk: Desk, family: str, name: str, shape: tuple[int, ...]) -> None:
    module, adapted = NAMES[family]
    tensors = {
        f"{module}.weight": stored(),
        f"{module}.{name}": ONE.reshape(shape).clone(),
        f"{module}.input_scale": torch.tensor(3.0),
        "scaled_fp8": torch.zeros(2, dtype=FP8),
    }
    _, report, new = desk.bake(tensors, {adapted: lora(4)})
    assert report is not None
    assert (report["used"], report["total"], report["changed"]) == (1, 1, 1)
    assert report["notes"] == ["1 weight is stored in 8 bits: its sum is rounded to 8 bits again"]
    assert new[f"{module}.weight"].dtype == FP8
    assert torch.equal(new[f"{module}.weight"].float(), torch.full((OUT, IN), 20.0))
    assert all(same_bits(new[key], tensors[key]) for key in tensors if key != f"{module}.weight"), "all else stays"
    found = desk.inspect()
    assert (found["used"], found["notes"]) == (1, report["notes"])


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "rows", "columns"),
    [
        (ROWS, ROWS, None),
        (ROWS[:, None], ROWS, None),
        (ROWS.half(), ROWS, None),
        (COLUMNS[None, :], ONE, COLUMNS),
    ],
    ids=["a row each", "a column of them", "in fp16", "one for each input"],
)
def test_many_scales(desk: Desk, dtype: torch.dtype, scale: Tensor, rows: Tensor, columns: Tensor | None) -> None:
    tensors = {f"{MODULE}.weight": stored(dtype), f"{MODULE}.weight_scale": scale.clone()}
    _, report, new = desk.bake(tensors, {ADAPTED: lora(4, rows, columns)})
    assert report is not None
    assert new[f"{MODULE}.weight"].dtype == dtype
    assert torch.equal(new[f"{MODULE}.weight"].float(), torch.full((OUT, IN), 20.0))


def test_a_convolution_with_a_scale_for_each_output(desk: Desk) -> None:
    module = f"{UNET}input_blocks.1.0.in_layers.2"
    tensors = {f"{module}.weight": stored(torch.int8, OUT, IN, 1, 1), f"{module}.weight_scale": ROWS[:, None].clone()}
    group = {key: value[:, :, None, None] for key, value in lora(4, ROWS).items()}
    _, report, new = desk.bake(tensors, {"lora_unet_input_blocks_1_0_in_layers_2": group})
    assert report is not None
    assert torch.equal(new[f"{module}.weight"], stored(torch.int8, OUT, IN, 1, 1) + 4)


@pytest.mark.parametrize(("fused", "part"), [
    ("double_blocks.0.img_attn.qkv", "transformer.transformer_blocks.0.attn.to_k"),
    (f"{UNET}joint_blocks.0.x_block.attn.qkv", "transformer.transformer_blocks.0.attn.to_k"),
])  # fmt: skip
def test_a_part_of_a_fused_projection_has_the_scales_of_its_rows(desk: Desk, fused: str, part: str) -> None:
    scales = torch.cat([ROWS * factor for factor in (1, 2, 4)])
    tensors = {f"{fused}.weight": stored(FP8, 3 * OUT, IN), f"{fused}.scale_weight": scales}
    _, report, new = desk.bake(tensors, {part: lora(4, 2 * ROWS)})
    assert report is not None
    expected = torch.full((3 * OUT, IN), 16.0)
    expected[OUT : 2 * OUT] = 20
    assert torch.equal(new[f"{fused}.weight"].float(), expected)


def test_what_needs_the_base_gets_the_numbers_with_their_scale(desk: Desk) -> None:
    """A DoRA that adds nothing but makes each output twice as long."""
    tensors = {f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": ROWS}
    twice = 2 * (16 * ROWS) * IN**0.5
    _, report, new = desk.bake(tensors, {ADAPTED: {**lora(0), "dora_scale": twice[:, None]}})
    assert report is not None
    assert torch.equal(new[f"{MODULE}.weight"].float(), torch.full((OUT, IN), 32.0))


def test_a_sum_beyond_what_the_scale_reaches_is_cut_off_and_counts_as_lost(desk: Desk) -> None:
    tensors = {f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": ONE}
    error, _, _ = desk.bake(tensors, {ADAPTED: lora(864)})  # 16 + 864 = 880, of 448
    assert "rounding to that would take 50% of what a adds" in error
    _, report, new = desk.bake(tensors, {ADAPTED: lora(864)}, "--allow-loss")
    assert report is not None
    assert "rounding takes 50% of what is added there" in report["notes"]
    assert torch.equal(new[f"{MODULE}.weight"].float(), torch.full((OUT, IN), 448.0))


def test_a_row_whose_scale_is_0_stays_0(desk: Desk) -> None:
    scales = ROWS.clone()
    scales[3] = 0
    tensors = {f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": scales}
    _, report, new = desk.bake(tensors, {ADAPTED: lora(4, scales)})
    assert report is not None
    assert bool(new[f"{MODULE}.weight"].float().isfinite().all())
    assert torch.equal(new[f"{MODULE}.weight"].float()[4:], torch.full((OUT - 4, IN), 20.0))


# ---- what rounding takes


@pytest.mark.parametrize("scaled", [True, False])
def test_what_is_rounded_away_whole_is_no_use_of_an_adapter(desk: Desk, scaled: bool) -> None:
    unit = ONE if scaled else torch.tensor(1.0)
    tensors = {f"{MODULE}.weight": stored()} | ({f"{MODULE}.scale_weight": ONE} if scaled else {})
    error, _, _ = desk.bake(tensors, {ADAPTED: lora(0.5, unit)})
    assert "nothing was written: a at 1 changes nothing in this model" in error
    assert "rounding takes all of what is added there" in error
    _, report, new = desk.bake(tensors, {ADAPTED: lora(0.5, unit)}, "--allow-loss")
    assert report is not None
    assert report["lost"]
    assert report["changed"] == 0
    assert same_bits(new[f"{MODULE}.weight"], tensors[f"{MODULE}.weight"])


def test_much_loss_is_refused_beside_a_scale_and_said_without_one(desk: Desk) -> None:
    """16 + 1.5 becomes 18: an error of 0.5 in a change of 1.5."""
    weight = {f"{MODULE}.weight": stored()}
    error, _, _ = desk.bake({**weight, f"{MODULE}.scale_weight": ONE}, {ADAPTED: lora(1.5)})
    assert "stores weights as F8_E4M3 with a scale, and rounding to that would take 33% of what a adds to 1" in error
    assert "--allow-loss" in error
    _, report, new = desk.bake(weight, {ADAPTED: lora(1.5, torch.tensor(1.0))})
    assert report is not None
    assert "rounding takes 33% of what is added there" in report["notes"]
    assert not report.get("lost")
    assert torch.equal(new[f"{MODULE}.weight"].float(), torch.full((OUT, IN), 18.0))


def test_a_sum_beyond_plain_fp8_is_refused(desk: Desk) -> None:
    error, _, _ = desk.bake({f"{MODULE}.weight": stored()}, {ADAPTED: lora(864, torch.tensor(1.0))})
    assert "numbers that torch.float8_e4m3fn cannot hold" in error


# ---- what is not known


def form(**values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


UNKNOWN: dict[str, tuple[dict[str, Tensor], str]] = {
    "a scale for each block": ({"weight_scale_inv": torch.ones(3, 2)}, "a scale (3 × 2 of F32) whose layout"),
    "scales for other rows": ({"scale_weight": torch.ones(5)}, "a scale (5 of F32) whose layout"),
    "no numbers": ({"scale_weight": torch.ones(0)}, "a scale (0 of F32) whose layout"),
    "packed scales": ({"weight_scale": torch.ones(OUT, 1, dtype=torch.uint8)}, "a scale (12 × 1 of U8) whose layout"),
    "two": ({"scale_weight": ONE, "weight_scale": ONE}, "more than one scale"),
    "a zero point": ({"scale_weight": ONE, "zero_point": ONE}, "has a zero_point beside it"),
    "a scale of another name": ({"scale": ONE}, "has a scale beside it"),
    "blocks of 4 bits": ({"weight_scale": ONE, "comfy_quant": form(format="nvfp4")}, "stores it as nvfp4"),
    "rotated": (
        {"weight_scale": ROWS, "comfy_quant": form(format="int8_tensorwise", convrot=True)},
        "stores it as int8_tensorwise with rotated inputs (convrot)",
    ),
    "no form": ({"weight_scale": ONE, "comfy_quant": torch.ones(3, dtype=torch.uint8)}, "something that it does not"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_what_is_not_known_is_left_out_and_named(desk: Desk, kind: str, dtype: torch.dtype) -> None:
    beside, says = UNKNOWN[kind]
    tensors = {f"{MODULE}.{name}": value.clone() for name, value in beside.items()}
    error, _, _ = desk.bake({f"{MODULE}.weight": stored(dtype), **tensors}, {ADAPTED: lora(4)})
    assert "nothing was written: a changes nothing" in error
    if kind == "a scale of another name" and dtype == torch.int8:
        says = "the checkpoint stores it as I8"
    assert says in error
    found = desk.inspect()
    assert found["used"] == 0
    assert says in found["unmatched"][0]["reason"]


def test_a_form_that_is_known_is_used(desk: Desk) -> None:
    tensors = {f"{MODULE}.weight": stored(torch.int8), f"{MODULE}.weight_scale": ROWS}
    blob = form(format="int8_tensorwise", full_precision_matrix_mult=True)
    _, report, new = desk.bake({**tensors, f"{MODULE}.comfy_quant": blob}, {ADAPTED: lora(4, ROWS)})
    assert report is not None
    assert torch.equal(new[f"{MODULE}.weight"], stored(torch.int8) + 4)
    assert same_bits(new[f"{MODULE}.comfy_quant"], blob)


@pytest.mark.parametrize("name", [MODULE, f"{UNET}{MODULE}"])
def test_a_form_in_the_metadata_counts_with_and_without_the_models_part(desk: Desk, name: str) -> None:
    module = f"{UNET}{MODULE}"
    tensors = {f"{module}.weight": stored(torch.int8), f"{module}.weight_scale": ROWS}

    def told(**values: object) -> str:
        return json.dumps({"layers": {name: values}})

    error, _, _ = desk.bake(tensors, {ADAPTED: lora(4, ROWS)}, _quantization_metadata=told(format="convrot_w4a4"))
    assert "stores it as convrot_w4a4" in error
    _, report, _ = desk.bake(tensors, {ADAPTED: lora(4, ROWS)}, _quantization_metadata=told(format="int8_tensorwise"))
    assert report is not None


def test_whole_numbers_without_a_scale(desk: Desk) -> None:
    error, _, _ = desk.bake({f"{MODULE}.weight": stored(torch.int8)}, {ADAPTED: lora(4)})
    assert "the checkpoint stores it as I8" in error


def test_a_scale_that_is_no_number(desk: Desk) -> None:
    tensors = {f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": torch.tensor(float("nan"))}
    error, _, _ = desk.bake(tensors, {ADAPTED: lora(4)})
    assert f"{MODULE}.scale_weight is NaN or infinite" in error


@pytest.mark.parametrize("scale", [ONE, ROWS])
def test_an_enlarged_weight_needs_a_scale_for_what_is_new(desk: Desk, scale: Tensor) -> None:
    tensors = {f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": scale}
    wider = {**lora(4), "reshape_weight": torch.tensor([OUT, 2 * IN])}
    wider["lora_down.weight"] = torch.ones(1, 2 * IN)
    error, report, new = desk.bake(tensors, {ADAPTED: wider})
    if scale is ROWS:
        assert "no scale for what would be new" in error
    else:
        assert report is not None
        assert torch.equal(new[f"{MODULE}.weight"].float(), torch.tensor([20.0] * IN + [4.0] * IN).expand(OUT, -1))


# ---- names


@pytest.mark.parametrize("module", [
    "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1",
    f"{UNET}joint_blocks.0.x_block.attn.qkv", f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1",
    "transformer_blocks.0.attn.add_q_proj", "norm_out.linear",
    "conditioner.embedders.1.model.transformer.resblocks.0.attn", "conditioner.embedders.1.model",
])  # fmt: skip
@pytest.mark.parametrize("parameter", [
    "weight", "bias", "scale", "scale_weight", "input_scale", "logit_scale", "in_proj_weight", "in_proj_bias",
    "text_projection", "positional_embedding",
])  # fmt: skip
def test_a_parameter_without_axes_breaks_no_table(module: str, parameter: str) -> None:
    fused = {f"transformer_blocks.0.attn.add_{name}_proj.{parameter}": () for name in "qkv"}
    whole = {"transformer_blocks.0.attn.add_q_proj.bias": (8,)} if module.startswith(("trans", "norm_out")) else {}
    for shape in ((), (1,)):
        table = TargetTable.of_shapes({**whole, **fused, f"{module}.{parameter}": shape})
        assert all(
            view.path in table.shapes for target in table.modules() for views in target.views.values() for view in views
        )


TEXT = "conditioner.embedders.1.model"
FUSED = {f"transformer_blocks.0.attn.add_{name}_proj.weight": torch.tensor(1.0) for name in "qkv"}


@pytest.mark.parametrize(("tensors", "adapted"), [
    ({f"{TEXT}.logit_scale": torch.tensor(1.0)}, "lora_te2_model_logit_scale"),
    ({f"{TEXT}.text_projection": torch.ones(8)}, "lora_te2_text_projection"),
    ({f"{TEXT}.text_projection": torch.tensor(1.0)}, "lora_te2_text_projection"),
    ({f"{TEXT}.transformer.resblocks.0.attn.in_proj_weight": torch.tensor(1.0)},
     "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
    ({"double_blocks.0.img_attn.qkv.weight": torch.tensor(1.0)}, "transformer.transformer_blocks.0.attn.to_k"),
    (FUSED, "lora_unet_joint_blocks_0_context_block_attn_qkv"),
])  # fmt: skip
def test_an_adapter_for_a_parameter_without_axes_is_not_used(
    desk: Desk, tensors: dict[str, Tensor], adapted: str
) -> None:
    error, _, _ = desk.bake(tensors, {adapted: lora(4)})
    assert "nothing was written: a changes nothing: none of its 1 layers fit" in error


def test_a_scale_is_nothing_that_an_adapter_names() -> None:
    shapes = {f"{MODULE}.weight": (OUT, IN), f"{MODULE}.scale_weight": (OUT, IN)}
    table = TargetTable.of_shapes(shapes)
    assert [target.name for target in table.modules()] == [MODULE]
    assert table.find(f"{MODULE}.scale_weight", ["unet"]) is None


def test_layouts_of_scales() -> None:
    assert [stretched(shape, (OUT, IN)) for shape in ((), (1,), (OUT,), (OUT, 1), (1, IN), (OUT, IN))] == [
        (), (), (OUT, 1), (OUT, 1), (1, IN), (OUT, IN)
    ]  # fmt: skip
    assert [stretched(shape, (OUT, IN)) for shape in ((IN,), (3, 2), (OUT, 2), (0,), (OUT, 1, 1))] == [None] * 5


# ---- models


def model_of(tensors: dict[str, Tensor]) -> nn.Module:
    """Of modules that are nothing but holders of parameters."""
    root = nn.Module()
    for path, value in tensors.items():
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return root


@pytest.mark.parametrize("scale", [ONE, ONE.reshape(1), ROWS, ROWS[:, None]], ids=str)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_a_session_on_modules_that_only_hold_parameters(desk: Desk, dtype: torch.dtype, scale: Tensor) -> None:
    model = model_of({f"{MODULE}.weight": stored(dtype), f"{MODULE}.scale_weight": scale.clone()})
    weight = model.get_parameter(f"{MODULE}.weight")
    adapter = lib_locon.load(desk.adapter({ADAPTED: lora(4, scale.reshape(-1))}))
    session = lib_locon.Session(model)
    report = session.apply([lib_locon.Use(adapter)])
    assert str(report).endswith(": 1/1 layers; 1 weight is stored in 8 bits: its sum is rounded to 8 bits again")
    assert torch.equal(weight.float(), torch.full((OUT, IN), 20.0))
    session.apply([])
    assert same_bits(weight, stored(dtype))


def test_a_session_says_what_rounding_takes(desk: Desk) -> None:
    model = model_of({f"{MODULE}.weight": stored(), f"{MODULE}.scale_weight": ONE})
    weight = model.get_parameter(f"{MODULE}.weight")
    adapter = lib_locon.load(desk.adapter({ADAPTED: lora(1)}))
    session = lib_locon.Session(model)

    def line(strength: float) -> str:
        lines = session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(strength))]).lines("problems")
        return lines[0] if lines else ""

    assert line(4) == ""
    assert line(0.5).startswith("a at 0.5 changes nothing in this model; 1 weight")
    assert "rounding takes all of what is added there" in line(0.5)
    assert same_bits(weight, stored())
    assert line(1.5) == ""
    report = session.apply([lib_locon.Use(adapter, lib_locon.Strengths.both(1.5), name="again")])
    assert report.written == 0
    assert str(report).endswith("rounding takes 33% of what is added there"), "known of the time when it was written"
    session.restore()


@pytest.mark.parametrize("beside", [{"zero_point": ONE}, {"comfy_quant": form(format="int8_tensorwise", convrot=True)}])
def test_a_session_leaves_out_what_is_not_known(desk: Desk, beside: dict[str, Tensor]) -> None:
    tensors = {f"{MODULE}.weight": stored(torch.int8), f"{MODULE}.weight_scale": ONE}
    model = model_of({**tensors, **{f"{MODULE}.{name}": value for name, value in beside.items()}})
    report = lib_locon.Session(model).apply([lib_locon.Use(lib_locon.load(desk.adapter({ADAPTED: lora(4)})))])
    assert report.adapters[0].used == 0
    assert any(word in str(report) for word in ("zero_point", "convrot"))
    assert same_bits(model.get_parameter(f"{MODULE}.weight"), stored(torch.int8))


STRANGE_FORMS = {
    "deep": torch.tensor(list(b"[" * 60_000), dtype=torch.uint8),
    "long": torch.zeros(1 << 20, dtype=torch.uint8),
    "numbers": torch.tensor([0.5, 300.0]),
    "several axes": torch.zeros(2, 3, dtype=torch.uint8),
    "nothing in it": torch.empty(40, dtype=torch.uint8, device="meta"),
}


@pytest.mark.parametrize("form", STRANGE_FORMS.values(), ids=STRANGE_FORMS)
def test_a_form_in_a_model_that_cannot_be_read_leaves_the_weight_out(desk: Desk, form: Tensor) -> None:
    weight, scale, written = (f"{MODULE}.{name}" for name in ("weight", "weight_scale", "comfy_quant"))
    model = model_of({weight: stored(torch.int8), scale: ONE, written: form})
    report = lib_locon.Session(model).apply([lib_locon.Use(lib_locon.load(desk.adapter({ADAPTED: lora(4)})))])
    assert "its form is something that it does not tell" in str(report)
    assert same_bits(model.get_parameter(weight), stored(torch.int8))
