"""Context from neighbours: a shot's vector becomes a weighted sum of itself and the title's other shots, and stays in the fused space.

    c_i = unit( g_i x_i  +  (1 - 1/S) (sum_j s_ij x_j  +  (3/2 - g_i) sum_j n_ij x_j) )

    x      fused vectors of unit norm
    s_ij   softmax over the other shots of -|i - j| / 4 + (cos(x_i, x_j) - 1) / 0.2: the shots that are near and alike
    n_ij   softmax over the other shots of -|i - j| / 2: the shots that are near, alike or not
    g_i    min(1, (a_i + 0.1) / (b_i + 0.1)): a_i is the mean cosine of the two shots most like i among the six before and after, b_i the
           mean of a over the shots around i. A shot that is as well supported as those around it keeps its weight; a cut-away, whose
           surroundings agree with one another and not with it, takes theirs. In a montage no shot is supported, and every shot does.
    S      shots of the window that have a vector: where there are few, their context weighs less, and of a single shot c is x

That is all of ``builtin:neighbours``: one layer of attention with fixed weights, for which nothing has to be trained. The constants were
chosen among round numbers on films put together from two splits of real footage (benchmarks/films.py); figures change little around them.

A trained ``NeighbourAttention`` is the same sum with learned corrections: a small network reads how two shots relate (their cosines by
modality, the cosine of their surroundings, their distance, and how well each is supported) and corrects the logits of s and n; another
reads how well a shot is supported and corrects the three weights. Both corrections are bounded, and zero at the start. It never sees
the vectors themselves, only relations between them, so what it learns on some hundred titles holds for titles, places and voices that
it never saw.

Shapes
    B  windows (each of one title)
    S  shots of the longest window
    D  dimension of a fused embedding
    F  features of a pair of shots
    N  features of a shot
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mediafm_ray.spec import MAX_SHOTS_PER_WINDOW

NEAR_SHOTS = 2.0  # shots: distance over which the weight of a near shot falls to 1/e
ALIKE_SHOTS = 4.0  # shots: the same, of a near shot that is alike, and of the surroundings whose support is averaged
ALIKE_COSINE = 0.2  # difference of cosine over which the weight of a shot falls to 1/e
SUPPORT_REACH = 6  # shots before and after among which the ones most alike are looked for
SUPPORTERS = 2  # shots most alike whose mean cosine is a shot's support
CONTEXT_WEIGHT = 1.5  # weights of a shot and of its near shots together
NO_SUPPORT = 0.1  # cosine that shots of different places may have by chance: below it supports do not differ
MAX_LOGIT = 1.0  # correction of a logit: a trained model may weigh a shot e times more or less than the formula does
MAX_LOG_FACTOR = math.log(2) / 2  # correction of a weight: 0.7 to 1.4 times the formula's
MASKED_OUT = -1e9  # logit of a shot that has no vector to give
LOGITS, WEIGHTS = 2, 3  # corrected for a pair of shots (s and n), and for a shot (itself, s and n)
PAIR_FEATURES, SHOT_FEATURES, SHOT_FEATURES_IN_PAIR = 9, 8, 6  # besides two features of a pair for each modality


class NeighbourAttentionConfig(PreTrainedConfig):
    """The shape of a NeighbourAttention: what config.json of a checkpoint holds."""

    model_type = "mediafm_neighbour_attention"

    fused_dim: int = 0  # D; 0 takes vectors of any dimension, without corrections only
    metadata_dim: int = 0  # of the dataset that it was trained on; the model does not look at metadata
    spans: dict[str, list[int]] | None = None  # [first, end) of each modality in a fused vector
    relation_size: int = 32  # width of the two networks; 0 leaves both out: the formula alone
    max_logit: float = MAX_LOGIT
    max_log_factor: float = MAX_LOG_FACTOR
    max_shots: int = MAX_SHOTS_PER_WINDOW
    time_features: bool = False  # never: shots are counted, not seconds
    initializer_range: float = 0.0  # transformers wants one; the networks are initialised as torch does
    dataset_version: str = ""  # what it was trained on: 12 hex digits of a dataset's version; empty where that is not known


@dataclass
class ContextualiserOutput(ModelOutput):
    """The vectors that a model of either kind gives for B windows."""

    contextual_BSD: Tensor | None = None  # the shots, in the space of the fused embeddings; undefined where a window is padded
    cls_BD: Tensor | None = (
        None  # a vector of the window: [CLS] of an encoder, through the same output projection, or the mean of the shots
    )
    hidden_BLH: Tensor | None = None  # of an encoder, the last layer before the output projection: [CLS], [GLOBAL], shots


@dataclass(frozen=True, eq=False)
class Relations:
    """How the shots of B windows relate, before anything is learned; float32."""

    unit_BSD: Tensor  # zero where a shot is hidden, padded or has no vector
    known_BS: Tensor  # bool, the others
    cosine_BSS: Tensor
    near_BSS: Tensor  # n of the module's formula; rows of zeros where no other shot is known
    alike_BSS: Tensor  # s
    top_BSK: Tensor  # cosines of the shots most alike, falling
    support_BS: Tensor  # a
    around_BS: Tensor  # b
    keep_BS: Tensor  # g; 0 where a shot is not known
    context_B: Tensor  # 1 - 1/S
    distance_SS: Tensor  # |i - j| in shots


def relations(fused_BSD: Tensor, known_BS: Tensor) -> Relations:
    """Relate the shots of every window; those that are not ``known_BS`` (bool) give nothing and are related to nothing."""
    shots = fused_BSD.shape[1]
    place_S = torch.arange(shots, device=fused_BSD.device)
    distance_SS = (place_S[:, None] - place_S[None]).abs().float()
    other_BSS = known_BS[:, None, :] & (distance_SS > 0)
    unit_BSD = F.normalize(fused_BSD.float(), dim=-1) * known_BS[..., None]
    cosine_BSS = unit_BSD @ unit_BSD.transpose(1, 2)
    near_BSS = _softmax((-distance_SS / NEAR_SHOTS).expand_as(cosine_BSS), other_BSS)
    alike_BSS = _softmax(-distance_SS / ALIKE_SHOTS + (cosine_BSS - 1) / ALIKE_COSINE, other_BSS)
    around_BSS = _softmax((-distance_SS / ALIKE_SHOTS).expand_as(cosine_BSS), other_BSS)
    top_BSK = _most_alike(cosine_BSS, other_BSS & (distance_SS <= SUPPORT_REACH), SUPPORTERS + 1)
    support_BS = top_BSK[..., :SUPPORTERS].mean(-1).clamp(0, 1) * known_BS
    around_BS = (around_BSS @ support_BS[..., None])[..., 0]
    keep_BS = ((support_BS + NO_SUPPORT) / (around_BS + NO_SUPPORT)).clamp(max=1) * known_BS
    context_B = 1 - 1 / known_BS.sum(1).clamp(min=1)
    context_B = torch.where(context_B > 0, context_B, 1.0)  # of the only shot that is known the others are the context, itself has none
    return Relations(unit_BSD, known_BS, cosine_BSS, near_BSS, alike_BSS, top_BSK, support_BS, around_BS, keep_BS, context_B, distance_SS)


def neighbour_context(fused_BSD: Tensor, known_BS: Tensor) -> Tensor:
    """The formula of the module: (B, S, D) float32 of unit norm; zero where neither the shot nor any other is known."""
    return _served(_weights(found := relations(fused_BSD, known_BS)), found, found.alike_BSS, found.near_BSS)


class _Correction(nn.Linear):
    """A last layer, which is zero before it is trained."""


class NeighbourAttention(PreTrainedModel):
    """The model; its ``forward`` is called as that of models.contextualiser.Contextualiser."""

    config_class = NeighbourAttentionConfig
    base_model_prefix = "neighbours"
    main_input_name = "fused_BSD"

    def __init__(self, config: NeighbourAttentionConfig) -> None:
        super().__init__(config)
        self.spans = sorted(tuple(span) for span in (config.spans or {}).values())  # config.json sorts the names
        size = config.relation_size
        self.pair_network = self.shot_network = None
        if size:
            pair_features = PAIR_FEATURES + 2 * len(self.spans) + 2 * SHOT_FEATURES_IN_PAIR
            inner = [nn.Linear(pair_features, size), nn.GELU(), nn.Linear(size, size), nn.GELU()]
            self.pair_network = nn.Sequential(*inner, _Correction(size, LOGITS))
            self.shot_network = nn.Sequential(nn.Linear(SHOT_FEATURES, size), nn.GELU(), _Correction(size, WEIGHTS))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initialisation, and zeros in the last layers: an untrained model is the formula."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()
            if isinstance(module, _Correction):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        fused_BSD: Tensor,
        metadata_BM: Tensor | None = None,
        has_metadata_B: Tensor | None = None,
        shots_BS: Tensor | None = None,
        masked_BS: Tensor | None = None,
        times_BS2: Tensor | None = None,
    ) -> ContextualiserOutput:
        """Contextualise B windows. ``shots_BS`` (bool) is False where a window is padded, ``masked_BS`` (bool) True where a shot is hidden.

        Metadata and times are not looked at. ``contextual_BSD`` is float32 of unit norm; ``cls_BD`` is the unit mean of a window's shots.
        """
        shots_BS = torch.ones(fused_BSD.shape[:2], dtype=torch.bool, device=fused_BSD.device) if shots_BS is None else shots_BS
        known_BS = shots_BS & (fused_BSD != 0).any(-1)
        if masked_BS is not None:
            known_BS = known_BS & ~masked_BS
        with torch.autocast(fused_BSD.device.type, enabled=False):
            contextual_BSD = self._contextualise(relations(fused_BSD, known_BS), fused_BSD.float())
            cls_BD = F.normalize((contextual_BSD * shots_BS[..., None]).sum(1), dim=-1)
        return ContextualiserOutput(contextual_BSD=contextual_BSD, cls_BD=cls_BD)

    def _contextualise(self, found: Relations, fused_BSD: Tensor) -> Tensor:
        if self.pair_network is None or self.shot_network is None:
            return _served(_weights(found), found, found.alike_BSS, found.near_BSS)
        near_unit_BSD = F.normalize(found.near_BSS @ found.unit_BSD, dim=-1)
        to_near_BSS = found.unit_BSD @ near_unit_BSD.transpose(1, 2)
        shot_BSN = self._shot_features(found, to_near_BSS)
        pair_BSSF = self._pair_features(found, fused_BSD, near_unit_BSD, to_near_BSS, shot_BSN)
        correction_BSS2 = _bounded(self.pair_network(pair_BSSF), self.config.max_logit)
        other_BSS = found.known_BS[:, None, :] & (found.distance_SS > 0)
        alike_BSS = -found.distance_SS / ALIKE_SHOTS + (found.cosine_BSS - 1) / ALIKE_COSINE + correction_BSS2[..., 0]
        near_BSS = -found.distance_SS / NEAR_SHOTS + correction_BSS2[..., 1]
        factor_BS3 = torch.exp(_bounded(self.shot_network(shot_BSN), self.config.max_log_factor))
        return _served(_weights(found) * factor_BS3, found, _softmax(alike_BSS, other_BSS), _softmax(near_BSS, other_BSS))

    def _shot_features(self, found: Relations, to_near_BSS: Tensor) -> Tensor:
        own_BS = torch.diagonal(to_near_BSS, dim1=1, dim2=2)
        single = [found.support_BS, found.around_BS, found.keep_BS, own_BS, found.known_BS.float()]
        return torch.cat([found.top_BSK, torch.stack(single, -1)], -1)

    def _pair_features(self, found: Relations, fused_BSD: Tensor, near_unit_BSD: Tensor, to_near_BSS: Tensor, shot_BSN: Tensor) -> Tensor:
        features: list[Tensor] = []
        for first, end in self.spans:
            part_BSD = F.normalize(fused_BSD[..., first:end], dim=-1) * found.known_BS[..., None]
            present_BS = (part_BSD != 0).any(-1).float()
            features += [part_BSD @ part_BSD.transpose(1, 2), present_BS[:, :, None] * present_BS[:, None]]
        alike_unit_BSD = F.normalize(found.alike_BSS @ found.unit_BSD, dim=-1)
        distance_BSS = found.distance_SS.expand_as(found.cosine_BSS)
        features += [found.cosine_BSS, near_unit_BSD @ near_unit_BSD.transpose(1, 2), alike_unit_BSD @ alike_unit_BSD.transpose(1, 2)]
        features += [to_near_BSS, to_near_BSS.transpose(1, 2), torch.log1p(distance_BSS) / 3]
        features += [torch.exp(-distance_BSS / 2), torch.exp(-distance_BSS / SUPPORT_REACH), distance_BSS % 2]
        shots = shot_BSN.shape[1]
        own_BSN = shot_BSN[..., [1, 3, 4, 5, 6, 7]]  # of the three cosines of shots most alike, the second says enough about a pair
        pairs = [own_BSN[:, :, None].expand(-1, -1, shots, -1), own_BSN[:, None].expand(-1, shots, -1, -1)]
        return torch.cat([torch.stack(features, -1), *pairs], -1)


def _weights(found: Relations) -> Tensor:
    """(B, S, 3) weights of a shot itself, of the shots near and alike, and of the near shots."""
    context_BS = found.context_B[:, None].expand_as(found.keep_BS)
    return torch.stack([found.keep_BS, context_BS, (CONTEXT_WEIGHT - found.keep_BS) * context_BS], -1)


def _served(weight_BS3: Tensor, found: Relations, alike_BSS: Tensor, near_BSS: Tensor) -> Tensor:
    mixed_BSS = weight_BS3[..., 1:2] * alike_BSS + weight_BS3[..., 2:3] * near_BSS
    own_BSD = (weight_BS3[..., 0] * found.known_BS)[..., None] * found.unit_BSD
    return F.normalize(own_BSD + mixed_BSS @ found.unit_BSD, dim=-1)


def _bounded(corrections: Tensor, bound: float) -> Tensor:
    """Corrections between -bound and bound, unchanged where they are small."""
    return bound * torch.tanh(corrections / bound)


def _softmax(logits_BSS: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Softmax over the allowed columns; a row of zeros where there is none."""
    return logits_BSS.masked_fill(~allowed_BSS, MASKED_OUT).softmax(-1) * allowed_BSS


def _most_alike(cosine_BSS: Tensor, allowed_BSS: Tensor, count: int) -> Tensor:
    """(B, S, count) greatest cosines of each row among the allowed columns; where there are fewer, their mean stands in, or 0."""
    nothing = -2.0  # below any cosine
    padded_BSS = F.pad(cosine_BSS.masked_fill(~allowed_BSS, nothing), (0, count), value=nothing)
    top_BSK = padded_BSS.topk(count, -1).values
    there_BSK = top_BSK > nothing
    mean_BS1 = (top_BSK * there_BSK).sum(-1, keepdim=True) / there_BSK.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(there_BSK, top_BSK, mean_BS1.expand_as(top_BSK))


def builtin_model() -> Any:
    """The model of ``builtin:neighbours``: the formula alone, for vectors of any dimension."""
    return NeighbourAttention(NeighbourAttentionConfig(relation_size=0)).eval()
