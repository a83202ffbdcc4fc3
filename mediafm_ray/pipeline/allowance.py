"""The embeddings API's rate limits and cap, kept in one actor for all encoders of a job, wherever they run."""

from __future__ import annotations

from typing import Any

import ray

from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.pipeline.cluster import on_this_node


class _Keeper:
    """The actor: what is left of the limits."""

    def __init__(self, config: TextEncoderConfig):
        from mediafm_ray.models.text_api import allowance_of  # of an optional extra

        self.allowance = allowance_of(config)

    def reserve(self, requests: int, tokens: int) -> float:
        return self.allowance.reserve(requests, tokens)

    def refund(self, tokens: int) -> None:
        self.allowance.refund(tokens)

    def pause(self, seconds: float) -> None:
        self.allowance.pause(seconds)


class SharedAllowance:
    """A ``text_api.Allowance`` that may be sent to any actor of the job."""

    def __init__(self, config: TextEncoderConfig):
        self.keeper: Any = ray.remote(num_cpus=0)(_Keeper).options(scheduling_strategy=on_this_node()).remote(config)

    def reserve(self, requests: int, tokens: int) -> float:
        """Book one request; return after how many seconds it may go. Raises BudgetExceeded."""
        return ray.get(self.keeper.reserve.remote(requests, tokens))

    def refund(self, tokens: int) -> None:
        """A booked request failed and was not charged."""
        ray.get(self.keeper.refund.remote(tokens))

    def pause(self, seconds: float) -> None:
        """The server asked for time: nothing goes before it is over."""
        ray.get(self.keeper.pause.remote(seconds))
