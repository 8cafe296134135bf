"""Our models as the tools of Hugging Face use any model: for every registered variant what stock models give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from settings import DEFAULTS, FAMILIES, LENGTH, VOCAB, halts, make, pointers, shares_as_scheduled, tokens
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from bench.config import IGNORED, Objective, TrainConfig
from bench.errors import InputError, UserError
from bench.exits.generation import EarlyExit
from bench.model.configuration import CycleConfig
from bench.model.language_model import CycleForCausalLM
from bench.train.loop import loss_of

NAMES = [name for name, _ in DEFAULTS]
# A row for every variant, and where the attention is of another kind than in its defaults.
ROWS = [*DEFAULTS, ("ztt", {"zero_tokens": 2, "value": "learned"}), ("mor", {"routing": "token"})]
every = pytest.mark.parametrize(
    ("name", "options"), ROWS, ids=["-".join([name, *map(str, options.values())]) for name, options in ROWS]
)
families = pytest.mark.parametrize("family", FAMILIES)
DOCUMENTS = (5, 1, 6)  # tokens of the documents in a row
CYCLES = 5  # more than any model here was built with
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}


def restarting() -> Tensor:
    """Positions [1, 12] of the documents in one row."""
    return torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


BARE: list[dict[str, Any]] = [{"n_cycles": 2}]
WITH_MASKS = [*BARE, {"position_ids": restarting()}, {"attention_mask": torch.ones(2, LENGTH, dtype=torch.long)}]


def apart(lm: CycleForCausalLM, ids: Tensor, **how: Any) -> Tensor:
    """Logits [B, T, V] of the documents of every row, each alone."""
    return torch.cat([lm(part, **how).logits for part in ids.split(DOCUMENTS, 1)], 1)


def block_diagonal() -> Tensor:
    """Which token of a row sees which [T, T]."""
    document = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
    return (document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def gradients(lm: CycleForCausalLM) -> dict[str, Tensor]:
    """Of all parameters that have one, which they lose."""
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    return found


def trained(name: str, options: dict[str, Any], family: str = "gpt2") -> tuple[CycleForCausalLM, Objective]:
    """A model in training mode, with a halting gate where the variant takes one, and what the suite trains there."""
    lm = make(name, options, family)
    if lm.schedule.n_cycles == 1 or halts(lm):
        return lm.train(), Objective()
    return make(name, options, family, halting="gate").train(), Objective(halting_loss="gate_cdf")


@every
def test_out_loss_is_what_the_suite_trains(name: str, options: dict[str, Any]) -> None:
    """In parts of a batch, too; and every parameter gets its gradient."""
    lm, objective = trained(name, options)
    ids = tokens(4)
    ids[:, 3] = ids[:, 4]
    labels = ids.clone()
    labels[:, :3] = IGNORED
    goal = pad(labels[:, 1:], (0, 1), value=IGNORED)
    config = TrainConfig(**objective.model_dump(), batch_size=4, accumulation=2)
    torch.manual_seed(0)
    for part in (slice(0, 2), slice(2, 4)):
        loss_of(config, None)(lm, ids[part], goal[part], (goal != IGNORED).sum())[0].backward()
    expected = gradients(lm)
    torch.manual_seed(0)
    for part in (slice(0, 2), slice(2, 4)):
        whole = int((goal != IGNORED).sum())
        lm(ids[part], labels=labels[part], num_items_in_batch=whole).loss.backward()
    found = gradients(lm)
    assert found.keys() == expected.keys() == dict(lm.named_parameters()).keys()
    torch.testing.assert_close(found, expected)
    # In evaluation it is the loss at full depth alone, as everywhere.
    lm.eval()
    logits = lm(ids).logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(lm(ids, labels=labels).loss, plain)
    lm.exits = EarlyExit("fixed", 1.0)
    assert lm(ids, labels=labels).loss.isfinite()


def test_an_objective_is_saved_and_loaded(tmp_path: Path) -> None:
    lm = make("htc", {}, halting="gate")
    assert lm.objective == Objective(halting_loss="gate_cdf")
    asked = Objective(halting_loss="act", halting_weight=0.5)
    lm.train_for(asked)
    lm.save_pretrained(tmp_path)
    assert CycleForCausalLM.from_pretrained(tmp_path).objective == asked
    with pytest.raises(UserError, match=r"objective.exit_loss: Input should be"):
        CycleForCausalLM.from_pretrained(tmp_path, objective={"exit_loss": -1})


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, options: dict[str, Any], reentrant: bool) -> None:
    lm, _ = trained(name, options)
    ids = tokens()

    def found() -> dict[str, Tensor]:
        torch.manual_seed(0)
        lm(ids, labels=ids).loss.backward()
        return gradients(lm)

    expected = found()
    lm.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(found(), expected)


@every
@families
def test_restarting_positions_separate_documents(name: str, options: dict[str, Any], family: str) -> None:
    """Alone, beside another row, behind padding, and with exits, where each document keeps its zero tokens."""
    lm, ids = make(name, options, family), tokens(2)
    positions, mask = restarting(), torch.ones(2, LENGTH + 3, dtype=torch.long)
    expected = apart(lm, ids)
    assert (lm(ids).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(lm(ids, position_ids=positions).logits, expected, rtol=1e-4, atol=1e-5)
    for left in (True, False):
        side = (3, 0) if left else (0, 3)
        mask[1] = pad(torch.ones(LENGTH), side)
        beside = torch.stack([torch.cat([ids[0], ids[0, :3]]), pad(ids[1], side)])
        where = torch.stack([torch.arange(LENGTH + 3), pad(positions[0], side)])
        found = lm(beside, position_ids=where, attention_mask=mask).logits
        part = found[1, 3:] if left else found[1, :LENGTH]
        torch.testing.assert_close(part, expected[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[0], lm(beside[:1]).logits[0], rtol=1e-4, atol=1e-5)
    number = max(1, lm.schedule.n_cycles - 1)
    lm.exits = EarlyExit("fixed", float(number))
    found, want = lm(ids, position_ids=positions).logits, apart(lm, ids)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    for kv in ("recompute", "propagate"):
        lm.exits = EarlyExit("fixed", float(number), kv)
        _goes_on(lm, ids, want)
    lm.exits = None
    _goes_on(lm, ids, expected)


@every
def test_documents_train_as_alone(name: str, options: dict[str, Any]) -> None:
    """As a collator packs them: the first token of each is no target. (What is chosen or counted among all tokens of a
    row, by a router or for a cost, is another matter.)
    """
    lm, _ = trained(name, options)
    ids, positions = tokens(1), restarting()
    labels = ids.masked_fill(positions == 0, IGNORED)
    torch.manual_seed(0)
    out = lm(ids, position_ids=positions, labels=labels)
    if out.auxiliary_loss is not None:
        pytest.skip("a cost among all tokens")
    out.loss.backward()
    found, whole = gradients(lm), int((labels != IGNORED).sum())
    torch.manual_seed(0)
    for part in ids.split(DOCUMENTS, 1):
        lm(part, labels=part, num_items_in_batch=whole).loss.backward()
    torch.testing.assert_close(found, gradients(lm), rtol=1e-4, atol=1e-5)


def _goes_on(lm: CycleForCausalLM, ids: Tensor, expected: Tensor) -> None:
    """What is in the cache keeps to its document, whichever pass it came with."""
    positions, cache, found = restarting(), None, []
    for part in (slice(0, 4), slice(4, 8), slice(8, 9), slice(9, LENGTH)):
        out = lm(ids[:, part], position_ids=positions[:, part], cache=cache, use_cache=True)
        cache = out.cache
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@families
def test_documents_as_stock_models_separate_them(family: str) -> None:
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": True}
    if family == "gpt2":
        theirs: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=4, n_head=4, n_positions=64, **common))
    else:
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
        theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=40, **common))
    theirs.eval()
    ids, positions = tokens(), restarting()
    own = make("vanilla", {}, family)
    for lm in (theirs, own):
        alone = torch.cat([lm(part, use_cache=False).logits for part in ids.split(DOCUMENTS, 1)], 1)
        together = lm(ids, position_ids=positions.expand(2, -1), use_cache=False).logits
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    for where in (torch.tensor([[3, 4, 5, 3, 4, 5]]), torch.tensor([[0, 1, 4, 5, 6, 7]])):  # any step but one
        few, parts = ids[:, :6], ((slice(0, 3), slice(3, 6)) if where[0, 0] else (slice(0, 2), slice(2, 6)))
        for lm in (theirs, own):
            alone = torch.cat([lm(few[:, at], position_ids=where[:, at], use_cache=False).logits for at in parts], 1)
            together = lm(few, position_ids=where.expand(2, -1), use_cache=False).logits
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every
@families
def test_masks_of_four_dimensions(name: str, options: dict[str, Any], family: str) -> None:
    """True or false, or what is added to the scores; in training, where the variant may choose tokens, as well."""
    lm, ids = make(name, options, family), tokens()
    seen, positions = block_diagonal()[None, None], restarting()
    added = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, -torch.inf)
    for mode in (False, True):
        lm.train(mode)
        torch.manual_seed(0)
        expected = lm(ids, position_ids=positions).logits
        for mask in (seen, added, seen.expand(2, lm.model_shape.n_heads, -1, -1), seen.long()):
            torch.manual_seed(0)
            found = lm(ids, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lm.eval().exits = EarlyExit("fixed", 1.0)
    expected, found = lm(ids, position_ids=positions), lm(ids, attention_mask=seen, position_ids=positions)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@every
def test_the_cache_follows_the_cycles_that_run(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    lm, ids, more = make(name, options, "llama"), tokens(2, 6), {**GREEDY, "n_cycles": CYCLES}
    if not lm.variant.cycled:
        with pytest.raises(InputError, match=f"^n_cycles: {CYCLES} with '{name}', which has no cycles"):
            lm.generate(ids, **more)
        return
    expected = lm.generate(ids, use_cache=False, **more)
    assert torch.equal(lm.generate(ids, **more), expected)
    assert torch.equal(lm.generate(ids, cache_implementation="static", **more), expected)
    lm.exits = EarlyExit("fixed", float(CYCLES))
    assert torch.equal(lm.generate(ids, **more), expected)
    lm.exits = None
    few = {**GREEDY, "n_cycles": 1}
    assert torch.equal(lm.generate(ids, **few), lm.generate(ids, use_cache=False, **few))
    # A checkpoint loaded to run for more cycles is the same model.
    lm.save_pretrained(tmp_path)
    changed = {**lm.config.shape, "n_cycles": CYCLES} if name != "bc" else {"n_cycles": CYCLES}
    longer = CycleForCausalLM.from_pretrained(tmp_path, shape=changed).eval()
    assert torch.equal(longer(ids).logits, lm(ids, n_cycles=CYCLES).logits)
    assert torch.equal(longer.generate(ids, **GREEDY), expected)
    assert longer.config.num_hidden_layers == longer.variant.cache_slots(lm.schedule_at(CYCLES))
    longer.save_pretrained(tmp_path / "longer")
    again = CycleForCausalLM.from_pretrained(tmp_path / "longer").eval()
    assert torch.equal(again(ids).logits, longer(ids).logits)


@every
def test_past_key_values_is_a_name_of_the_cache(name: str, options: dict[str, Any]) -> None:
    lm, ids = make(name, options, "llama"), tokens(2, 7)
    first = lm(ids[:, :5], use_cache=True)
    then = lm(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(then, lm(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="past_key_values: given beside cache"):
        lm(ids[:, 5:], cache=first.cache, past_key_values=DynamicCache())
    assert torch.equal(lm.generate(ids, past_key_values=DynamicCache(), **GREEDY), lm.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ["htc", "mor", "ztt"])
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static", "exits"])
def test_a_cache_of_other_cycles_is_refused(name: str, kind: str) -> None:
    lm, ids = make(name, {}, "llama"), tokens(2, 7)
    made = {"dynamic": DynamicCache(config=lm.config), "static": StaticCache(config=lm.config, max_cache_len=9)}
    lm.exits = EarlyExit("fixed", 2.0) if kind == "exits" else None
    for filled, then in ((3, 5), (5, 3), (3, 1)):
        cache = lm(ids[:, :5], cache=copy.deepcopy(made.get(kind)), use_cache=True, n_cycles=filled).cache
        with pytest.raises(InputError, match=f"another number of cycles than {then}, which runs now"):
            lm(ids[:, 5:], cache=cache, n_cycles=then)
        lm(ids[:, 5:], cache=cache, n_cycles=filled)


@every
def test_learned_positions_have_an_end(name: str, options: dict[str, Any]) -> None:
    lm = make(name, options)
    assert lm.n_positions == 64
    line = r"position 64 is beyond the 64 that the model has learned \(allowed: 0 to 63"
    behind = torch.ones(1, 65, dtype=torch.long)
    for wrong in ({}, {"attention_mask": behind}, {"position_ids": torch.arange(65)[None]}):
        with pytest.raises(ValueError, match=line) as found:
            lm(tokens(1, 65), **wrong)
        assert isinstance(found.value, UserError) and "\n" not in str(found.value)
    with pytest.raises(ValueError, match="position 64"):
        lm.generate(tokens(1, 62), attention_mask=behind[:, :62], **GREEDY)
    behind[0, 0] = 0
    assert lm(tokens(1, 65), attention_mask=behind).logits.isfinite().all()  # 64 that are real
    assert make(name, options, "llama")(tokens(1, 65)).logits.isfinite().all()


@every
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float16)])
def test_half_precision_weights(name: str, options: dict[str, Any], family: str, dtype: torch.dtype) -> None:
    """Forward, backward, generation with a cache and with exits, each near what float32 gives."""
    lm, ids = make(name, options, family), tokens()
    exact = lm(ids).logits
    lm.to(dtype)
    found = lm(ids, output_zero_attention=True, output_exits=True)
    assert found.logits.dtype is dtype
    scale = exact.std()
    assert (found.logits.float() - exact).abs().median() < 0.1 * scale
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert lm(ids, attention_mask=mask).logits.isfinite().all()
    assert lm.generate(ids, attention_mask=mask, **GREEDY).shape == (2, LENGTH + 4)
    rule = "zero_attention" if lm.prefix is not None else "latent_diff"
    for key, kv in ((rule, "recompute"), ("confidence", "propagate")):
        lm.exits = EarlyExit(key, 0.3, kv)
        assert lm.generate(ids, attention_mask=mask, **GREEDY).shape == (2, LENGTH + 4)
    lm.exits = None
    lm.train()
    lm(ids, labels=ids).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(lm).values())


@every
@pytest.mark.long
def test_one_graph(name: str, options: dict[str, Any]) -> None:
    """``torch.compile`` of the whole model without a break, at other cycles than it was built with, with one program at
    lengths that it has not seen, and with the weights where they were.
    """
    lm = make(name, options, "llama", n_blocks=3, n_cycles=1)
    before = pointers(lm)
    compiled = torch.compile(lm, fullgraph=True, backend="eager")
    first = tokens()
    torch._dynamo.mark_dynamic(first, (0, 1))  # else the program for all lengths would be the second one
    calls = [(tokens(), how) for how in (WITH_MASKS if (name, options) == ("ztt", {}) else [])]
    calls += [(ids, BARE[0] if lm.variant.cycled else {}) for ids in (first, tokens(3, 5), tokens(3, 7))]
    for number, (ids, how) in enumerate(calls, 3 - len(calls)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(ids, **how).logits
        torch.testing.assert_close(found, lm(ids, **how).logits, rtol=1e-4, atol=1e-5)
    assert pointers(lm) == before and shares_as_scheduled(lm)
    torch.compiler.reset()


@every
def test_tracing(name: str, options: dict[str, Any]) -> None:
    lm, ids = make(name, options, "llama", n_blocks=3, n_cycles=2), tokens()
    program = torch.jit.trace(lm, ids, strict=False, check_trace=False)
    torch.testing.assert_close(program(ids)["logits"], lm(ids).logits, rtol=1e-4, atol=1e-5)


def test_nothing_is_swallowed() -> None:
    lm, ids = make("htc", {}), tokens()
    assert isinstance(lm(ids, return_dict=False), tuple)
    lm(ids, output_attentions=None, output_hidden_states=False)
    for name, value in (("output_hidden_states", True), ("inputs_embeds", ids), ("label", ids)):
        with pytest.raises(InputError, match=f"{name}: not known to this model .allowed: input_ids, "):
            lm(ids, **{name: value})
    with pytest.raises(InputError, match="attention_mask: 3 dimensions"):
        lm(ids, attention_mask=block_diagonal().expand(2, -1, -1))
    batch, length = ids.shape
    for shape in ((batch, length - 1), (1, length), (batch + 1, 2)):
        for ones in (True, False):
            mask = torch.ones(shape) if ones else torch.zeros(shape)
            with pytest.raises(InputError, match=f"attention_mask: of shape .* .allowed: {batch}, {length}"):
                lm(ids, attention_mask=mask)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logits_to_keep": -1}, "logits_to_keep: -1 .allowed: a whole number from 0 on"),
        ({"logits_to_keep": torch.arange(2)}, "logits_to_keep: tensor"),
        ({"n_cycles": 0}, "n_cycles: 0 .allowed: a whole number from 1 on"),
        ({"n_cycles": 1.5}, "n_cycles: 1.5"),
        ({"n_cycles": True}, "n_cycles: True"),
        ({"backward_cycles": -1}, "backward_cycles: -1"),
        ({"sequence_cycles": torch.tensor([99] * batch)}, "sequence_cycles: .*allowed: a number from 1 to "),
        ({"sequence_cycles": torch.tensor([1])}, f"sequence_cycles: .*for each of {batch} sequences"),
        ({"labels": ids[:, 1:]}, "labels: of shape"),
        ({"labels": ids, "logits_to_keep": 1}, "logits_to_keep: 1 with labels"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=f"^{message}"):
            lm(ids, **arguments)


def test_a_configuration_takes_sizes_in_its_shape_alone(tmp_path: Path) -> None:
    for name, value in (("hidden_size", 64), ("num_hidden_layers", 6), ("n_cycles", 7), ("d_model", 64)):
        with pytest.raises(InputError, match=rf"^{name} = {value} .allowed: in shape, as shape="):
            CycleConfig(variant="htc", **{name: value})
    for name, size in (("vocab_size", -5), ("max_position_embeddings", 0)):
        with pytest.raises(InputError, match=f"^{name}: {size} .allowed: a whole number from 1 on"):
            CycleConfig(variant="htc", **{name: size})
    with pytest.raises(InputError, match=r"^tie_word_embeddings = False .allowed: in shape, as"):
        CycleConfig(variant="htc", tie_word_embeddings=False)
    untied = CycleConfig(variant="htc", shape={"tie_embeddings": False}, tie_word_embeddings=False)
    assert CycleConfig.from_dict(untied.to_dict()).tie_word_embeddings is False
    make("htc", {}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^hidden_size = 64"):
        CycleForCausalLM.from_pretrained(tmp_path, hidden_size=64)
    lm = CycleForCausalLM.from_pretrained(tmp_path, shape={"n_cycles": 5})
    assert lm.config.num_hidden_layers == lm.schedule.depth and lm.schedule.n_cycles == 5
