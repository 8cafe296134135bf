"""The exit rules that come with the suite: importing this module registers them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bench.evaluate.rules import Prediction, Rule, View, register


@register("zero_attention")
class ZeroAttention(Rule):
    """The attention on the zero tokens of the last cycle's steps, averaged over steps and heads (arXiv 2502.12214);
    aggregate ``max`` takes the largest over steps, heads and queries.
    """

    leave, high = "above", 1.0
    aggregates = ("mean", "last", "max")
    reads_zero_attention = True

    def usable(self, view: View) -> bool:
        return view.zero_attention is not None

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.zero_attention is not None
        return view.zero_attention.amax((0, 2)) if self.aggregate == "max" else view.zero_attention.mean((0, 2))


class _Reader(Rule):
    """A rule on what would be predicted if the cycles ended here."""

    reads_logits = True

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.now is not None
        return self.compare(view.now, view.then, previous)

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        """The signal [B, T] from this exit point's prediction and the one before, None at the first."""
        raise NotImplementedError


@register("confidence")
class Confidence(_Reader):
    """The largest probability (CALM: Schuster et al. 2022, arXiv 2207.07061, softmax response)."""

    leave, high = "above", 1.0

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return now.log_probs.amax(-1).exp()


@register("entropy")
class Entropy(_Reader):
    """The entropy of the prediction, nats (BranchyNet: Teerapittayanon et al. 2016, arXiv 1709.01686)."""

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return now.entropy


@register("kl")
class KullbackLeibler(_Reader):
    """KL(p_{t-1} || p_t) of successive predictions, nats, p_0 being uniform (Geiping et al. 2025, arXiv 2502.05171)."""

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        if then is None:
            return -now.log_probs.mean(-1) - math.log(now.log_probs.shape[-1])
        return (then.log_probs.exp() * (then.log_probs - now.log_probs)).sum(-1)


@register("entropy_diff")
class EntropyDifference(_Reader):
    """|H_t - H_{t-1}| of successive predictions, nats, H_0 being that of the uniform distribution (Geiping et al.
    2025, arXiv 2502.05171).
    """

    leave = "below"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        return (now.entropy - (math.log(now.log_probs.shape[-1]) if then is None else then.entropy)).abs()


@register("patience")
class Patience(_Reader):
    """For how many cycles the likeliest token has not changed (PABEE: Zhou et al. 2020, arXiv 2006.04152)."""

    leave = "above"

    def compare(self, now: Prediction, then: Prediction | None, previous: Tensor | None) -> Tensor:
        if then is None or previous is None:
            return torch.zeros_like(now.token, dtype=torch.float)
        return torch.where(now.token == then.token, previous + 1, 0.0)


@register("latent_diff")
class LatentDifference(Rule):
    """||h_t - h_{t-1}|| / ||h_t||, the relative change of the state (Geiping et al. 2025, arXiv 2502.05171)."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.norm(dim=-1) / view.hidden.float().norm(dim=-1)


@register("latent_norm")
class LatentNorm(Rule):
    """||h_t - h_{t-1}||, not normalised (the static delta-h baseline of Ouro, arXiv 2510.25741)."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.norm(dim=-1)


@register("latent_rms")
class LatentRms(Rule):
    """The root mean square of h_t - h_{t-1} over channels and, for a sequence, over its tokens as well."""

    leave = "below"

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return view.change.square().mean(-1).sqrt()

    def pool(self, signal: Tensor, real: Tensor | None = None) -> Tensor:
        return super().pool(signal.square(), real).sqrt()


@register("cosine")
class Cosine(Rule):
    """1 - cos(h_t, h_{t-1}), the turn of the state."""

    leave, high = "below", 2.0

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return 1 - torch.cosine_similarity(view.hidden.float(), view.before.float(), dim=-1)


@register("halting")
class Halting(Rule):
    """The chance of having halted by now, as a trained halting module says (the gate CDF of Ouro, arXiv 2510.25741; ACT
    leaves where the remainder is below 0.001, hence at a threshold of 0.999).
    """

    leave, high = "above", 1.0

    def usable(self, view: View) -> bool:
        return view.halting is not None

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        assert view.halting is not None
        return view.halting.float()


@register("fixed")
class Fixed(Rule):
    """The number of cycles done: every sequence leaves after the same one."""

    leave, low = "above", 1.0
    aggregates = ("mean",)

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        return torch.full(view.hidden.shape[:2], float(view.number), device=view.hidden.device)


@register("random")
class Random(Rule):
    """A uniform number drawn for every sequence and exit point: at each of them the same share of those still there
    leaves. What it gives is what the numbers of cycles alone are worth, without knowing whom to give them to.
    """

    leave, high = "above", 1.0
    aggregates = ("mean",)

    def signal(self, view: View, previous: Tensor | None) -> Tensor:
        rows = view.rows.cpu().numpy()
        drawn = np.random.default_rng([0xE817, view.number]).random(int(rows.max()) + 1, dtype=np.float32)[rows]
        return torch.from_numpy(drawn).to(view.hidden.device)[:, None].expand(view.hidden.shape[:2])
