"""`builtin` rounding: what the built-in Lora makes of the same adapters, bit for bit; and all else as ever."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lib_locon
from extensions_builtin_shim.launch import launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon import Session, Strengths, Use
from lib_locon.arithmetic import has_products
from lib_locon.models.targets import View
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import make_plan
from lib_locon.patching.rounding import ROUNDINGS, rounding_named
from tests import random_adapters
from tests.conftest import MakePatch, Zoo

put_modules_on_path()

OUT, IN, RANK = 24, 40, 4
HALVES = (torch.float16, torch.bfloat16)
VIEWS: tuple[dict[str, Any], ...] = (
    {"path": "linear.weight"}, {"path": "conv2d.weight"}, {"path": "norm.bias"}, {"path": "embedding.weight"},
    {"path": "fused.weight", "axis": 0, "start": 8, "length": 8},
    {"path": "conv2d.weight", "axis": 1, "start": 0, "length": 2},
    {"path": "linear.weight", "transposed": True},
)  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)
        self.conv = nn.Conv2d(6, OUT, 3)


def made(dtype: torch.dtype) -> Two:
    torch.manual_seed(7)
    return Two().eval().to(dtype)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(folder: Path, seed: int, *, dtype: torch.dtype = torch.float16, alpha: float = 2.5) -> lib_locon.Adapter:
    """On both layers, as strong as trained ones are: a tenth of the weights."""
    small = 0.1 / IN**0.5
    tensors = {
        "lora_unet_linear.lora_up.weight": small * randn(seed, OUT, RANK),
        "lora_unet_linear.lora_down.weight": randn(seed + 1, RANK, IN),
        "lora_unet_linear.alpha": torch.tensor(alpha),
        "lora_unet_conv.lora_up.weight": small * randn(seed + 2, OUT, RANK, 1, 1),
        "lora_unet_conv.lora_down.weight": randn(seed + 3, RANK, 6, 3, 3),
        "lora_unet_conv.alpha": torch.tensor(alpha),
    }
    return saved(folder / f"lora{seed}.safetensors", {key: tensor.to(dtype) for key, tensor in tensors.items()})


def saved(path: Path, tensors: Mapping[str, Tensor]) -> lib_locon.Adapter:
    save_file(dict(tensors), path)
    return lib_locon.load(path)


def factors(adapter: lib_locon.Adapter, layer: str) -> tuple[Tensor, Tensor, float]:
    tensors = load_file(adapter.identity.path)
    up, down = (tensors[f"lora_unet_{layer}.lora_{side}.weight"] for side in ("up", "down"))
    return up, down, float(tensors[f"lora_unet_{layer}.alpha"])


def after(weight: Tensor, adapter: lib_locon.Adapter, layer: str, strength: float, *, rank: int = RANK) -> Tensor:
    """What the built-in makes of a weight: its factors, product and scaled products are all in the webui's dtype."""
    up, down, alpha = factors(adapter, layer)
    up, down = up.to(weight.dtype).flatten(1)[:, :rank], down.to(weight.dtype).flatten(1)[:rank]
    change = (up @ down).reshape(weight.shape)
    change = change * (alpha / RANK)
    change = change * strength
    return (weight + change).to(weight.dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def three(tmp_path: Path) -> list[lib_locon.Adapter]:
    return [lora(tmp_path, 10), lora(tmp_path, 20, alpha=4), lora(tmp_path, 30)]


STRENGTHS = (0.8, -0.35, 1.0)


def uses(adapters: list[lib_locon.Adapter], *order: int) -> list[Use]:
    return [Use(adapters[number], Strengths.both(STRENGTHS[number])) for number in order or range(len(adapters))]


# ---- what it makes


@each_dtype
def test_three_adapters_are_as_the_built_in_makes_them(three: list[lib_locon.Adapter], dtype: torch.dtype) -> None:
    for order in itertools.permutations(range(3)):
        model = made(dtype)
        base = weights(model)
        Session(model, rounding="builtin").apply(uses(three, *order))
        for layer in ("linear", "conv"):
            wanted = base[f"{layer}.weight"]
            for number in order:
                wanted = after(wanted, three[number], layer, STRENGTHS[number])
            assert torch.equal(model.get_parameter(f"{layer}.weight"), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_it_is_another_sum_than_the_exact_one_and_knows_the_order(
    three: list[lib_locon.Adapter], dtype: torch.dtype
) -> None:
    """Else the tests here would show nothing."""
    found: dict[str, list[dict[str, Tensor]]] = {rounding: [] for rounding in ROUNDINGS}
    for rounding, order in itertools.product(ROUNDINGS, itertools.permutations(range(3))):
        model = made(dtype)
        Session(model, rounding=rounding).apply(uses(three, *order))
        found[rounding].append(weights(model))
    assert all(same(found["exact"][0], each) for each in found["exact"])
    assert not all(same(found["builtin"][0], each) for each in found["builtin"])
    assert not any(same(found["exact"][0], each) for each in found["builtin"])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_dtype
def test_what_depends_on_the_weight_sees_the_adapters_before_it(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    first, last = lora(tmp_path, 10), lora(tmp_path, 20)
    factor = randn(5, OUT).to(stored)
    tensors = {"lora_unet_linear.weight": factor, "lora_unet_linear.on_input": torch.tensor(False)}
    ia3 = saved(tmp_path / "ia3.safetensors", tensors)
    model = made(dtype)
    base = model.linear.weight.detach().clone()
    Session(model, rounding="builtin").apply([Use(each, Strengths.both(0.5)) for each in (first, ia3, last)])

    def with_ia3(weight: Tensor, before: Tensor) -> Tensor:
        change = before * factor.reshape(-1, 1) * 0.5
        return (weight.to(change.dtype) + change).to(dtype)

    one = after(base, first, "linear", 0.5)
    assert torch.equal(model.linear.weight, after(with_ia3(one, one), last, "linear", 0.5))
    assert not torch.allclose(with_ia3(one, one), with_ia3(one, base), rtol=1e-2)  # else the test would show nothing


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@each_dtype
def test_other_families_are_rounded_in_the_dtype_of_their_file(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype
) -> None:
    def numbers(seed: int, *shape: int) -> Tensor:
        return (0.3 * randn(seed, *shape)).to(stored)

    loha = {
        "w1_a": numbers(1, OUT, 3),
        "w1_b": numbers(2, 3, IN),
        "w2_a": numbers(3, OUT, 3),
        "w2_b": numbers(4, 3, IN),
    }
    lokr = {"w1": numbers(5, 4, 5), "w2": numbers(6, OUT // 4, IN // 5)}
    diff = numbers(7, OUT, IN)
    alpha = {"lora_unet_linear.alpha": torch.tensor(2.0)}
    adapters = [
        saved(tmp_path / "loha.safetensors", {**{f"lora_unet_linear.hada_{k}": v for k, v in loha.items()}, **alpha}),
        saved(tmp_path / "lokr.safetensors", {**{f"lora_unet_linear.lokr_{k}": v for k, v in lokr.items()}}),
        saved(tmp_path / "full.safetensors", {"lora_unet_linear.diff": diff}),
    ]
    model = made(dtype)
    wanted = model.linear.weight.detach().clone()
    Session(model, rounding="builtin").apply([Use(each, Strengths.both(0.7)) for each in adapters])
    deltas = [
        ((loha["w1_a"] @ loha["w1_b"]) * (loha["w2_a"] @ loha["w2_b"])) * (2.0 / 3),
        torch.kron(lokr["w1"], lokr["w2"]),
        diff,
    ]
    for delta in deltas:
        wanted = (wanted.to(stored) + delta * 0.7).to(dtype)
    assert torch.equal(model.linear.weight, wanted)


@each_dtype
def test_dora_and_rows_of_a_fused_adapter_act_too(tmp_path: Path, dtype: torch.dtype) -> None:
    """Their ΔW is had by rows only: each is added as the engine adds it, and rounded."""
    first = lora(tmp_path, 10)
    tensors = load_file(first.identity.path)
    dora = saved(
        tmp_path / "dora.safetensors",
        {
            **{key: tensor for key, tensor in tensors.items() if "linear" in key},
            "lora_unet_linear.dora_scale": randn(9, OUT, 1).abs(),
        },
    )
    model, alone = made(dtype), made(dtype)
    Session(model, rounding="builtin").apply([Use(first, Strengths.both(0.5)), Use(dora, Strengths.both(0.5))])
    before = after(alone.linear.weight.detach(), first, "linear", 0.5)
    with torch.no_grad():
        alone.linear.weight.copy_(before)
    Session(alone).apply([Use(dora, Strengths.both(0.5))])
    assert torch.equal(model.linear.weight, alone.linear.weight) and not torch.equal(alone.linear.weight, before)


def test_where_torch_has_no_products_in_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.1 on the CPU, where the weights are with --medvram: made in fp32, then rounded."""
    first = lora(tmp_path, 10)
    loha = {
        f"w{one}_{two}": 0.3 * randn(5, *shape) for one in (1, 2) for two, shape in (("a", (OUT, 3)), ("b", (3, IN)))
    }
    other = saved(tmp_path / "loha.safetensors", {f"lora_unet_linear.hada_{k}": v.half() for k, v in loha.items()})
    multiply, found = Tensor.__matmul__, []

    def refuse(left: Tensor, right: Tensor) -> Tensor:
        if left.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return multiply(left, right)

    for refused in (False, True):
        with monkeypatch.context() as patch:
            if refused:
                patch.setattr(Tensor, "__matmul__", refuse)
            has_products.cache_clear()
            model = made(torch.float16)
            Session(model, rounding="builtin").apply([Use(each, Strengths.both(0.7)) for each in (first, other)])
        found.append(model.linear.weight.detach().float())
    has_products.cache_clear()
    assert torch.allclose(*found, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(found[0], made(torch.float16).linear.weight.float(), atol=2e-2)


@pytest.mark.parametrize("view", VIEWS, ids=str)
@each_dtype
def test_parts_of_a_weight(zoo: Zoo, patch: MakePatch, view: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows, input channels, transposed: a product, a whole change, and a product again."""
    model = zoo(dtype)
    weight = model.get_parameter(view["path"])
    base = weight.detach().clone()
    part = View(**view).of(base.clone())
    rows = part.shape[0]
    pairs = [(0.1 * randn(seed, rows, 2), randn(seed + 1, 2, part[0].numel())) for seed in (1, 3)]
    whole = 0.1 * randn(5, *part.shape)
    plan = make_plan(
        [
            patch(**view, source="z", up=pairs[0][0], down=pairs[0][1], strength=0.7),
            patch(**view, source="y", whole=whole, strength=-0.25),
            patch(**view, source="x", up=pairs[1][0], down=pairs[1][1], strength=1.3),
        ],
        as_given=True,
    )
    engine = Engine(model)
    assert engine.apply(plan, "builtin") == 1
    wanted = base.clone()
    target = View(**view).of(wanted)
    products = [(up.to(dtype) @ down.to(dtype)).reshape(part.shape) for up, down in pairs]
    change = [product * strength for product, strength in zip(products, (0.7, 1.3), strict=True)]
    target.copy_(target + change[0])
    target.copy_((target.float() + -0.25 * whole).to(dtype))
    target.copy_(target + change[1])
    assert torch.equal(weight, wanted)
    engine.restore()
    assert torch.equal(weight, base)


def test_fewer_ranks_keep_the_scale_of_all(tmp_path: Path) -> None:
    a, model = lora(tmp_path, 10), made(torch.float16)
    base = model.linear.weight.detach().clone()
    Session(model, rounding="builtin").apply([Use(a, Strengths.both(0.5), dyn=2)])
    assert torch.equal(model.linear.weight, after(base, a, "linear", 0.5, rank=2))


def test_an_adapter_that_is_there_twice_acts_at_its_first_place_with_both_strengths(
    three: list[lib_locon.Adapter],
) -> None:
    model, other = made(torch.float16), made(torch.float16)
    a, b, _ = three
    quarter, half = Strengths.both(0.25), Strengths.both(0.5)
    Session(model, rounding="builtin").apply([Use(b, quarter), Use(a, half), Use(b, quarter)])
    Session(other, rounding="builtin").apply([Use(b, half), Use(a, half)])
    assert same(weights(model), weights(other))


# ---- the engine's promises hold


@each_dtype
def test_what_comes_off_leaves_the_base(three: list[lib_locon.Adapter], dtype: torch.dtype) -> None:
    model = made(dtype)
    base, session = weights(model), Session(model, rounding="builtin")
    for chosen in (uses(three), uses(three, 2), [Use(three[0], Strengths.both(0))], uses(three, 1, 0), []):
        session.apply(chosen)
    assert same(weights(model), base)
    session.apply(uses(three))
    session.restore()
    assert same(weights(model), base)


def test_the_same_again_writes_nothing_and_another_rounding_writes_anew(three: list[lib_locon.Adapter]) -> None:
    model = made(torch.float16)
    session = Session(model)
    assert session.apply(uses(three)).written == 2
    exact = weights(model)
    session.rounding = "builtin"
    assert session.apply(uses(three)).written == 2
    rounded = weights(model)
    assert session.apply(uses(three)).written == 0
    assert session.apply(uses(three, 1, 0, 2)).written == 2  # the order counts
    other = Session(model)  # another session of the same model, with the other rounding
    assert other.apply(uses(three)).written == 2
    assert same(weights(model), exact) and not same(rounded, exact)
    session.apply(uses(three))
    assert same(weights(model), rounded)


def test_strengths_alone_start_from_the_base_again(three: list[lib_locon.Adapter]) -> None:
    model, fresh = made(torch.float16), made(torch.float16)
    session = Session(model, rounding="builtin")
    for strength in (1.0, 0.3, -2.0, 0.75):
        session.apply([Use(three[0], Strengths.both(strength)), Use(three[1])])
    Session(fresh, rounding="builtin").apply([Use(three[0], Strengths.both(0.75)), Use(three[1])])
    assert same(weights(model), weights(fresh))


def test_a_conversion_of_the_model_keeps_what_is_held(three: list[lib_locon.Adapter]) -> None:
    """The engine makes its sum again to know its own numbers in another tensor: with the rounding that they have."""
    model = made(torch.float16)
    base, session = weights(model), Session(model, rounding="builtin")
    session.apply(uses(three))
    held = weights(model)
    for module in (model.linear, model.conv):
        module.weight = nn.Parameter(module.weight.detach().clone())
    session.apply(uses(three, 0, 1))
    assert not same(weights(model), held)
    session.restore()
    assert same(weights(model), base)


def test_beside_the_layer_nothing_is_rounded(three: list[lib_locon.Adapter]) -> None:
    outputs = []
    for rounding in ROUNDINGS:
        model = made(torch.float32)
        session = Session(model, side_path=True, rounding=rounding)
        base = weights(model)
        session.apply(uses(three))
        assert same(weights(model), base) and session.side.active
        outputs.append(model.linear(randn(1, 3, IN)))
        session.restore()
    assert torch.allclose(outputs[0], outputs[1], atol=1e-6)


def test_numbers_beyond_the_dtype_leave_the_base(three: list[lib_locon.Adapter]) -> None:
    model = made(torch.float16)
    base, session = weights(model), Session(model, rounding="builtin")
    session.apply(uses(three))
    with pytest.raises(lib_locon.PatchError, match="beyond those of its dtype"):
        session.apply([Use(three[0], Strengths.both(1e7)), Use(three[1])])
    assert same(weights(model), base) and not session.active


def test_a_name_that_is_none_is_refused() -> None:
    assert [rounding_named(name) for name in ROUNDINGS] == list(ROUNDINGS)
    with pytest.raises(ValueError, match="exact, builtin, not 'banker'"):
        rounding_named("banker")
    with pytest.raises(ValueError, match="exact, builtin, not 'banker'"):
        Session(nn.Linear(2, 2), rounding="banker")  # type: ignore[arg-type]


# ---- the setting


@pytest.fixture
def webui(tmp_path: Path) -> Iterator[Any]:
    for name in ("tiny_lora", "tiny_loha", "tiny_locon"):
        shutil.copy(random_adapters.folder() / f"{name}.safetensors", tmp_path)
    with launch(lora_dir=tmp_path, make_model=in_half) as running:
        yield running


def in_half() -> TinySD:
    """Weights with the bits that bf16 has, so that each rounding shows in the image."""
    model = TinySD.random()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    return model


PROMPT = "a cat <lora:tiny_lora:0.7><lora:tiny_loha:0.6><lora:tiny_locon:0.5>"


@pytest.fixture
def chosen() -> Callable[[str], None]:
    def choose(rounding: str) -> None:
        from modules import shared

        shared.opts.set("locon_rounding", rounding)

    return choose


def held() -> dict[str, Tensor]:
    from modules import shared

    return weights(shared.sd_model)


def test_the_setting_is_honoured_by_the_next_image(webui: Any, chosen: Callable[[str], None]) -> None:
    webui.generate(PROMPT, steps=1)
    exact = held()
    chosen("builtin")
    webui.generate(PROMPT, steps=1)
    rounded = held()
    assert not same(exact, rounded)
    assert all(torch.allclose(exact[name], rounded[name], atol=0.01) for name in exact)
    chosen("exact")
    webui.generate(PROMPT, steps=1)
    assert same(held(), exact)


def test_it_stands_in_the_text_where_it_is_not_the_default(webui: Any, chosen: Callable[[str], None]) -> None:
    assert "Locon rounding" not in webui.generate(PROMPT, steps=1).infotext
    chosen("builtin")
    assert "Locon rounding: builtin" in webui.generate(PROMPT, steps=1).infotext
    assert "Locon rounding" not in webui.generate("a cat", steps=1).infotext
    chosen("no such")
    assert "Locon rounding" not in webui.generate(PROMPT, steps=1).infotext


def test_pasting_brings_it_back(webui: Any, chosen: Callable[[str], None]) -> None:
    from modules import infotext_utils, shared

    texts = {}
    for rounding in ROUNDINGS:
        chosen(rounding)
        texts[rounding] = webui.generate(PROMPT, steps=1).infotext
    for now, pasted in itertools.product(ROUNDINGS, ROUNDINGS):
        chosen(now)
        fields = infotext_utils.paste_fields(texts[pasted])
        wanted = [("Locon rounding", "locon_rounding", pasted)] if now != pasted else []
        assert infotext_utils.get_override_settings(fields) == wanted
    chosen("builtin")
    # a text that is not ours says nothing of it, and neither does one without adapters
    for text in ("a cat <lora:tiny_lora:1>\nSteps: 1, Seed: 1, Size: 8x8", webui.generate("a cat", steps=1).infotext):
        assert infotext_utils.get_override_settings(infotext_utils.paste_fields(text)) == []
    assert shared.opts.locon_rounding == "builtin"


def test_an_override_of_one_image_is_put_back(webui: Any) -> None:
    from modules import shared
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images

    webui.generate(PROMPT, steps=1)
    exact = held()
    override = {"locon_rounding": "builtin"}
    text = process_images(
        StableDiffusionProcessingTxt2Img(prompt=PROMPT, steps=1, seed=1, override_settings=override)
    ).infotexts[0]
    assert "Locon rounding: builtin" in text and not same(held(), exact)
    assert shared.opts.locon_rounding == "exact"
    webui.generate(PROMPT, steps=1)
    assert same(held(), exact)


def test_a_schedule_ends_as_if_it_had_been_so_from_the_start(webui: Any, chosen: Callable[[str], None]) -> None:
    chosen("builtin")
    webui.generate("<lora:tiny_lora:0.7:unet=0@0,0.3@1><lora:tiny_locon:0.5>", steps=4)
    scheduled = held()
    webui.generate("<lora:tiny_lora:0.7:unet=0.3><lora:tiny_locon:0.5>", steps=1)
    assert same(held(), scheduled)
    webui.generate("a cat", steps=1)
    from modules import shared

    assert same(held(), weights(in_half().to(next(shared.sd_model.parameters()).dtype)))


def test_the_encoded_prompt_is_not_taken_from_before(webui: Any, chosen: Callable[[str], None]) -> None:
    from lib_locon.hosts import a1111

    webui.generate("a cat <lora:tiny_locon:1>", steps=1)
    webui.generate("a cat <lora:tiny_locon:1>", steps=1)
    assert not a1111._webui.text_changed
    chosen("builtin")
    webui.generate("a cat <lora:tiny_locon:1>", steps=1)
    assert a1111._webui.text_changed
