"""Estimated cost of a run. Reads timed text in a separate process, opens no video, and sends nothing."""

from __future__ import annotations

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.pipeline.rows import TitleRow
from mediafm_ray.pipeline.stages import media_options, metadata_text
from mediafm_ray.runs.plan import Plan
from mediafm_ray.spec import Title
from mediafm_ray.text import counted


def describe_cost(plan: Plan, config: EmbedCatalogConfig) -> str:
    """Return a line with the texts, requests, tokens and price of the pending titles at the embeddings API."""
    pending = f"dry run: {counted(plan.pending.num_rows, 'title')} would be computed"
    if config.text.encoder != "openai":
        return f"{pending}; text is embedded on this machine or cluster and costs nothing at the embeddings API"
    from mediafm_ray.models.text_api import estimate

    texts = requests = tokens = 0
    usd, exact = 0.0, True
    reader = IsolatedReader(config.frames, config.timed_text, config.media)
    try:
        for index in range(plan.pending.num_rows):
            title = TitleRow(plan.pending, index).title()
            one = estimate(config.text, [*_texts(title, config, reader), metadata_text(title.synopsis, list(title.tags))])
            texts, requests, tokens = texts + one.texts, requests + one.requests, tokens + one.tokens
            usd, exact = usd + one.usd, exact and one.exact
    finally:
        reader.close()
    count = f"{tokens} tokens" if exact else f"at most {tokens} tokens (without the vocabulary that is needed to count them)"
    price = f"${usd:.4f} at ${config.text.price_per_million_tokens:g} a million"
    return f"{pending}; {texts} texts in {requests} requests, {count}, about {price}; subtitles inside the videos are not counted"


def _texts(title: Title, config: EmbedCatalogConfig, reader: IsolatedReader) -> list[str]:
    """Return the texts of the sidecar that would be used; a title whose timed text cannot be read has none."""
    if not title.timed_text:
        return []
    reader.media = media_options(config.media, title.video, config.storage)
    try:
        return reader.texts(title)
    except (TitleError, OutageError):  # Hostile text, or a server that did not deliver it.
        return []
