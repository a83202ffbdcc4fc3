"""A reverse proxy that injects faults between an S3 client and its server, by a seeded plan. The bytes pass unchanged: signatures hold.

    with FaultProxy(server_url, seed=1) as proxy:
        proxy.faults = [Fault("status", share=0.2), Fault("reset_after", match="^PUT", times=3)]
        ... proxy.url ... proxy.requests ...

Whether a request meets a fault depends on the seed, its line and how often that line came before, not on the order of different requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PIECE_BYTES = 1 << 16
RANDOM_NAME = re.compile(r"[0-9a-f]{8,}")  # in names of buckets and probes
ACTIONS = ("status", "reset_before", "reset_middle", "reset_after", "truncate", "stall", "delay", "throttle")


@dataclass
class Fault:
    """What happens to requests that match.

    status: an answer without asking the server; reset_before: the connection breaks before the server hears of it; reset_middle: after
    ``size`` bytes of the request's body; reset_after: the server does the work and its answer is lost; truncate: the answer ends after
    ``size`` bytes of its body; stall: nothing for ``seconds``, then the connection breaks; delay: ``seconds`` later; throttle: the answer
    comes at ``kilobytes_per_s``.
    """

    action: str
    match: str = ""  # regular expression, searched in "METHOD /path?query"
    share: float = 1.0  # of the requests that match
    skip: int = 0  # so many pass first
    times: int = 1 << 60  # so many are hit
    status: int = 503
    code: str = "SlowDown"
    size: int = 0  # bytes
    seconds: float = 0.0
    kilobytes_per_s: float = 100.0
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert self.action in ACTIONS, self.action


class Head:
    """The head of a request or an answer."""

    def __init__(self, raw: bytes):
        self.raw = raw
        first, *lines = raw.decode("latin1").split("\r\n")
        self.first = first.split(" ")
        self.fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}

    @property
    def line(self) -> str:
        """Of a request: method and path with query."""
        return " ".join(self.first[:2])

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.first[1])

    def says(self, name: str, value: str) -> bool:
        """Whether a field has a value."""
        return value in self.fields.get(name, "").lower()


class _Broken(Exception):
    """The connection to the client is over."""


class FaultProxy:
    """Listens on a free port of loopback, in a thread of its own."""

    def __init__(self, upstream: str, seed: int = 0):
        parts = urlsplit(upstream)
        self.upstream, self.seed = (parts.hostname, parts.port), seed
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # line, action
        self._came: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.url = ""

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def count(self, match: str) -> int:
        """How many requests came whose line matches."""
        return sum(bool(re.search(match, line)) for line, _ in self.requests)

    def injected(self) -> Counter[str]:
        """How often each fault struck."""
        return Counter(action for _, action in self.requests if action)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))

    def _fault_for(self, line: str) -> Fault | None:
        drawn = RANDOM_NAME.sub("*", line)  # or no seed would be what it was
        chance = random.Random(f"{self.seed}|{drawn}|{self._came[drawn]}")
        self._came[drawn] += 1
        for fault in self.faults:
            if re.search(fault.match, line) and chance.random() < fault.share:
                fault.seen += 1
                if fault.seen > fault.skip and fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = Head(await reader.readuntil(b"\r\n\r\n"))
                fault = self._fault_for(request.line)
                self.requests.append((request.line, fault.action if fault else ""))
                await self._answer(request, fault, reader, writer)
        except (_Broken, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, request: Head, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        action = fault.action if fault else ""
        if fault and action in ("stall", "delay"):
            await asyncio.sleep(fault.seconds)
        if action in ("stall", "reset_before"):
            raise _reset(writer)
        if fault and action == "status":
            await _refuse(request, fault, reader, writer)
            return
        from_server, to_server = await asyncio.open_connection(*self.upstream, limit=1 << 20)
        try:
            to_server.write(request.raw)
            if request.says("expect", "100-continue"):
                interim = Head(await from_server.readuntil(b"\r\n\r\n"))
                writer.write(interim.raw)
                if interim.status != 100:  # refused before the body came
                    async for piece in _body(from_server, interim):
                        writer.write(piece)
                    await writer.drain()
                    raise _Broken
            sent = 0
            async for piece in _body(reader, request):
                sent += len(piece)
                if fault and action == "reset_middle" and sent > fault.size:
                    _reset(to_server)
                    raise _reset(writer)
                to_server.write(piece)
                await to_server.drain()
            answer = Head(await from_server.readuntil(b"\r\n\r\n"))
            while answer.status == 100:
                answer = Head(await from_server.readuntil(b"\r\n\r\n"))
            await self._pass_on(request, answer, fault, from_server, writer)
        finally:
            to_server.close()

    async def _pass_on(
        self, request: Head, answer: Head, fault: Fault | None, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        action = fault.action if fault else ""
        bare = request.first[0] == "HEAD" or answer.status in (204, 304)
        if action != "reset_after":
            writer.write(answer.raw)
        came = 0
        if not bare:
            async for piece in _body(from_server, answer, until_closed=True):
                came += len(piece)
                if action == "reset_after":
                    continue
                if fault and action == "truncate" and came > fault.size:
                    writer.write(piece[: max(0, len(piece) - (came - fault.size))])
                    await writer.drain()
                    raise _Broken  # an orderly end, but too early
                writer.write(piece)
                await writer.drain()
                if fault and action == "throttle":
                    await asyncio.sleep(len(piece) / 1024 / fault.kilobytes_per_s)
        if action == "reset_after":
            raise _reset(writer)
        await writer.drain()
        endless = not bare and "content-length" not in answer.fields and "transfer-encoding" not in answer.fields
        if endless or request.says("connection", "close") or answer.says("connection", "close"):
            raise _Broken


async def _refuse(request: Head, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if request.says("expect", "100-continue"):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async for _ in _body(reader, request):
        pass
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{fault.code}</Code><Message>injected</Message></Error>'.encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + (b"" if request.first[0] == "HEAD" else body))
    await writer.drain()


async def _body(reader: asyncio.StreamReader, head: Head, until_closed: bool = False) -> AsyncIterator[bytes]:
    """The pieces of a message's body as they stand on the wire."""
    if head.says("transfer-encoding", "chunked"):
        while True:
            line = await reader.readuntil(b"\r\n")
            yield line
            size = int(line.split(b";")[0], 16)
            if size == 0:
                while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
                    yield trailer
                yield b"\r\n"
                return
            async for piece in _exactly(reader, size + 2):
                yield piece
    elif "content-length" in head.fields:
        async for piece in _exactly(reader, int(head.fields["content-length"])):
            yield piece
    elif until_closed:
        while piece := await reader.read(PIECE_BYTES):
            yield piece


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, PIECE_BYTES))
        if not piece:
            raise _Broken
        size -= len(piece)
        yield piece


def _reset(writer: asyncio.StreamWriter) -> _Broken:
    """Break a connection so that the other side sees a reset, not an orderly end."""
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return _Broken()
