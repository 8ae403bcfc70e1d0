"""HTTP: who may ask, what a request may be, and how answers and refusals are sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

from modules import errors

from extensions_builtin_shim.app import App
from extensions_builtin_shim.limits import BadRequest
from extensions_builtin_shim.page.routes import ROUTES, Answer, NotFound, extension_file
from extensions_builtin_shim.webui import Webui
from lib_locon.untrusted_json import parse

ADDRESS = "127.0.0.1"
MAX_BODY = 64 * 1024  # bytes
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Refused(Exception):
    """A request that gets no answer but this sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Listens on this machine only. Raises OSError where the port is taken."""

    allow_reuse_address = sys.platform != "win32"  # there it would let two servers have the same port

    def __init__(self, webui: Webui, port: int) -> None:
        self.webui = webui
        super().__init__((ADDRESS, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away before its answer is there is nothing to tell about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            errors.report(f"Error in a request from {client_address}", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Finds the route and sends its answer. Every refusal is a JSON sentence."""

    server: Server
    server_version = "tiny-webui"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:  # the name http.server calls
        """The page, its parts, and what there is."""
        self._respond("GET")

    def do_POST(self) -> None:
        """What changes something."""
        self._respond("POST")

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the terminal is for what goes wrong with images."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, such as unknown methods, in the same form as our refusals."""
        del explain
        self.close_connection = True
        self._send_json(code, {"error": message or HTTPStatus(code).description or HTTPStatus(code).phrase})

    def _respond(self, method: str) -> None:
        try:
            self._check_sender()
            answer = self._answer(method)
        except Refused as refused:
            self._refuse(refused.status, refused)
        except BadRequest as bad:
            self._refuse(HTTPStatus.BAD_REQUEST, bad)
        except NotFound as absent:
            self._refuse(HTTPStatus.NOT_FOUND, absent)
        except (ConnectionError, TimeoutError):
            raise  # nobody is there to be told
        except Exception as error:  # noqa: BLE001  # the user must hear of it, whatever it is, and the page stay up
            errors.report("Error while answering a request", exc_info=True)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, error)
        else:
            self._send(HTTPStatus.OK, answer.content, answer.kind)

    def _answer(self, method: str) -> Answer:
        try:
            url = urlsplit(self.path)
        except ValueError as error:
            raise BadRequest(f"the address is none: {error}") from error
        file = extension_file(unquote(url.path))
        if file is not None and method == "GET":
            return file
        if url.path not in ROUTES:
            return self._of_extension(method, unquote(url.path), url.query)
        wanted, route = ROUTES[url.path]
        if wanted != method:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{url.path} is for {wanted} requests")
        return route(self.server.webui, self._body() if method == "POST" else dict(parse_qsl(url.query)))

    def _of_extension(self, method: str, path: str, query: str) -> Answer:
        """What stands at an address that an extension added."""
        app, body = self.server.webui.app, b""
        if method == "POST":
            body = json.dumps(self._body()).encode()
        found = app.answer(method, path, query, body) if isinstance(app, App) else None
        if found is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is nothing at {path}")
        status, content, kind = found
        if status != HTTPStatus.OK:
            raise Refused(HTTPStatus(status), json.loads(content)["error"])
        return Answer(content, kind)

    def _check_sender(self) -> None:
        """Another site's name may be made to point to 127.0.0.1, and its page then speaks to us as its own server."""
        port = self.server.server_address[1]
        ours = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        if self.headers.get("Host", "").lower() not in ours:
            raise Refused(HTTPStatus.FORBIDDEN, f"this page answers only as {ADDRESS}:{port} or localhost:{port}")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower().removeprefix("http://") not in ours:
            raise Refused(HTTPStatus.FORBIDDEN, "requests from other sites are not answered")

    def _body(self) -> Mapping[str, object]:
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request must be application/json")
        lengths = [length.strip() for length in self.headers.get_all("Content-Length", [])]
        whole = all(length.isascii() and length.isdigit() for length in lengths)
        if len(lengths) != 1 or not whole or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request must say how long it is (one Content-Length)")
        digits = lengths[0].lstrip("0") or "0"
        if len(digits) > len(str(MAX_BODY)) or int(digits) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {MAX_BODY} bytes")
        try:
            body = parse(self.rfile.read(int(digits)).decode())
        except ValueError as error:
            raise BadRequest(f"the request is no JSON: {error}") from error
        if not isinstance(body, dict):
            raise BadRequest("the request must be a JSON object")
        return body

    def _refuse(self, status: HTTPStatus, error: Exception) -> None:
        self.close_connection = True  # a body that was not read would be taken for the next request
        self._send_json(status, {"error": str(error) or type(error).__name__})

    def _send_json(self, status: int, data: Mapping[str, object]) -> None:
        self._send(status, json.dumps(data).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
