"""How a stage trains: the keys of `train`, shared by pretraining, fine-tuning and distillation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from engine.config import Fraction, Strict, ZeroRef

WHOLE_TENSORS = ("lamb", "muon", "stable_adamw")
"""Optimizers that measure each tensor as a whole."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class EarlyStopping(Strict):
    """Stop when the validation metric has not improved for a while."""

    patience: int = Field(2, ge=1)
    """Evaluations without improvement before training stops."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest change of the metric that counts as an improvement, in the metric's unit."""


class BadSteps(Strict):
    """What to do about a step whose loss or gradient is not finite, or whose loss is a spike."""

    action: Literal["stop", "skip", "rollback"] = "stop"
    """stop: end the run, its checkpoints are intact. skip: leave the update of the step out. rollback: go back to the newest
    checkpoint and leave out the data from there to the bad step (as in PaLM, arXiv:2204.02311, section 5.1)."""
    spike_factor: float | None = Field(None, gt=1)
    """A loss above this multiple of the median of the last 50 steps is a spike; None: only what is not finite is bad."""
    limit: int = Field(3, ge=1)
    """Bad steps that are skipped or rolled back in one stage before it stops."""


class TrainConfig(Strict):
    """Optimization of one stage. Exactly one of `epochs` and `steps`."""

    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; may be a fraction."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=1)
    """Global batch: rows (packed rows in pretraining) per optimizer step, over all processes and accumulation steps."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass of one process; None: batch_size / processes, that is, no accumulation."""
    optimizer: Literal["adamw", "adamw_8bit", "lamb", "muon", "stable_adamw"] = "adamw"
    """`adamw_8bit` keeps its state in 8 bits (bitsandbytes, arXiv:2110.02861); not with CPU offload. `lamb`, for large batches,
    `muon`, with AdamW for what is no matrix of a layer, and `stable_adamw`, against spikes, are those of
    engine/training/tensor_optimizers.py; they measure whole tensors: no ZeRO above stage 0, no fp16."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Shape after warm-up; all but constant end at 0. wsd: constant, then down over `cooldown` (MiniCPM, arXiv:2404.06395), as 1
    less the root of the share that is done (arXiv:2405.18392)."""
    cooldown: Fraction = 0.2
    """Share of all optimizer steps, the last ones, over which `wsd` falls."""
    warmup: Fraction = 0.06
    """Share of all optimizer steps spent raising the learning rate linearly; 6 % follows RoBERTa (arXiv:1907.11692)."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and normalization weights are exempt."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's averaging factors."""
    clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """bf16 is torch's autocast: weights, gradients, their sums over ranks and the optimizer state stay fp32, which keeps losses
    within 1e-3 of fp32 (a model that is bf16 as a whole drifts far more). fp16 needs GPUs: weights and gradients are fp16 under
    DeepSpeed's dynamic loss scaling, with fp32 master weights. auto: bf16 where the hardware multiplies it, else fp32."""
    deterministic: bool = False
    """On GPUs only kernels that give the same bits in every run, and attention by plain matrix products: slower. CPUs always
    do that."""
    compile: bool = False
    """On GPUs each layer becomes a few fused kernels (torch.compile, about half a minute at the start): faster, and rounded in
    another way. CPUs take the layers as they are: there it gains nothing."""
    gradient_checkpointing: bool = False
    """Compute the activations of every layer again in the backward pass instead of keeping them: less memory for one more forward
    pass; losses and gradients stay the same."""
    layers: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Which part of the model is trained. all: body and head, both ways; 0: the head alone, one way, on a frozen body; a number:
    the head and so many layers from the top."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a layer over that of the layer above it; the head has `learning_rate` itself, the embeddings come below
    the lowest layer (discriminative fine-tuning, arXiv:1801.06146; ELECTRA, arXiv:2003.10555, takes 0.8 and 0.9)."""
    unfreeze: Fraction = 0.0
    """Share of all optimizer steps over which the layers join in, evenly and from the top (gradual unfreezing, arXiv:1801.06146);
    0: all train from the first step. A layer that waits has learning rate 0; Adam's averages fill meanwhile."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Replaces every dropout probability of the model; None keeps the model's own."""
    evaluate_every: Annotated[int, Field(ge=1)] | Annotated[Fraction, Field(gt=0)] | None = None
    """Optimizer steps (a whole number) or a share of training (`25%`, 0.25) between evaluations; None: once an epoch."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints; None: at every evaluation."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints stay on disk while the stage runs."""
    keep: Literal["best", "last"] = "best"
    """Which weights the stage hands on: those of the best validation, or those of the last step."""
    early_stopping: EarlyStopping | None = None
    bad_steps: BadSteps = BadSteps()

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of train.epochs and train.steps")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainConfig:
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError("train.warmup and train.cooldown are more than all steps: lower one of them")
        return self

    @model_validator(mode="after")
    def _whole_tensors(self) -> TrainConfig:
        if self.optimizer in WHOLE_TENSORS and self.precision == "fp16":
            raise ValueError(
                f"train.optimizer={self.optimizer} measures whole tensors, which DeepSpeed joins for fp16: use bf16, or adamw"
            )
        return self

    @model_validator(mode="after")
    def _muon_has_layers(self) -> TrainConfig:
        if self.optimizer == "muon" and self.layers == 0:
            raise ValueError("train.optimizer=muon is for layers, of which train.layers=0 trains none: use adamw")
        return self

    @model_validator(mode="after")
    def _one_of_both(self) -> TrainConfig:
        if self.compile and self.deterministic:
            raise ValueError(
                "train.compile chooses its kernels anew in every run, train.deterministic forbids that: leave one out"
            )
        return self


class Trained(Strict):
    """Base of the sections that train: where and how wide."""

    PLACEMENT: ClassVar = ("section.processes", "section.parallel", "section.train.micro_batch_size", "inputs.parallel")
    """What an interrupted run may change before it goes on: how its work is spread, not what it computes."""

    train: TrainConfig
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of every random choice of this stage; None: the recipe's. `seeds: [1, 2, 3]`, or how many, in its place runs the stage once
    for each and hands on the model that is best on the validation rows (engine/select.py)."""
    parallel: ZeroRef | None = None
    """Name of a file in ds_configs/ (zero0 … zero3, zero2_offload, …) or a path to a DeepSpeed JSON; None: zero0, plain data
    parallelism."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Ranks on this machine; auto: one per GPU, or one without GPUs. A machine with fewer GPUs takes fewer, and `auto` leaves
    out GPUs that would not divide the batch: the batch and so the training are the same."""
