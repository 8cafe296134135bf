"""The small modules a variant may attach to its schedule."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from bench.config import ModelConfig
from bench.model.flops import Flops
from bench.model.schedule import Step
from bench.model.walk import Walk

Branch = Literal["attention", "mlp"]
Linear = Literal["qkv", "attention_out", "mlp_up", "mlp_out"]  # the linear layers of a block
Lookup = Literal["step", "cycle", "block", "shared"]


PARTS = ("prefix", "adapter", "recurrence", "gate", "halting")  # attributes of the model that hold what a variant added


class StepTable:
    """Which row of a table of parameters a step reads.

    lookup: every (block, cycle) step has its own row (``step``), or shares it with its cycle, its block, or all. A step
    of a cycle beyond the trained ones reads what its block's last trained cycle reads, so that a model can be run for
    more cycles than it was built with.
    """

    def __init__(self, steps: Iterable[Step], lookup: Lookup = "step") -> None:
        """steps: those the table is made for; other blocks have no row, nor have cycles before a block's first."""
        wanted: dict[tuple[int, int], Hashable] = {}
        self._last: dict[int, int] = {}
        for step in steps:
            whole = (step.block, step.cycle)
            wanted[whole] = {"step": whole, "cycle": step.cycle, "block": step.block, "shared": 0}[lookup]
            self._last[step.block] = max(step.cycle, self._last.get(step.block, 0))
        rows = {entry: row for row, entry in enumerate(dict.fromkeys(wanted.values()))}
        self._row = {whole: rows[entry] for whole, entry in wanted.items()}
        self._size = len(rows)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, step: Step) -> bool:
        return self._whole(step) in self._row

    def __getitem__(self, step: Step) -> int:
        return self._row[self._whole(step)]

    def _whole(self, step: Step) -> tuple[int, int]:
        return step.block, min(step.cycle, self._last.get(step.block, 0))


class Part(nn.Module):
    """Something a variant adds to the plain blocks. Parameters are filled by ``reset_parameters``."""

    label: ClassVar[str] = "part"  # how the cost table calls it

    def reset_parameters(self) -> None:
        """Fill the part's own parameters. Its child layers have been filled before and may be filled again.

        Use ``torch.nn.init`` only, so that loading a checkpoint can skip what it has loaded.
        """

    def flops(self, step: Step, length: int) -> Flops:
        """Forward FLOPs of this part at one step for one sequence of ``length`` tokens, beside the attention's."""
        return Flops()


