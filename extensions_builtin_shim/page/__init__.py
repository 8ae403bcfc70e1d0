"""The page on 127.0.0.1: one model, one user, one job at a time."""

from __future__ import annotations

import sys

from extensions_builtin_shim.page.server import ADDRESS, Server
from extensions_builtin_shim.webui import Webui

__all__ = ["ADDRESS", "Server", "serve"]


def serve(webui: Webui, port: int) -> int:
    """Serves until Ctrl-C; returns the exit code."""
    try:
        server = Server(webui, port)
    except OSError as error:
        sys.stderr.write(f"port {port} of {ADDRESS} cannot be had ({error.strerror or error}); try another --port\n")
        return 1
    try:
        sys.stdout.write(f"http://{ADDRESS}:{server.server_address[1]}/  (Ctrl-C ends)\n")
        sys.stdout.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    finally:
        webui.interrupt()  # the browser that waits for an image gets what there is, and closing need not wait for more
        server.server_close()
    return 0
