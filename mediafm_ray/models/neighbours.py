"""Context from neighbours: a weighted sum of a shot's vector and those of the title's other shots, which stays in the fused space.

    c_i = unit( g_i x_i  +  (1 - 1/S) (sum_j s_ij x_j  +  (3/2 - g_i) sum_j n_ij x_j) )

    x      fused vectors of unit norm
    s_ij   softmax over the other shots of -|i - j| / 4 + (cos(x_i, x_j) - 1) / 0.2: shots that are near and similar
    n_ij   softmax over the other shots of -|i - j| / 2: shots that are near, similar or not
    g_i    min(1, (a_i + 0.1) / (b_i + 0.1)): the support a_i is the mean cosine to the two most similar shots among the six before and
           after, b_i the mean of a over the shots around i. A shot with as much support as the shots around it keeps its weight; a
           cut-away, whose surroundings are similar to one another but not to it, takes their vector. In a montage no shot has more support
           than the others, so every shot keeps its weight.
    S      shots of the window that have a vector: the fewer there are, the less their context weighs; for a single shot, c is x

``builtin:neighbours`` is this formula: one layer of attention with fixed weights and nothing to train. The constants are round numbers,
chosen on films that were put together from two splits of real footage (benchmarks/films.py); results are not sensitive to them.

A trained ``NeighbourAttention`` is the same sum with learned corrections. One small network corrects the logits of s and n from the
relation of two shots (cosines by modality, cosine of their surroundings, distance, support of each); another corrects the three weights
from the support of a shot. Both corrections are bounded, and zero at the start. The networks see relations between vectors, never the
vectors, so that training on some hundred titles generalises to other titles, places and voices.

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

NEAR_SHOTS = 2.0  # Distance in shots over which the weight in n falls to 1/e.
ALIKE_SHOTS = 4.0  # The same distance for s, and for the surroundings whose support is averaged.
ALIKE_COSINE = 0.2  # Difference of cosine over which the weight in s falls to 1/e.
SUPPORT_REACH = 6  # Shots before and after among which the most similar ones are searched.
SUPPORTERS = 2  # Most similar shots whose mean cosine is the support of a shot.
CONTEXT_WEIGHT = 1.5  # Sum of the weights of a shot and of its near shots.
NO_SUPPORT = 0.1  # Shots of different places may have this cosine by chance; smaller supports count alike.
MAX_LOGIT = 1.0  # Maximum correction of a logit: a trained model can change a weight by a factor of e.
MAX_LOG_FACTOR = math.log(2) / 2  # Maximum correction of a weight: 0.7 to 1.4 times the formula's.
MASKED_OUT = -1e9  # Logit of a shot without a vector.
LOGITS, WEIGHTS = 2, 3  # Corrections of a pair of shots (s and n) and of a shot (itself, s and n).
PAIR_FEATURES, SHOT_FEATURES, SHOT_FEATURES_IN_PAIR = 9, 8, 6  # A pair has two more features for each modality.


class NeighbourAttentionConfig(PreTrainedConfig):
    """The shape of a NeighbourAttention, as stored in config.json of a checkpoint."""

    model_type = "mediafm_neighbour_attention"

    fused_dim: int = 0  # D; 0 = any dimension, possible only without corrections
    metadata_dim: int = 0  # metadata dimension of the training dataset; the model does not use metadata
    spans: dict[str, list[int]] | None = None  # [first, end) of each modality in a fused vector
    relation_size: int = 32  # width of the two networks; 0 = no networks, only the formula
    max_logit: float = MAX_LOGIT
    max_log_factor: float = MAX_LOG_FACTOR
    max_shots: int = MAX_SHOTS_PER_WINDOW
    time_features: bool = False  # always False: distances are in shots, not in seconds
    initializer_range: float = 0.0  # required by transformers; torch initialises the networks
    dataset_version: str = ""  # 12 hex digits of the dataset version that it was trained on; empty if unknown


@dataclass
class ContextualiserOutput(ModelOutput):
    """The output of a contextualiser of either kind for B windows."""

    contextual_BSD: Tensor | None = None  # shots in the space of the fused embeddings; undefined where a window is padded
    cls_BD: Tensor | None = None  # a vector of the window: an encoder's projected [CLS], or the mean of the shots
    hidden_BLH: Tensor | None = None  # an encoder's last layer before the output projection: [CLS], [GLOBAL], shots


@dataclass(frozen=True, eq=False)
class Relations:
    """The relations of the shots of B windows, without learned corrections; float32."""

    unit_BSD: Tensor  # zero where a shot is hidden, padded or has no vector
    known_BS: Tensor  # bool, True for all other shots
    cosine_BSS: Tensor
    near_BSS: Tensor  # n of the module's formula; rows are zero if no other shot is known
    alike_BSS: Tensor  # s
    top_BSK: Tensor  # cosines of the most similar shots, descending
    support_BS: Tensor  # a
    around_BS: Tensor  # b
    keep_BS: Tensor  # g; 0 if a shot is not known
    context_B: Tensor  # 1 - 1/S
    distance_SS: Tensor  # |i - j| in shots


def relations(fused_BSD: Tensor, known_BS: Tensor) -> Relations:
    """Relate the shots of every window; shots that are not ``known_BS`` (bool) relate to none."""
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
    context_B = torch.where(context_B > 0, context_B, 1.0)  # A single known shot has no context, but is the context of the others.
    return Relations(unit_BSD, known_BS, cosine_BSS, near_BSS, alike_BSS, top_BSK, support_BS, around_BS, keep_BS, context_B, distance_SS)


def neighbour_context(fused_BSD: Tensor, known_BS: Tensor) -> Tensor:
    """Apply the module's formula: (B, S, D) float32 of unit norm; zero if neither the shot nor any other is known."""
    return _served(_weights(found := relations(fused_BSD, known_BS)), found, found.alike_BSS, found.near_BSS)


