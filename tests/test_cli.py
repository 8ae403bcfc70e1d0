"""The command line, in this process, on a checkpoint whose every byte is known; expected weights by a formula here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from extensions_builtin_shim.tiny_sd import TinySD, checkpoint
from lib_locon.__main__ import main

if TYPE_CHECKING:
    from tests.conftest import WriteAdapter

ROOT = Path(__file__).parents[1]
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
PROJ, QUERY = f"{UNET}input_blocks.1.1.proj_in", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
CONV, FC1 = f"{UNET}input_blocks.1.0.in_layers.2", f"{TEXT}encoder.layers.0.mlp.fc1"


def grid(*shape: int, seed: int, steps: int = 64) -> Tensor:
    """Multiples of 1/64 below 1: sums and products of them are exact in fp32."""
    return torch.randint(-steps, steps, shape, generator=torch.Generator().manual_seed(seed)) / 64


# In this order, which no library would write: not by name, not by dtype.
CHECKPOINT: dict[str, Tensor] = {
    f"{PROJ}.weight": grid(8, 8, 1, 1, seed=1).half(),
    "model_ema.num_updates": torch.tensor(7),
    f"{FC1}.weight": grid(16, 8, seed=2),
    f"{QUERY}.weight": grid(8, 8, seed=3).bfloat16(),
    f"{PROJ}.bias": grid(8, seed=4).half(),
    f"{CONV}.weight": grid(8, 8, 3, 3, seed=5).half(),
    "first_stage_model.decoder.weight": torch.tensor([float("nan"), -0.0, float("inf")]),
    "alphas_cumprod": torch.linspace(0, 1, 5, dtype=torch.float64),
    "quantised": torch.arange(5, dtype=torch.uint8),
}
ADAPTER: dict[str, dict[str, Tensor]] = {
    "lora_unet_input_blocks_1_1_proj_in": {
        "lora_up.weight": grid(8, 2, 1, 1, seed=11),
        "lora_down.weight": grid(2, 8, 1, 1, seed=12),
        "alpha": torch.tensor(1.0),
    },
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": {
        "lora_up.weight": grid(8, 2, seed=13).half(),
        "lora_down.weight": grid(2, 8, seed=14).half(),
    },
    "lora_te_text_model_encoder_layers_0_mlp_fc1": {
        "lora_up.weight": grid(16, 4, seed=15),
        "lora_down.weight": grid(4, 8, seed=16),
        "alpha": torch.tensor(8.0),
    },
}
DELTAS = {
    f"{PROJ}.weight": 0.5,
    f"{QUERY}.weight": 1.0,
    f"{FC1}.weight": 2.0,
}
"""Weight → alpha / rank of its module in ADAPTER, in the same order."""
NAMES = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
TYPES = {dtype: name for name, dtype in {**NAMES, "U8": torch.uint8}.items()}


def expected(te: float, unet: float) -> dict[str, Tensor]:
    """The checkpoint with ADAPTER at these strengths, in float64 and rounded once."""
    found = dict(CHECKPOINT)
    for (name, scale), factors in zip(DELTAS.items(), ADAPTER.values(), strict=True):
        up, down = (factors[f"lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
        base, strength = CHECKPOINT[name], te if name.startswith(TEXT) else unet
        found[name] = (base.double() + strength * scale * (up @ down).reshape(base.shape)).to(base.dtype)
    return found


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """In the order given."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += raw(tensor)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, list[int], bytes]]]:
    """Metadata, and name → dtype, shape, bytes in the order of the data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    found = {}
    for name in order:
        first, last = header[name]["data_offsets"]
        found[name] = (header[name]["dtype"], header[name]["shape"], content[start + first : start + last])
    assert list(header) == order
    assert start % 8 == 0
    return metadata, found


class Desk:
    """A checkpoint, a folder with the adapter `style`, and the command."""

    def __init__(self, folder: Path, write: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.write, self.capsys = folder, write, capsys
        self.loras, self.out = folder / "loras", folder / "out.safetensors"
        self.base = write_checkpoint(folder / "base.safetensors", CHECKPOINT, {"author": "me", "ünï": "{'a': 1}"})
        self.style = write(self.loras / "style.safetensors", ADAPTER, prefix="")

    def run(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = main([str(argument) for argument in arguments])
        return code, *self.capsys.readouterr()

    def bake(self, prompt: str, *more: object, base: Path | None = None, out: Path | None = None) -> Any:
        folder = ("--prompt", prompt, "--lora-dir", self.loras, "-o", out or self.out)
        return self.run("bake", base or self.base, *folder, *more)

    def nothing_written(self) -> bool:
        return sorted(path.name for path in self.folder.iterdir()) == ["base.safetensors", "loras"]


@pytest.fixture
def desk(tmp_path: Path, write_adapter: WriteAdapter, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, write_adapter, capsys)


# ---- bake


@pytest.mark.parametrize(
    ("tags", "te", "unet"),
    [
        ("<lora:style:1>", 1, 1),
        ("a cat <lora:style:0.5>, <hypernet:x:1>", 0.5, 0.5),
        ("<lora:style:0.5:-2>", 0.5, -2),
        ("<lyco:style:te=0:unet=0.75>", 0, 0.75),
        ("<lora:style:0.25><lora:style:0.5:0.25>", 0.75, 0.5),
    ],
)
def test_a_baked_checkpoint_is_the_sum_and_all_else_is_byte_for_byte_the_same(
    desk: Desk, tags: str, te: float, unet: float
) -> None:
    code, stdout, stderr = desk.bake(tags)
    assert (code, stderr) == (0, "")
    wanted = expected(te, unet)
    changed = sum(raw(tensor) != raw(CHECKPOINT[name]) for name, tensor in wanted.items())
    assert f"{changed} of 9 tensors changed" in stdout
    assert changed == (3 if te else 2)
    metadata, tensors = read_checkpoint(desk.out)
    assert list(tensors) == list(CHECKPOINT)
    for name, (dtype, shape, content) in tensors.items():
        assert (dtype, shape) == (TYPES[CHECKPOINT[name].dtype], list(CHECKPOINT[name].shape))
        assert content == raw(wanted[name]), name
    assert {key: metadata[key] for key in ("author", "ünï")} == {"author": "me", "ünï": "{'a': 1}"}
    assert load_file(desk.out).keys() == CHECKPOINT.keys()  # the library that made the format reads it


def test_the_recipe_says_how_to_do_it_again(desk: Desk) -> None:
    tags = "x <lora:style:0.5:0.25:1>"
    assert desk.bake(tags)[0] == 0
    recipe = json.loads(read_checkpoint(desk.out)[0]["locon_recipe"])
    assert recipe == {
        "checkpoint": "base.safetensors",
        "prompt": tags,
        "adapters": [
            {
                "name": "style",
                "sha256": hashlib.sha256(desk.style.read_bytes()).hexdigest(),
                "strengths": {"te": 0.5, "unet": 0.25},
                "dyn": 1,
            }
        ],
    }


def test_two_folders_and_two_adapters(desk: Desk, write_adapter: WriteAdapter) -> None:
    module = "lora_unet_input_blocks_1_0_in_layers_2"
    factors = {"lora_up.weight": grid(8, 1, 1, 1, seed=21), "lora_down.weight": grid(1, 8, 3, 3, seed=22)}
    write_adapter(desk.folder / "loras" / "b" / "extra.safetensors", {module: factors}, prefix="")
    (desk.folder / "more").mkdir()
    desk.style.rename(desk.folder / "more" / "style.safetensors")
    tags = "<lora:b/extra:0.5><lora:style:1>"
    code, stdout, _ = desk.bake(tags, "--lora-dir", desk.folder / "more", "--json")
    assert code == 0
    result = json.loads(stdout)
    assert (result["changed"], result["total"], result["problems"]) == (4, 9, [])
    assert result["output"] == str(desk.out)
    report, _ = result["adapters"]
    assert (report["name"], report["used"], report["total"]) == ("b/extra", 1, 1)
    assert report["strengths"] == {"te": 0.5, "unet": 0.5}
    wanted = expected(1, 1)
    base, product = (
        CHECKPOINT[f"{CONV}.weight"],
        factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1),
    )
    wanted[f"{CONV}.weight"] = (base.double() + 0.5 * product.double().reshape(8, 8, 3, 3)).half()
    assert {name: content for name, (_, _, content) in read_checkpoint(desk.out)[1].items()} == {
        name: raw(tensor) for name, tensor in wanted.items()
    }


def test_a_checkpoint_of_the_small_model(desk: Desk, write_adapter: WriteAdapter) -> None:
    base = desk.folder / "tiny.safetensors"
    checkpoint.save(TinySD.random(0), base)
    before = load_file(base)
    group = {"lora_up.weight": grid(16, 2, seed=1), "lora_down.weight": grid(2, 16, seed=2)}
    diffusers = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    write_adapter(desk.loras / "q.safetensors", {diffusers: group}, prefix="")
    assert desk.bake("<lora:q:2>", base=base)[0] == 0
    after = load_file(desk.out)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"{QUERY}.weight"]
    delta = 2 * group["lora_up.weight"].double() @ group["lora_down.weight"].double()
    assert (after[changed[0]].double() - before[changed[0]].double() - delta).abs().max() < 1e-6
    model = checkpoint.load(desk.out)
    assert torch.equal(model.get_parameter(changed[0]), after[changed[0]])


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ("<lora:style:1><lora:stile:1>", "no adapter 'stile'"),
        ("<lora:style:1><lora:stile:1>", "near it: style"),
        ("<lora:style:1><lora:style:x>", "'x' is no number"),
        ("<lora:style:1><lora:style:x>", f"\n  <lora:style:x>\n  {' ' * 12}^\n"),
        ("<lora:style:1><lora: :1>", "names no adapter"),
        ("<lora:style:1><lora:pointer:1>", "git-lfs pointer"),
        ("<lora:style:1><lora:page:1>", "web page"),
        ("<lora:style:1><lora:short:1>", "cut short"),
        ("<lora:style:1><lora:checkpoint:1>", "whole checkpoint"),
    ],
)
def test_one_tag_that_fails_stops_it_all_unless_it_is_to_be_skipped(desk: Desk, tags: str, says: str) -> None:
    (desk.loras / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (desk.loras / "page.safetensors").write_bytes(b"<!DOCTYPE html>")
    (desk.loras / "short.safetensors").write_bytes(desk.style.read_bytes()[:-9])
    save_file(CHECKPOINT, desk.loras / "checkpoint.safetensors")
    code, stdout, stderr = desk.bake(tags)
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert "nothing was written" in stderr
    assert desk.nothing_written()
    code, stdout, stderr = desk.bake(tags, "--skip-bad", "--json")
    assert code == 0
    assert says in stderr
    (problem,) = json.loads(stdout)["problems"]
    assert problem in stderr
    tensors = read_checkpoint(desk.out)[1]
    assert {name: content for name, (_, _, content) in tensors.items()} == {
        k: raw(v) for k, v in expected(1, 1).items()
    }


def test_an_argument_that_is_not_understood_is_a_warning(desk: Desk) -> None:
    code, _, stderr = desk.bake("<lora:style:1:foo=2>")
    assert code == 0
    assert "not understood" in stderr


@pytest.mark.parametrize("strengths", ["1:0@0,1@1", "1:stop=20", "unet=0@0,1@0.5:lbw=OUTALL"])
def test_what_depends_on_the_step_is_not_baked(desk: Desk, strengths: str) -> None:
    tag = f"<lora:style:{strengths}>"
    code, _, stderr = desk.bake(tag)
    assert code == 2
    assert "a checkpoint has no steps, and style is to be used at" in stderr
    assert desk.nothing_written()
    code, _, stderr = desk.bake(f"<lora:style:0.5>{tag}", "--skip-bad")
    assert code == 0
    assert "has no steps" in stderr
    tensors = read_checkpoint(desk.out)[1]
    assert {name: content for name, (_, _, content) in tensors.items()} == {
        k: raw(v) for k, v in expected(0.5, 0.5).items()
    }


def test_block_weights_are_baked(desk: Desk) -> None:
    assert desk.bake("<lora:style:1:lbw=NONE:*_blocks.*=0.5>")[0] == 0
    assert json.loads(read_checkpoint(desk.out)[0]["locon_recipe"])["adapters"][0]["strengths"] == {
        "te": 1,
        "unet": 1,
        "blocks": {"label": "NONE", "values": [0] * 17},
        "layers": {"*_blocks.*": 0.5},
    }
    tensors = read_checkpoint(desk.out)[1]
    assert {name: content for name, (_, _, content) in tensors.items()} == {
        k: raw(v) for k, v in expected(0, 0).items()
    }


@pytest.mark.parametrize("strength", ["1e300", "1e39"])
def test_a_strength_beyond_fp32(desk: Desk, strength: str) -> None:
    code, _, stderr = desk.bake(f"<lora:style:{strength}>")
    assert code == 2
    assert "come to no number" in stderr
    assert desk.nothing_written()


def test_two_strengths_whose_sum_is_no_number(desk: Desk) -> None:
    code, _, _ = desk.bake("<lora:style:1e308><lora:style:1e308>")
    assert code == 2
    assert desk.nothing_written()


def broken(desk: Desk, kind: str) -> Path:
    path = desk.folder / "loras" / "x" / f"{kind}.safetensors"
    path.parent.mkdir()
    content = {
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "page": b"<!DOCTYPE html><html>",
        "empty": b"",
        "short": desk.base.read_bytes()[:-1],
    }.get(kind)
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "cannot be read: No such file"),
        ("pointer", "git-lfs pointer"),
        ("page", "web page"),
        ("empty", "is empty"),
        ("short", "cut short"),
    ],
)
def test_a_checkpoint_that_is_none(desk: Desk, kind: str, says: str) -> None:
    code, stdout, stderr = desk.bake("<lora:style:1>", base=broken(desk, kind))
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert desk.nothing_written()


def test_the_output_is_never_the_checkpoint_itself(desk: Desk) -> None:
    before = desk.base.read_bytes()
    link = desk.folder / "link.safetensors"
    link.symlink_to(desk.base)
    for out in (desk.base, link, desk.folder / "loras" / ".." / "base.safetensors"):
        code, _, stderr = desk.bake("<lora:style:1>", "--force", out=out)
        assert code == 2
        assert "is the checkpoint itself" in stderr
    assert desk.base.read_bytes() == before
    assert link.is_symlink()


def test_an_output_that_exists_is_replaced_by_force_only(desk: Desk) -> None:
    desk.out.write_bytes(b"precious")
    code, _, stderr = desk.bake("<lora:style:1>")
    assert code == 2
    assert "exists already" in stderr
    assert desk.out.read_bytes() == b"precious"
    assert desk.bake("<lora:style:1>", "--force")[0] == 0
    assert len(read_checkpoint(desk.out)[1]) == len(CHECKPOINT)


@pytest.mark.parametrize(
    ("out", "says"), [("out.ckpt", "must end in .safetensors"), ("none/out.safetensors", "there is no folder")]
)
def test_an_output_that_cannot_be(desk: Desk, out: str, says: str) -> None:
    code, _, stderr = desk.bake("<lora:style:1>", out=desk.folder / out)
    assert code == 2
    assert says in stderr
    assert desk.nothing_written()


def test_a_prompt_without_tags_and_a_folder_that_is_none(desk: Desk) -> None:
    code, _, stderr = desk.bake("a cat")
    assert code == 2
    assert "no <lora:…> tag" in stderr
    code, _, stderr = desk.bake("<lora:style:1>", "--lora-dir", desk.folder / "none")
    assert code == 2
    assert "is no folder" in stderr
    assert desk.nothing_written()


def test_a_part_left_by_another_run_is_not_touched(desk: Desk) -> None:
    part = desk.folder / "out.safetensors.part"
    part.write_bytes(b"somebody's")
    code, _, stderr = desk.bake("<lora:style:1>")
    assert code == 2
    assert f"{part} is there already" in stderr
    assert part.read_bytes() == b"somebody's"
    assert not desk.out.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_bake_that_stops_half_way_leaves_no_file(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from lib_locon import bake

    patched, calls = bake.patched, iter(range(99))

    def stop_at_the_second(*arguments: Any) -> Tensor:
        if next(calls) == 1:
            raise error
        return patched(*arguments)

    monkeypatch.setattr(bake, "patched", stop_at_the_second)
    desk.out.write_bytes(b"precious")
    code, _, stderr = desk.bake("<lora:style:1>", "--force")
    assert code == 2
    assert ("No space left on device" if isinstance(error, OSError) else "interrupted") in stderr
    assert desk.out.read_bytes() == b"precious"
    desk.out.unlink()
    assert desk.nothing_written()


MEMORY = """
import resource, sys
from lib_locon.__main__ import main
peaks = []
for base in sys.argv[2:]:
    out = base + ".out.safetensors"
    assert main(["bake", base, "--prompt", "<lora:a:1>", "--lora-dir", sys.argv[1], "-o", out]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in other units elsewhere")
def test_the_memory_of_a_bake_does_not_grow_with_the_file(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    count, side = 24, 1024  # 24 tensors of 4 MiB
    names = [f"{UNET}middle_block.1.transformer_blocks.{i}.ff.net.2" for i in range(count)]
    group = {"lora_up.weight": torch.ones(side, 1), "lora_down.weight": torch.ones(1, side)}
    modules = {f"lora_unet_{name.removeprefix(UNET).replace('.', '_')}": group for name in names}
    write_adapter(tmp_path / "loras" / "a.safetensors", modules, prefix="")
    weight = torch.ones(side, side)
    one, many = tmp_path / "one.safetensors", tmp_path / "many.safetensors"
    save_file({f"{names[0]}.weight": weight}, one)
    save_file({f"{name}.weight": weight.clone() for name in names}, many)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "loras"), str(one), str(many)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.splitlines()[-1].split())
    assert (second - first) * 1024 < 6 * weight.nbytes


