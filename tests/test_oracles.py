"""The oracles themselves: every library against the slow formulas, the trainers' naming against its known counts."""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.oracles import naive
from tests.oracles import trainer_files as files
from tests.oracles.cases import KINDS, Case, all_cases, relative_error, select

TOLERANCE = 1e-5
ORACLES = Path(__file__).parent / "oracles"


def by_formula(case: Case, tensors: dict[str, Tensor] | None = None) -> Tensor:
    return naive.delta(case.family, case.tensors if tensors is None else tensors, case.base, case.config)


# ---- the libraries against the formulas


@pytest.mark.parametrize("family", naive.FAMILIES)
def test_library_agrees_with_formula(family: str) -> None:
    cases = select(family=family)
    assert cases, f"no case of {family}"
    errors = {case.name: relative_error(by_formula(case), case.delta) for case in cases}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong


def test_bias_agrees_with_formula() -> None:
    seen = set()
    for case in all_cases():
        wanted = naive.bias_delta(case.family, case.tensors, case.config)
        assert (wanted is None) == (case.bias_delta is None), case.name
        if wanted is not None and case.bias_delta is not None:
            assert relative_error(wanted, case.bias_delta) < TOLERANCE, case.name
            seen.add(case.family)
    assert seen == {"lora", "full", "norm", "peft_ia3"}


def test_family_is_told_by_its_suffixes() -> None:
    for case in all_cases():
        assert naive.family_of(case.tensors) == case.family, case.name


# ---- the cases


def test_cases_are_complete_and_sound() -> None:
    cases = all_cases()
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.family for case in cases} == set(naive.FAMILIES)
    for case in cases:
        assert case.base.dtype == torch.float32
        assert case.delta.shape == case.base.shape, case.name
        assert all(bool(tensor.isfinite().all()) for tensor in case.tensors.values()), case.name
        assert case.delta.isfinite().all(), case.name
        assert case.delta.abs().max() > 1e-3 * case.base.abs().max(), f"{case.name}: next to no change"
        assert not any(tensor.requires_grad for tensor in (*case.tensors.values(), case.delta, case.base)), case.name
        # A PEFT file holds no alpha, so whatever PEFT scales comes with the scale it was trained at.
        scaled_by_peft = case.source == "peft" and not case.family.startswith("peft_")
        assert ("scale" in case.config) == scaled_by_peft, case.name


def test_the_first_tier_has_the_plain_families_only() -> None:
    families = {case.family for case in select(tier=1)}
    assert families == {"lora", "tucker", "loha", "loha_tucker", "lokr"}
    assert {case.family for case in select(tier=1, source="peft")} == {"lora"}


def test_only_square_cases_are_square() -> None:
    for case in all_cases():
        if case.base.dim() > 1:
            assert (case.base.shape[0] == case.base.shape[1]) == ("square" in case.name), case.name


def test_cases_do_not_depend_on_each_other_or_on_the_global_generator() -> None:
    from tests.oracles import lycoris_oracle, peft_oracle

    state = torch.get_rng_state()
    for spec, build in (
        *((spec, lycoris_oracle.build) for spec in list(lycoris_oracle.specs())[::40]),
        *((spec, peft_oracle.build) for spec in list(peft_oracle.specs())[::20]),
    ):
        torch.manual_seed(len(spec.name))
        again = build(spec).case
        before = next(case for case in all_cases() if case.name == spec.name)
        assert torch.equal(again.base, before.base)
        assert torch.equal(again.delta, before.delta)
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in before.tensors.items())
    torch.set_rng_state(state)


# ---- a comparison that cannot fail proves nothing


def is_idle(case: Case, suffix: str) -> bool:
    """What by the rules changes nothing: alpha of a LoKr in two full halves, a limit that an OFT does not reach."""
    if suffix != "alpha":
        return False
    full_halves = {"lokr_w1", "lokr_w2"} <= set(case.tensors)
    clamped = case.name.split("/")[2] in ("constraint", "constraint_rescale")
    return full_halves or (case.family in ("oft", "boft") and not clamped)


