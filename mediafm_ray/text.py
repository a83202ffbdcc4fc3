"""Addresses and text for people, without secrets and control characters. Standard library only."""

from __future__ import annotations

import re
import urllib.parse

# Characters that control a terminal, begin a line or change the reading direction, and surrogates, which cannot be encoded.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Addresses in texts may be percent-encoded (%25 if more than once), have JSON's slashes (\/), or lack a slash.
WORD = re.compile(r"[^ \t\r\n\"<>]+")  # An address has none of these characters.
SEPARATOR = re.compile(r"(?::|%(?:25)*3a)(?:\\*/|%(?:25)*2f)+", re.IGNORECASE)  # Between the scheme of an address and its rest.
USER = re.compile(r"[^/?#]*@")  # User and password follow the separator.
USER_ENCODED = re.compile(r"(?:(?!%(?:25)*(?:2f|3f|23))[^/?#])*(?:@|%(?:25)*40)", re.IGNORECASE)
AT = re.compile(r"@|%(?:25)*40", re.IGNORECASE)
COLON = re.compile(r":|%(?:25)*3a", re.IGNORECASE)
NO_PORT = re.compile(r"[^/?#@\[:]*:(?!\d*(?:[/?#]|$))")  # A host and an invalid port: a password with unescaped characters.
NO_PORT_ENCODED = re.compile(
    r"(?:(?!%(?:25)*(?:2f|3f|23|40|5b|3a))[^/?#@\[:])*(?::|%(?:25)*3a)(?!\d*(?:[/?#]|%(?:25)*(?:2f|3f|23)|$))", re.IGNORECASE
)
QUERY = re.compile(r"\?|%(?:25)*3f", re.IGNORECASE)
EQUALS = re.compile(r"=|%(?:25)*3d", re.IGNORECASE)
WEB = ("http", "https")
CLOSING = "'`)]},.;:\\"  # A text may have these characters after an address.


def counted(count: int, noun: str) -> str:
    """Return a count and a noun, in the plural unless the count is one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def public_uri(uri: str) -> str:
    """Return a URI without its secrets: user, password and the query of a signed link. A local path is returned unchanged."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.lower() in ("file", "memory"):
        return uri
    shown = _public_word(uri, "")
    return shown.partition("#")[0] if scheme.lower() in WEB else shown


def public_text(text: str) -> str:
    """Return a text, such as a library's error, without the users, passwords and queries of its addresses."""
    return WORD.sub(lambda word: _public_word(word[0], CLOSING), text)


def escape_controls(text: str) -> str:
    """Escape control characters as in Python, so that a text cannot control a terminal or forge a line of a log."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def public_line(text: str) -> str:
    """Return a text as one printable line without secrets."""
    return escape_controls(public_text(text))


def public_lines(text: str) -> str:
    """Return a text of several lines, such as a traceback, with every line printable and without secrets."""
    return "\n".join(map(public_line, text.split("\n")))


def escape_controls_in_json(text: str) -> str:
    """Escape control characters in JSON text as JSON does: the value is the same, and a terminal is safe."""
    return CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


class PublicError(Exception):
    """An error with a message for people, in terminals, logs and records, without secrets and control characters."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(map(public_line, lines)))


def _public_word(word: str, closing: str) -> str:
    """Remove the secrets of a word with one or several addresses; characters of ``closing`` at its end are kept."""
    if not any(mark in word for mark in "@?%"):
        return word
    kept, position = [], 0
    last_at = max((found.end() for found in AT.finditer(word)), default=0)
    web = web_encoded = len(word)  # Start of the first web address in the kept text.
    length = 0
    for separator in SEPARATOR.finditer(word):
        if separator.start() < position:  # It is part of a password.
            continue
        start, end, encoded = separator.start(), separator.end(), "%" in separator[0]
        on_web = word[max(0, start - 5) : start].lower().endswith(WEB)
        kept.append(word[position:end])
        length += end - position
        if on_web:
            web = min(web, length)
            web_encoded = min(web_encoded, length) if encoded else web_encoded
        user = (USER_ENCODED if encoded else USER).match(word, end)
        if user and (on_web or COLON.search(user[0])):
            position = user.end()
        elif not user and last_at > end and end - start > 2 and (NO_PORT_ENCODED if encoded else NO_PORT).match(word, end):
            position = last_at
        else:
            position = end
    kept.append(word[position:])
    shown = "".join(kept)
    equals = max((found.start() for found in EQUALS.finditer(shown)), default=-1)
    for mark in QUERY.finditer(shown):
        if mark.start() < equals or mark.start() >= (web if mark[0] == "?" else web_encoded):
            tail = shown[mark.end() :]
            return shown[: mark.start()] + tail[len(tail.rstrip(closing)) :] if closing else shown[: mark.start()]
    return shown


def local_path(uri: str) -> str | None:
    """Return the path of a plain path or a ``file://`` URI (RFC 8089); None for another scheme.

    A URI is percent-decoded, a plain path is not; '#' and '?' are characters of a file's name in both.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme.lower() != "file":
        return None
    path = urllib.parse.unquote(rest, errors="surrogateescape")  # os.fsdecode does the same.
    return path.removeprefix("localhost") if path.startswith("localhost/") else path