# ---- inspect


def test_inspect_says_what_a_file_is(desk: Desk) -> None:
    code, stdout, stderr = desk.run("inspect", desk.style)
    assert (code, stderr) == (0, "")
    rows = dict(line.strip().split("  ", 1) for line in stdout.splitlines() if "  " in line.strip())
    found = {label: value.strip() for label, value in rows.items()}
    assert stdout.splitlines()[0] == "style"
    assert found["family"] == "LoRA"
    assert found["rank"] == "2 (2), 4 (1)"
    assert set(found["alpha"].split(", ")) == {"1 (1)", "none (1)", "8 (1)"}
    assert found["names"] == "kohya"
    assert found["modules"] == "3"
    assert str(desk.style) in found["file"]


def test_inspect_as_json(desk: Desk) -> None:
    bad = desk.folder / "bad.safetensors"
    bad.write_bytes(b"<!DOCTYPE html>")
    code, stdout, stderr = desk.run("inspect", desk.style, bad, "--json")
    assert code == 2
    result = json.loads(stdout)
    (found,) = result["adapters"]
    assert found["ranks"] == {"2": 2, "4": 1}
    assert found["families"] == {"LoRA": 3}
    assert found["modules"] == 3
    assert found["size"] == desk.style.stat().st_size
    assert found["match"] is None
    (error,) = result["errors"]
    assert error["path"] == str(bad)
    assert "is a web page" in error["error"]
    assert stderr.count("is a web page") == 1


