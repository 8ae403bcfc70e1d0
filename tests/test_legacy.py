"""The built-in Lora's names, used as other extensions use them: with the built-in switched off, and with it on."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from extensions_builtin_shim.launch import OURS, launch, put_modules_on_path
from extensions_builtin_shim.tiny_sd import TinySD
from tests import random_adapters

put_modules_on_path()
from modules import extra_networks, script_callbacks, sd_models, shared  # noqa: E402  # only now is there a `modules`

from lib_locon.hosts import takeover  # noqa: E402
from lib_locon.session import Session  # noqa: E402

Launch = Callable[..., Any]
SHIM = Path(__file__).parents[1] / "extensions_builtin_shim" / "Lora"
NAMES = [path.stem for path in SHIM.glob("*.py") if path.stem != "__init__"]
LAYERS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
TORCHS_OWN = {kind: (kind.forward, kind._load_from_state_dict) for kind in LAYERS}

# Stands for the built-in where that is switched on: it patches torch's classes and keeps its state in modules.
BUILTIN = {
    "networks.py": """
from torch import nn
available_networks, available_network_aliases, networks_in_memory, loaded_networks = {}, {}, {}, []
acted, originals = [], None
def network_apply_weights(self):
    acted.append(self)
def load_networks(names, *_):
    acted.append(names)
def network_restore_weights_from_backup(self):
    acted.append("restore")
    self.weight.copy_(self.network_weights_backup)
def network_reset_cached_weight(self):
    acted.append("reset")
    self.network_current_names, self.network_weights_backup = (), None
class Originals:
    def __init__(self):
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention):
            for short, field in (("forward", "forward"), ("load_state_dict", "_load_from_state_dict")):
                name = f"{kind.__name__}_{short}"
                if getattr(self, name, None) is not None:
                    raise RuntimeError("patched already")
                setattr(self, name, getattr(kind, field))
                setattr(kind, field, globals()["network_" + name])
    def undo(self):
        for name, function in list(vars(self).items()):
            if function is None:
                raise RuntimeError("not patched")
            kind, _, short = name.partition("_")
            setattr(getattr(nn, kind), "forward" if short == "forward" else "_load_from_state_dict", function)
            setattr(self, name, None)
def patch(name, acts):
    def method(self, *args, **kwargs):
        if acts:
            network_apply_weights(self)
        return getattr(originals, name)(self, *args, **kwargs)
    globals()["network_" + name] = method
for kind in ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "MultiheadAttention"):
    patch(kind + "_forward", True)
    patch(kind + "_load_state_dict", False)
""",
    "network.py": """
class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name, self.filename = name, filename
class Network:
    def __init__(self, name, network_on_disk):
        raise AssertionError("we make our own")
""",
    "lora.py": "import networks\nloaded_loras = networks.loaded_networks\n",
    "extra_networks_lora.py": """
