"""What no library writes on demand: old and rare forms, choices that a file leaves open, what is known but not read.

Expected values are the formulas of docs/formulas.md, written out here or in `tests.oracles.naive`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from lib_locon.report import AdapterReport
from lib_locon.resolve import AdapterCache
from tests.oracles import naive

OUT, IN = 8, 6


def rand(*shape: int, seed: int = 1, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Bench:
    """One model with a linear layer, a convolution, a norm and an embedding; adapters are written and applied to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "adapter.safetensors"
        self.model = nn.ModuleDict(
            {
                "linear": nn.Linear(IN, OUT),
                "square": nn.Linear(IN, IN),
                "conv": nn.Conv2d(IN, OUT, 3),
                "norm": nn.LayerNorm(OUT),
                "embedding": nn.Embedding(10, OUT),
            }
        )
        with torch.no_grad():
            for i, parameter in enumerate(self.model.parameters()):
                parameter.copy_(rand(*parameter.shape, seed=100 + i, scale=1.0))
        self.base = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def apply(
        self, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, strength: float = 1.0
    ) -> AdapterReport:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.path, metadata)
        use = lib_locon.Use(lib_locon.load(self.path), lib_locon.Strengths.both(strength))
        return lib_locon.Session(self.model).apply([use]).adapters[0]

    def change(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach() - self.base[name]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-5)


def named(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


# ---- changes that are stored whole


def test_set_weight_replaces_the_base_by_strength(bench: Bench) -> None:
    new = rand(OUT, IN, seed=3)
    bench.apply({"linear.set_weight": new}, strength=0.5)
    assert close(bench.model["linear"].weight, (bench.base["linear.weight"] + new) / 2)


@pytest.mark.parametrize(
    ("suffix", "parameter"),
    [("linear.diff_b", "linear.bias"), ("norm.w_norm", "norm.weight"), ("norm.b_norm", "norm.bias")],
)
def test_each_half_of_a_pair_may_come_alone(bench: Bench, suffix: str, parameter: str) -> None:
    report = bench.apply({suffix: rand(OUT, seed=4)}, strength=-1.0)
    assert (report.used, report.unmatched) == (1, ())
    assert close(bench.change(parameter), -rand(OUT, seed=4))


def test_a_bias_that_the_model_lacks_is_said(bench: Bench) -> None:
    report = bench.apply({"embedding.diff_b": rand(OUT), "linear.diff": rand(OUT, IN)})
    assert report.used == 1
    assert [item.reason for item in report.unmatched] == ["the model's embedding has no bias"]


def test_a_loras_bias_has_the_loras_scale(bench: Bench) -> None:
    bench.apply(
        named(
            "linear",
            {
                "lora_A.weight": rand(2, IN),
                "lora_B.weight": rand(OUT, 2),
                "lora_B.bias": rand(OUT, seed=5),
                "alpha": torch.tensor(6.0),
            },
        )
    )
    assert close(bench.change("linear.bias"), 3 * rand(OUT, seed=5))


# ---- rotations


def test_kohyas_oft_is_always_limited(bench: Bench) -> None:
    tensors = {"oft_blocks": rand(2, 4, 4, scale=0.5), "alpha": torch.tensor(0.05)}
    report = bench.apply(named("oft_unet_linear", tensors))
    assert report.families == {"OFT": 1}
    expected = naive.delta("oft", tensors, bench.base["linear.weight"], {"kohya": True})
    assert close(bench.change("linear.weight"), expected)


def test_kohyas_alpha_zero_is_no_rotation_and_lycoris_is_no_limit(bench: Bench) -> None:
    tensors = {"oft_blocks": rand(2, 4, 4, scale=0.5), "alpha": torch.tensor(0.0)}
    bench.apply(named("oft_unet_linear", tensors))
    assert bench.change("linear.weight").abs().max() < 1e-5
    bench = Bench(bench.path.parent)
    bench.apply(named("lora_unet_linear", tensors))
    assert close(bench.change("linear.weight"), naive.delta("oft", tensors, bench.base["linear.weight"]))
    assert bench.change("linear.weight").abs().max() > 0.1


@pytest.mark.parametrize("finished", [True, False])
def test_old_oft_is_the_rotation_or_its_difference_from_one(bench: Bench, finished: bool) -> None:
    difference = rand(2, 4, 4)
    bench.apply({"linear.oft_diag": difference + torch.eye(4) if finished else difference})
    rotation = torch.block_diag(*(difference + torch.eye(4)))
    assert close(bench.change("linear.weight"), (rotation.T - torch.eye(OUT)) @ bench.base["linear.weight"])


def test_onetrainers_oft_turns_convolutions_the_other_way(bench: Bench) -> None:
    packed = {"oft_R.weight": rand(IN * 9 // 3, 3), "oft_R.scaled_oft": torch.tensor(1.0)}
    reversed_ = {"oft_R.weight": -packed["oft_R.weight"], "oft_R.scaled_oft": torch.tensor(1.0)}
    weight = bench.base["conv.weight"]
    bench.apply(named("lora_unet_conv", packed))
    got = bench.change("conv.weight")
    # R of −Q is Rᵀ up to the last term of the series, so W·R is nearly W·R(−Q)ᵀ
    other = naive.delta("peft_oft", reversed_, weight)
    assert torch.allclose(got.double(), other, atol=2e-3)
    assert not torch.allclose(got.double(), naive.delta("peft_oft", packed, weight), atol=2e-2)
    bench = Bench(bench.path.parent)
    peft = {"oft_R.weight": packed["oft_R.weight"]}  # PEFT writes no marker
    bench.apply(named("base_model.model.conv", peft))
    assert close(bench.change("conv.weight"), naive.delta("peft_oft", peft, weight))


def test_onetrainers_oft_on_linear_layers_is_pefts(bench: Bench) -> None:
    packed = {"oft_R.weight": rand(2, 3), "oft_R.scaled_oft": torch.tensor(1.0)}
    bench.apply(named("lora_unet_linear", packed))
    expected = naive.delta("peft_oft", packed, bench.base["linear.weight"])
    assert close(bench.change("linear.weight"), expected)


# ---- alpha and scale


def lora(alpha: float | None, rank: int = 2) -> dict[str, Tensor]:
    tensors = {"lora_up.weight": rand(OUT, rank, seed=7), "lora_down.weight": rand(rank, IN, seed=8)}
    return tensors if alpha is None else {**tensors, "alpha": torch.tensor(alpha)}


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (-4.0, -2.0), (8.0, 4.0)])
def test_alpha(bench: Bench, alpha: float | None, scale: float) -> None:
    tensors = lora(alpha)
    bench.apply(named("linear", tensors))
    assert close(bench.change("linear.weight"), scale * tensors["lora_up.weight"] @ tensors["lora_down.weight"])


def test_an_infinite_alpha_spoils_its_own_layer_only(bench: Bench) -> None:
    report = bench.apply({**named("linear", lora(float("inf"))), "square.diff": rand(IN, IN)})
    assert report.used == 1
    assert "not finite" in report.unmatched[0].reason
    assert torch.equal(bench.model["linear"].weight, bench.base["linear.weight"])


def test_an_infinite_alpha_that_is_not_used_does_no_harm(bench: Bench) -> None:
    w1, w2 = rand(2, 3), rand(4, 2, seed=2)
    bench.apply(named("linear", {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(float("inf"))}))
    assert close(bench.change("linear.weight"), torch.kron(w1, w2))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"linear": 2}}, 1.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"^linear$": 2}}, 4.0),
        ({"lora_alpha": 8}, 4.0),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["beside", "metadata"])