def test_inspect_against_a_checkpoint(desk: Desk, write_adapter: WriteAdapter) -> None:
    none = {"lora_up.weight": grid(8, 1, seed=1), "lora_down.weight": grid(1, 8, seed=2)}
    odd = {"lora_up.weight": grid(3, 1, seed=1), "lora_down.weight": grid(1, 8, seed=2)}
    modules = {**ADAPTER, "lora_unet_no_such": none, "lora_unet_input_blocks_1_0_in_layers_2": odd, "lora_te2_x": none}
    write_adapter(desk.style, modules, prefix="")
    code, stdout, _ = desk.run("inspect", desk.style, "--base", desk.base, "--json")
    assert code == 0
    found = json.loads(stdout)["adapters"][0]["match"]
    assert (found["used"], found["total"], found["weights"]) == (3, 6, 3)
    assert found["bytes"] == sum(CHECKPOINT[name].nbytes for name in DELTAS)
    reasons = {item["key"]: item["reason"] for item in found["unmatched"]}
    assert "no module of this name" in reasons["lora_unet_no_such"]
    assert "the weight is 8 × 8 × 3 × 3" in reasons["lora_unet_input_blocks_1_0_in_layers_2"]
    assert "no te2" in reasons["lora_te2_x"]
    code, stdout, _ = desk.run("inspect", desk.style, "--base", desk.base)
    assert code == 0
    assert "3/6 modules" in stdout
    assert all(f"{key}: {reason}" in stdout for key, reason in reasons.items())


