"""Configuration of the training layer: the shape of the model and how it learns. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from mediafm_ray.spec import MAX_SHOTS_PER_WINDOW, ConfigSection, recipe, resource


@dataclass(frozen=True)
class ShapeConfig(ConfigSection):
    """The shape of the contextualiser. The dataset gives its input dimensions; training.objective decides which keys apply."""

    relation_size: int = recipe(32, "width of the networks that compare two shots (context)", min=1)
    hidden_size: int = recipe(768, "width of the encoder (recipe)", min=1)
    num_hidden_layers: int = recipe(3, "layers of the encoder (recipe); 3 is the published number of MediaFM", min=1)
    num_attention_heads: int = recipe(12, "attention heads of a layer; must divide hidden_size (recipe)", min=1)
    intermediate_size: int = recipe(3072, "width of the feed-forward network of a layer (recipe)", min=1)
    max_shots: int = recipe(MAX_SHOTS_PER_WINDOW, "shots of a window; longer titles are sampled", min=1)
    dropout: float = recipe(0.1, "dropout probability of the hidden states (recipe)", min=0, below=1)
    time_features: bool = recipe(False, "add the length of each shot and the gap before it to the input (recipe)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")


@dataclass(frozen=True)
class TrainingConfig(ConfigSection):
    """Masked shot modelling: masking, optimisation and stopping."""

    objective: str = recipe(
        "context",
        "context = neighbour attention, trained at every shot, for the vectors that are served; "
        "recipe = the BERT-style encoder of MediaFM, trained at masked shots",
        choices=("context", "recipe"),
    )
    seed: int = recipe(0, "seed of weights, order of titles, windows, masks and dropout", min=0)
    steps: int = recipe(2000, "maximum number of steps; the learning rate decays to 0 over them", min=1)
    windows_per_step: int = recipe(32, "windows of a step, of all workers together", min=1)
    mask_fraction: float = recipe(0.2, "share of a window's shots that is replaced by [MASK]; at least one shot is", above=0, max=1)
    cut_away_fraction: float = recipe(
        0.15, "share of a window's shots that is replaced by shots of another title, which the model must find (context)", min=0, below=1
    )
    optimiser: str = recipe(
        "muon", "muon = Muon for the matrices of the encoder and AdamW for the rest; adamw = AdamW for all", choices=("muon", "adamw")
    )
    learning_rate: float = recipe(1e-3, "peak learning rate of AdamW", above=0)
    muon_learning_rate: float = recipe(0.02, "peak learning rate of Muon: the singular values of an update", above=0)
    warmup_steps: int = recipe(100, "steps in which the learning rate rises to its peak", min=0)
    weight_decay: float = recipe(0.01, "weight decay of matrices; norms, biases, tokens and positions have none", min=0)
    gradient_norm: float = recipe(1.0, "longer gradients are clipped to this norm; 0 = no clipping", min=0)
    held_out_fraction: float = recipe(0.1, "share of titles, by a hash of their id, that is held out from training", min=0, below=1)
    held_out_titles: int = recipe(256, "maximum number of held-out titles in an evaluation", min=1)
    evaluate_every: int = recipe(200, "steps between evaluations on held-out titles", min=1)
    patience: int = recipe(10, "stop after this many evaluations without improvement; 0 = never", min=0)
    log_every: int = recipe(10, "steps between rows of metrics", min=1)
    precision: str = recipe(
        "auto",
        "arithmetic of the network; bfloat16 uses autocast, auto = bfloat16 on CUDA and float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    save_every: int = resource(200, "steps between saved states, from which a killed training continues", min=1)
    device: str = resource("cpu", "torch device of a worker: cpu, cuda")
    threads: int = resource(0, "CPU threads of a worker; 0 = divide the cores of the machine among the workers", min=0)
    compile: bool = resource(False, "compile the network with torch.compile (for GPUs; takes a minute at the start)")
    read_threads: int = resource(4, "threads of a worker that read titles ahead", min=1)
    read_ahead: int = resource(
        4, "maximum number of steps to read ahead; each takes windows x shots x dimensions x 4 bytes of memory", min=1
    )
    cache_gb: float = resource(1.0, "memory of a worker for titles that were read, in GB; 0 = no cache", min=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, is {self.device!r}")
