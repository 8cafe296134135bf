"""What every variant promises on sequences of every form: vectors, full attention, one class a sequence, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from settings import DEFAULT_ID, DEFAULTS, make
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.config import TrainConfig
from bench.errors import InputError, UserError
from bench.evaluate.evaluation import evaluate
from bench.evaluate.loops import loop_points
from bench.evaluate.rules import all_rules, get_rule
from bench.exits.execute import execute
from bench.exits.whole import WholeExit
from bench.form import TEXT, Form
from bench.model.attention import attend
from bench.model.costs import costs, measured_flops, pass_flops, training_flops
from bench.model.forms import blank, judged
from bench.model.language_model import CycleForClassification, CycleModel, load_model
from bench.model.variant import get_variant
from bench.train.graphs import Replayed
from bench.train.loop import loss_of
from bench.train.modes import stackable
from bench.train.packing import run_stacked

LENGTH, FEATURES, CLASSES = 7, 6, 19
FORMS = {
    "pictures": Form(features=FEATURES, attention="full", judged="mean"),
    "speech": Form(features=FEATURES, attention="full", judged="mean", padded=True),
    "class token": Form(features=FEATURES, attention="full", judged="last"),
    "frames": Form(features=FEATURES, padded=True),  # causal, each of them judged
    "tokens": Form(attention="full", judged="mean"),
}
defaults = pytest.mark.parametrize(("name", "options"), DEFAULTS, ids=DEFAULT_ID)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def model(
    name: str, options: dict[str, Any], form: Form, family: str = "gpt2", **changes: Any
) -> CycleForClassification:
    lm: CycleModel = make(name, options, family, form=form, **changes)
    assert isinstance(lm, CycleForClassification)
    return lm


def sequences(form: Form, batch: int = 3, ends: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs and targets; those of a padded form end at different places."""
    generator = torch.Generator().manual_seed(0)
    if form.features is None:
        inputs = torch.randint(CLASSES, (batch, LENGTH), generator=generator)
    else:
        inputs = torch.randn(batch, LENGTH, FEATURES, generator=generator)
        for row in range(batch) if form.padded and ends else ():
            inputs[row, LENGTH - row :] = torch.nan
    return inputs, torch.randint(CLASSES, (batch, form.places(LENGTH)), generator=generator)


@defaults
def test_flops_equal_the_counter_to_the_last_one(name: str, options: dict[str, Any]) -> None:
    """What training executes, on one form for each variant, in turns."""
    turn = DEFAULT_ID.index(name) % len(FORMS)
    lm = model(name, options, list(FORMS.values())[turn], "llama", n_cycles=2).train()
    assert 2 * pass_flops(lm, LENGTH).forward == measured_flops(lm, 2, LENGTH)
    assert 2 * training_flops(lm, LENGTH) == measured_flops(lm, 2, LENGTH, training=True)


@forms
@pytest.mark.parametrize("name", ["ztt", "mor", "vanilla"])
@pytest.mark.long
def test_every_form_is_counted_to_the_last_flop(name: str, form: Form) -> None:
    for trained in ("all", "additions"):
        lm = model(name, {}, form).train()
        variant = get_variant(name, {})
        found = costs(variant, lm.model_shape, CLASSES, LENGTH)
        assert found.forward_flops_per_token * LENGTH == measured_flops(lm, 1, LENGTH), trained
        assert found.train_flops_per_token * LENGTH == measured_flops(lm, 1, LENGTH, training=True)
    one = model(name, {}, form).train()  # a picture of one patch
    assert pass_flops(one, 1).forward == measured_flops(one, 1, 1)


@defaults
def test_who_sees_whom(name: str, options: dict[str, Any]) -> None:
    """A change of the last place reaches the first where attention is full, and there alone."""
    for attention in ("full", "causal"):
        form = Form(features=FEATURES, attention=attention)
        lm, (x, _) = model(name, options, form), sequences(form)
        y = x.clone()
        y[:, -1] += 1
        with torch.no_grad():
            first, last = (lm(x).logits - lm(y).logits).abs().amax((0, 2))[[0, -1]]
        assert (first > 1e-6) == (attention == "full") and last > 1e-6


