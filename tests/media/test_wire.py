"""Messages between the pipeline and its reading process."""

from __future__ import annotations

import socket
import threading

import pytest

from mediafm_ray.media.wire import BufferedChannel, Channel, PeerClosed

BLOCK = bytes(64 * 27 * 48 * 3)


def test_blocks_are_sent_while_the_other_side_is_busy():
    """A socket's buffer holds less than one block of pictures."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = BufferedChannel(theirs)

        def send():
            for number in range(6):
                sender.send("pictures", {"number": number}, [BLOCK])

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        sending.join(10)
        assert not sending.is_alive()
        receiver = Channel(ours)
        ours.settimeout(10)
        assert [(header["number"], parts) for header, parts in (receiver.receive() for _ in range(6))] == [(n, [BLOCK]) for n in range(6)]


def test_sender_learns_that_the_other_side_is_gone():
    ours, theirs = socket.socketpair()
    with theirs:
        sender = BufferedChannel(theirs)
        ours.close()

        def send():
            for _ in range(1000):
                sender.send("pictures", {}, [BLOCK])

        with pytest.raises(PeerClosed):
            send()
