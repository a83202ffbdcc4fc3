"""What can be configured in training: the shape of the model and how it learns, frozen dataclasses that are filled from YAML. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mediafm_ray.spec import MAX_SHOTS_PER_WINDOW, recipe, resource

OBJECTIVES = ("context", "recipe")
OPTIMISERS = ("muon", "adamw")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class ShapeConfig:
    """The contextualiser to be trained. Its inputs have the dimensions of the dataset; which fields count depends on training.objective."""

    relation_size: int = recipe(32, "width of the networks that read how shots relate (context)")
    hidden_size: int = recipe(768, "width of the encoder (recipe)")
    num_hidden_layers: int = recipe(3, "layers of the encoder (recipe); 3 is the only number that was published for MediaFM")
    num_attention_heads: int = recipe(12, "attention heads of a layer; they divide hidden_size (recipe)")
    intermediate_size: int = recipe(3072, "width inside a layer (recipe)")
    max_shots: int = recipe(MAX_SHOTS_PER_WINDOW, "shots of a window; longer titles are sampled")
    dropout: float = recipe(0.1, "probability that a number of the hidden states is dropped in training (recipe)")
    time_features: bool = recipe(False, "tell the model how long shots are and when they follow (recipe)")

    def __post_init__(self) -> None:
        for name in ("relation_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_shots"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, is {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads {self.num_attention_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is a probability from 0 to below 1, not {self.dropout}")


@dataclass(frozen=True)
class TrainingConfig:
    """Masked shot modelling: which shots are hidden, how the model learns, when it stops."""

    objective: str = recipe(
        "context",
        "context: neighbour attention, trained at every shot, where it is served; "
        "recipe: MediaFM's BERT-style encoder, trained at masked shots",
    )
    seed: int = recipe(0, "of the weights, of the order of titles, of windows, masks and dropout")
    steps: int = recipe(2000, "steps at most; the learning rate decays to 0 over them")
    windows_per_step: int = recipe(32, "windows of a step, of all workers together")
    mask_fraction: float = recipe(0.2, "share of a window's shots that is hidden behind [MASK]; at least one shot is")
    cut_away_fraction: float = recipe(
        0.15, "share of a window's shots that is replaced by shots of another title, whose context the model has to see (context)"
    )
    optimiser: str = recipe("muon", "muon: Muon for the encoder's matrices and AdamW for the rest; adamw: AdamW for all")
    learning_rate: float = recipe(1e-3, "the highest of AdamW")
    muon_learning_rate: float = recipe(0.02, "the highest of Muon: the size of an update's singular values")
    warmup_steps: int = recipe(100, "steps in which the learning rate rises to its highest")
    weight_decay: float = recipe(0.01, "of matrices; norms, biases, tokens and positions have none")
    gradient_norm: float = recipe(1.0, "longer gradients are clipped to this norm; 0 = never")
    held_out_fraction: float = recipe(0.1, "share of titles, by a hash of their id, that is never trained on")
    held_out_titles: int = recipe(256, "of them, take so many at most for an evaluation")
    evaluate_every: int = recipe(200, "steps between evaluations on held-out titles")
    patience: int = recipe(10, "stop after so many evaluations without a better one; 0 = never")
    log_every: int = recipe(10, "steps between rows of metrics")
    precision: str = recipe("auto", "arithmetic of the network: float32, bfloat16 (autocast), auto = bfloat16 on CUDA")
    save_every: int = resource(200, "steps between saved states, from which a killed training goes on")
    device: str = resource("cpu", "torch device of a worker: cpu, cuda")
    threads: int = resource(0, "CPU threads of a worker; 0 = share the cores of the machine among the workers")
    compile: bool = resource(False, "compile the network with torch.compile (for GPUs; takes a minute at the start)")
    read_threads: int = resource(4, "threads of a worker that read titles ahead")
    read_ahead: int = resource(4, "steps that are read ahead at most; each takes windows x shots x dimensions x 4 bytes of memory")
    cache_gb: float = resource(1.0, "memory of a worker for titles that were read; 0 = keep none")

    def __post_init__(self) -> None:
        least_one = (
            "steps",
            "windows_per_step",
            "held_out_titles",
            "evaluate_every",
            "log_every",
            "save_every",
            "read_threads",
            "read_ahead",
        )
        for name in least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, is {getattr(self, name)}")
        for name in ("seed", "warmup_steps", "weight_decay", "gradient_norm", "patience", "threads", "cache_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name} cannot be negative, is {getattr(self, name)}")
        if not 0 < self.mask_fraction <= 1:
            raise ValueError(f"training.mask_fraction is a share above 0 and up to 1, not {self.mask_fraction}")
        if not 0 <= self.cut_away_fraction < 1:
            raise ValueError(f"training.cut_away_fraction is a share from 0 to below 1, not {self.cut_away_fraction}")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"training.held_out_fraction is a share from 0 to below 1, not {self.held_out_fraction}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name} must be positive, is {getattr(self, name)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"training.device is cpu or cuda, not {self.device!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"training.objective must be one of {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"training.optimiser must be one of {', '.join(OPTIMISERS)}, not {self.optimiser!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training.precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
