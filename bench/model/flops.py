"""The unit that the cost of a part is counted in."""

from __future__ import annotations

from typing import NamedTuple


class Flops(NamedTuple):
    """Forward FLOPs, 2 for each multiply-add, by kind because their backward passes cost differently.

    Attributes:
        matmul: of products both of whose operands get a gradient.
        attention: of the fused attention kernel.
        half: of products only one of whose operands gets a gradient (a frozen weight).
    """

    matmul: int = 0
    attention: int = 0
    half: int = 0

    def __add__(self, other: object) -> Flops:
        if not isinstance(other, Flops):
            return NotImplemented
        return Flops(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __sub__(self, other: Flops) -> Flops:
        return Flops(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def training(self) -> int:
        """Forward and backward: a product's gradients are products of the same size, one for each operand that gets
        one; the fused attention's backward is five products against two, as it computes the scores again (PyTorch's
        flop_counter).
        """
        return 3 * self.matmul + self.attention * 7 // 2 + 2 * self.half
