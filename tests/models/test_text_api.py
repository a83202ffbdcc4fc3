"""The embeddings API client, against a real HTTP server on loopback that misbehaves on demand."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tiktoken

from mediafm_ray.models import encoder, text_api
from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.models.sentence import SentenceEncoder
from mediafm_ray.models.text_api import ApiError, ApiTextEncoder, BudgetExceeded, LocalAllowance, TokenCounter, allowance_of, estimate
from tests.embeddings_server import DIM, KEY, Server, fails, load_minilm, padded_minilm, serving


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return load_minilm()


@pytest.fixture(scope="module")
def embed(minilm: SentenceEncoder) -> Callable[[list[str]], np.ndarray]:
    """Real embeddings, zero-padded to 768."""
    return padded_minilm(minilm)


@pytest.fixture
def server(embed: Callable[[list[str]], np.ndarray]) -> Iterator[Server]:
    with serving(embed) as state:
        yield state


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(text_api, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(text_api, "_load_vocabulary", lambda: None)  # its download is tried in a test of its own


def config_of(server: Server, **options: Any) -> TextEncoderConfig:
    return TextEncoderConfig(**{"encoder": "openai", "base_url": server.url, "requests_per_minute": 0, "tokens_per_minute": 0, **options})


@pytest.fixture
def build(server: Server) -> Iterator[Callable[..., ApiTextEncoder]]:
    built = []

    def make(allowance: LocalAllowance | None = None, **options: Any) -> ApiTextEncoder:
        made = encoder.build_text_encoder(config_of(server, **options), allowance)
        assert isinstance(made, ApiTextEncoder)
        built.append(made)
        return made

    yield make
    for made in built:
        made.close()


TEXTS = ["A man walks in.", "", "Hello", "A man walks in.", "  ", "¿Qué? 映画"]


# ------------------------------------------------------------------------------------------------------------ right


def test_embeddings_come_back_in_order_and_duplicates_are_sent_once(server: Server, build: Any, embed: Any) -> None:
    encoded = build().encode(TEXTS)
    assert encoded.present_S.tolist() == [True, False, True, True, False, True]
    np.testing.assert_allclose(encoded.embeddings_SD[encoded.present_S], embed([TEXTS[0], TEXTS[2], TEXTS[0], TEXTS[5]]), atol=1e-6)
    assert not encoded.embeddings_SD[1].any()
    assert [request["input"] for request in server.requests] == [["A man walks in.", "Hello", "¿Qué? 映画"]]
    assert server.requests[0]["model"] == "text-embedding-3-large"
    assert server.requests[0]["dimensions"] == DIM


def test_texts_of_earlier_calls_are_not_sent_again(server: Server, build: Any) -> None:
    built = build()
    first = built.encode(["[music]", "one"])
    second = built.encode(["two", "[music]"])
    assert second.embeddings_SD[1].tobytes() == first.embeddings_SD[0].tobytes()
    assert sorted(server.answered) == ["[music]", "one", "two"]


def test_calls_at_once_share_what_is_under_way(server: Server, build: Any) -> None:
    server.delay_s = 0.2
    built = build()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda number: built.encode(["[music]", f"line {number}"]).embeddings_SD[0].tobytes(), range(4)))
    assert len(set(results)) == 1
    assert sorted(server.answered) == ["[music]", "line 0", "line 1", "line 2", "line 3"]


def test_requests_keep_within_the_limits_and_are_as_few_as_these_allow(server: Server, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "INPUTS_PER_REQUEST", 4)
    monkeypatch.setattr(text_api, "TOKENS_PER_REQUEST", 20)
    build().encode([f"word {number}" for number in range(9)] + ["x" * 19])  # 6 bytes each: three fill 20 tokens
    assert sorted(len(request["input"]) for request in server.requests) == [1, 3, 3, 3]
    assert all(sum(len(text.encode()) for text in request["input"]) <= 20 for request in server.requests)


def test_concurrent_requests_are_limited(server: Server, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "INPUTS_PER_REQUEST", 1)
    server.delay_s = 0.2
    build(concurrent_requests=3).encode([f"word {number}" for number in range(12)])
    assert server.most_under_way == 3


def test_a_text_that_is_too_long_is_cut_with_a_warning(server: Server, build: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, text_api.__name__):
        build(max_tokens=10).encode(["short", "映画映画映画"])
    assert server.requests[0]["input"] == ["short", "映画映"]  # 9 bytes: no character is cut in two
    assert "text.max_tokens is 10" in caplog.text


# ---------------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_what_may_pass_is_tried_again(server: Server, build: Any, embed: Any, status: int) -> None:
    server.plan = [fails(status), fails(status)]
    encoded = build().encode(["one", "two"])
    np.testing.assert_allclose(encoded.embeddings_SD, embed(["one", "two"]), atol=1e-6)
    assert len(server.requests) == 3
    assert server.answered == ["one", "two"]


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "1"}, {"retry-after-ms": "1000"}, {"Retry-After": "date"}], ids=["seconds", "milliseconds", "date"]
)
def test_retry_after_is_honoured(server: Server, build: Any, headers: dict[str, str]) -> None:
    if headers.get("Retry-After") == "date":
        headers = {"Retry-After": email.utils.formatdate(time.time() + 3, usegmt=True)}  # whole seconds, one to get there
    server.plan = [fails(429, headers=headers)]
    build().encode(["one"])
    assert server.times[1] - server.times[0] >= 0.95


def test_a_retry_after_of_hours_is_an_error_at_once(server: Server, build: Any) -> None:
    server.plan = [fails(429, headers={"Retry-After": "7200"})]
    with pytest.raises(ApiError, match="failed after 1 attempts"):
        build().encode(["one"])


def test_a_stalled_request_is_sent_again(server: Server, build: Any) -> None:
    server.plan = [lambda handler, request: time.sleep(8.0)]
    started = time.monotonic()
    build(timeout_s=1.5).encode(["one"])
    assert time.monotonic() - started < 8
    assert len(server.requests) == 2


def truncated(handler: Any, request: dict[str, Any]) -> None:
    handler.answer(200, {"data": [{"index": 0, "embedding": [0.0] * DIM}]}, short_by=40)


def half_json(handler: Any, request: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "12")
    handler.end_headers()
    handler.wfile.write(b'{"data": [{"')


@pytest.mark.parametrize("broken", [truncated, half_json])
def test_a_body_cut_short_is_asked_for_again(server: Server, build: Any, embed: Any, broken: Any) -> None:
    server.plan = [broken]
    np.testing.assert_allclose(build().encode(["one"]).embeddings_SD, embed(["one"]), atol=1e-6)
    assert len(server.requests) == 2


def test_retries_end(server: Server, build: Any) -> None:
    server.plan = [fails(503)] * 10
    with pytest.raises(ApiError, match=r"failed after 4 attempts \(InternalServerError"):
        build(max_retries=3).encode(["one"])
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (fails(400), "BadRequestError"),
        (fails(404), r"check text\.base_url and text\.model"),
        (fails(403), "may not use the model"),
        (fails(429, "insufficient_quota"), "account's quota"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(server: Server, build: Any, step: Any, message: str) -> None:
    server.plan = [step]
    with pytest.raises(ApiError, match=message):
        build().encode(["one"])
    assert len(server.requests) == 1


def rows(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, dict[str, Any]], None]:
    return lambda handler, request: handler.embeddings(change(np.ones((len(request["input"]), DIM))), request)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[1, 5] = np.nan
    return values


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (rows(lambda values: values[:, :512]), r"shape \(512,\), not the 768 dimensions requested.*text\.dimensions"),
        (rows(with_nan), "NaN or infinity for input 1 of 3"),
        (rows(lambda values: values[:2]), "left out 1 of 3"),
        (rows(lambda values: np.vstack([values, values[:1]])), "for input 3 of 3"),
        (lambda handler, request: handler.answer(200, {"detail": "hello"}), "left out 3 of 3"),
    ],
)
def test_answers_that_are_wrong_are_errors_and_not_paid_for_twice(server: Server, build: Any, step: Any, message: str) -> None:
    server.plan = [step]
    with pytest.raises(ApiError, match=message):
        build().encode(["one", "two", "three"])
    assert len(server.requests) == 1


def test_after_a_failure_only_what_failed_is_sent_again(server: Server, build: Any, embed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "INPUTS_PER_REQUEST", 1)
    server.plan = [fails(400)]
    built = build()
    with pytest.raises(ApiError):
        built.encode(["one", "two", "three"])
    np.testing.assert_allclose(built.encode(["one", "two", "three"]).embeddings_SD, embed(["one", "two", "three"]), atol=1e-6)
    assert sorted(server.answered) == ["one", "three", "two"]
    assert len(server.requests) == 4


def test_a_server_that_is_not_there(server: Server, build: Any) -> None:
    with pytest.raises(ApiError, match=r"APIConnectionError.*check the network and text\.base_url"):
        build(base_url="http://127.0.0.1:9/v1", max_retries=1).encode(["one"])


# -------------------------------------------------------------------------------------------------------------- key


def test_a_wrong_key_is_an_error_that_does_not_show_it(
    server: Server, build: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-but-secret")
    with caplog.at_level(logging.DEBUG), pytest.raises(ApiError, match="check the key in OPENAI_API_KEY") as caught:
        build().encode(["one"])
    assert len(server.requests) == 1
    assert "Incorrect API key provided: Bearer ***" in str(caught.value)  # the server repeats what it was given
    assert caught.value.__cause__ is None
    assert "sk-wrong-but-secret" not in caplog.text


def test_without_a_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY must hold the key"):
        ApiTextEncoder(TextEncoderConfig(encoder="openai"))
    ApiTextEncoder(config_of(server)).close()  # a server of one's own may want none


# ----------------------------------------------------------------------------------------------------------- limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def send_all(allowance: LocalAllowance, clock: Clock, tokens: list[int]) -> list[float]:
    """When each request goes, in seconds from the start, for a sender that books one after the other without waiting."""
    return [clock.now - 1000.0 + allowance.reserve(1, count) for count in tokens]


@pytest.mark.parametrize(
    ("requests", "tokens", "sizes"), [(600, 0, [1] * 400), (0, 60_000, [1000] * 300), (600, 60_000, [50, 3000, 10] * 50)]
)
def test_no_minute_sees_more_than_the_limits(requests: int, tokens: int, sizes: list[int]) -> None:
    clock = Clock()
    gone = np.array(send_all(LocalAllowance(requests, tokens, clock=clock), clock, sizes))
    for start in gone:
        inside = (gone >= start) & (gone < start + 60)
        slack = 1 + text_api.BURST_S / 60
        assert not requests or inside.sum() <= requests * slack + 1
        assert not tokens or np.array(sizes)[inside].sum() <= tokens * slack + max(sizes)
    lower = max(len(sizes) * 60 / requests if requests else 0, sum(sizes) * 60 / tokens if tokens else 0)
    assert lower - text_api.BURST_S - 6 <= gone.max() <= lower  # and no slower than they allow


def test_a_pause_holds_all() -> None:
    clock = Clock()
    allowance = LocalAllowance(0, 0, clock=clock)
    assert allowance.reserve(1, 1) == 0
    allowance.pause(3)
    assert allowance.reserve(1, 1) == 3
    clock.now += 4
    assert allowance.reserve(1, 1) == 0


def test_the_rate_limit_is_kept_on_the_wire(server: Server, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "INPUTS_PER_REQUEST", 1)
    monkeypatch.setattr(text_api, "BURST_S", 0.0)
    shared = LocalAllowance(600, 0)  # ten a second
    first, second = build(shared), build(shared)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda built: built.encode([f"{id(built)} {number}" for number in range(6)]), [first, second]))
    assert server.times[-1] - server.times[0] > 0.9  # twelve requests by two encoders: eleven gaps of 0.1 s


def test_the_cap_stops_before_it_is_passed(server: Server, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "INPUTS_PER_REQUEST", 1)
    built = build(max_cost_usd=1e-5, price_per_million_tokens=1.0)  # ten tokens
    with pytest.raises(BudgetExceeded, match=r"text\.max_cost_usd is reached.*cap of 10"):
        built.encode(["aaaa", "bbbb", "cccc"])
    assert sorted(server.answered) == ["aaaa", "bbbb"]
    with pytest.raises(BudgetExceeded):
        built.encode(["dddd"])
    assert built.encode(["aaaa"]).present_S.all()  # paid for already


def test_a_cap_below_the_price_of_a_token_sends_nothing(server: Server, build: Any) -> None:
    with pytest.raises(BudgetExceeded, match="cap of 0"):
        build(max_cost_usd=1e-7, price_per_million_tokens=1.0).encode(["aaaa"])
    assert not server.answered


def test_refused_requests_do_not_count_towards_the_cap(server: Server, build: Any) -> None:
    server.plan = [fails(429), fails(503)]
    built = build(max_cost_usd=1e-5, price_per_million_tokens=1.0)
    built.encode(["0123456789"])
    assert built.allowance.spent() == 10


def test_wrong_limits_are_named() -> None:
    with pytest.raises(ValueError, match="requests_per_minute must be at least 0"):
        allowance_of(TextEncoderConfig(requests_per_minute=-1))
    with pytest.raises(ValueError, match="needs price_per_million_tokens"):
        allowance_of(TextEncoderConfig(max_cost_usd=1, price_per_million_tokens=0))


# ---------------------------------------------------------------------------------------------------------- tokens


def test_the_estimate_is_what_is_then_sent(server: Server, build: Any) -> None:
    config = config_of(server, price_per_million_tokens=0.5)
    expected = estimate(config, TEXTS)
    assert (expected.texts, expected.requests, expected.tokens, expected.exact) == (3, 1, 15 + 5 + 14, False)
    assert expected.usd == pytest.approx(34 * 0.5 / 1e6)
    assert server.requests == []
    built = build()
    built.encode(TEXTS)
    assert built.allowance.spent() == expected.tokens


class LetterPairs:
    """A vocabulary of pairs of bytes, with tiktoken's interface."""

    def encode(self, text: str, disallowed_special: tuple[str, ...]) -> list[bytes]:
        data = text.encode()
        return [data[start : start + 2] for start in range(0, len(data), 2)]

    def decode_bytes(self, tokens: list[bytes]) -> bytes:
        return b"".join(tokens)


def test_tokens_are_counted_where_the_vocabulary_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_api, "_load_vocabulary", LetterPairs)
    counter = TokenCounter("text-embedding-3-large")
    assert counter.exact
    assert counter.count("abcde") == 3
    assert counter.truncate("abcde", 2) == "abcd"
    assert counter.truncate("映画映", 4) == "映画"  # eight bytes are two characters and two thirds of one
    assert not TokenCounter("my-own-model").exact  # its vocabulary is not known


def test_a_vocabulary_that_cannot_be_had_is_said_and_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    text_api._load_vocabulary.cache_clear()  # another test may have tried before
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no network")))
    with caplog.at_level(logging.WARNING, text_api.__name__):
        counter = TokenCounter("text-embedding-3-large")
    assert "no network" in caplog.text
    assert counter.count("映画") == 6
    text_api._load_vocabulary.cache_clear()
    monkeypatch.setattr(text_api, "VOCABULARY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    started = time.monotonic()
    assert not TokenCounter("text-embedding-3-large").exact
    assert time.monotonic() - started < 4
