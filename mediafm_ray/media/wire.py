"""Messages between the pipeline and its reading process: a JSON header and raw bytes, over a stream socket.

There is no pickle: code that takes over a decoder in the child must not be able to run in the parent, so both sides accept
only JSON of known size and counted bytes.

    4 bytes   length of the header, big-endian
    header    UTF-8 JSON object with "kind" and "sizes" (bytes of each part)
    parts     one after another
"""

from __future__ import annotations

import json
import math
import queue
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 64 << 20  # a header holds the texts of all shots of a title
MAX_MESSAGE_BYTES = 256 << 20
MAX_PARTS = 4096
MAX_WAITING_MESSAGES = 32


class WireError(Exception):
    """The other side breaks the protocol."""


class PeerClosed(WireError):
    """The other side has closed its end, or is dead."""


class DeadlineExceeded(Exception):
    """The deadline has passed."""


class Channel:
    """One end of the connection."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.deadline = math.inf  # for ``receive``, by time.monotonic

    def send(self, kind: str, fields: Mapping[str, Any] | None = None, parts: Sequence[bytes | memoryview] = ()) -> None:
        """Send one message. Raises WireError when the other side is gone."""
        header = json.dumps({**(fields or {}), "kind": kind, "sizes": [len(part) for part in parts]}).encode()
        self._send_pieces([LENGTH.pack(len(header)) + header, *parts])

    def _send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        try:
            for piece in pieces:
                self.sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerClosed("the other side has closed the connection") from error

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """Return the header and the parts of the next message.

        Raises WireError when the other side is gone or breaks the protocol, TimeoutError when the socket has a timeout
        and nothing at all arrives for that long, DeadlineExceeded when the deadline has passed.
        """
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise WireError(f"a header of {length} bytes was announced")
        try:
            header = json.loads(bytes(self._exactly(length)))
            sizes = [int(size) for size in header["sizes"]]
            header["kind"].strip()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise WireError("a header is not a JSON object with kind and sizes") from error
        if len(sizes) > MAX_PARTS or any(size < 0 for size in sizes) or sum(sizes) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {sum(sizes)} bytes in {len(sizes)} parts was announced")
        return header, [bytes(self._exactly(size)) for size in sizes]

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            if time.monotonic() > self.deadline:
                raise DeadlineExceeded
            try:
                count = self.sock.recv_into(view[done:])
            except ConnectionResetError as error:
                raise PeerClosed("the other side has closed the connection") from error
            if count == 0:
                raise PeerClosed("the other side has closed the connection")
            done += count
        return data

    def close(self) -> None:
        self.sock.close()


class BufferedChannel(Channel):
    """A channel whose messages are sent by a thread of its own.

    A socket's buffer holds less than one block of pictures, so without the thread the sender would wait until the other side receives.
    ``send`` waits where MAX_WAITING_MESSAGES have not been sent, and raises WireError where an earlier message could not be sent.
    """

    def __init__(self, sock: socket.socket):
        super().__init__(sock)
        self._waiting: queue.Queue[Sequence[bytes | memoryview]] = queue.Queue(MAX_WAITING_MESSAGES)
        self._failure: WireError | None = None
        threading.Thread(target=self._send_waiting, name="sender", daemon=True).start()

    def _send_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiting.put(pieces)

    def _send_waiting(self) -> None:
        while True:
            pieces = self._waiting.get()
            if self._failure is None:  # after a failure messages are dropped, so that ``send`` does not wait for room
                try:
                    super()._send_pieces(pieces)
                except WireError as error:
                    self._failure = error