@defaults
@pytest.mark.parametrize("judged", ["mean", "tokens"])
def test_padding_changes_nothing(name: str, options: dict[str, Any], judged: str) -> None:
    """A sequence among longer ones is the sequence alone: predictions, zero attention and signals."""
    form = Form(features=FEATURES, attention="full", judged=judged, padded=True)
    lm, (x, targets) = model(name, options, form, "llama").double(), sequences(form)
    x = x.double()
    whole, rules = evaluate(lm, x.numpy(), targets.numpy(), rules=all_rules()), all_rules()
    with torch.no_grad():
        out = lm(x, output_zero_attention=True)
    for row in range(len(x)):
        own, length = x[row : row + 1, : LENGTH - row], LENGTH - row
        with torch.no_grad():
            alone = lm(own, output_zero_attention=True)
        assert out.logits[row].isfinite().all()
        kept = out.logits[row] if judged == "mean" else out.logits[row, :length]
        torch.testing.assert_close(kept, alone.logits[0], rtol=1e-4, atol=1e-5)
        if alone.exit_signals is not None:
            torch.testing.assert_close(out.exit_signals[row], alone.exit_signals[0], rtol=1e-4, atol=1e-5)
        if judged == "mean":
            trace = evaluate(lm, own.numpy(), targets[row : row + 1].numpy(), rules=rules)
            for key in set(trace.signals) - {"random"}:
                np.testing.assert_allclose(whole.signals[key][row], trace.signals[key][0], rtol=2e-3, atol=1e-5)