def test_inspect_of_a_file_that_is_not_there_or_a_base_that_is_none(desk: Desk) -> None:
    code, _, stderr = desk.run("inspect", desk.folder / "none.safetensors")
    assert code == 2
    assert "cannot be read" in stderr
    code, stdout, stderr = desk.run("inspect", desk.style, "--base", broken(desk, "page"))
    assert (code, stdout) == (2, "")
    assert "is a web page" in stderr


def test_inspect_reads_no_tensor_but_alphas(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_locon.files.reader import TensorData

    read: list[str] = []
    get_tensor = TensorData.get_tensor

    def spy(data: TensorData, key: str) -> Tensor:
        read.append(key)
        return get_tensor(data, key)

    monkeypatch.setattr(TensorData, "get_tensor", spy)
    assert desk.run("inspect", desk.style)[0] == 0
    assert len(read) == 2
    assert all(key.endswith(".alpha") for key in read)


# ---- as a process


def test_stdout_holds_json_alone_and_the_exit_code_gets_out(desk: Desk) -> None:
    (desk.loras / "page.safetensors").write_bytes(b"<!DOCTYPE html>")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lib_locon", *map(str, arguments)]
        return subprocess.run(
            command, cwd=desk.folder, env=environment, capture_output=True, encoding="utf-8", check=False
        )

    tags = "<lora:page:1><lora:style:1:x=1>"
    done = run(
        "bake", desk.base, "--prompt", tags, "--lora-dir", "loras", "-o", "o.safetensors", "--skip-bad", "--json"
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["changed"] == 3
    assert "is a web page" in done.stderr
    done = run("inspect", "none.safetensors")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
