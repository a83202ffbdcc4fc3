"""Access to the web application: the names by which it may be addressed, the token, and headers that bind a page to this server.

A page of another origin whose name was made to point here (DNS rebinding) sends its own name as Host, and is refused. Standard
library only.
"""

from __future__ import annotations

import hmac
import http.cookies
import ipaddress
import secrets
import socket
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
TOKEN_BYTES = 24  # of a random token
COOKIE = "mediafm_explore"
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Return True if nobody but this machine can reach a server that listens at ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of(host: str, token: str) -> str:
    """Return the token that visitors need: the configured one, or a random one where others can reach the server; empty = none."""
    return token or ("" if is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES))


class Guard:
    """The middleware that answers requests under foreign names and without the token itself, and passes on the others.

    ``host``: the address at which the server listens; ``hosts``: further names. Where others than this machine can reach it, every
    numeric address passes too, because the token protects it.
    """

    def __init__(self, app: App, host: str, hosts: Iterable[str] = (), token: str = ""):
        self.app, self.token = app, token
        self.names = {name.lower() for name in (host, *hosts)}
        self.any_number = not is_loopback(host)
        self.names |= {socket.gethostname().lower()} if self.any_number else set(LOOPBACK_NAMES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # There are no web sockets.

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._may_be_called(headers.get("host", "")):
            await _answer(send_with_headers, 421, "This server does not answer under this name. Further names: explore.hosts=[NAME]")
        elif scope["method"] == "POST" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            await _answer(send_with_headers, 403, "This form belongs to another site.")
        elif not self.token or self._same(_cookie(headers.get("cookie", ""), self._cookie_name(scope))):
            await self.app(scope, receive, send_with_headers)
        else:
            await self._admit(scope, send_with_headers)

    def _may_be_called(self, host: str) -> bool:
        name = _name_of(host)
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_number

    async def _admit(self, scope: Scope, send: Send) -> None:
        """Exchange a token in the address for a cookie, so that the token does not stay in the history."""
        fields = urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in fields if name == "token"]
        if not given or not self._same(given[0]):
            await _answer(send, 403, "A token is needed: open the address that mediafm explore printed when it started.")
            return
        rest = urllib.parse.urlencode([(name, value) for name, value in fields if name != "token"])
        path = urllib.parse.quote("/" + scope["path"].lstrip("/\\"))  # Two slashes would lead to another server.
        cookie = f"{self._cookie_name(scope)}={urllib.parse.quote(self.token, safe='')}; Path=/; HttpOnly; SameSite=Strict"
        location = f"{path}?{rest}" if rest else path
        await _answer(send, 303, "", [(b"location", location.encode()), (b"set-cookie", cookie.encode())])

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _cookie_name(self, scope: Scope) -> str:
        """Return the name of the cookie: all ports of a host share their cookies."""
        return f"{COOKIE}_{(scope.get('server') or ('', 0))[1]}"


def _name_of(host: str) -> str:
    """Return the name in a Host header, without its port and an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower() if host.count(":") <= 1 else host.lower()


def _cookie(header: str, name: str) -> str:
    try:
        found = http.cookies.SimpleCookie(header).get(name)
    except http.cookies.CookieError:
        return ""
    return urllib.parse.unquote(found.value) if found else ""


async def _answer(send: Send, status: int, text: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})