class AttentionPrefix(Part):
    """Keys and values put before the real tokens of a step's attention.

    n_tokens: M, the number of tokens put before, the same at every step that has them; trained_key: whether the keys
    get a gradient.
    """

    n_tokens: int
    trained_key: bool = True

    def forward(self, step: Step, hidden: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Keys [H_kv, M, d] and values of the same shape for a step; values None means zero; None means no prefix.

        hidden: [B, T, D], the normed input of the attention. A leading batch dimension is allowed.
        """
        raise NotImplementedError

    def covers(self, step: Step) -> bool:
        """Whether the step has a prefix (known without running it, for the cost count)."""
        raise NotImplementedError


class Adapter(Part):
    """What a step adds to its shared block: to its input (a cycle embedding, ...), to its matrices (low rank, ...), or
    to what its branches read and give (norms and scales of its own, ...).

    linears: the linear layers of the block that ``delta`` adds to; recovers: whether it starts from what sharing has
    taken from a pretrained stack (``recover``); window: of steps that look back (``looks_back``), None: none does.
    """

    label = "adapter"
    linears: tuple[Linear, ...] = ()
    recovers: bool = False
    window: int | None = None

    def forward(self, step: Step, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The block's input [B, T, D] from the residual stream ``hidden`` and the embedded tokens, both [B, T, D]."""
        return hidden

    def asks(self, step: Step, state: Walk) -> Tensor | None:
        """The stream [B, T, D] that the step's queries are made of; None: the one that keys and values are made of."""
        return None

    def looks_back(self, step: Step) -> bool:
        """Whether the step mixes two attentions of its queries: to the keys and values of its block's first cycle, and,
        within the last ``window`` tokens, to its own. It has no prefix. ``first_share`` says how much of the former.
        """
        return False

    def first_share(self, step: Step, query: Tensor) -> Tensor:
        """The share [B, H, T] of the first cycle's keys and values, from queries [B, H, T, d] as they are scored."""
        raise NotImplementedError

    def normed(self, step: Step, branch: Branch, x: Tensor, state: Walk) -> Tensor:
        """What a branch of the block reads [B, T, D], made from the normed stream x of the same shape."""
        return x

    def scaled(self, step: Step, branch: Branch, update: Tensor, state: Walk) -> Tensor:
        """A branch's update [B, T, D] as it goes on to the gate, or into the residual stream."""
        return update

    def delta(self, step: Step, linear: Linear, x: Tensor) -> Tensor | None:
        """What is added to the output [B, T, out] of the block's linear layer for its input x [B, T, in], or None."""
        return None

    def recover(self, step: Step, linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
        """Start from what a linear layer [out, in] of a shared block lacks of the one that stood where the step runs.

        weight: [out, in], to be added to the shared layer's; bias: [out] likewise, None where layers have none.
        """

    def delta_flops(self, step: Step, linear: Linear, length: int) -> Flops:
        """Forward FLOPs of ``delta`` for one sequence of ``length`` tokens."""
        return Flops()

    def flops(self, step: Step, length: int) -> Flops:
        return sum((self.delta_flops(step, linear, length) for linear in self.linears), Flops())


class Recurrence(Part):
    """What happens between the cycles: re-injected input, context from earlier cycles, a memory, halting.

    Its tensors [B, T, ...] live in ``state.memory``, by name. They are replaced and never written in place, since
    leaving early reads them on a branch. A part that knows when a token is done keeps the probability that it is after
    each cycle, [B, T], as ``state.memory["halting"]``, where exit rules find it.

    reinjects: whether every cycle reads the prelude's output, so that it gets a gradient from the last cycle alone.
    routes: whether cycles run on some of the tokens, each on others.
    chooses: whether each sequence decides, when the model is not training, how many of its tokens a cycle runs on.
    masks: whether later cycles run for all tokens in training, with a mask over those that are done.
    """

    label = "recurrence"
    reinjects: bool = False
    chooses: bool = False
    routes: bool = False
    masks: bool = False

    def begin(self, state: Walk) -> None:
        """Called once after the prelude, before the first cycle."""

    def enter(self, cycle: int, state: Walk) -> None:
        """Called before the steps of cycle 0, 1, ...; may replace ``state.hidden`` [B, T, D].

        The cycle may run on fewer tokens [B, k, D] if ``leave`` puts them back: what is set here in ``state.embedded``
        and ``state.context`` holds for this cycle only.
        """

    def common(self, cycle: int, state: Walk) -> Tensor | None:
        """What an adapter finds as ``state.common`` [B, ...] in the steps of a cycle: the same for all tokens of a
        sequence, and not made of their states.
        """
        return None

    def leave(self, cycle: int, state: Walk) -> None:
        """Called after the steps of cycle 0, 1, ...; may replace ``state.hidden`` [B, T, D]."""

    def end(self, state: Walk) -> None:
        """Called once after the last cycle, when sequences that ran fewer cycles are what they were after their own."""

    def output(self, state: Walk) -> Tensor:
        """The state [B, T, D] that the coda reads if the cycles end here; changes nothing."""
        return state.hidden

    def tokens(self, cycle: int, length: int) -> int:
        """How many tokens of a sequence of ``length`` the steps of the cycle run on (in training)."""
        return length

    def ran(self, cycle: int, state: Walk) -> Tensor | None:
        """How many tokens [B] of each sequence the steps of the cycle just run were for, where it ``chooses``; None: as
        many as ``tokens`` says.
        """
        return None

    def cycle_flops(self, cycle: int, length: int) -> Flops:
        """Forward FLOPs of ``enter``, ``common`` and ``leave`` (and, in cycle 0, of ``begin``) for one sequence."""
        return Flops()

    def chosen_flops(self, cycle: int, length: int, before: int) -> Flops:
        """``cycle_flops`` of a sequence that decides itself how many tokens run, of which ``before`` have run in the
        cycle before.
        """
        return self.cycle_flops(cycle, length)

    def output_flops(self, length: int) -> Flops:
        """Forward FLOPs of ``output`` for one sequence."""
        return Flops()


class Gate(Part):
    """How a step's updates are merged into the residual stream."""

    label = "gate"
    reads_zero_attention: ClassVar[bool] = False

    def __init__(self, model: ModelConfig, steps: Sequence[Step]) -> None:
        """model: the shape; steps: those that are gated, the others merge their updates as plain blocks do."""
        super().__init__()
        self._gated = StepTable(steps)

    def covers(self, step: Step) -> bool:
        """Whether the step is gated: one that the gate is made for, or such a block's in a cycle beyond the trained
        ones. The gate is asked for nothing at other steps.
        """
        return step in self._gated

    def heads(self, step: Step, hidden: Tensor) -> Tensor | None:
        """Factors [H] for the attention heads' outputs before they are mixed, or None."""
        return None

    def merge(
        self, step: Step, branch: Branch, hidden: Tensor, update: Tensor, zero_attention: Tensor | None
    ) -> Tensor:
        """The new residual stream [B, T, D] from the old one and the branch's update, both [B, T, D].

        zero_attention: [B, H, T], the step's attention to its zero tokens; None where it has none, and where neither
        the gate (``reads_zero_attention``) nor the caller asked for it.
        """
        return hidden + update


def gate_at(gate: Gate | None, step: Step) -> Gate | None:
    """The gate, where there is one and the step is gated."""
    return gate if gate is not None and gate.covers(step) else None