def test_the_scale_of_a_configuration(bench: Bench, settings: dict[str, object], scale: float, place: str) -> None:
    tensors, metadata = lora(None), None
    if place == "beside":
        (bench.path.parent / "adapter_config.json").write_text(json.dumps(settings))
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    peft = {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"]}
    bench.apply(named("unet.linear", peft), metadata)
    assert close(bench.change("linear.weight"), scale * tensors["lora_up.weight"] @ tensors["lora_down.weight"])


def test_an_alpha_in_the_file_wins_over_the_configuration(bench: Bench) -> None:
    (bench.path.parent / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 100}))
    tensors = lora(2.0)
    bench.apply(named("linear", tensors))
    assert close(bench.change("linear.weight"), tensors["lora_up.weight"] @ tensors["lora_down.weight"])


def test_a_configuration_beside_a_file_that_is_not_pefts_is_anothers(bench: Bench) -> None:
    (bench.path.parent / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 80}))
    tensors = lora(None)
    bench.apply(named("lora_unet_linear", tensors))
    assert close(bench.change("linear.weight"), tensors["lora_up.weight"] @ tensors["lora_down.weight"])


def test_a_changed_configuration_is_read_anew(bench: Bench) -> None:
    config, cache = bench.path.parent / "adapter_config.json", AdapterCache()
    factors = {"lora_A.weight": rand(2, IN), "lora_B.weight": rand(OUT, 2)}
    save_file(named("base_model.model.linear", factors), bench.path)
    session = lib_locon.Session(bench.model)
    changes = []
    for alpha in (2, 20):
        config.write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        os.utime(config, ns=(alpha, alpha))
        session.apply([lib_locon.Use(cache.read(bench.path))])
        changes.append(bench.change("linear.weight"))
    assert close(changes[1], 10 * changes[0])


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_itself_saved(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    base = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "1"], use_rslora=rslora, alpha_pattern={"1": 3}, init_lora_weights=False
    )
    trained = get_peft_model(plain, config)
    trained.save_pretrained(tmp_path)
    deltas = {i: trained.base_model.model[i].get_delta_weight("default").detach() for i in (0, 1)}
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    model.load_state_dict(base)
    adapter = lib_locon.load(tmp_path / "adapter_model.safetensors")
    report = lib_locon.Session(model).apply([lib_locon.Use(adapter)]).adapters[0]
    assert (report.used, report.unmatched) == (2, ())
    for i, delta in deltas.items():
        assert close(model[i].weight - base[f"{i}.weight"], delta)


