"""Plot of the metrics of a training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mediafm_ray.training.baselines import BASELINES

Row = Mapping[str, float]
PREFIX = "held_out_"
BASELINE_STYLES = ("-", "--", ":", "-.")


def draw(rows: Sequence[Row], title: str) -> bytes:
    """Return a PNG with the loss, the held-out cosine with its baselines, and the learning rate over the steps."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, cosine, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    figure.suptitle(title)
    _line(loss, rows, "loss", "training")
    _line(cosine, rows, f"{PREFIX}cosine", "contextualiser")
    first = rows[0] if rows else {}
    baselines = {name: first[f"{PREFIX}{name}"] for name in ("cosine_neighbours", *BASELINES) if f"{PREFIX}{name}" in first}
    for (name, value), style in zip(baselines.items(), BASELINE_STYLES, strict=False):
        label = f"without learning: {name.removeprefix('cosine_').replace('_', ' ')}"
        cosine.axhline(value, linestyle=style, linewidth=1, color="grey", label=label)
    if cosine.lines:
        cosine.legend(loc="best", fontsize=8)
    _line(rate, rows, "learning_rate", "learning rate")
    loss.set_ylabel("loss")
    cosine.set_ylabel("held-out cosine")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()


def _line(axes: Axes, rows: Sequence[Row], name: str, label: str) -> None:
    found = [(row["step"], row[name]) for row in rows if name in row]
    if found:
        axes.plot(*zip(*found, strict=True), marker="o" if len(found) < 30 else "", markersize=3, label=label)
        axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.3)