def bumped(tensor: Tensor) -> Tensor:
    """One entry moved, off every diagonal; a flag flipped; an index moved by one."""
    changed = tensor.clone()
    corner = (0,) * (tensor.dim() - 1) + (-1,) if tensor.dim() else ()
    if tensor.is_floating_point():
        changed[corner] += 0.5
    else:
        changed[corner] = 1 - changed[corner]
    return changed


def test_every_tensor_of_every_case_matters() -> None:
    unmoved = []
    for case in all_cases():
        if case.kind not in ("linear", "conv2d_3x3", "embedding", "layernorm"):
            continue
        for suffix, tensor in case.tensors.items():
            if is_idle(case, suffix) or suffix in ("b_norm", "diff_b", "lora_B.bias", "bias_size", "bias_indices"):
                continue
            try:
                got = by_formula(case, {**case.tensors, suffix: bumped(tensor)})
            except ValueError:
                continue  # a flag that no longer fits the shapes
            if relative_error(got, case.delta) < 10 * TOLERANCE:
                unmoved.append(f"{case.name}: {suffix}")
    assert not unmoved


def swapped(case: Case, one: str, other: str) -> dict[str, Tensor]:
    return {**case.tensors, one: case.tensors[other], other: case.tensors[one]}


def broken_copies() -> dict[str, Callable[[], tuple[Case, dict[str, Tensor], Tensor]]]:
    """Mistakes of the kind an implementation makes, each on a case where shapes alone would not give it away."""

    def case(name: str) -> Case:
        return next(c for c in all_cases() if c.name == name)

    def alpha_twice() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/loha/plain/linear")
        return c, c.tensors, by_formula(c) * float(c.tensors["alpha"]) / c.tensors["hada_w1_b"].shape[0]

    def w1_for_w2() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/lokr/square/linear")
        t = swapped(c, "lokr_w1_a", "lokr_w2_a")
        t = {**t, "lokr_w1_b": c.tensors["lokr_w2_b"], "lokr_w2_b": c.tensors["lokr_w1_b"]}
        return c, t, by_formula(c, t)

    def dora_axis() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/dora_lora/output_square/linear")
        t = {**c.tensors, "dora_scale": c.tensors["dora_scale"].T}
        return c, t, by_formula(c, t)

    def oft_transposed() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/oft/plain/linear")
        t = {**c.tensors, "oft_blocks": c.tensors["oft_blocks"].transpose(1, 2)}
        return c, t, by_formula(c, t)

    def ia3_side() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/ia3/output_square/linear")
        t = {**c.tensors, "on_input": 1 - c.tensors["on_input"]}
        return c, t, by_formula(c, t)

    def cayley() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("peft/peft_oft/exact/linear")
        return c, c.tensors, naive.peft_oft(c.tensors, c.base, {"use_cayley_neumann": True})

    def tucker_axes() -> tuple[Case, dict[str, Tensor], Tensor]:
        c = case("lycoris/tucker/square/conv2d_3x3")
        t = {**c.tensors, "lora_mid.weight": c.tensors["lora_mid.weight"].transpose(0, 1)}
        return c, t, by_formula(c, t)

    return {f.__name__: f for f in (alpha_twice, w1_for_w2, dora_axis, oft_transposed, ia3_side, cayley, tucker_axes)}


@pytest.mark.parametrize("mistake", sorted(broken_copies()))
def test_mistakes_are_seen(mistake: str) -> None:
    case, _, got = broken_copies()[mistake]()
    assert relative_error(got, case.delta) > 0.01


def test_relative_error_refuses_another_shape() -> None:
    assert relative_error(torch.zeros(2, 3), torch.zeros(3, 2)) == float("inf")
    assert relative_error(torch.ones(2), torch.ones(2)) == 0
    assert relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)


# ---- the libraries against themselves: what each really does when it runs


def test_lycoris_forward_agrees_with_its_weight() -> None:
    from tests.oracles import lycoris_oracle

    items = [item for item in lycoris_oracle.built() if item.spec.family != "norm"]
    gaps = {item.spec.name: lycoris_oracle.forward_gap(item) for item in items}
    assert {name: gap for name, gap in gaps.items() if gap > 2 * TOLERANCE} == {}


