"""OpenAI's embeddings API, or a compatible server, as a text encoder. No torch.

Requests are as few as the API's limits allow; every distinct text is sent once, and after a failure only the failed request is sent again.
The key is read from the environment, kept out of every message, and never stored in a configuration.

Shapes
    S  texts
    D  dimensions requested
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import logging
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import openai

from mediafm_ray.errors import OutageError
from mediafm_ray.models.encoder import ApiError, BudgetExceeded, Encoded
from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.text import public_line

INPUTS_PER_REQUEST = 2048  # limit of the API
TOKENS_PER_REQUEST = 300_000  # limit of the API
VOCABULARY = "cl100k_base"  # vocabulary of the text-embedding-3 models
VOCABULARY_TIMEOUT_S = 15.0  # tiktoken downloads the vocabulary at first use.
MAX_CACHED_TEXTS = 8192  # Results kept for later calls: titles share lines such as "[music]".
BURST_S = 5.0  # This many seconds' worth of the rate limit may be sent at once.
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
MAX_RETRY_AFTER_S = 600.0  # A server that asks for a longer pause ends the request.
TEXT_REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)  # These may be caused by the text.
NO_KEY = "no-key"  # Compatible servers that need no key receive this.

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class ApiUnavailable(ApiError, OutageError):
    """A failure of the API, or a refusal that does not depend on the text."""


class Allowance(Protocol):
    """The rate limiter and cost cap that all encoders of a job share, wherever they run."""

    def reserve(self, requests: int, tokens: int) -> float:
        """Book one request; return the seconds to wait before it may be sent. Raises BudgetExceeded."""
        ...

    def refund(self, tokens: int) -> None:
        """Give back the tokens of a booked request that failed and was not charged."""
        ...

    def pause(self, seconds: float) -> None:
        """Hold all requests for the time that the server asked for."""
        ...


@dataclass
class Usage:
    """The requests of an encoder since it was made."""

    api_requests: int = 0  # requests sent, including retries
    api_retries: int = 0  # requests that were retries
    text_tokens: int = 0  # tokens of the answered requests; an upper bound if tokens cannot be counted


class LocalAllowance:
    """Rate limits and a cap on tokens for the encoders that share this object; thread-safe, and usable as a Ray actor."""

    def __init__(
        self, requests_per_minute: int, tokens_per_minute: int, max_tokens: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Set the limits; a rate of 0 = no limit."""
        self._rates = {"requests": requests_per_minute / 60, "tokens": tokens_per_minute / 60}  # per second
        self._free_at = {"requests": -math.inf, "tokens": -math.inf}
        self._paused_until = -math.inf
        self._max_tokens = max_tokens
        self._spent = 0
        self._clock = clock
        self._lock = threading.Lock()

    def reserve(self, requests: int, tokens: int) -> float:
        """See Allowance. The rate is steady, with bursts of BURST_S."""
        with self._lock:
            if self._spent + tokens > self._max_tokens:
                raise BudgetExceeded(
                    f"text.max_cost_usd is reached: {self._spent} tokens are spent, {tokens} more exceed the cap of {self._max_tokens}"
                )
            self._spent += tokens
            now = self._clock()
            go_at = max(now, self._paused_until)
            for name, amount in (("requests", requests), ("tokens", tokens)):
                if rate := self._rates[name]:
                    go_at = max(go_at, self._free_at[name] - BURST_S)
                    self._free_at[name] = max(self._free_at[name], now) + amount / rate
            return go_at - now

    def refund(self, tokens: int) -> None:
        """See Allowance."""
        with self._lock:
            self._spent -= tokens

    def pause(self, seconds: float) -> None:
        """See Allowance."""
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def spent(self) -> int:
        """Return the tokens of requests that were answered or are in progress."""
        with self._lock:
            return self._spent


