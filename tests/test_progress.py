"""What is on the screen while cells run: it fits, it moves, and it tells when all will be done."""

import io
import itertools
import time

import pytest
from rich.console import Console

from bench.run.progress import HEARTBEAT, SOON, Progress, TimeLeft, in_words


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_cells_that_have_failed_are_not_told_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    for done, failed, said in (
        (4, 0, "4 of 4 cells are done already; nothing to run"),
        (1, 3, "1 of 4 cells are done already, 3 have failed; nothing to run"),
        (0, 4, "0 of 4 cells are done already, 4 have failed; nothing to run"),
        (1, 1, "1 of 4 cells are done already, 1 have failed"),
    ):
        with Progress(4) as progress:
            progress.skip(done, failed)
            assert (progress.done, progress.failed) == (done + failed, failed)
        assert capsys.readouterr().err.strip() == said


def use(console: Console) -> None:
    with Progress(4, console) as progress:
        progress.skip(1)
        progress.start("a", "ztt p_hop seed 1", 100)
        progress.update("a", 50, 1.234, 5678.0)
        progress.update("a", 60, None, 5678.0)
        progress.phase("a", "testing")
        progress.finish("a", "accuracy 0.412, 12.3 s")
        progress.start("b", "bc kjv seed 0", 100)
        progress.finish("b", "failed: loss is nan", failed=True)
        assert (progress.done, progress.failed) == (3, 1)


def test_without_a_terminal_it_is_a_line_a_cell() -> None:
    text = io.StringIO()
    use(Console(file=text))
    assert text.getvalue().splitlines() == [
        "1 of 4 cells are done already",
        "[2/4] ztt p_hop seed 1: accuracy 0.412, 12.3 s",
        "[3/4] bc kjv seed 0: failed: loss is nan",
    ]


def test_signs_of_life_soon_and_then_sparse(clock: Clock) -> None:
    text, spoken = io.StringIO(), []
    progress = Progress(1, Console(file=text), {"a": 1e9})
    progress.start("a", "ztt kjv seed 0", 1000)
    for step in range(1, 1001):
        clock.now += 1
        before = len(text.getvalue())
        progress.update("a", step, 2.0 if step % 10 == 0 else None, 1000.0)
        spoken += [step] * (len(text.getvalue()) > before)
    between = [after - before for before, after in itertools.pairwise([0, *spoken])]
    assert between[0] == SOON + 1 and between[-1] == HEARTBEAT + 1 and between == sorted(between)
    first, second = text.getvalue().splitlines()[:2]
    assert first == "ztt kjv seed 0: step 6/1000, 1,000 tokens/s; all cells: about 17 min left"
    assert "step 12/1000" in second


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_there_are_bars_that_fit_it(width: int, clock: Clock) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width)
    use(console)
    shown = text.getvalue()
    assert "study" in shown and "━" in shown and "[2/4] ztt p_hop seed 1: accuracy 0.412" in shown
    text = io.StringIO()
    progress = Progress(20, Console(file=text, width=width, force_terminal=True), {"a": 3e12, "b": 1e12})
    label = "vanilla (params) modular_chain seed 10"
    progress.start("a", label, 10_000)
    progress.update("a", 0, 5.0, 1e5)
    clock.now += 300
    progress.update("a", 5_000, 1.234, 123_456.0)
    assert progress._bars is not None
    plain = Console(file=(seen := io.StringIO()), width=width)
    plain.print(progress._bars.make_tasks_table(progress._bars.tasks))
    lines = seen.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and "…" not in seen.getvalue()
    assert "0/20 cells, 0:05:00, about 8 min left" in seen.getvalue(), "before the first cell has ended"
    assert "5000/10000, loss 1.234" in seen.getvalue() and ("123,456 tokens/s" in seen.getvalue()) == (width == 120)
    assert all(word in seen.getvalue() for word in label.split())


def test_everything_done_is_said() -> None:
    text = io.StringIO()
    with Progress(2, Console(file=text)) as progress:
        progress.skip(2)
    assert text.getvalue() == "2 of 2 cells are done already; nothing to run\n"


def test_the_time_that_is_left_is_told_by_planned_costs_and_measured_steps(clock: Clock) -> None:
    left = TimeLeft({"cheap": 1e9, "dear": 9e9, "later": 5e9})
    assert left.seconds() is None and left.words() == ""
    left.step("cheap", 0.5)  # goes on from a checkpoint: no speed is known by that
    assert left.seconds() is None
    clock.now += 10
    left.step("cheap", 1.0)
    assert left.seconds() == pytest.approx(14 / 0.5 * 10)
    clock.now += 5  # its tests
    left.end("cheap", True)
    assert left.seconds() == pytest.approx(14 / 0.5 * 15) and left.words() == ", about 7 min left"
    left.end("later", True)  # in another process, which shares the work
    assert left.seconds() == pytest.approx(9 / 5.5 * 15)
    left.end("dear", False)
    assert left.words() == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4, "4 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (9000, "2.5 h"), (2e5, "2.3 days")],
)
def test_about_how_long(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