def test_peft_forward_agrees_with_its_merge_except_oft_on_wide_convolutions() -> None:
    from tests.oracles import peft_oracle

    gaps = {item.spec.name: peft_oracle.forward_gap(item) for item in peft_oracle.built()}
    apart = {name for name, gap in gaps.items() if gap > TOLERANCE}
    assert apart == {name for name in gaps if name.startswith("peft/peft_oft/") and name.endswith("conv2d_3x3")}


def test_lycoris_scales_loha_and_lokr_twice_where_we_do_not_trust_it() -> None:
    """If this fails, LyCORIS was repaired: ``get_diff_weight`` may then serve as a second oracle."""
    from tests.oracles import lycoris_oracle

    for item in lycoris_oracle.built():
        if item.spec.family in ("loha", "lokr") and item.spec.variant in ("plain", "w1_low"):
            with torch.no_grad():
                theirs = item.module.get_diff_weight(1.0, item.case.base.shape)[0]
            assert relative_error(theirs, item.case.delta * item.module.scale) < TOLERANCE, item.spec.name
            assert item.module.scale != 1


def test_peft_lokr_with_two_full_halves_on_conv1d_is_something_else() -> None:
    """If this fails, PEFT was repaired: take the kind into its LoKr cases."""
    from tests.oracles import peft_oracle

    case = peft_oracle.build(peft_oracle.odd_lokr_spec()).case
    w1, w2 = case.tensors["lokr_w1"].double(), case.tensors["lokr_w2"].double()
    as_peft_does = torch.kron(w1.unsqueeze(0), w2).reshape(case.base.shape) * case.config["scale"]
    assert relative_error(as_peft_does, case.delta) < TOLERANCE
    assert relative_error(by_formula(case), case.delta) > 0.1


# ---- formulas that no installed library writes


def test_onetrainer_marker_divides_the_packed_values() -> None:
    case = select(family="peft_oft", kind="linear")[0]
    b = 5
    packed = case.tensors["oft_R.weight"] * (2 * (b - 1) ** 0.5)
    marked = {"oft_R.weight": packed, "oft_R.scaled_oft": torch.tensor(True)}
    assert relative_error(naive.peft_oft(marked, case.base), case.delta) < TOLERANCE


def test_kohya_oft_clamps_even_at_zero() -> None:
    case = next(c for c in select(family="oft") if c.name == "lycoris/oft/plain/linear")
    assert float(case.tensors["alpha"]) == 0
    frozen = naive.oft(case.tensors, case.base, {"kohya": True})
    assert frozen.abs().max() < 1e-6
    tight = next(c for c in select(family="oft") if c.name == "lycoris/oft/constraint/linear")
    assert relative_error(naive.oft(tight.tensors, tight.base, {"kohya": True}), tight.delta) < 1e-4


def test_alpha_missing_or_zero_means_scale_one() -> None:
    case = select(family="lora", source="lycoris", kind="linear")[0]
    factors = {suffix: tensor for suffix, tensor in case.tensors.items() if suffix != "alpha"}
    rank = factors["lora_down.weight"].shape[0]
    at_rank = naive.lora({**factors, "alpha": torch.tensor(float(rank))}, case.base)
    assert torch.equal(naive.lora(factors, case.base), at_rank)
    assert torch.equal(naive.lora({**factors, "alpha": torch.tensor(0.0)}, case.base), at_rank)


def test_strength_is_linear_between_the_base_and_the_full_result() -> None:
    case = all_cases()[0]
    base = case.base.double()
    assert torch.equal(naive.at_strength(base, case.delta, 0.0), base)
    assert torch.equal(naive.at_strength(base, case.delta, 1.0), base + case.delta)
    half = naive.at_strength(base, case.delta, 0.5)
    assert relative_error(half - base, case.delta / 2) < 1e-9


# ---- the trainers' names and files


@pytest.mark.parametrize("sizes", [files.SD15, files.TINY], ids=["sd15", "tiny"])
def test_counts_of_modules(sizes: files.Sizes) -> None:
    unet, te = files.unet_modules(sizes), files.te_modules(sizes)
    types = Counter(module.type for module in unet)
    assert types == {"Linear": 184, "Conv2d": 98, "GroupNorm": 61, "LayerNorm": 48}
    assert Counter(module.type for module in te) == {"Linear": 72, "LayerNorm": 25, "Embedding": 2}
    assert len(files.kohya_unet_targets(sizes)) == 192
    assert Counter(module.type for module in files.kohya_unet_targets(sizes)) == {"Linear": 160, "Conv2d": 32}
    assert len(files.kohya_te_targets(sizes)) == 72
    assert len(files.kohya_unet_targets(sizes, conv=True)) == 278
    assert len(files.modules_by_file_name(sizes)) == 391 + 99
    assert len({module.ldm_file_name for module in (*unet, *te)}) == 391 + 99


