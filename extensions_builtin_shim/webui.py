"""The running headless webui. Import it through `launch`, which first makes `modules` importable."""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from modules import (
    extensions,
    extra_networks,
    initialize,
    paths_internal,
    progress,
    script_callbacks,
    sd_models,
    shared,
    shared_options,
    ui_extra_networks,
)
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
        make_app: Callable[[], object] | None = None,
        data_dir: Path | None = None,
    ) -> None:
        self._own_data = None if data_dir else tempfile.TemporaryDirectory(prefix="headless-webui-")
        paths_internal.data_path = str(data_dir or self._own_data.name)
        initialize.make_app = make_app
        self.seconds_to_load = 0.0
        self._lock = threading.Lock()
        self._pages = threading.Lock()
        shared.cmd_opts.__dict__.clear()
        shared.cmd_opts.lora_dir = str(lora_dir)
        shared.opts.data.clear()
        shared.opts.data_labels.clear()
        shared.opts.data_labels.update(shared_options.known())
        sd_models.model_data.clear()
        sd_models.model_data.make = make_model or TinySD.random
        extensions.configure(builtin, user)
        with _one_thread():
            initialize.start()

    def generate(
        self, prompt: str, negative_prompt: str = "", *, seed: int = 1, steps: int = 8, guidance: float = 2.5
    ) -> Run:
        """One image, as the webui's Generate makes it. Calls from several threads wait for each other."""
        return self.generate_all(prompt, negative_prompt, seed=seed, steps=steps, guidance=guidance)[0]

    def generate_all(
        self, prompt: str, negative_prompt: str = "", *, seed: int, steps: int, guidance: float = 2.5, count: int = 1
    ) -> tuple[Run, ...]:
        """The images of one job: `count` batches of one image, with the seeds from `seed` on. Fewer if interrupted."""
        p = StableDiffusionProcessingTxt2Img(
            prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, cfg_scale=guidance, n_iter=count
        )
        with self._lock, _one_thread():
            shared.state.begin("txt2img")
            try:
                processed = process_images(p)
            finally:
                shared.state.end()
            load, self.seconds_to_load = self.seconds_to_load, 0.0
            return _runs(p, processed, load)

    @property
    def app(self) -> Any:
        """The web application of the page that is up now; None without a `make_app`."""
        return initialize.app

    @contextmanager
    def pages(self) -> Iterator[list[ui_extra_networks.ExtraNetworksPage]]:
        """The registered pages of cards. They list their items one request at a time."""
        with self._pages:
            yield list(ui_extra_networks.extra_pages)

    def progress(self) -> dict[str, object]:
        """How far the running job is: `progress` from 0 to 1, and the host's state."""
        return {"progress": progress.fraction(), "state": shared.state.dict()}

    def interrupt(self) -> None:
        """Presses the host's "Interrupt"."""
        shared.state.interrupt()

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
            if self._own_data is not None:
                self._own_data.cleanup()

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


def _runs(p: StableDiffusionProcessingTxt2Img, processed: Processed, load: float) -> tuple[Run, ...]:
    if not processed.images:
        raise RuntimeError("the run was stopped before there was an image")
    seconds = Seconds(load, processed.seconds.get("activate", 0.0), processed.seconds.get("sample", 0.0))
    comments, reports = tuple(p.comments), _reports(p)
    return tuple(
        Run(p.all_prompts[index], p.all_seeds[index], image, _png(image, text), text, comments, reports, seconds)
        for index, (image, text) in enumerate(zip(processed.images, processed.infotexts, strict=True))
    )


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
