"""The small model has SD1's shape and names, is reproducible, listens to its prompt and its weights, and can learn."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extensions_builtin_shim.launch import CHECKOUT
from extensions_builtin_shim.tiny_sd import Config, TinySD, load, sample, save, to_image
from extensions_builtin_shim.tiny_sd.model import FirstStage
from extensions_builtin_shim.tiny_sd.sampler import as_pictures, timesteps
from extensions_builtin_shim.tiny_sd.shapes import COLOURS, SHAPES, SIZES
from extensions_builtin_shim.tiny_sd.tokenizer import FIRST_SPARE, FIRST_WORD, WORDS, Tokenizer

UNET_LEAVES = {nn.Linear: 184, nn.Conv2d: 98, nn.GroupNorm: 61, nn.LayerNorm: 48}
CLIP_LEAVES = {nn.Linear: 72, nn.LayerNorm: 25, nn.Embedding: 2}
PROMPT = "a red circle"
# Pixels are 1/255 apart: below this a difference in the mean cannot be seen.
VISIBLE = 1 / 255


@pytest.fixture(scope="module")
def model() -> TinySD:
    return TinySD.random()


@pytest.fixture(scope="module")
def plain(model: TinySD) -> Tensor:
    """What the untouched model paints in 8 steps."""
    return paint(model, steps=8)


def paint(model: TinySD, prompt: str = PROMPT, *, seed: int = 1, steps: int = 4, batch_size: int = 1) -> Tensor:
    return sample(model, prompt, seed=seed, steps=steps, batch_size=batch_size)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def leaves(module: nn.Module) -> Counter[type]:
    return Counter(type(part) for part in module.modules() if list(part.parameters(recurse=False)))


# ---- the shape of SD1


def test_true_size_has_the_true_parameter_counts() -> None:
    full = TinySD.skeleton(Config.sd15())
    assert parameters(full.model.diffusion_model) == 859_520_964
    assert parameters(full.cond_stage_model) == 123_060_480
    assert {parameter.device.type for parameter in full.parameters()} == {"meta"}


@pytest.mark.parametrize("config", [Config.tiny(), Config.sd15()], ids=["tiny", "sd15"])
def test_every_width_has_every_module(config: Config) -> None:
    skeleton = TinySD.skeleton(config)
    assert leaves(skeleton.model.diffusion_model) == UNET_LEAVES
    assert leaves(skeleton.cond_stage_model) == CLIP_LEAVES
    assert sum(UNET_LEAVES.values()) == 391


def test_the_trained_width_lacks_two_modules() -> None:
    """Its levels are equally wide, so that the skips into them need no convolution."""
    names, all_names = (
        {name.rpartition(".")[0] for name, _ in TinySD.skeleton(config).named_parameters()}
        for config in (Config.trained(), Config.tiny())
    )
    assert all_names - names == {f"model.diffusion_model.input_blocks.{n}.0.skip_connection" for n in (4, 7)}
    assert not names - all_names


def test_names_are_those_of_the_host() -> None:
    unet, text = "model.diffusion_model.", "cond_stage_model.wrapped.transformer.text_model."
    shapes = {name: tuple(tensor.shape) for name, tensor in TinySD.skeleton(Config.sd15()).named_parameters()}
    known = {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        f"{unet}input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.0.emb_layers.1.weight": (640, 1280),
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        f"{unet}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        f"{unet}output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        f"{text}embeddings.token_embedding.wrapped.weight": (49408, 768),
        f"{text}embeddings.position_embedding.weight": (77, 768),
        f"{text}encoder.layers.11.mlp.fc1.weight": (3072, 768),
    }
    assert known.items() <= shapes.items()


# ---- the same again


def test_a_seed_decides_every_byte_of_the_weights(model: TinySD) -> None:
    again, other = TinySD.random(0).state_dict(), TinySD.random(1).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in model.named_parameters())


def test_the_global_random_state_is_left_alone(model: TinySD) -> None:
    before = torch.get_rng_state()
    TinySD.random(7)
    paint(model, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_seed_paints_the_same_bytes(model: TinySD) -> None:
    first, second = paint(model), paint(model)
    assert first.shape == (1, 3, 32, 32) and first.dtype == torch.float32
    assert to_image(first).tobytes() == to_image(second).tobytes()
    assert torch.equal(first, second)


def test_several_prompts_are_painted_at_once(model: TinySD) -> None:
    batch = sample(model, [PROMPT, "a blue square"], seed=3, steps=4)
    singles = torch.cat([paint(model, seed=3), paint(model, "a blue square", seed=4)])
    torch.testing.assert_close(batch, singles, atol=1e-3, rtol=0)


def test_a_batch_holds_the_pictures_of_the_seeds_that_follow(model: TinySD) -> None:
    batch = paint(model, seed=3, batch_size=2)
    singles = torch.cat([paint(model, seed=3), paint(model, seed=4)])
    torch.testing.assert_close(batch, singles, atol=1e-3, rtol=0)


# ---- pictures worth looking at


def test_pictures_have_contrast_and_patches_but_are_not_burnt_out(plain: Tensor) -> None:
    assert plain.isfinite().all()
    assert plain.std() > 0.08
    assert ((plain <= 0) | (plain >= 1)).float().mean() < 0.05
    neighbours = (plain[..., 1:] - plain[..., :-1]).abs().mean()
    assert neighbours < 0.5 * plain.std()


@pytest.mark.parametrize("other", ["a blue circle", "a red square", "", "a red circle, watercolor"])
def test_another_prompt_is_another_picture(model: TinySD, other: str) -> None:
    assert difference(paint(model), paint(model, other)) > 5 * VISIBLE


def test_seed_and_negative_prompt_count_too(model: TinySD) -> None:
    picture = paint(model)
    assert difference(picture, paint(model, seed=2)) > 5 * VISIBLE
    assert difference(picture, sample(model, PROMPT, "blurry", seed=1, steps=4)) > VISIBLE


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v",
        "model.diffusion_model.output_blocks.4.1.transformer_blocks.0.ff.net.2",
        "model.diffusion_model.output_blocks.7.0.in_layers.2",
        "cond_stage_model.wrapped.transformer.text_model.encoder.layers.5.mlp.fc1",
    ],
)
def test_a_small_change_of_one_weight_shows_and_can_be_undone(model: TinySD, plain: Tensor, name: str) -> None:
    weight = model.get_parameter(f"{name}.weight")
    base = weight.detach().clone()
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        weight.add_(0.1 * base.std() * noise)
        changed = paint(model, steps=8)
        weight.copy_(base)
    assert (plain - changed).abs().max() > VISIBLE
    assert torch.equal(plain, paint(model, steps=8))


def test_rounding_is_not_blown_up_into_another_picture(model: TinySD, plain: Tensor) -> None:
    weight = model.get_parameter("model.diffusion_model.input_blocks.0.0.weight")
    base = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1 + 1e-6)
        changed = paint(model, steps=8)
        weight.copy_(base)
    assert (plain - changed).abs().max() < VISIBLE


# ---- steps


def test_on_step_runs_before_each_step_and_may_stop_it(model: TinySD) -> None:
    class Interrupted(Exception):
        pass

    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def watch(step: int, steps: int, latents: Tensor) -> None:
        seen.append((step, steps, tuple(latents.shape)))
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        sample(model, PROMPT, seed=1, steps=4, on_step=watch)
    assert seen == [(step, 4, (1, 4, 32, 32)) for step in range(3)]
    assert torch.is_grad_enabled()


def test_timesteps_start_at_the_noisiest_and_never_repeat() -> None:
    assert timesteps(4) == [999, 749, 499, 249]
    assert timesteps(1000) == list(range(999, -1, -1))
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="steps"):
            timesteps(wrong)


def test_noise_schedule_is_that_of_sd1(model: TinySD) -> None:
    alphas = model.alphas_cumprod
    torch.testing.assert_close(alphas[[0, -1]], torch.tensor([0.99915, 0.0046600]), atol=1e-6, rtol=0)
    assert alphas.shape == (1000,) and bool((alphas.diff() < 0).all())


def test_latents_of_a_picture_give_it_back(model: TinySD) -> None:
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = model.first_stage_model.encode(picture)
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(model.first_stage_model.decode(latents), picture)
    torch.testing.assert_close(as_pictures(model.first_stage_model, latents), latents)
    first_stage = FirstStage(patch=2)
    latents = first_stage.encode(picture)
    assert latents.shape == (2, 12, 4, 4)
    torch.testing.assert_close(first_stage.decode(latents), picture)


def test_clean_latents_tell_the_noise() -> None:
    """With a UNet that knows the clean latents, the model finds the noise that was put in."""
    latents, noise = torch.randn(2, 3, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 500, 999])
    model = TinySD.random(0, Config.trained())
    kept = model.alphas_cumprod[t][:, None, None, None]
    model.model.forward = lambda x, t, context: latents  # type: ignore[method-assign]
    found = model.apply_model(kept.sqrt() * latents + (1 - kept).sqrt() * noise, t, torch.zeros(3, 77, 48))
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="prediction"):
        replace(Config.tiny(), prediction="x")


# ---- words


def test_listed_words_fit_below_the_spare_ids_and_are_distinct() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert FIRST_WORD + len(WORDS) <= FIRST_SPARE


def test_text_becomes_ids_of_a_fixed_length() -> None:
    tokenizer = Tokenizer(max_length=8, vocab_size=512)
    red, zyxw = FIRST_WORD + WORDS.index("red"), tokenizer.word_id("zyxw")
    assert zyxw == 399  # hashed, and so the same everywhere and always
    assert tokenizer(["RED, zyxw!", ""]).tolist() == [[1, red, zyxw, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert tokenizer.encode("red " * 20) == [1, *[red] * 6, 2]


def test_conditioning_has_one_row_for_each_position(model: TinySD) -> None:
    rows = model.learned_conditioning([PROMPT, ""])
    assert rows.shape == (2, 32, 64)
    torch.testing.assert_close(rows[0, 0], rows[1, 0])  # causal: the start token knows nothing of what follows
    assert not torch.allclose(rows[0, 1:], rows[1, 1:])


# ---- files


def test_a_saved_model_comes_back_byte_for_byte(model: TinySD, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save(model, first)
    again = load(first)
    save(again, second)
    assert first.read_bytes() == second.read_bytes()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(paint(model), paint(again))


def test_a_file_has_the_names_of_a_checkpoint(model: TinySD, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(model, path)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert not any("wrapped" in name for name in names)
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in names
    assert {name.partition(".")[0] for name in names} == {"model", "cond_stage_model", "first_stage_model"}
    assert len(names) == len(model.state_dict())


def test_a_file_from_another_tool_loads_in_its_own_dtype(model: TinySD, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(model, path)
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    half = load(path)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert paint(half, steps=2).isfinite().all()


def test_an_incomplete_file_is_refused(model: TinySD, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(model, path)
    tensors = load_file(path)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=r"out\.2\.bias"):
        load(path)


# ---- learning


def test_a_gradient_reaches_every_parameter() -> None:
    model = TinySD.random(2)
    generator = torch.Generator().manual_seed(0)
    latents = model.first_stage_model.encode(torch.rand(2, 3, 16, 16, generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.tensor([800, 200])
    alphas = model.alphas_cumprod[t][:, None, None, None]
    noised = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    context = model.learned_conditioning([PROMPT, "a blue square"])
    nn.functional.mse_loss(model.apply_model(noised, t, context), noise).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias on the keys shifts all scores of a query alike, which softmax cannot see.
        assert name.endswith("k_proj.bias") or parameter.grad.any(), name


def test_the_page_tells_all_words_for_pictures() -> None:
    page = (CHECKOUT / "extensions_builtin_shim" / "page" / "files" / "page.html").read_text(encoding="utf-8")
    hint = page.partition('id="words"')[2].partition("</p>")[0]
    told = set(re.findall(r"[a-z]+", hint.partition(":")[2]))
    assert told == {*SHAPES, *COLOURS}
    assert all(size in hint for size in SIZES)
