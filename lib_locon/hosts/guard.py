"""Who may ask: the passwords that the host was started with, and whether a request comes from this computer."""

from __future__ import annotations

import base64
import hmac
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any, TypeAlias

Logins: TypeAlias = "Mapping[str, str] | None"
"""User name → password. None where the host asks for none; an empty one lets nobody in."""
_LOGIN_COOKIE = "access-token"
_PROXY = (
    b"forwarded",
    b"x-forwarded-",
    b"x-real-ip",
    b"x-client-ip",
    b"x-original-",
    b"via",
    b"cf-",
    b"true-client-ip",
)
"""How the headers begin by which a proxy tells that it hands a request on."""


def logins_of(option: str | None) -> Logins:
    """What the host's --api-auth says: `name:password`, several with commas between."""
    if not option:
        return None
    # without a colon nobody can log in: the host itself does not start its API so, and ours must not be open for it
    return dict(pair.split(":", 1) for pair in option.split(",") if ":" in pair)


def may_ask(scope: Mapping[str, Any], logins: Logins) -> bool:
    """Whether a request has one of `logins`, or one of the host's page (--gradio-auth), or comes from that page.

    Where neither asks for any, everybody may.
    """
    app = scope.get("app")
    page: Mapping[str, str] | Callable[[str, str], bool] | None = getattr(app, "auth", None)
    if logins is None and page is None:
        return True
    headers = dict(scope["headers"])
    user, password = _basic(headers.get(b"authorization", b""))
    known = [logins or {}, page if isinstance(page, Mapping) else {}]
    # every login is compared, so that the time taken says nothing
    good = [_same(user, name) & _same(password, word) for each in known for name, word in each.items()]
    return any(good) or _asked_by_page(headers.get(b"cookie", b""), getattr(app, "tokens", None))


def _basic(header: bytes) -> tuple[bytes, bytes]:
    kind, _, token = header.partition(b" ")
    try:
        user, colon, password = base64.b64decode(token, validate=True).partition(b":")
    except ValueError:
        return b"", b""
    return (user, password) if colon and kind.lower() == b"basic" else (b"", b"")


def _same(given: bytes, wanted: str) -> bool:
    return hmac.compare_digest(given, wanted.encode("utf8", "surrogateescape"))


def _asked_by_page(header: bytes, tokens: object) -> bool:
    """Whether a browser is logged in on the host's page: gradio gives it a cookie and keeps what it gave."""
    if not isinstance(tokens, Mapping):
        return False
    try:
        cookies = SimpleCookie(header.decode("latin-1"))
    except CookieError:
        return False
    return any(name.startswith(_LOGIN_COOKIE) and cookie.value in tokens for name, cookie in cookies.items())


def is_local(scope: Mapping[str, Any]) -> bool:
    """Whether a request comes from a program on this computer, as far as that can be seen.

    A proxy on this computer that says nothing of itself cannot be told from one: so this alone gives nobody anything.
    """
    headers = dict(scope.get("headers", ()))
    client: Sequence[Any] = scope.get("client") or ("",)
    host = headers.get(b"host", b"").decode("latin-1")
    if any(name.lower().startswith(_PROXY) for name in headers):
        return False
    return _is_loopback(str(client[0])) and (host == "" or _is_loopback(_without_port(host)))


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] or host


def _is_loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