class _Correction(nn.Linear):
    """A last layer, which is zero before training."""


class NeighbourAttention(PreTrainedModel):
    """The model of the module; ``forward`` has the arguments of models.contextualiser.Contextualiser."""

    config_class = NeighbourAttentionConfig
    base_model_prefix = "neighbours"
    main_input_name = "fused_BSD"

    def __init__(self, config: NeighbourAttentionConfig) -> None:
        super().__init__(config)
        self.spans = sorted(tuple(span) for span in (config.spans or {}).values())  # config.json sorts the names.
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
        """Initialise as torch does, the last layers with zeros: an untrained model is the formula."""
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

        Metadata and times are ignored. ``contextual_BSD`` is float32 of unit norm; ``cls_BD`` is the unit mean of a window's shots.
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
        own_BSN = shot_BSN[..., [1, 3, 4, 5, 6, 7]]  # The second of the three greatest cosines is enough for a pair.
        pairs = [own_BSN[:, :, None].expand(-1, -1, shots, -1), own_BSN[:, None].expand(-1, shots, -1, -1)]
        return torch.cat([torch.stack(features, -1), *pairs], -1)


def _weights(found: Relations) -> Tensor:
    """Return the (B, S, 3) weights of a shot itself, of s and of n."""
    context_BS = found.context_B[:, None].expand_as(found.keep_BS)
    return torch.stack([found.keep_BS, context_BS, (CONTEXT_WEIGHT - found.keep_BS) * context_BS], -1)


def _served(weight_BS3: Tensor, found: Relations, alike_BSS: Tensor, near_BSS: Tensor) -> Tensor:
    mixed_BSS = weight_BS3[..., 1:2] * alike_BSS + weight_BS3[..., 2:3] * near_BSS
    own_BSD = (weight_BS3[..., 0] * found.known_BS)[..., None] * found.unit_BSD
    return F.normalize(own_BSD + mixed_BSS @ found.unit_BSD, dim=-1)


def _bounded(corrections: Tensor, bound: float) -> Tensor:
    """Squash corrections to between -bound and bound; small ones are unchanged."""
    return bound * torch.tanh(corrections / bound)


def _softmax(logits_BSS: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Return the softmax over the allowed columns; a row without any is zero."""
    return logits_BSS.masked_fill(~allowed_BSS, MASKED_OUT).softmax(-1) * allowed_BSS


def _most_alike(cosine_BSS: Tensor, allowed_BSS: Tensor, count: int) -> Tensor:
    """Return the (B, S, count) greatest cosines among the allowed columns; missing ones are the mean of the others, or 0."""
    nothing = -2.0  # This is below every cosine.
    padded_BSS = F.pad(cosine_BSS.masked_fill(~allowed_BSS, nothing), (0, count), value=nothing)
    top_BSK = padded_BSS.topk(count, -1).values
    there_BSK = top_BSK > nothing
    mean_BS1 = (top_BSK * there_BSK).sum(-1, keepdim=True) / there_BSK.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(there_BSK, top_BSK, mean_BS1.expand_as(top_BSK))


def builtin_model() -> Any:
    """Return the model of ``builtin:neighbours``: the formula, for vectors of any dimension."""
    return NeighbourAttention(NeighbourAttentionConfig(relation_size=0)).eval()
