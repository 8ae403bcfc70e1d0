"""Starts a headless webui in this process: the stand-in's `modules`, the small model, and the extensions.

from extensions_builtin_shim.launch import launch

with launch(lora_dir="my/adapters") as webui:
    run = webui.generate("a red heart on blue <lora:glow:0.8>", seed=1, steps=20)
    run.image.save("a.png")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extensions_builtin_shim.tiny_sd import TinySD
    from extensions_builtin_shim.webui import Webui

SHIM = Path(__file__).resolve().parent
CHECKOUT = SHIM.parent
ADAPTERS = SHIM / "tiny_sd" / "models" / "Lora"
OURS = {"sd-webui-locon": CHECKOUT}


def launch(
    *,
    lora_dir: Path | str = ADAPTERS,
    extensions: Mapping[str, Path] = OURS,
    builtin: Mapping[str, Path] | None = None,
    make_model: Callable[[], TinySD] | None = None,
    make_app: Callable[[], object] | None = None,
    data_dir: Path | str | None = None,
) -> Webui:
    """Starts it as the host starts, and returns it ready.

    `extensions` and `builtin` are name → root, in the place of the host's two directories; `make_model` gives the model
    (left out: the trained small one). `make_app` gives the web application (a FastAPI) that extensions add
    their addresses to; left out, there is none. `data_dir` is the host's folder for its user's data; left out, it is
    one that goes with the run. One at a time in a process, as `modules` is the process's.
    """
    started = time.perf_counter()
    put_modules_on_path()
    from extensions_builtin_shim.webui import Webui  # imports the stand-in's `modules`

    roots = {name: Path(root).resolve() for name, root in extensions.items()}
    builtin_roots = {name: Path(root).resolve() for name, root in (builtin or {}).items()}
    webui = Webui(
        Path(lora_dir),
        builtin_roots,
        roots,
        make_model or trained,
        make_app,
        None if data_dir is None else Path(data_dir),
    )
    webui.seconds_to_load = time.perf_counter() - started
    return webui


def trained() -> TinySD:
    """The small model with the weights that it is shipped with."""
    from extensions_builtin_shim.tiny_sd.checkpoint import load_trained

    return load_trained()


def put_modules_on_path() -> None:
    """Makes `import modules` find the stand-in, as the webui's root on `sys.path` makes it find the real one.

    Raises RuntimeError where another `modules` is imported already, as inside a real webui.
    """
    loaded = sys.modules.get("modules")
    if loaded is not None and Path(str(loaded.__file__)).resolve().parent != SHIM / "modules":
        raise RuntimeError(f"another package called `modules` is in use here already: {loaded.__file__}")
    if str(SHIM) not in sys.path:
        sys.path.insert(0, str(SHIM))
