"""Addresses and text for people: without secrets, without control characters. Standard library only."""

from __future__ import annotations

import re
import urllib.parse

# What drives a terminal, forges a line or turns the reading direction, and halves of characters, which cannot be written
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# In texts, addresses also stand percent-encoded (%25 where more than once), with the slashes of JSON (\/), or with one slash too few
WORD = re.compile(r"[^ \t\r\n\"<>]+")  # what none of those characters interrupts: they stand in no address
SEPARATOR = re.compile(r"(?::|%(?:25)*3a)(?:\\*/|%(?:25)*2f)+", re.IGNORECASE)  # between the scheme of an address and its rest
USER = re.compile(r"[^/?#]*@")  # user and password, right after it
USER_ENCODED = re.compile(r"(?:(?!%(?:25)*(?:2f|3f|23))[^/?#])*(?:@|%(?:25)*40)", re.IGNORECASE)
AT = re.compile(r"@|%(?:25)*40", re.IGNORECASE)
COLON = re.compile(r":|%(?:25)*3a", re.IGNORECASE)
NO_PORT = re.compile(r"[^/?#@\[:]*:(?!\d*(?:[/?#]|$))")  # a host and what cannot be its port: a password as people paste it
NO_PORT_ENCODED = re.compile(
    r"(?:(?!%(?:25)*(?:2f|3f|23|40|5b|3a))[^/?#@\[:])*(?::|%(?:25)*3a)(?!\d*(?:[/?#]|%(?:25)*(?:2f|3f|23)|$))", re.IGNORECASE
)
QUERY = re.compile(r"\?|%(?:25)*3f", re.IGNORECASE)
EQUALS = re.compile(r"=|%(?:25)*3d", re.IGNORECASE)
WEB = ("http", "https")
CLOSING = "'`)]},.;:\\"  # what a text may put after an address


def public_uri(uri: str) -> str:
    """A URI without what may be secret in it: user and password, and the query of a signed link. A local path stays as it is."""
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme.lower() in ("file", "memory"):
        return uri
    shown = _public_word(uri, "")
    return shown.partition("#")[0] if scheme.lower() in WEB else shown


def public_text(text: str) -> str:
    """A text, such as another library's error, without users, passwords and queries of the addresses in it."""
    return WORD.sub(lambda word: _public_word(word[0], CLOSING), text)


def escape_controls(text: str) -> str:
    """A text in one line, with control characters as Python writes them: they reach no terminal and forge no line of a log."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def public_line(text: str) -> str:
    """A text in one printable line without secrets."""
    return escape_controls(public_text(text))


def public_lines(text: str) -> str:
    """A text of several lines, such as a traceback: each printable and without secrets."""
    return "\n".join(map(public_line, text.split("\n")))


def escape_controls_in_json(text: str) -> str:
    """JSON text with control characters escaped as JSON does it: it holds the same, and reaches a terminal unharmed."""
    return CONTROLS.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


class PublicError(Exception):
    """An error whose message a person reads, in terminals, logs and records: no line of it holds secrets or control characters."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(map(public_line, lines)))


def _public_word(word: str, closing: str) -> str:
    """A text that is at most one address, or several without a space between, without secrets. ``closing``: kept at its end."""
    if not any(mark in word for mark in "@?%"):
        return word
    kept, position = [], 0
    last_at = max((found.end() for found in AT.finditer(word)), default=0)
    web = web_encoded = len(word)  # where the first address of the web begins, in the text that is kept
    length = 0
    for separator in SEPARATOR.finditer(word):
        if separator.start() < position:  # it stands in a password
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
    """The path that a plain path or a ``file://`` URI (RFC 8089) names, as it was written; None for an object of another scheme.

    Percent-encoding is undone in a URI and means nothing in a plain path; '#' and '?' are characters of a file's name in both.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if scheme.lower() != "file":
        return None
    path = urllib.parse.unquote(rest, errors="surrogateescape")  # as os.fsdecode does
    return path.removeprefix("localhost") if path.startswith("localhost/") else path