def test_shapes_of_the_true_model() -> None:
    table = {module.name: module for module in files.unet_modules()}
    assert table["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"].shape == (320, 768)
    assert table["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"].shape == (10240, 1280)
    assert table["up_blocks.0.resnets.0.conv1"].shape == (1280, 2560, 3, 3)
    assert table["up_blocks.3.resnets.2.conv_shortcut"].shape == (320, 640, 1, 1)
    assert table["up_blocks.1.resnets.2.conv_shortcut"].ldm == "output_blocks.5.0.skip_connection"
    assert table["up_blocks.0.upsamplers.0.conv"].ldm == "output_blocks.2.1.conv"
    assert table["up_blocks.1.upsamplers.0.conv"].ldm == "output_blocks.5.2.conv"
    assert table["down_blocks.2.downsamplers.0.conv"].ldm == "input_blocks.9.0.op"
    assert table["mid_block.resnets.1.time_emb_proj"].ldm == "middle_block.2.emb_layers.1"
    weights = sum(torch.Size(module.shape).numel() for module in files.unet_modules())
    biases = sum(module.shape[0] for module in files.unet_modules() if module.bias)
    assert weights + biases == 859_520_964


@pytest.mark.parametrize(("conv", "count"), [(False, 264), (True, 350)])
def test_kohya_file(tmp_path: Path, conv: bool, count: int) -> None:
    path = tmp_path / "kohya.safetensors"
    stored = files.kohya_lora(path, files.TINY, conv=conv, conv_rank=3, conv_alpha=1.5)
    read = files.grouped(path)
    assert len(read) == len(stored) == count
    assert {name: set(group) for name, group in read.items()} == {name: set(group) for name, group in stored.items()}
    for name, (module, group) in files.fitting(read, files.TINY).items():
        rank = 3 if module.is_wide_conv else 4
        assert group["lora_down.weight"].shape == (rank, module.shape[1], *module.kernel), name
        assert {tensor.dtype for tensor in group.values()} == {torch.float16}
        assert torch.equal(group["lora_up.weight"], stored[name]["lora_up.weight"])
    with safe_open(path, "pt") as handle:
        header = handle.metadata()
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert header["ss_network_module"] == "networks.lora"
    assert ("ss_network_args" in header) == conv


EXPECTED = dict.fromkeys(files.LYCORIS_ALGORITHMS, 354) | {"norm": 354 + 108, "tlora": 264}


@pytest.mark.parametrize("algorithm", files.LYCORIS_ALGORITHMS)
def test_lycoris_file(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "lycoris.safetensors"
    stored = files.fitting(files.lycoris_file(path, algorithm, files.TINY), files.TINY)
    assert len(stored) == EXPECTED[algorithm]
    parts = Counter(module.part for module, _ in stored.values())
    assert parts[files.TEXT] == 72
    if EXPECTED[algorithm] == 354:
        assert parts[files.UNET] == 282
    if algorithm == "tlora":
        return  # its formula takes an SVD of the true base
    for module, group in list(stored.values())[::45]:
        base = files.random_base(module)
        delta = naive.delta(naive.family_of(group), group, base)
        assert delta.shape == base.shape
        assert delta.isfinite().all()
        assert delta.abs().max() > 0


def test_lycoris_presets_do_not_leak() -> None:
    from lycoris.kohya import LycorisNetworkKohya

    before = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    unet = files.module_tree(files.unet_modules(files.TINY))
    network = files.lycoris_network(2, 1.0, None, unet, {"algo": "lora", "preset": "attn-mlp"})
    assert len(network.loras) == 192
    assert {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()} == before


# ---- independence


def test_oracles_do_not_import_what_they_judge() -> None:
    for source in ORACLES.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "lib_locon" for name in names), source.name
