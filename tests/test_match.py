import pytest
from stored import plan

from bench.config import ModelConfig
from bench.errors import UserError
from bench.model.match import TOLERANCE, Match, measure, solve
from bench.model.variant import get_variant

HTC = ModelConfig(d_model=32, n_heads=4, n_blocks=4, n_cycles=3)
VOCAB, LENGTH = 64, 32


def target(kind: Match) -> float:
    return measure(kind, get_variant("htc"), HTC, VOCAB, LENGTH)


def solved(kind: Match, name: str, model: ModelConfig) -> tuple[ModelConfig, str]:
    return solve(kind, get_variant(name), model, target(kind), VOCAB, LENGTH)


def test_a_shape_that_fits_is_kept() -> None:
    model, text = solved("params", "bc", HTC)
    assert model == HTC and text.startswith("as given")


def test_vanilla_at_equal_depth_gets_as_many_blocks_as_htc_has_steps() -> None:
    model, text = solved("depth", "vanilla", HTC.model_copy(update={"n_cycles": 1}))
    assert model.n_blocks == 8 and text.startswith("n_blocks 4 -> 8")


def test_basic_cycling_at_equal_depth_changes_its_cycles() -> None:
    model, _ = solved("depth", "bc", HTC)
    assert (model.n_blocks, model.n_cycles) == (4, 2)


@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize("name", ["vanilla", "bc", "htc", "ztt"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("d_model", [24, 48])
def test_within_one_percent_from_any_width(kind: Match, name: str, family: str, d_model: int) -> None:
    variant = get_variant(name)
    start = HTC.model_copy(update={"d_model": d_model, "family": family, "n_cycles": 3 if variant.cycled else 1})
    model, text = solved(kind, name, start)
    found = measure(kind, variant, model, VOCAB, LENGTH)
    assert abs(found / target(kind) - 1) <= TOLERANCE
    assert f"{found:,.0f}" in text
    changed = {field for field in ModelConfig.model_fields if getattr(model, field) != getattr(start, field)}
    assert len(changed) <= 1 or changed == {"d_model", "d_ff"}


def test_what_cannot_be_matched_is_refused_with_the_nearest() -> None:
    odd = HTC.model_copy(update={"n_blocks": 3})  # 3 blocks cycled, or n blocks cycled 3 times, never make 8 steps
    with pytest.raises(UserError, match=r"match: depth of bc cannot .* 8 steps .*nearest: as given gives 9"):
        solved("depth", "bc", odd)


def test_a_longer_training_is_told_beside_what_is_matched() -> None:
    model = {"d_model": 16, "n_heads": 2, "n_blocks": 4, "n_cycles": 3}
    variants = ["htc", {"name": "vanilla", "match": "params", "budget": "flops"}]
    found = plan(model=model, train={"steps": 100, "batch_size": 4}, variants=variants)
    assert found.cells[-1].cell.train.steps > 150
    chosen = found.manifest.variants[1].chosen
    assert "non-embedding parameters" in chosen and f"steps 100 -> {found.cells[-1].cell.train.steps} (" in chosen