def test_a_mask_is_padding_too() -> None:
    form = FORMS["speech"]
    lm, (x, _) = model("ztt", {}, form), sequences(form)
    mask = ~x[..., 0].isnan()
    filled = x.nan_to_num(7.0)
    torch.testing.assert_close(lm(filled, attention_mask=mask.long()).logits, lm(x).logits)


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("learned", [False, True], ids=["zero", "learned"])
@pytest.mark.parametrize("padded", [False, True])
def test_full_attention_beside_zero_tokens_is_the_formula(n_tokens: int, learned: bool, padded: bool) -> None:
    """Outputs, zero attention and the gradients of both, against softmax written out, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.double) for _ in range(3))
    k0, v0 = (torch.randn(4, n_tokens, 8, generator=generator, dtype=torch.double) for _ in range(2))
    weights = torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.double)
    mask = None
    if padded:
        mask = torch.zeros(2, 1, LENGTH, n_tokens + LENGTH, dtype=torch.double)
        mask[0, ..., -2:] = torch.finfo(torch.double).min

    def formula(q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat([a.expand(2, -1, -1, -1), b], 2) for a, b in ((k0, k), (v0 * learned, v)))
        scores = q @ keys.transpose(-1, -2) / 8**0.5
        p = (scores if mask is None else scores + mask).softmax(-1)
        return p @ values, p[..., :n_tokens].sum(-1)

    def ours(q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor) -> tuple[Tensor, Tensor]:
        out, mass = attend(q, k, v, (k0, v0 if learned else None), mask, True, causal=False)
        assert mass is not None
        return out, mass

    found = []
    for run in (formula, ours):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v, k0, v0)]
        out, mass = run(*inputs)
        ((out * weights).sum() + (mass * weights[..., 0]).sum()).backward()
        grads = [tensor.grad for tensor in inputs[: 5 if learned else 4]]
        found.append([out, mass, *grads])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_what_is_judged() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert judged(states, None, Form()) is states
    assert judged(states, real, Form(judged="mean"))[:, 0].tolist() == [[1.0, 2.0], [8.0, 9.0]]
    assert judged(states, None, Form(judged="last"))[:, 0].tolist() == [[4.0, 5.0], [10.0, 11.0]]


@pytest.mark.parametrize("form", [FORMS["pictures"], FORMS["speech"]], ids=["pictures", "speech"])
@pytest.mark.parametrize("name", ["ztt", "universal", "mor", "mesh"])
def test_leaving_early_is_what_the_trace_says(name: str, form: Form) -> None:
    lm, (x, targets) = model(name, {}, form), sequences(form, 5)
    trace = evaluate(lm, x.numpy(), targets.numpy(), rules=all_rules())
    seen: set[int] = set()
    for key in set(trace.signals) & {"zero_attention", "confidence", "latent_diff.last", "entropy"}:
        threshold = float(np.median(trace.signals[key][:, 0]))
        done = execute(lm, x.numpy(), targets.numpy(), key, threshold)
        expected = trace.leave(key, threshold)
        assert done.cycle.tolist() == expected.tolist()
        seen |= set(expected.tolist())
        assert done.flops.mean() / LENGTH == pytest.approx(trace.score(key, threshold)["flops_per_token"], rel=1e-12)
        assert done.scores["loss"] == pytest.approx(trace.score(key, threshold)["loss"], rel=1e-4)
    assert len(seen) > 1


def test_the_hugging_face_model_leaves_early_too() -> None:
    form = FORMS["speech"]
    lm, (x, targets) = model("ztt", {}, form), sequences(form, 5)
    trace = evaluate(lm, x.numpy(), targets.numpy(), rules=[get_rule("confidence")])
    threshold = float(np.median(trace.signals["confidence"][:, 0]))
    lm.exits = WholeExit("confidence", threshold)
    out = lm(x, labels=targets)
    rows = torch.arange(len(x))
    assert out.logits.shape == (len(x), CLASSES) and out.exit_depth.unique().numel() > 1
    loss = trace.loss[rows, trace.leave("confidence", threshold) - 1].mean()
    assert float(out.loss) == pytest.approx(loss, rel=1e-4)


def test_tokens_do_not_leave_where_others_look_ahead() -> None:
    x, targets = sequences(FORMS["pictures"])
    with pytest.raises(UserError, match="'token' needs causal attention and targets at tokens"):
        execute(model("ztt", {}, FORMS["pictures"]), x.numpy(), targets.numpy(), "latent_diff", granularity="token")


@pytest.mark.parametrize(("name", "options"), [*DEFAULTS, ("ztt", {"zero_tokens": 2})], ids=[*DEFAULT_ID, "pictures"])
def test_a_stack_has_the_gradients_of_each(name: str, options: dict[str, Any]) -> None:
    noisy, form = name == "recurrent", FORMS["pictures" if options else "speech"]
    lms = [model(name, options, form, "llama", n_cycles=2).double().train() for _ in range(2)]
    with torch.no_grad():
        for parameter in lms[1].parameters():
            parameter.mul_(0.9)
    assert stackable(lms[0].variant, lms[0].model_shape, CLASSES, LENGTH, TrainConfig()) != noisy
    if noisy:
        return
    x, goal = sequences(form)
    x = x.double() if x.is_floating_point() else x
    batches = [(x, goal), (x.flip(0), goal.flip(0))]
    losses, scored = loss_of(TrainConfig(), None), torch.full((2,), 3.0)
    stacked = (torch.stack(parts) for parts in zip(*batches, strict=True))
    loss, _ = run_stacked(lms, losses, *stacked, scored)
    loss.sum().backward()
    for lm, (x, targets), together in zip(lms, batches, loss, strict=True):
        grads = {key: parameter.grad.clone() for key, parameter in lm.named_parameters()}
        lm.zero_grad(set_to_none=True)
        alone, _ = losses(lm, x, targets, 3.0)
        alone.backward()
        torch.testing.assert_close(together, alone)
        size = torch.stack([p.grad.norm() for p in lm.parameters()]).norm()
        for key, parameter in lm.named_parameters():
            assert (grads[key] - parameter.grad).norm() < 5e-6 * size, key


@pytest.mark.parametrize("halting_loss", ["gate_cdf", "act", "none"])
@forms
def test_losses_over_the_exits(form: Form, halting_loss: str) -> None:
    """Halting is judged where the class is: its chance is read there too."""
    halting = "none" if halting_loss == "none" else "gate"
    lm, (x, targets) = model("ztt", {}, form, halting=halting).train(), sequences(form)
    config = TrainConfig(halting_loss=halting_loss, exit_loss=0.5 if halting == "none" else 0.0)
    loss, last = loss_of(config, None)(lm, x, targets, targets.numel())
    loss.backward()
    assert loss.isfinite() and last.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
    out = lm(x, output_exits=True)
    assert len(out.exit_logits) == 3 and out.exit_logits[-1].shape == out.logits.shape
    if out.halting is not None:
        assert out.halting[0].shape == targets.shape


@forms
def test_round_trip(form: Form, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    lm, (x, targets) = model("ztt", {}, form), sequences(form)
    lm.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), AutoModelForImageClassification.from_pretrained(tmp_path)):
        assert isinstance(loaded, CycleForClassification)
        out, again = lm(x, labels=targets), loaded.eval()(x, labels=targets)
        assert torch.equal(out.logits, again.logits) and torch.equal(out.loss, again.loss)
    assert loaded.model_shape.form == form
    if form.features is not None:
        assert loaded.tokens.weight.data_ptr() != loaded.lm_head.weight.data_ptr()
    expected = cross_entropy(out.logits.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(out.loss, expected)


def test_whole_pictures_are_cut_as_the_data_were() -> None:
    form = Form(features=5, patch=2, attention="full", judged="last")
    lm = model("ztt", {}, form)
    pictures = torch.arange(2 * 1 * 4 * 6, dtype=torch.float).view(2, 1, 4, 6) / 10
    rows = [[pictures[:, 0, y : y + 2, x : x + 2].flatten(1) for x in (0, 2, 4)] for y in (0, 2)]
    cut = torch.stack([part for row in rows for part in row], 1)
    token = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).expand(2, 1, 5)
    vectors = torch.cat([torch.nn.functional.pad(cut, (0, 1)), token], 1)
    assert torch.equal(lm(pictures).logits, lm(vectors).logits)
    with pytest.raises(InputError, match="3 x 6 pixels"):
        lm(pictures[:, :, :3])
    with pytest.raises(InputError, match="the model has no patches"):
        model("ztt", {}, FORMS["pictures"])(pictures)
    with pytest.raises(InputError, match="5 dimensions"):
        lm(pictures[None])
    with pytest.raises(InputError, match="use_cache: not known"):
        lm(pictures, use_cache=True)


def test_a_form_refuses_what_means_nothing() -> None:
    with pytest.raises(ValueError, match="padded = True needs features"):
        Form(padded=True)
    assert Form() == TEXT and blank(TEXT, 2, 3)[0].shape == (2, 3)


def test_recorded_passes_take_vectors() -> None:
    """What a CUDA graph repeats is made of the batch's own tensors, whatever their kind."""
    form = FORMS["speech"]
    lm, (x, targets) = model("ztt", {}, form).train(), sequences(form)

    def passes(x: Tensor, targets: Tensor) -> Tensor:
        loss, _ = loss_of(TrainConfig(), None)(lm, x, targets, 3.0)
        loss.backward()
        return loss.detach()

    replayed = Replayed(list(lm.parameters()), torch.device("cpu"), lambda run: lambda: run())
    assert torch.equal(replayed(passes, x, targets), passes(x, targets))