def allowance_of(config: TextEncoderConfig) -> LocalAllowance:
    """Return an allowance with the limits of a configuration, for one job."""
    max_tokens = int(config.max_cost_usd / config.price_per_million_tokens * 1e6) if config.max_cost_usd else math.inf
    return LocalAllowance(config.requests_per_minute, config.tokens_per_minute, max_tokens)


# ----------------------------------------------------------------------------------------------------------- tokens


class TokenCounter:
    """A counter of tokens: tiktoken, or the number of UTF-8 bytes (an upper bound) if its vocabulary cannot be loaded."""

    def __init__(self, model: str) -> None:
        self._encoding = _load_vocabulary() if model.startswith("text-embedding-") else None
        self.exact = self._encoding is not None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, or an upper bound."""
        return len(self._tokens(text)) if self._encoding else len(text.encode())

    def truncate(self, text: str, most: int) -> str:
        """Return the longest beginning of a text with at most ``most`` tokens (or bytes if tokens cannot be counted)."""
        if len(text.encode()) <= most:  # A text has at most as many tokens as bytes.
            return text
        if self._encoding:
            tokens = self._tokens(text)
            return text if len(tokens) <= most else self._encoding.decode_bytes(tokens[:most]).decode("utf-8", "ignore")
        return text.encode()[:most].decode("utf-8", "ignore")

    def _tokens(self, text: str) -> list[int]:
        assert self._encoding is not None
        return self._encoding.encode(text, disallowed_special=())  # "<|endoftext|>" in a subtitle is text.


@functools.cache
def _load_vocabulary() -> Any:
    """Return tiktoken's encoding, or None if the package or its vocabulary (downloaded at first use) cannot be loaded in time."""
    loaded: list[Any] = []
    reason: list[str] = ["no answer in time"]

    def load() -> None:
        try:
            import tiktoken

            loaded.append(tiktoken.get_encoding(VOCABULARY))
        except Exception as error:  # A missing package, network or cache folder or a damaged download: all use the fallback.
            reason[0] = public_line(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=load, daemon=True, name="tiktoken")  # The download has no timeout of its own.
    thread.start()
    thread.join(VOCABULARY_TIMEOUT_S)
    if loaded:
        return loaded[0]
    logger.warning(
        "tokens are bounded by UTF-8 bytes: tiktoken's vocabulary %s could not be loaded (%s); set TIKTOKEN_CACHE_DIR to a copy of it",
        VOCABULARY,
        reason[0],
    )
    return None


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of embedding some texts. Tokens are an upper bound if they cannot be counted."""

    texts: int  # distinct and not empty
    requests: int
    tokens: int
    usd: float
    exact: bool  # True if tokens were counted


def estimate(config: TextEncoderConfig, texts: Sequence[str]) -> Estimate:
    """Return the requests, tokens and price of one call of ``encode`` with these texts. Sends nothing, needs no key."""
    counter = TokenCounter(config.model)
    distinct = [counter.truncate(text, config.max_tokens) for text in dict.fromkeys(texts) if text.strip()]
    batches = _batches(distinct, counter)
    tokens = sum(count for _, count in batches)
    return Estimate(len(distinct), len(batches), tokens, tokens / 1e6 * config.price_per_million_tokens, counter.exact)


def _batches(texts: Sequence[str], counter: TokenCounter) -> list[tuple[list[str], int]]:
    """Group texts into requests as large as the limits allow; return each with its number of tokens."""
    batches: list[tuple[list[str], int]] = []
    for text in texts:
        tokens = counter.count(text)
        if batches and len(batches[-1][0]) < INPUTS_PER_REQUEST and batches[-1][1] + tokens <= TOKENS_PER_REQUEST:
            batches[-1][0].append(text)
            batches[-1] = (batches[-1][0], batches[-1][1] + tokens)
        else:
            batches.append(([text], tokens))
    return batches


# ---------------------------------------------------------------------------------------------------------- encoder


class ApiTextEncoder:
    """The text encoder of the MediaFM profile: text-embedding-3-large at 768 dimensions by default.

    ``encode`` may be called from several threads: all share one client, its connections, the limit on concurrent requests and the cached
    results. A text over ``max_tokens`` is truncated, with a warning.
    """

    def __init__(self, config: TextEncoderConfig, allowance: Allowance | None = None) -> None:
        """Open the client. ``allowance`` is shared by all encoders of a job; without one this encoder has the configured limits alone.

        Raises ValueError if the environment holds no key.
        """
        key = os.environ.get(config.api_key_variable, "")
        if not key and not config.base_url:
            raise ValueError(f"the environment variable {config.api_key_variable} must hold the key of the embeddings API (it is empty)")
        self.config = config
        self.dim = config.dimensions
        self.allowance = allowance or allowance_of(config)
        self.counter = TokenCounter(config.model)
        self.usage = Usage()
        self._key = key or NO_KEY
        self._cache: OrderedDict[str, asyncio.Future[np.ndarray]] = OrderedDict()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="embeddings-api").start()
        self._run(self._open()).result()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See TextEncoder. Raises ApiError if the server refuses, keeps failing or returns something else."""
        return self._run(self._encode(texts)).result()

    def close(self) -> None:
        """Close the connections. The encoder cannot be used afterwards."""
        self._run(self._client.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> None:
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.config.base_url or None,
            timeout=self.config.timeout_s,
            max_retries=0,  # Our own retries go through the allowance.
        )
        self._slots = asyncio.Semaphore(self.config.concurrent_requests)

    async def _encode(self, texts: Sequence[str]) -> Encoded:
        present_S = np.array([bool(text.strip()) for text in texts], bool)
        wanted = {text: self._truncate(text) for text in dict.fromkeys(texts) if text.strip()}
        distinct = dict.fromkeys(wanted.values())
        found = {text: self._cache[text] for text in distinct if text in self._cache}
        new = {text: self._loop.create_future() for text in distinct if text not in found}
        self._cache.update(new)
        try:
            sent = [self._send(batch, tokens, new) for batch, tokens in _batches(list(new), self.counter)]
            # All are awaited even if one fails: paid results are kept for the next attempt at these texts.
            outcomes = await asyncio.gather(*sent, return_exceptions=True)
        finally:
            for text, future in new.items():
                if not future.done():
                    future.cancel()
                    self._cache.pop(text, None)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        futures = found | new
        embeddings_SD = np.zeros((len(texts), self.dim), np.float32)
        for index in np.flatnonzero(present_S).tolist():
            text = wanted[texts[index]]
            embeddings_SD[index] = await self._result(futures[text], text)
        while len(self._cache) > MAX_CACHED_TEXTS:
            self._cache.popitem(last=False)
        return Encoded(embeddings_SD, present_S)

    async def _result(self, future: asyncio.Future[np.ndarray], text: str) -> np.ndarray:
        """Return the result that another call requested; request it here if that call failed."""
        try:
            return await asyncio.shield(future)
        except (ApiError, asyncio.CancelledError):
            if not future.done():
                raise  # This call itself was cancelled.
            return (await self._encode([text])).embeddings_SD[0]

    def _truncate(self, text: str) -> str:
        truncated = self.counter.truncate(text, self.config.max_tokens)
        if len(truncated) < len(text):
            logger.warning(
                "a text of %d characters was truncated to %d: text.max_tokens is %d", len(text), len(truncated), self.config.max_tokens
            )
        return truncated

    async def _send(self, batch: list[str], tokens: int, futures: dict[str, asyncio.Future[np.ndarray]]) -> None:
        """Request a batch, retry transient errors, and set the results of its texts."""
        for attempt in range(self.config.max_retries + 1):
            wait_s = await asyncio.to_thread(self.allowance.reserve, 1, tokens)
            await asyncio.sleep(wait_s)
            self.usage.api_requests += 1
            self.usage.api_retries += attempt > 0
            try:
                async with self._slots:
                    response = await self._client.embeddings.create(
                        input=batch, model=self.config.model, dimensions=self.dim, encoding_format="float"
                    )
                rows = self._check(response, len(batch))
            except (openai.OpenAIError, json.JSONDecodeError) as error:
                if isinstance(error, openai.APIStatusError):  # It was refused; after a timeout or a broken answer it may have been charged.
                    await asyncio.to_thread(self.allowance.refund, tokens)
                asked_s = _retry_after(error)
                if not _is_transient(error) or attempt == self.config.max_retries or asked_s > MAX_RETRY_AFTER_S:
                    kind = ApiError if isinstance(error, TEXT_REFUSED) else ApiUnavailable
                    raise kind(self._describe(error, attempt + 1)) from None  # The cause holds the request and its key.
                backoff_s = random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt))
                if asked_s:
                    await asyncio.to_thread(self.allowance.pause, asked_s)
                logger.info(
                    "the embeddings API answered %s; attempt %d of %d follows",
                    type(error).__name__,
                    attempt + 2,
                    self.config.max_retries + 1,
                )
                await asyncio.sleep(asked_s + backoff_s)
            else:
                self.usage.text_tokens += tokens
                for text, row_D in zip(batch, rows, strict=True):
                    futures[text].set_result(row_D)
                return

    def _check(self, response: Any, count: int) -> list[np.ndarray]:
        """Return the (D,) float32 embeddings of a response in the order of its inputs. Raises ApiUnavailable for anything else."""
        rows: list[Any] = [None] * count
        where = self.config.base_url or "the embeddings API"
        for item in getattr(response, "data", None) or []:
            if not isinstance(item.index, int) or not 0 <= item.index < count or rows[item.index] is not None:
                raise ApiUnavailable(f"{where} returned an embedding for input {item.index} of {count}, or returned it twice")
            row_D = np.asarray(item.embedding, np.float32)
            if row_D.shape != (self.dim,):
                raise ApiUnavailable(
                    f"{where} returned an embedding of shape {row_D.shape}, not the {self.dim} dimensions requested: does the model "
                    f"{self.config.model} support 'dimensions'? Set text.dimensions to what it returns"
                )
            if not np.isfinite(row_D).all():
                raise ApiUnavailable(f"{where} returned an embedding with NaN or infinity for input {item.index} of {count}")
            rows[item.index] = row_D
        if missing := sum(row is None for row in rows):
            raise ApiUnavailable(f"{where} left out {missing} of {count} embeddings")
        return rows

    def _describe(self, error: Exception, attempts: int) -> str:
        where = self.config.base_url or "the embeddings API"
        hints = {
            openai.AuthenticationError: f"check the key in {self.config.api_key_variable}",
            openai.PermissionDeniedError: f"the key in {self.config.api_key_variable} may not use the model {self.config.model}",
            openai.NotFoundError: f"check text.base_url and text.model ({self.config.model})",
            openai.RateLimitError: "lower text.requests_per_minute and tokens_per_minute, or check the account's quota",
            openai.APITimeoutError: f"no answer within text.timeout_s = {self.config.timeout_s}",
            openai.APIConnectionError: "check the network and text.base_url",
        }
        hint = next((f"; {advice}" for kind, advice in hints.items() if isinstance(error, kind)), "")
        words = str(error).replace(self._key, "***") if self._key != NO_KEY else str(error)
        return f"{where} failed after {attempts} attempts ({type(error).__name__}: {words[:500]}){hint}"


def _is_transient(error: Exception) -> bool:
    """Return True if the same request may succeed later: overload, an error of server or network, a truncated answer."""
    if isinstance(error, openai.RateLimitError):
        return error.code != "insufficient_quota"  # The account has no credit left; waiting does not help.
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409) or error.status_code >= 500
    return isinstance(error, (openai.APIConnectionError, json.JSONDecodeError))  # Timeouts are connection errors.


def _retry_after(error: Exception) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not; given as milliseconds, seconds or a date (RFC 9110)."""
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except ValueError:
        return 0.0  # An unreadable header counts as missing.
