"""What a cell is: pydantic models for the shape, the training and the identity of one run."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, model_validator

from bench.errors import UserError
from bench.form import Form
from bench.rope import RopeScaling as RopeScaling
from bench.strict import Strict as Strict
from bench.strict import parse as parse

IGNORED = -100  # the target of a position that is not scored
FIRST_PILOT = 10_000  # seeds from here on are for choosing settings: they never enter a verdict
LARGEST = (1 << 63) - 1  # what a count may be as far as it is not bounded otherwise: as large as files can hold it
LARGE = 1e30  # the same of other numbers: float32, in which models compute, still has room for it
MOST_STEPS = 10_000_000  # of a training: their learning rates and FLOPs are known before it begins
RESULTS_SCHEMA = 3  # part of every cell's id: raise it when a change makes older results incomparable


NUMBERLESS = {"activation_checkpointing"}  # fields of a training that change no number
RESOLVED = ("device", "precision", "stacked")  # fields of a training that are never left out of an id

Count = Literal["full", "executed"]  # of the FLOPs of causal attention

# Fields of a training that change how many cycles a step runs, with the value that each has where it does not.
DEPTHS = {"random_cycles": False, "sequence_cycles": False, "cycles_schedule": None, "shortcut_loss": 0.0}


class ModelConfig(Strict):
    """The shape of a model, whatever its variant.

    ``n_blocks`` counts blocks with parameters of their own (parameter depth); the variant's schedule decides how often
    each runs.
    """

    family: Literal["gpt2", "llama"] = Field(
        "gpt2", description="of the blocks: LayerNorm, GELU, learned positions; or RMSNorm, SwiGLU, rotary ones"
    )
    activation: Literal["gelu_tanh", "gelu"] = Field(
        "gelu_tanh", description="gpt2 only: GELU in the form of GPT-2, or by its definition, twice as fast on a CPU"
    )
    d_model: int = Field(128, ge=2, le=16384, description="width of the residual stream")
    n_blocks: int = Field(4, ge=1, le=512, description="blocks with parameters of their own")
    n_cycles: int = Field(3, ge=1, le=512, description="how often the shared blocks run")
    n_heads: int = Field(4, ge=1, le=256, description="of attention; divides d_model")
    n_kv_heads: int | None = Field(None, ge=1, le=256, description="None: as many as n_heads; fewer only for llama")
    d_ff: int | None = Field(None, ge=1, le=131072, description="None: 4 d (gpt2) or 8/3 d rounded up to 8 (llama)")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the activations set to zero in training")
    tie_embeddings: bool = Field(True, description="one matrix for the embedding and the LM head")
    norm_eps: float = Field(1e-5, gt=0.0, lt=1.0, description="added to the variance in norms")
    rope_theta: float = Field(10000.0, gt=1.0, le=LARGE, description="base of the rotary frequencies; llama only")
    rope_scaling: RopeScaling | None = Field(None, description="how rotary positions are stretched; llama only")
    halting: Literal["none", "gate"] = Field(
        "none", description="gate: a linear head on the state after each cycle gives the chance of halting there"
    )
    norm: Literal["pre", "sandwich"] = Field(
        "pre",
        description="of a block: one before attention and MLP, or another of their updates too, x + norm(f(norm(x))), "
        "as in Ouro, arXiv 2510.25741, and Gemma 2, arXiv 2408.00118",
    )
    kv: Literal["own", "first", "last"] = Field(
        "own",
        description="keys and values of a block in later cycles: its own, those of its first cycle, or its own with a "
        "cache that keeps the last cycle's alone (bench.model.keys)",
    )
    residual_scale: float | None = Field(
        None,
        gt=0.0,
        le=1000.0,
        description="lambda: every update of the residual stream is multiplied by lambda / (N sqrt(L)), with L blocks "
        "and N uses of the block (arXiv 2606.18524; bench.model.schedule.residual_scales); None: by 1",
    )
    flops: Count = Field(
        "full",
        description="how causal attention is counted: full, as if every token saw its whole sequence, or executed, by "
        "the earlier tokens that each one sees, which is about half; kernels for long sequences compute only these",
    )

    form: Form = Field(Form(), description="of the task's sequences, which the task tells")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model = {self.d_model} must be a multiple of n_heads = {self.n_heads}")
        if self.family == "llama" and (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model / n_heads = {self.d_model // self.n_heads} must be even for rotary positions")
        if self.family == "gpt2" and self.rope_scaling is not None:
            raise ValueError("rope_scaling needs family llama: gpt2 has learned positions")
        if self.n_kv_heads is not None:
            if self.family == "gpt2" and self.n_kv_heads != self.n_heads:
                raise ValueError(f"n_kv_heads = {self.n_kv_heads}: grouped-query attention needs family llama")
            if self.n_heads % self.n_kv_heads:
                raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")
        return self

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding: vectors have none that could be it."""
        return self.tie_embeddings and self.form.features is None

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def ff(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.family == "gpt2" else -(-8 * self.d_model // 24) * 8


CELL_SOURCE = "cell:"  # what a source begins with that is another cell
Sharing = Literal["stepwise", "lower", "upper", "average", "random"]  # of a pretrained stack's blocks among fewer

Trained = Literal["all", "additions", "additions+norms"]


class Init(Strict):
    """What a cell's model starts from instead of random weights.

    Attributes:
        source: what ``cyclebench convert`` takes, or ``cell:ID`` for the model another cell has trained.
        sharing: how the source's blocks are shared among fewer, None keeps them all.
        digest: of the source's configuration and weights.
    """

    source: str
    sharing: Sharing | None = None
    digest: str = ""


class Execution(Strict):
    """How something is computed: where, how precisely, in how many pieces. Not what."""

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of products of matrices; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(
        1, ge=1, le=1024, description="CPU threads of the cell: part of what makes its sums repeatable"
    )
    processes: int = Field(
        1, ge=1, le=1024, description="of one cell, each with a GPU or threads of its own and its share of every batch"
    )
    sharding: Literal["none", "full"] = Field(
        "none", description="of the model among the processes; none: each has all of it (DDP), full: a part (FSDP)"
    )
    stacked: bool | Literal["auto"] = Field(
        "auto",
        description="compute the steps in a stack of models of this shape, with a copy where there is no other "
        "(bench.train.packing): other last digits; auto: where it is possible and pays, judged by the cell alone",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep the states between cycles alone for the backward pass and compute what is inside each again "
        "(Chen et al. 2016, arXiv 1604.06174): less memory, the same numbers; FLOPs are counted without it",
    )
    compile: bool = Field(
        False,
        description="torch.compile the blocks, once for all cycles; a CPU gains little by it (cyclebench bench)",
    )
    cuda_graphs: bool = Field(
        False,
        description="repeat the recorded forward and backward passes of a step instead of launching every kernel anew: "
        "for small models on a GPU, where the launches take the time",
    )

    @model_validator(mode="after")
    def _possible(self) -> Execution:
        if self.sharding == "full" and self.processes == 1:
            raise ValueError("sharding = 'full' needs processes > 1")
        if self.compile and self.processes > 1:
            raise ValueError(f"compile = True needs processes = 1, not {self.processes}")
        if self.compile and self.activation_checkpointing:
            raise ValueError("activation_checkpointing = True needs compile = False, which decides itself what to keep")
        for other in ("compile", "activation_checkpointing"):
            if self.cuda_graphs and getattr(self, other):
                raise ValueError(f"cuda_graphs = True needs {other} = False")
        if self.cuda_graphs and self.processes > 1:
            raise ValueError(f"cuda_graphs = True needs processes = 1, not {self.processes}")
        return self


class Objective(Strict):
    """What is trained besides the loss at full depth (``bench.model.losses``). A saved model tells its own, so that
    whoever trains it further, with the suite or without, trains the same.
    """

    exit_loss: float = Field(
        0.0,
        ge=0.0,
        le=LARGE,
        description="weight of the mean loss at the earlier exit points, beside 1 for that at full depth",
    )
    halting_loss: Literal["none", "gate_cdf", "pondernet", "act"] = Field(
        "none", description="train model.halting: the loss expected under it, with a penalty (bench.model.losses)"
    )
    halting_weight: float = Field(
        0.01, ge=0.0, le=LARGE, description="of the penalty: beta of gate_cdf and pondernet, tau of act"
    )
    halting_prior: float = Field(
        0.2, gt=0.0, lt=1.0, description="chance of halting after a cycle in pondernet's geometric prior"
    )

    shortcut_loss: float = Field(
        0.0,
        ge=0.0,
        le=LARGE,
        description="weight of a second pass, of fewer cycles drawn for every step: of its loss at full depth, and of "
        "how far its states are from those of the first (LoopFormer, arXiv 2602.11451, which takes 0.1)",
    )

    @model_validator(mode="after")
    def _one_weighting(self) -> Objective:
        if self.halting_loss != "none" and self.exit_loss:
            raise ValueError(f"exit_loss = {self.exit_loss:g} must be 0 where halting_loss weighs the exit points")
        if self.trains_exits and self.shortcut_loss:
            raise ValueError(f"shortcut_loss = {self.shortcut_loss:g} must be 0 where the loss reads every exit point")
        return self

    @property
    def trains_exits(self) -> bool:
        """Whether the loss reads what every exit point predicts."""
        return bool(self.exit_loss) or self.halting_loss != "none"


class CyclesSchedule(Strict):
    """A curriculum over the number of cycles.

    Attributes:
        start: the number at the first step.
        end: from the end of the share on; None: ``model.n_cycles``.
        share: of the steps, over which it goes from the one to the other.
    """

    start: int = Field(1, ge=1, le=512)
    end: int | None = Field(None, ge=1, le=512)
    share: float = Field(0.5, gt=0.0, le=1.0)


class TrainConfig(Objective, Execution):
    """One training run. Part of the cell's identity: everything here may change the numbers."""

    steps: int = Field(1000, ge=1, le=MOST_STEPS, description="optimizer steps")
    batch_size: int = Field(32, ge=1, le=LARGEST, description="sequences per optimizer step")
    accumulation: int = Field(1, ge=1, le=LARGEST, description="micro-batches a step is split into; divides batch_size")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: of the matrices of blocks, at the same learning rate; the rest stays with AdamW"
    )
    lr: float = Field(1e-3, gt=0.0, le=10.0, description="peak learning rate")
    lr_schedule: Literal["cosine", "trapezoid"] = Field(
        "cosine", description="from the peak down along a cosine; or constant, then straight down in the cooldown"
    )
    warmup: float = Field(0.05, ge=0.0, le=1.0, description="share of the steps")
    cooldown: float = Field(0.2, ge=0.0, le=1.0, description="share of the steps, trapezoid only")
    min_lr: float = Field(0.1, ge=0.0, le=1.0, description="final learning rate as a share of the peak")
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        le=LARGE,
        description="on matrices of linear layers only, not on norms, biases, embeddings, the head, tokens",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="of AdamW: decay of the mean gradient")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="of AdamW: decay of the mean square")
    grad_clip: float | None = Field(1.0, gt=0.0, le=LARGE, description="largest norm of the gradients; None: any")
    trained: Trained = Field(
        "all", description="additions: only what the variant adds to plain blocks (with the norms); the rest is frozen"
    )
    random_cycles: bool = Field(
        False,
        description="draw the number of cycles of every step: rate ~ LogNormal(ln r - 1/8, 1/2), Poisson(rate) + 1 "
        "(Geiping et al. 2025, arXiv 2502.05171, section 3.3), r being model.n_cycles",
    )
    sequence_cycles: bool = Field(
        False,
        description="draw the number of cycles of every sequence: max(1, Poisson(r)) (Parcae, arXiv 2604.12946)",
    )
    cycles_schedule: CyclesSchedule | None = Field(
        None, description="a curriculum over the number of cycles, or over r where it is drawn"
    )
    backward_cycles: int | None = Field(
        None, ge=1, le=1024, description="gradients flow through so many last cycles only; None: through all"
    )
    eval_every: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="optimizer steps between validations; None: a tenth"
    )
    eval_every_flops: float | None = Field(None, gt=0.0, le=LARGE, description="training FLOPs between validations")
    eval_sequences: int = Field(256, ge=1, le=LARGEST, description="validation sequences used while training")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of accumulation = {self.accumulation}")
        if self.batch_size // self.accumulation % self.processes:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of accumulation x processes = "
                f"{self.accumulation} x {self.processes}"
            )
        for field, off in DEPTHS.items():
            if self.cuda_graphs and getattr(self, field) != off:
                raise ValueError(f"cuda_graphs = True needs {field} = {off}")
        if self.sequence_cycles and self.random_cycles:
            raise ValueError("sequence_cycles = True needs random_cycles = False: one of them draws")
        if self.sequence_cycles and self.trains_exits:
            raise ValueError("sequence_cycles = True must be False where the loss reads every exit point")
        for field in ("sequence_cycles", "backward_cycles"):
            if self.shortcut_loss and getattr(self, field):
                raise ValueError(f"shortcut_loss = {self.shortcut_loss:g} must be 0 with {field}")
        if self.optimizer == "muon":
            if self.trained != "all":
                raise ValueError(f"optimizer = 'muon' needs trained = 'all', not {self.trained!r}: it is for blocks")
            if self.sharding != "none":
                raise ValueError(f"optimizer = 'muon' needs whole matrices: sharding = 'none', not {self.sharding!r}")
        if self.lr_schedule == "trapezoid" and self.warmup + self.cooldown > 1.0:
            raise ValueError(f"warmup + cooldown = {self.warmup + self.cooldown:g} must not exceed 1")
        if self.trains_exits and self.backward_cycles is not None:
            raise ValueError(
                f"backward_cycles = {self.backward_cycles} must be none where the loss reads every exit point"
            )
        return self

    @property
    def steps_between(self) -> int:
        """Optimizer steps between validations."""
        return self.eval_every or max(1, self.steps // 10)

    @property
    def validates_once(self) -> bool:
        """Whether there is a validation at the end alone."""
        return self.eval_every_flops is None and self.steps_between >= self.steps

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if the model cannot be trained so: it has a halting gate that nothing would train, or
        rotary frequencies that are made on the host.
        """
        if model.halting == "gate" and self.halting_loss == "none":
            raise UserError("model.halting: 'gate' is trained by train.halting_loss, which must not be 'none' then")
        if self.cuda_graphs and model.rope_scaling is not None:
            raise UserError("train.cuda_graphs: True cannot be had with model.rope_scaling (allowed: False)")


class EvalConfig(Strict):
    """How a trained model is tested."""

    max_cycles: int | None = Field(None, ge=1, le=1024, description="tested at 1, 2, ... so many; None: twice its own")
    loop_sequences: int = Field(
        4, ge=0, le=1024, description="test sequences on which is measured what each cycle does to the state; 0: none"
    )


class Cell(Strict):
    """The unit that is run, stored and resumed: one variant, shape, training, task and seed on known data.

    Attributes:
        options, task_options: what differs from the defaults of the variant and of the task, which fill in the rest.
        train: as resolved when the cell was planned, without any ``auto``.
    """

    variant: str
    options: dict[str, Any]
    model: ModelConfig
    train: TrainConfig
    task: str
    task_options: dict[str, Any]
    seed: int = Field(ge=0, le=LARGEST)
    evaluation: EvalConfig = EvalConfig()
    init: Init | None = None
    fingerprint: str = Field(description="of the data: a digest of every example")

    @property
    def id(self) -> str:
        """SHA-256 of what can change the cell's numbers: its configuration, the data's fingerprint, the results schema.

        Fields at their default are left out, so that a new one changes no id; so are those that change no number. To
        change a default is to change what ids mean: it needs another schema.
        """
        told = self.model_dump(mode="json", exclude_defaults=True, exclude={"train": NUMBERLESS})
        told["train"] |= {field: getattr(self.train, field) for field in RESOLVED}
        payload = {"schema": RESULTS_SCHEMA, **told}
        return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