@pytest.mark.parametrize(
    ("name", "options"),
    [("universal", {}), ("mor", {"routing": "token", "z_loss": 0.1}), ("mor", {"z_loss": 0.1})],
    ids=["universal", "token", "expert"],
)
def test_padding_is_in_no_loss_and_takes_no_place(name: str, options: dict[str, Any]) -> None:
    """Losses of parts are means over real places; a cycle that takes the best of a sequence takes no padding."""
    form = Form(features=FEATURES, attention="full", judged="mean", padded=True)
    lm, (x, _) = model(name, options, form).train(), sequences(form, ends=False)
    added = []
    for more in (0, 5):
        wide = torch.cat([x, torch.full((len(x), more, FEATURES), torch.nan)], 1)
        added.append(lm(wide).auxiliary_loss.item())
        state = lm.embed(wide)
        for number in lm.cycles(state):
            index = state.memory.get("index")
            assert index is None or index.shape[1] > LENGTH or index.max() < LENGTH, number
    if name == "universal" or "routing" in options:  # how many are best depends on the length
        assert added[0] == pytest.approx(added[1], rel=1e-5) != 0


def test_padding_is_in_no_spectral_radius() -> None:
    form = Form(features=FEATURES, attention="full", judged="mean", padded=True)
    lm, (x, _) = model("htc", {}, form), sequences(form, ends=False)
    wide = torch.cat([x, torch.full((len(x), 5, FEATURES), torch.nan)], 1)
    # The vectors that the iteration starts from are others, so that many iterations are wanted.
    alone, among = (loop_points(lm, some, 2, iterations=400) for some in (x, wide))
    for one, other in zip(alone, among, strict=True):
        assert one.spectral_radius == pytest.approx(other.spectral_radius, rel=3e-3)
