"""A pretrained model as any variant."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.config import ModelConfig, Sharing
from bench.errors import UserError, first_line
from bench.model.configuration import CycleConfig
from bench.model.language_model import CycleModel, model_of
from bench.model.parts import PARTS
from bench.model.tried import all_set
from bench.model.variant import Variant
from bench.pretrained.recover import recover, recovers
from bench.pretrained.sharing import sources_of
from bench.pretrained.sources import Pretrained
from bench.pretrained.stock import State


def convert(
    pretrained: Pretrained, variant: Variant, model: ModelConfig, sharing: Sharing | None = None, seed: int = 0
) -> CycleModel:
    """The pretrained model as a variant of the shape ``model`` (``target_shape``), in the source's own precision.

    What the variant adds, and blocks that are to start afresh, are drawn from the seed as for a model trained from
    scratch. The weights of ``pretrained`` are used up: they become the model's. Raises UserError if the source holds
    something the variant has no place for.
    """
    found = pretrained.outline
    config = CycleConfig(
        variant=variant.name,
        options=variant.options.model_dump(mode="json"),
        shape=model.model_dump(mode="json"),
        vocab_size=found.vocab_size,
        max_position_embeddings=found.positions,
        bos_token_id=found.special["bos_token_id"],
        eos_token_id=found.special["eos_token_id"],
        pad_token_id=found.special["pad_token_id"],
    )
    with torch.device("meta"):
        lm = model_of(config)
    dtype = pretrained.weights["tokens.weight"].dtype
    given_back = recovers(lm.adapter, lm.model_shape, sharing, found.shape.n_blocks, lm.schedule)
    stack = dict(pretrained.weights) if given_back else None
    sources = sources_of(sharing, found.shape.n_blocks, lm.schedule)
    fresh = [name for name in PARTS if getattr(lm, name) is not None]
    fresh += [f"blocks.{block}" for block, chosen in enumerate(sources) if not chosen]
    modules = {name: lm.get_submodule(name).to_empty(device="cpu").to(dtype) for name in fresh}

    def added() -> dict[str, Tensor]:
        return {key: t for name, module in modules.items() for key, t in module.state_dict(prefix=f"{name}.").items()}

    with all_set(added, variant.name):
        lm.reset_parameters(seed, tuple(fresh))
    try:
        _, unexpected = lm.load_state_dict(_shared(pretrained.weights, sources), strict=False, assign=True)
    except RuntimeError as error:  # sizes that differ
        reason = first_line(str(error).partition("\n")[2] or error)  # the first is a heading
        raise UserError(f"source {pretrained.source!r} does not fit variant {variant.name!r}: {reason}") from None
    lm.tie_weights()
    empty = [key for key, tensor in lm.state_dict().items() if tensor.is_meta]
    if unexpected or empty:
        raise UserError(
            f"source {pretrained.source!r}: {(unexpected or empty)[0]} of the {'source' if unexpected else 'variant'} "
            f"has no counterpart (allowed: a source without added parts, or with those of {variant.name!r})"
        )
    if stack is not None:
        recover(lm, stack)
    return lm.eval()


def _shared(weights: State, sources: list[tuple[int, ...]]) -> State:
    """The weights with the blocks that ``sources`` asks for; takes over what it can and empties ``weights``."""
    made = {key: weights.pop(key) for key in list(weights) if not key.startswith("blocks.")}
    left = [block for chosen in sources for block in chosen]
    names = sorted({key.split(".", 2)[2] for key in weights})
    for name in names:
        columns: dict[int, Tensor] = {}
        for key in [key for key in weights if key.split(".", 2)[2] == name]:
            columns[int(key.split(".")[1])] = weights.pop(key)
        for block, chosen in enumerate(sources):
            if chosen:
                made[f"blocks.{block}.{name}"] = _mean([columns[source] for source in chosen], left.count(chosen[0]))
    return made


def _mean(tensors: list[Tensor], uses: int) -> Tensor:
    """The mean of the tensors; a single one itself, or a copy if other blocks start from it too."""
    if len(tensors) == 1:
        return tensors[0] if uses == 1 else tensors[0].clone()
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)


@torch.no_grad()
def logit_difference(lm: CycleModel, pretrained: Pretrained) -> float:
    """Largest difference of a logit from the source's on the probe, at one cycle."""
    return float((lm(pretrained.probe, n_cycles=1).logits.float() - pretrained.logits).abs().max())
