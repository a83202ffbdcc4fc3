"""Rate limits and cost cap of the embeddings API, shared by all encoders of a job through one actor."""

from __future__ import annotations

from typing import Any

import ray

from mediafm_ray.models.options import TextEncoderConfig
from mediafm_ray.pipeline.cluster import on_this_node


class _Keeper:
    """Actor that counts down the limits."""

    def __init__(self, config: TextEncoderConfig):
        from mediafm_ray.models.text_api import allowance_of  # It needs an optional extra.

        self.allowance = allowance_of(config)

    def reserve(self, requests: int, tokens: int) -> float:
        return self.allowance.reserve(requests, tokens)

    def refund(self, tokens: int) -> None:
        self.allowance.refund(tokens)

    def pause(self, seconds: float) -> None:
        self.allowance.pause(seconds)


class SharedAllowance:
    """A ``text_api.Allowance`` that can be sent to any actor of the job."""

    def __init__(self, config: TextEncoderConfig):
        self.keeper: Any = ray.remote(num_cpus=0)(_Keeper).options(scheduling_strategy=on_this_node()).remote(config)

    def reserve(self, requests: int, tokens: int) -> float:
        """Reserve one request; return the seconds to wait before it is sent. Raises BudgetExceeded."""
        return ray.get(self.keeper.reserve.remote(requests, tokens))

    def refund(self, tokens: int) -> None:
        """Give back the tokens of a reserved request that failed and was not charged."""
        ray.get(self.keeper.refund.remote(tokens))

    def pause(self, seconds: float) -> None:
        """Send nothing for so many seconds, as the server asked."""
        ray.get(self.keeper.pause.remote(seconds))