from modules import extra_networks
import networks
class ExtraNetworkLora(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")
    def activate(self, p, params_list):
        networks.load_networks([params.items[0] for params in params_list])
    def deactivate(self, p):
        networks.acted.append("deactivate")
""",
    "scripts/lora_script.py": """
import networks, network, lora, extra_networks_lora
from modules import extra_networks, script_callbacks
from torch import nn
def before_ui():
    handler = extra_networks_lora.ExtraNetworkLora()
    extra_networks.register_extra_network(handler)
    extra_networks.register_extra_network_alias(handler, "lyco")
def unload():
    networks.patched_at_unload = nn.Linear.forward is networks.network_Linear_forward
    networks.originals.undo()
networks.originals = networks.Originals()
script_callbacks.on_before_ui(before_ui)
script_callbacks.on_script_unloaded(unload)
""",
}


@functools.cache
def model() -> TinySD:
    return TinySD.random(0)


@pytest.fixture
def started() -> Iterator[Launch]:
    """started(**options of launch): a webui that is closed after the test."""
    running = []

    def start(**options: Any) -> Any:
        known = {"lora_dir": random_adapters.folder(), "make_model": lambda: copy.deepcopy(model())}
        running.append(launch(**{**known, **options}))
        return running[-1]

    yield start
    for webui in running:
        webui.close()
    assert {kind: (kind.forward, kind._load_from_state_dict) for kind in LAYERS} == TORCHS_OWN


def write(root: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return root


@pytest.fixture
def builtin(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """The built-in's folder. Its modules stay imported as in the webui, but not beyond the test."""
    yield {"Lora": write(tmp_path / "Lora", BUILTIN)}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def tagged(builtin: dict[str, Path], started: Launch) -> Any:
    """The webui with the built-in switched on."""
    return started(builtin=builtin)


def generate(webui: Any, prompt: str, steps: int = 2) -> bytes:
    picture: bytes = webui.generate(prompt, seed=1, steps=steps).image.tobytes()
    return picture


def at_each_step(function: Callable[[int], object]) -> None:
    """As an extension that begins to listen when it is used first, and so after us."""
    script_callbacks.on_cfg_denoiser(lambda params: function(params.sampling_step))


def imported(name: str) -> Any:
    return importlib.import_module(name)


# --- the names ---------------------------------------------------------------------------------------------------


def test_names_are_there_while_we_are(started: Launch) -> None:
    webui = started()
    for name in NAMES:
        assert Path(str(imported(name).__file__)).parent == SHIM
    before = imported("networks")
    webui.reload_ui()
    assert "lora" not in sys.modules  # the built-in may be switched on at a reload
    assert imported("networks") is not before
    assert imported("lora").loaded_loras is imported("networks").loaded_networks
    webui.close()
    for name in NAMES:
        assert name not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            imported(name)


def test_names_give_way(started: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else has a module of one of the names keeps it, before and after."""
    write(tmp_path, {"network_ia3.py": "OWNER = 'somebody'\n"})
    monkeypatch.syspath_prepend(tmp_path)
    try:
        webui = started()
        assert imported("network_ia3").OWNER == "somebody"
        webui.close()
        assert imported("network_ia3").OWNER == "somebody"
    finally:
        sys.modules.pop("network_ia3", None)


def test_a_stranger_called_networks(started: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its module as it is, and adapters work."""
    stranger = type(sys)("networks")
    monkeypatch.setitem(sys.modules, "networks", stranger)
    before = dict(vars(stranger))
    webui = started()
    assert generate(webui, "cat <lora:tiny_lora:1>") != generate(webui, "cat")
    assert vars(stranger) == before


def test_names_at_script_load(started: Launch, tmp_path: Path) -> None:
    """Many extensions import the names while their own script loads."""
    script = "import networks, network, network_lora, extra_networks_lora\nnetworks.seen_by_script = True\n"
    other = write(tmp_path / "z-other", {"scripts/z.py": script})
    started(extensions={**OURS, "z-other": other})
    assert imported("networks").seen_by_script


# --- reading -----------------------------------------------------------------------------------------------------


def test_tagcomplete_reads_the_files(started: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(random_adapters.folder() / "tiny_lora.safetensors", folder / "first.safetensors")
    started(lora_dir=folder)
    lora, networks = imported("lora"), imported("networks")
    (file,) = lora.available_loras.values()
    assert (file.name, file.filename) == ("first", str(folder / "first.safetensors"))
    assert file.metadata["ss_output_name"] == file.alias
    assert file.get_alias() == file.alias
    assert lora.available_lora_aliases["first"] is lora.available_lora_aliases[file.alias] is file
    assert file.hash == file.shorthash == ""  # not computed yet, and what the file says of itself is no proof
    assert file not in networks.available_network_hash_lookup.values()
    file.read_hash()
    assert len(file.hash) == 64
    assert networks.available_network_hash_lookup[file.shorthash] is file
    # a second file with the same alias, and one with the same name
    shutil.copy(folder / "first.safetensors", folder / "sub" / "first.safetensors")
    shutil.copy(folder / "first.safetensors", folder / "second.safetensors")
    networks.list_available_networks()
    assert set(networks.available_networks) == {"first", "sub/first", "second"}
    assert file.alias.lower() in networks.forbidden_network_aliases
    assert {each.get_alias() for each in networks.available_networks.values()} == {"first", "second"}


def test_block_weight_reads_the_loaded(started: Launch) -> None:
    webui = started()
    networks, network_lora = imported("networks"), imported("network_lora")
    generate(webui, "cat <lora:tiny_lora:0.8:0.4><lora:tiny_loha:0.5:dyn=3>")
    one, two = networks.loaded_networks
    assert (one.name, one.mentioned_name, one.te_multiplier, one.unet_multiplier, one.dyn_dim) == (
        "tiny_lora", "tiny_lora", 0.8, 0.4, None,
    )  # fmt: skip
    assert (two.te_multiplier, two.unet_multiplier, two.dyn_dim) == (0.5, 0.5, 3)
    assert one.network_on_disk is networks.available_networks["tiny_lora"]
    assert networks.networks_in_memory == {"tiny_lora": one, "tiny_loha": two}
    assert isinstance(one, imported("network").Network)
    mapping = sd_models.model_data.sd_model.network_layer_mapping  # type: ignore[union-attr]
    for name, module in one.modules.items():
        assert isinstance(module, network_lora.NetworkModuleLora)
        assert module.sd_module is mapping[name]
        assert module.multiplier() == (0.8 if "transformer_text" in name else 0.4)
        assert module.dim == len(module.down_model.weight)
        up, down = module.up_model.weight.float().flatten(1), module.down_model.weight.float().flatten(1)
        delta = module.alpha / module.dim * module.multiplier() * (up @ down)
        updown, bias = module.calc_updown(module.sd_module.weight.detach())
        torch.testing.assert_close(updown.flatten(1), delta)
        assert bias is None
    assert {type(module).__name__ for module in two.modules.values()} == {"NetworkModuleHada"}
    generate(webui, "cat")
    assert networks.loaded_networks == []
    assert networks.networks_in_memory == {}


def test_block_weight_changes_factors(started: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """It multiplies factors by its ratios; those are read from the tag by us, and would count twice."""
    webui = started()
    networks = imported("networks")
    expected = generate(webui, "cat <lora:tiny_lora:1><lora:tiny_loha:1>")

    def rewrite(_: int) -> None:
        lora, loha = networks.loaded_networks
        for module in lora.modules.values():
            module.up_model.weight = nn.Parameter(module.up_model.weight * 0)
        for module in loha.modules.values():
            module.w1a = nn.Parameter(module.w1a * 0)

    at_each_step(rewrite)
    assert generate(webui, "cat <lora:tiny_lora:1><lora:tiny_loha:1>") == expected
    told = [record.message for record in caplog.records if "lbw=" in record.message]
    assert len(told) == 2
    assert "tiny_lora" in told[0]


def test_block_weight_beside_a_tag_that_has_block_weights(started: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """It multiplies the factors by what stands in the tag, which we did already: nothing is wrong, nothing is said."""
    webui = started()
    networks = imported("networks")
    expected = generate(webui, "cat <lora:tiny_lora:1:lbw=OUTALL>")

    def rewrite(_: int) -> None:
        for module in networks.loaded_networks[0].modules.values():
            module.up_model.weight = nn.Parameter(module.up_model.weight * 0)

    at_each_step(rewrite)
    assert generate(webui, "cat <lora:tiny_lora:1:lbw=OUTALL>") == expected
    assert [record.message for record in caplog.records if "changes the layers" in record.message] == []


def test_composable_lora_reads_every_field_of_a_layer(started: Launch, caplog: pytest.LogCaptureFixture) -> None:
    """It makes an object of its own of each, and notes that on ours."""
    webui = started()
    networks = imported("networks")
    generate(webui, "cat <lora:tiny_locon:1><lora:tiny_loha:1><lora:tiny_lokr:1>")
    seen = set()
    for network in networks.loaded_networks:
        for module in network.modules.values():
            layer = module.sd_module
            assert module.bias is None and module.scale is None and module.dora_scale is None
            assert module.dora_norm_dims == layer.weight.ndim - 1
            kwargs = {} if isinstance(layer, nn.Linear) else {"stride": layer.stride, "padding": layer.padding}
            assert module.extra_kwargs == kwargs
            updown, _ = module.calc_updown(layer.weight.detach())
            value = torch.ones(1, layer.weight.shape[1], *[4] * (layer.weight.ndim - 2))
            if isinstance(layer, nn.Linear):
                value = value.reshape(1, -1)
            change = module.ops(value, updown, **kwargs)
            torch.testing.assert_close(module.forward(value, torch.ones(())), 1 + change)
            module.lyco_converted_lora_module = seen
            if type(module).__name__ == "NetworkModuleLora":
                assert module.mid_model is None
                both = module.up_model.to(device="cpu")(module.down_model.to(device="cpu")(value))
                torch.testing.assert_close(both * module.calc_scale() * module.multiplier(), change)
            seen.add(type(module).__name__)
    assert seen == {"NetworkModuleLora", "NetworkModuleHada", "NetworkModuleLokr"}
    assert "changes the layers" not in caplog.text


def test_the_page_of_cards_can_be_made(started: Launch) -> None:
    started()
    page = imported("ui_extra_networks_lora").ExtraNetworksPageLora()
    assert {item["name"] for item in page.list_items()} == set(imported("networks").available_networks)


def test_names_are_looked_for(started: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    started(lora_dir=folder)
    networks = imported("networks")
    time = folder.stat().st_mtime_ns
    assert not networks.available_networks
    shutil.copy(random_adapters.folder() / "tiny_lora.safetensors", folder / "new.safetensors")
    os.utime(folder, ns=(time, time))
    networks.update_available_networks_by_names([])
    assert not networks.available_networks
    networks.update_available_networks_by_names(["new"])
    assert list(networks.available_networks) == ["new"]
    networks.purge_networks_from_memory()


# --- setting -----------------------------------------------------------------------------------------------------


def test_regional_prompter_sets_strengths_at_steps(started: Launch) -> None:
    webui = started()
    networks = imported("networks")
    plain, full = generate(webui, "cat"), generate(webui, "cat <lora:tiny_lora:0.8>")
    first_half = generate(webui, "cat <lora:tiny_lora:0.8:stop=2>")
    weaker = generate(webui, "cat <lora:tiny_lora:0.8:0.4>")
    assert len({plain, full, first_half, weaker}) == 4
    wanted: Callable[[int], float] = lambda step: 0.8  # noqa: E731

    def change(step: int) -> None:
        for item in networks.loaded_networks:
            item.unet_multiplier = wanted(step)

    at_each_step(change)
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == full
    wanted = lambda step: 0.0 if step else 0.8  # noqa: E731
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == first_half
    wanted = lambda step: 0.4  # noqa: E731
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == weaker
    assert generate(webui, "cat <lora:tiny_lora:0.8:unet=0.8@0,0.1@1>", 4) == generate(
        webui, "cat <lora:tiny_lora:0.8:0.4>", 4
    )  # and over what the prompt says of the steps
    assert generate(webui, "cat") == plain


def test_what_was_set_ends_with_the_next_activate(started: Launch) -> None:
    webui = started()
    networks = imported("networks")
    full = generate(webui, "cat <lora:tiny_lora:0.8>")
    item = networks.loaded_networks[0]
    item.unet_multiplier = 0.0
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == full
    assert networks.loaded_networks[0].unet_multiplier == 0.8


def test_what_is_no_strength_is_left_out(started: Launch, caplog: pytest.LogCaptureFixture) -> None:
    webui = started()
    networks = imported("networks")
    full = generate(webui, "cat <lora:tiny_lora:0.8>")
    bad = iter(["much", float("nan")])

    def change(_: int) -> None:
        networks.loaded_networks[0].unet_multiplier = next(bad)

    at_each_step(change)
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == full
    assert sum("is no strength" in record.message for record in caplog.records) == 2


def test_out_of_the_list_is_out_of_the_model(started: Launch) -> None:
    webui = started()
    networks = imported("networks")
    one_of_two = generate(webui, "cat <lora:tiny_loha:0:1>")
    plain = generate(webui, "cat")
    at_each_step(lambda _: networks.loaded_networks.pop(0) if len(networks.loaded_networks) == 2 else None)
    assert generate(webui, "cat <lora:tiny_lora:0:1><lora:tiny_loha:0:1>") == one_of_two
    at_each_step(lambda _: setattr(networks, "loaded_networks", []))
    assert generate(webui, "cat <lora:tiny_lora:0:1>") == plain


def test_load_networks(started: Launch) -> None:
    webui = started()
    networks = imported("networks")
    weights = sd_models.model_data.sd_model.state_dict  # type: ignore[union-attr]
    base = {key: tensor.clone() for key, tensor in weights().items()}
    generate(webui, "cat <lora:tiny_lora:0.5:0.25><lora:tiny_loha:1>")
    by_prompt = {key: tensor.clone() for key, tensor in weights().items()}
    networks.load_networks([])
    assert all(torch.equal(base[key], tensor) for key, tensor in weights().items())
    networks.load_networks(["tiny_loha", "tiny_lora", "none"], [1.0, 0.5, 1.0], [1.0, 0.25, 1.0], [None, None, None])
    assert all(torch.equal(by_prompt[key], tensor) for key, tensor in weights().items())
    assert [item.name for item in networks.loaded_networks] == ["tiny_loha", "tiny_lora"]
    networks.load_networks(["tiny_loha"])
    assert networks.loaded_networks[0].unet_multiplier == 1.0


LORACTL = """
from modules import extra_networks, script_callbacks
import network, networks, network_lora, extra_networks_lora
STRENGTH = {"now": 0.0, "given": 0.0}
class Controlled(extra_networks_lora.ExtraNetworkLora):
    def activate(self, p, params_list):
        networks.controlled = [params.items[0] for params in params_list]
        return super().activate(p, params_list)
def set_up(*_):
    networks.strength = STRENGTH
    network.Network.te_multiplier = property(lambda self: STRENGTH["te"], lambda self, value: None)
    network.Network.unet_multiplier = property(lambda self: STRENGTH["unet"])
    extra_networks.extra_network_registry["lora"] = Controlled()
script_callbacks.on_app_started(set_up)
"""


@pytest.mark.parametrize("switched_on", [False, True])
def test_loractl_answers_itself(
    started: Launch,
    builtin: dict[str, Path],
    tmp_path: Path,
    switched_on: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    webui = started()
    wanted = {
        prompt: generate(webui, prompt)
        for prompt in ("cat", "cat <lora:tiny_lora:0.8:0.4>", "cat <lora:tiny_lora:0.8:stop=2>")
    }
    webui.close()
    other = write(tmp_path / "z-loractl", {"scripts/z.py": LORACTL})
    webui = started(extensions={**OURS, "z-loractl": other}, builtin=builtin if switched_on else {})
    networks = imported("networks")
    networks.strength.update(te=0.8, unet=0.4)
    assert generate(webui, "cat <lora:tiny_lora:1>") == wanted["cat <lora:tiny_lora:0.8:0.4>"]
    assert networks.controlled == ["tiny_lora"]
    (told,) = [record.message for record in caplog.records if "answers for <lora:…> now" in record.message]
    assert "extension z-loractl" in told
    assert "hands them on" in told
    networks.strength.update(unet=0.8)
    at_each_step(lambda step: networks.strength.update(unet=0.0 if step else 0.8))
    assert generate(webui, "cat <lora:tiny_lora:1>") == wanted["cat <lora:tiny_lora:0.8:stop=2>"]
    assert generate(webui, "cat") == wanted["cat"]


FAILING = """
from modules import script_callbacks
import network
STEPS = {"now": 2}
def strength(self):
    return 1 / (STEPS["now"] - 2)
def set_up(*_):
    network.Network.steps = STEPS
    network.Network.unet_multiplier = property(strength)
script_callbacks.on_app_started(set_up)
"""


@pytest.mark.parametrize("from_step", [0, 2])
def test_an_extension_whose_property_fails_is_named_and_costs_its_own_effect_only(
    started: Launch, tmp_path: Path, from_step: int
) -> None:
    webui = started()
    wanted = generate(webui, "cat <lora:tiny_lora:0.8><lora:tiny_loha:0.5>")
    webui.close()
    other = write(tmp_path / "z-curves", {"scripts/z.py": FAILING})
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    other = other.rename(extensions / "z-curves")
    webui = started(extensions={**OURS, "z-curves": other})
    steps = imported("network").Network.steps
    if from_step:
        steps["now"] = 3  # a strength of 1, until it divides by zero
        at_each_step(lambda step: steps.update(now=2 if step >= from_step else 3))
    run = webui.generate("cat <lora:tiny_lora:0.8><lora:tiny_loha:0.5>", seed=1, steps=4)
    said = [line for line in run.comments if "z-curves" in line]
    assert len(said) == 2 and all("ZeroDivisionError: division by zero" in line for line in said), run.comments
    assert "the extension z-curves failed when it was asked for unet_multiplier of 'tiny_lora'" in said[0]
    assert "the strength in the tag is used" in said[0]
    assert not any("sd-webui-locon itself" in line or "no adapter" in line for line in run.comments)
    if not from_step:
        assert generate(webui, "cat <lora:tiny_lora:0.8><lora:tiny_loha:0.5>") == wanted


def test_composable_lora_gives_layers_back(started: Launch) -> None:
    webui = started()
    networks = imported("networks")
    text_only = generate(webui, "cat <lora:tiny_lora:0.8:0>")
    full = generate(webui, "cat <lora:tiny_lora:0.8>")

    def restore(_: int) -> None:
        for module in sd_models.model_data.sd_model.model.modules():  # type: ignore[union-attr]
            networks.network_restore_weights_from_backup(module)
            networks.network_reset_cached_weight(module)

    at_each_step(restore)
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == text_only
    # the built-in's own way into a layer applies again what was reset
    unet = sd_models.model_data.sd_model.model  # type: ignore[union-attr]
    at_each_step(lambda _: networks.network_apply_weights(unet))
    assert generate(webui, "cat <lora:tiny_lora:0.8>") == full


def test_layers_that_get_their_base_back_and_are_patched_again_at_once(
    started: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One composable-lora does so with each layer, before it adds to the output: not the whole model each time."""
    webui = started()
    networks = imported("networks")
    plain = generate(webui, "cat")
    expected = [generate(webui, prompt) for prompt in ("cat <lora:tiny_lora:0.8>", "cat <lora:tiny_loha:1>")]
    restored: list[object] = []
    real = Session.restore
    monkeypatch.setattr(Session, "restore", lambda session: (restored.append(session), real(session))[1])
    own = nn.Linear.forward

    def forward(self: nn.Linear, value: torch.Tensor) -> torch.Tensor:
        networks.network_restore_weights_from_backup(self)
        networks.network_reset_cached_weight(self)
        return networks.network_Linear_forward(self, value)  # type: ignore[no-any-return]

    nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        found = [generate(webui, prompt) for prompt in ("cat <lora:tiny_lora:0.8>", "cat <lora:tiny_loha:1>", "cat")]
    finally:
        nn.Linear.forward = own  # type: ignore[method-assign]
    assert found == [*expected, plain]
    assert len(restored) <= 4


def test_through_the_functions_of_layers(started: Launch) -> None:
    """Some put `networks.network_Linear_forward` into torch's classes, and set strengths in the middle of a step."""
    webui = started()
    networks = imported("networks")
    weaker = generate(webui, "cat <lora:tiny_lora:0.8:0.4>")
    layer = sd_models.model_data.sd_model.model.diffusion_model.time_embed[0]  # type: ignore[union-attr]
    own = nn.Linear.forward

    def forward(self: nn.Linear, value: torch.Tensor) -> torch.Tensor:
        if self is layer:
            for item in networks.loaded_networks:
                item.unet_multiplier = 0.4
        out: torch.Tensor = networks.network_Linear_forward(self, value)
        return out

    nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        assert generate(webui, "cat <lora:tiny_lora:0.8>") == weaker
    finally:
        nn.Linear.forward = own  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["network_Linear_forward", "network_forward"])
def test_strengths_that_are_set_in_the_forward_of_a_layer_beside_which_an_adapter_runs(
    started: Launch, name: str
) -> None:
    """As regional-prompter does, which wants adapters beside the layers, at the first layer of the text encoder."""
    webui = started()
    shared.opts.set("lora_functional", True)
    networks = imported("networks")
    wanted = generate(webui, "cat <lora:tiny_lora:0.8:0>")
    assert wanted != generate(webui, "cat")
    names = networks.loaded_networks
    first = next(
        module
        for path, module in sd_models.model_data.sd_model.named_modules()  # type: ignore[union-attr]
        if path.endswith("layers.0.self_attn.q_proj")
    )
    own, calls = nn.Linear.forward, list[float]()

    def forward(self: nn.Linear, value: torch.Tensor) -> torch.Tensor:
        if self is first:
            calls.append(len(self._forward_hooks))
            for item in networks.loaded_networks:
                item.te_multiplier = 0.8
        if name == "network_forward":
            return networks.network_forward(self, value, own)  # type: ignore[no-any-return]
        return networks.network_Linear_forward(self, value)  # type: ignore[no-any-return]

    nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        assert generate(webui, "cat <lora:tiny_lora:0:0>") == wanted
    finally:
        nn.Linear.forward = own  # type: ignore[method-assign]
    assert calls[0] == 0, "no hook stood there when torch looked for one"
    assert names is networks.loaded_networks


def test_the_functions_of_layers_are_all_there(started: Launch) -> None:
    """One composable-lora keeps each of them, and puts it back into torch's classes after an image."""
    started()
    networks = imported("networks")
    layer = nn.Linear(2, 2)
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    own = nn.Linear._load_from_state_dict
    nn.Linear._load_from_state_dict = networks.network_Linear_load_state_dict  # type: ignore[method-assign]
    try:
        layer.load_state_dict(state)
    finally:
        nn.Linear._load_from_state_dict = own  # type: ignore[method-assign]
    assert layer.weight.eq(1).all()
    for kind in LAYERS:
        for short in ("forward", "load_state_dict"):
            assert callable(getattr(networks, f"network_{kind.__name__}_{short}"))


# --- the model's layers ------------------------------------------------------------------------------------------


def test_animatediff_finds_layers(started: Launch) -> None:
    webui = started()
    known: Any = sd_models.model_data.sd_model
    mapping = known.network_layer_mapping
    assert mapping["diffusion_model_time_embed_0"] is known.model.diffusion_model.time_embed[0]
    encoder = known.cond_stage_model.wrapped
    assert mapping["transformer_text_model_encoder"] is encoder.transformer.text_model.encoder
    assert all(module.network_layer_name == name for name, module in mapping.items() if name)
    webui.reload_ui()
    assert known.network_layer_mapping.keys() == mapping.keys()
    webui.close()
    assert not hasattr(known, "network_layer_mapping")
    assert not hasattr(known.model.diffusion_model, "network_layer_name")


def test_layers_of_sdxl() -> None:
    from lib_locon.hosts.takeover import name_layers

    class Embedder(nn.Module):
        def __init__(self, wrapped: nn.Module | None) -> None:
            super().__init__()
            if wrapped is not None:
                self.wrapped = wrapped

    known: Any = nn.Module()
    known.is_sdxl = True
    known.conditioner = nn.Module()
    inner = nn.Sequential(nn.Linear(1, 1))
    known.conditioner.embedders = nn.ModuleList([Embedder(inner), Embedder(None), Embedder(nn.Sequential(nn.ReLU()))])
    known.model = nn.Sequential(nn.Conv2d(1, 1, 1))
    name_layers(known)
    assert set(known.network_layer_mapping) == {"0_", "0_0", "2_", "2_0", "", "0"}
    assert known.network_layer_mapping["0_0"] is inner[0]


# --- the built-in switched on ------------------------------------------------------------------------------------


def test_the_built_in_stays_and_acts_no_more(builtin: dict[str, Path], started: Launch) -> None:
    off = started()
    wanted = {prompt: generate(off, prompt) for prompt in ("cat", "cat <lora:tiny_lora:0.8:0.4>")}
    off.close()
    webui = started(builtin=builtin)
    networks = imported("networks")
    assert Path(networks.__file__).parent == builtin["Lora"]
    for _ in range(3):
        assert {kind: (kind.forward, kind._load_from_state_dict) for kind in LAYERS} == TORCHS_OWN
        networks.acted.clear()
        loaded = networks.loaded_networks
        assert {prompt: generate(webui, prompt) for prompt in wanted} == wanted
        (item,) = imported("lora").loaded_loras
        assert networks.loaded_networks is loaded
        assert (item.name, item.te_multiplier, item.unet_multiplier) == ("tiny_lora", 0.8, 0.4)
        assert isinstance(item, imported("network").Network)
        # an instance of the built-in's, as it made one itself, hands on to us
        handler = imported("extra_networks_lora").ExtraNetworkLora()
        extra_networks.register_extra_network(handler)
        assert {prompt: generate(webui, prompt) for prompt in wanted} == wanted
        networks.network_restore_weights_from_backup(nn.Linear(1, 1))
        assert networks.acted == []
        webui.reload_ui()
        assert networks.patched_at_unload
        assert imported("networks") is networks
    webui.close()
    assert networks.patched_at_unload
    networks.load_networks(["it is itself again"])
    assert networks.acted == [["it is itself again"]]
    assert networks.originals.Linear_forward is None  # by its own undo, which found its patches


def test_others_import_half_of_a_built_in_that_is_switched_off(
    builtin: dict[str, Path], started: Launch, tmp_path: Path
) -> None:
    """Its files lie there all the same: tagcomplete puts the folder on the path, and loractl finds the other half."""
    early = f"import sys\nsys.path.append({str(builtin['Lora'])!r})\nimport lora\n"
    late = """
from modules import extra_networks, script_callbacks
import network, networks, extra_networks_lora
class Mine(extra_networks_lora.ExtraNetworkLora):
    def activate(self, p, params_list):
        return super().activate(p, params_list)
def before_image(*_):
    extra_networks.register_extra_network(Mine())
script_callbacks.on_app_started(before_image)
"""
    path = list(sys.path)
    alone = started()
    plain, expected = generate(alone, "cat"), generate(alone, "cat <lora:tiny_lora:1>")
    alone.close()
    others = {
        "a-complete": write(tmp_path / "a-complete", {"scripts/a.py": early}),
        **OURS,
        "z-ctl": write(tmp_path / "z-ctl", {"scripts/z.py": late}),
    }
    webui = started(extensions=others)
    sys.path[:] = path
    networks = imported("networks")
    assert not takeover.is_ours(networks) and takeover.is_ours(imported("extra_networks_lora"))
    for _ in range(2):
        assert generate(webui, "cat <lora:tiny_lora:1>") == expected
        assert [each.name for each in networks.loaded_networks] == ["tiny_lora"]
        assert networks.originals.Linear_forward is nn.Linear.forward
        assert generate(webui, "cat") == plain
        webui.reload_ui()
    webui.close()
    assert networks.originals is None


def test_what_the_built_in_left_in_the_model_comes_out(tagged: Any) -> None:
    """It was in the model when we were switched on by a "Reload UI": that would be our base for good."""
    plain = generate(tagged, "cat")
    layer = sd_models.model_data.sd_model.model.diffusion_model.time_embed[0]  # type: ignore[union-attr]
    layer.network_weights_backup = layer.weight.detach().clone()
    layer.network_current_names = (("old", 1.0, 1.0, None),)
    with torch.no_grad():
        layer.weight.add_(1)
    imported("networks").loaded_networks.append("what the built-in had in use")
    tagged.reload_ui()
    assert layer.network_weights_backup is None
    assert imported("networks").loaded_networks == []
    assert generate(tagged, "cat") == plain
    assert generate(tagged, "cat <lora:tiny_lora:1>") != plain
    assert generate(tagged, "cat") == plain


def test_the_host_loads_a_model_meanwhile(builtin: dict[str, Path], started: Launch) -> None:
    """It puts methods of its own over torch's while it loads, and then what it found there back."""
    started(builtin=builtin)
    networks = imported("networks")
    script_callbacks.script_unloaded_callback()  # as a reload does
    networks.originals = networks.Originals()
    found = nn.Linear._load_from_state_dict
    nn.Linear._load_from_state_dict = lambda *_: None  # type: ignore[method-assign]
    script_callbacks.app_started_callback(None, None)
    assert nn.Linear.forward is networks.network_Linear_forward
    nn.Linear._load_from_state_dict = found  # type: ignore[method-assign]
    script_callbacks.model_loaded_callback(sd_models.model_data.sd_model)
    assert {kind: (kind.forward, kind._load_from_state_dict) for kind in LAYERS} == TORCHS_OWN


def test_who_still_holds_the_built_ins_functions(tagged: Any) -> None:
    """They call the originals through a name that the built-in's own undo empties."""
    networks = imported("networks")
    layer = nn.Linear(2, 2)
    value = torch.ones(1, 2)
    assert torch.equal(networks.network_Linear_forward(layer, value), layer(value))
    assert networks.acted == []


def test_patches_over_the_built_ins_stay(
    builtin: dict[str, Path], started: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To undo the built-in's would take off another extension's too; under it, the built-in's do nothing."""
    script = """
from torch import nn
below = nn.Linear.forward
def above(self, *args):
    return below(self, *args)
nn.Linear.forward = above
def unload():
    nn.Linear.forward = below
from modules import script_callbacks
script_callbacks.on_script_unloaded(unload)
"""
    off = started()
    wanted = {prompt: generate(off, prompt) for prompt in ("cat", "cat <lora:tiny_lora:0.8:0.4>")}
    off.close()
    other = write(tmp_path / "z-patcher", {"scripts/z.py": script})
    caplog.set_level(logging.INFO)
    webui = started(builtin=builtin, extensions={**OURS, "z-patcher": other})
    assert nn.Linear.forward.__name__ == "above"
    imported("networks").acted.clear()
    assert {prompt: generate(webui, prompt) for prompt in wanted} == wanted
    assert imported("networks").acted == []
    assert any("another extension patches too" in record.message for record in caplog.records)


def test_multipliers_on_the_built_ins_objects(tagged: Any) -> None:
    networks = imported("networks")
    weaker = generate(tagged, "cat <lora:tiny_lora:0.8:0.4>")

    def change(_: int) -> None:
        networks.loaded_networks[0].unet_multiplier = 0.4

    at_each_step(change)
    assert generate(tagged, "cat <lora:tiny_lora:0.8>") == weaker


# --- whose tags they are -----------------------------------------------------------------------------------------


def test_the_line_at_start(started: Launch, builtin: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    webui = started()
    webui.close()
    started(builtin=builtin)
    said = [record.message for record in caplog.records if "answers for <lora:…> and <lyco:…>" in record.message]
    assert len(said) == 2
    assert "in the place of" not in said[0]
    assert "in the place of the extension Lora" in said[1]


def test_a_rival_is_named_and_left_alone(started: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = """
from modules import extra_networks
class Rival(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")
    def activate(self, p, params_list):
        p.comment("the rival")
    def deactivate(self, p):
        pass
extra_networks.the_rival = Rival
"""
    other = write(tmp_path / "a-rival", {"scripts/a.py": script})
    webui = started(extensions={**OURS, "a-rival": other})
    plain = generate(webui, "cat")
    assert generate(webui, "cat <lora:tiny_lora:1>") != plain
    extra_networks.register_extra_network(extra_networks.the_rival())  # type: ignore[attr-defined]
    assert generate(webui, "cat <lora:tiny_lora:1>") == plain
    assert generate(webui, "cat <lora:tiny_lora:1>") == plain
    (told,) = [record.message for record in caplog.records if "answers for <lora:…> now" in record.message]
    assert "extension a-rival" in told
    assert "applies none" in told
    assert imported("networks").loaded_networks == []
    webui.reload_ui()
    assert generate(webui, "cat <lora:tiny_lora:1>") != plain