def test_a_broken_configuration_is_said_and_does_no_harm(bench: Bench) -> None:
    (bench.path.parent / "adapter_config.json").write_text("{")
    report = bench.apply(named("linear", {"lora_A.weight": rand(2, IN), "lora_B.weight": rand(OUT, 2)}))
    assert report.used == 1
    assert "adapter_config.json cannot be read" in str(report)


# ---- DoRA where the shape leaves the side open


def dora(magnitude: Tensor) -> dict[str, Tensor]:
    return {
        "lora_up.weight": rand(IN, 2, seed=7),
        "lora_down.weight": rand(2, IN, seed=8),
        "dora_scale": magnitude,
    }


@pytest.mark.parametrize("on_output", [True, False])
def test_the_metadata_decides_a_square_layer(bench: Bench, on_output: bool) -> None:
    metadata = {"ss_network_args": json.dumps({"dora_wd": "True", "wd_on_output": str(on_output)})}
    tensors = dora(1 + rand(IN, seed=9))
    report = bench.apply(named("square", tensors), metadata)
    shaped = {**tensors, "dora_scale": tensors["dora_scale"].reshape((IN, 1) if on_output else (1, IN))}
    expected = naive.delta("dora_lora", shaped, bench.base["square.weight"])
    assert close(bench.change("square.weight"), expected)
    assert "the file's metadata" in str(report)


def test_else_the_other_layers_decide(bench: Bench) -> None:
    other = {**lora(None), "dora_scale": 1 + rand(1, IN, seed=3)}
    tensors = dora(1 + rand(IN, seed=9))
    report = bench.apply({**named("linear", other), **named("square", tensors)})
    shaped = {**tensors, "dora_scale": tensors["dora_scale"].reshape(1, IN)}
    assert close(bench.change("square.weight"), naive.delta("dora_lora", shaped, bench.base["square.weight"]))
    assert "the file's other layers" in str(report)


def test_a_magnitude_without_factors_is_said(bench: Bench) -> None:
    report = bench.apply({"linear.dora_scale": rand(OUT, 1), "square.diff": rand(IN, IN)})
    assert [item.reason for item in report.unmatched] == ["a DoRA magnitude without factors"]


# ---- known, but not to be done


@pytest.mark.parametrize(
    ("suffix", "name"),
    [("vera_lambda_b", "VeRA"), ("oft_r", "before 0.16"), ("bm.weight", "GLoRA"), ("hra_u", "HRA")],
)
def test_what_is_known_but_not_read_is_named(bench: Bench, suffix: str, name: str) -> None:
    beside = named("linear", lora(None))  # must not be taken for a LoRA: with the other factor it means something else
    report = bench.apply({**beside, f"linear.{suffix}": rand(4, 4), "square.diff": rand(IN, IN)})
    assert report.used == 1
    assert all(name in item.reason for item in report.unmatched)
    assert not bench.change("linear.weight").any()


def test_tlora_on_a_convolution_is_left_out_with_a_word(bench: Bench) -> None:
    tensors = {
        "q_layer.weight": rand(2, IN, 1, 1),
        "p_layer.weight": rand(OUT, 2, 1, 1),
        "lambda_layer": rand(1, 2),
    }
    report = bench.apply({**named("conv", tensors), "square.diff": rand(IN, IN)})
    assert report.used == 1
    assert "no single meaning" in str(report)


def test_an_incomplete_family_says_what_is_missing(bench: Bench) -> None:
    report = bench.apply(
        {"linear.hada_w1_a": rand(OUT, 2), "linear.hada_w1_b": rand(2, IN), "square.diff": rand(IN, IN)}
    )
    assert "hada_w2_a, hada_w2_b missing" in report.unmatched[0].reason


@pytest.mark.parametrize("suffix", ["oft_R.{}.weight", "ia3_l.{}", "hada_w1_a.{}", "lora_B.{}.bias"])
def test_pefts_name_of_the_adapter_may_stand_in_the_key(suffix: str) -> None:
    from lib_locon.files.dialects import split_key

    assert split_key("base_model.model.a.b." + suffix.format("my_style")) == (
        "base_model.model.a.b",
        suffix.replace(".{}", ""),
    )


def test_dyn_on_a_family_without_ranks_to_keep_is_said(bench: Bench) -> None:
    save_file(named("linear", {"lokr_w1": rand(2, 3), "lokr_w2": rand(4, 2)}), bench.path)
    report = lib_locon.Session(bench.model).apply([lib_locon.Use(lib_locon.load(bench.path), dyn=1)])
    assert "dyn has no meaning for LoKr" in str(report)


def test_a_stable_cascade_file_is_refused_in_a_sentence(bench: Bench) -> None:
    with pytest.raises(lib_locon.FileError, match="Stable Cascade"):
        bench.apply(named("lora_prior_unet_linear", lora(None)))
