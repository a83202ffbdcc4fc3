"""An HTTP server on loopback that speaks the embeddings API's protocol and misbehaves as told. Its embeddings are real ones."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.models.sentence import SentenceEncoder

KEY = "sk-test-0123456789abcdef"
DIM = 768


@dataclass
class Server:
    """What the server does and has seen. ``plan`` is consumed, one step a request; afterwards every request is answered well."""

    url: str = ""
    plan: list[Callable[[Any, dict[str, Any]], None]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)  # the inputs of requests that were answered: those one pays for
    under_way: int = 0
    most_under_way: int = 0
    delay_s: float = 0.0


def padded_minilm(encoder: SentenceEncoder) -> Callable[[list[str]], np.ndarray]:
    """MiniLM's embeddings, zero-padded to 768; from one thread at a time."""
    lock = threading.Lock()

    def padded(texts: list[str]) -> np.ndarray:
        with lock:
            return np.pad(encoder.encode(texts).embeddings_SD, ((0, 0), (0, DIM - encoder.dim)))

    return padded


def load_minilm() -> SentenceEncoder:
    """The sentence encoder that a package carries."""
    return SentenceEncoder(TextEncoderConfig(threads=1))


@contextlib.contextmanager
def serving(embed: Callable[[list[str]], np.ndarray], key: str = KEY) -> Iterator[Server]:
    """A server on loopback that takes ``key`` and answers with what ``embed`` gives, until the context ends."""
    state, lock = Server(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.requests.append(request)
                state.times.append(time.monotonic())
                state.under_way += 1
                state.most_under_way = max(state.most_under_way, state.under_way)
                step = state.plan.pop(0) if state.plan else None
            time.sleep(state.delay_s)
            if self.headers["Authorization"] != f"Bearer {key}" or self.path != "/v1/embeddings":
                self.answer(
                    401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}", "code": "invalid_api_key"}}
                )
            elif step:
                step(self, request)
            else:
                self.embeddings(embed(request["input"]), request)
            with lock:
                state.under_way -= 1

        def embeddings(self, rows: np.ndarray, request: dict[str, Any]) -> None:
            data = [{"object": "embedding", "index": index, "embedding": [float(v) for v in row]} for index, row in enumerate(rows)]
            state.answered.extend(request["input"])
            # in another order than asked: the index decides
            self.answer(200, {"object": "list", "data": data[::-1], "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}})

        def answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None, short_by: int = 0) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) - short_by])
            if short_by:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Threads(http.server.ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that timed out has closed the connection

    with Threads(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}/v1"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield state
        listening.shutdown()


def fails(status: int, code: str = "", headers: dict[str, str] | None = None) -> Callable[[Any, dict[str, Any]], None]:
    return lambda handler, request: handler.answer(status, {"error": {"message": "planned", "code": code}}, headers)
