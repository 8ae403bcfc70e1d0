"""The running headless webui. Import it through `launch`, which first makes `modules` importable."""

from __future__ import annotations

import hashlib
import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from modules import extensions, extra_networks, initialize, script_callbacks, sd_models, shared
from modules.processing import Processed, StableDiffusionProcessingTxt2Img, process_images
from PIL import Image, PngImagePlugin

from extensions_builtin_shim.tiny_sd import TinySD

if TYPE_CHECKING:  # at run time only the script brings lib_locon in, as in the host
    from lib_locon.report import AdapterReport


class Seconds(NamedTuple):
    """How long a run took: `load` is the start-up and counted for the first run only, `apply` the extra networks."""

    load: float
    apply: float
    sample: float


@dataclass(frozen=True, eq=False)
class Run:
    """An image and how it came to be. `png` has the infotext in it and is the same for the same request."""

    prompt: str
    seed: int
    image: Image.Image
    png: bytes
    infotext: str
    comments: tuple[str, ...]
    """What the webui shows under the image."""
    adapters: tuple[AdapterReport, ...]
    seconds: Seconds

    @property
    def sha256(self) -> str:
        """Of the PNG file."""
        return hashlib.sha256(self.png).hexdigest()

    def as_json(self, image: str | None) -> dict[str, object]:
        """Plain data for JSON; `image` says where the image is to be found."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "image": image,
            "sha256": self.sha256,
            "adapters": [adapter.as_json() for adapter in self.adapters],
            "comments": list(self.comments),
            "seconds": {name: round(value, 4) for name, value in self.seconds._asdict().items()},
        }


class Webui:
    """Started when made; `close` it, or use it in a `with`."""

    def __init__(
        self,
        lora_dir: Path,
        builtin: Mapping[str, Path],
        user: Mapping[str, Path],
        make_model: Callable[[], TinySD] | None,
    ) -> None:
        self.seconds_to_load = 0.0
        self._lock = threading.Lock()
        shared.cmd_opts.__dict__.clear()
        shared.cmd_opts.lora_dir = str(lora_dir)
        shared.opts.data.clear()
        shared.opts.data_labels.clear()
        sd_models.model_data.clear()
        sd_models.model_data.make = make_model or TinySD.random
        extensions.configure(builtin, user)
        with _one_thread():
            initialize.start()

    def generate(
        self, prompt: str, negative_prompt: str = "", *, seed: int = 1, steps: int = 8, guidance: float = 5.0
    ) -> Run:
        """One image, as the webui's Generate makes it. Calls from several threads wait for each other."""
        p = StableDiffusionProcessingTxt2Img(
            prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, cfg_scale=guidance
        )
        with self._lock, _one_thread():
            shared.state.begin("txt2img")
            try:
                processed = process_images(p)
            finally:
                shared.state.end()
            load, self.seconds_to_load = self.seconds_to_load, 0.0
            return _run(p, processed, load)

    def reload_ui(self) -> None:
        """Presses the host's "Reload UI"."""
        with self._lock:
            initialize.reload_ui()

    def close(self) -> None:
        """Stops a run that is under way, and unloads scripts and models."""
        shared.state.interrupt()
        with self._lock:
            script_callbacks.script_unloaded_callback()
            script_callbacks.clear_callbacks()
            extra_networks.initialize()
            sd_models.model_data.clear()
            shared.state.interrupted = False  # it was for that run

    def __enter__(self) -> Webui:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is too small for more, and how sums are split, and so how they round, would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(p: StableDiffusionProcessingTxt2Img, processed: Processed, load: float) -> Run:
    if not processed.images:
        raise RuntimeError("the run was stopped before there was an image")
    image, infotext = processed.images[0], processed.infotexts[0]
    seconds = Seconds(load, processed.seconds.get("activate", 0.0), processed.seconds.get("sample", 0.0))
    png = _png(image, infotext)
    return Run(p.all_prompts[0], processed.all_seeds[0], image, png, infotext, tuple(p.comments), _reports(p), seconds)


def _png(image: Image.Image, infotext: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", infotext)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def _reports(p: StableDiffusionProcessingTxt2Img) -> tuple[AdapterReport, ...]:
    """The structured report of our extension; none where the prompt has no tag, or another answers for the tags."""
    tags = p.extra_network_data.keys() & {"lora", "lyco"}
    registry, aliases = extra_networks.extra_network_registry, extra_networks.extra_network_aliases
    handlers = [registry.get(tag) or aliases.get(tag) for tag in tags]
    a1111 = sys.modules.get("lib_locon.hosts.a1111")
    if a1111 is None or not any(isinstance(handler, a1111.LoconNetwork) for handler in handlers):
        return ()
    adapters: tuple[AdapterReport, ...] = a1111.last_report().adapters
    return adapters
