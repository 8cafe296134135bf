import io

from rich.console import Console

import bench.run.progress
from bench.run.progress import Progress


def use(console: Console) -> None:
    with Progress(4, console) as progress:
        progress.skip(1)
        progress.start("a", "ztt p_hop seed 1", 100)
        progress.update("a", 50, 1.234, 5678.0)
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


def test_a_sign_of_life_now_and_then(monkeypatch: object) -> None:
    text = io.StringIO()
    progress = Progress(1, Console(file=text))
    progress.start("a", "ztt kjv seed 0", 100)
    progress.update("a", 10, 2.0, 1000.0)
    assert text.getvalue() == ""
    progress._spoke -= bench.run.progress.HEARTBEAT + 1
    progress.update("a", 20, 1.5, 1000.0)
    assert text.getvalue() == "ztt kjv seed 0: step 20/100, loss 1.500, 1,000 tokens/s\n"


def test_on_a_terminal_there_are_bars() -> None:
    text = io.StringIO()
    use(Console(file=text, force_terminal=True, width=120))
    shown = text.getvalue()
    assert "study" in shown and "━" in shown and "[2/4] ztt p_hop seed 1: accuracy 0.412" in shown


def test_everything_done_is_said() -> None:
    text = io.StringIO()
    with Progress(2, Console(file=text)) as progress:
        progress.skip(2)
    assert text.getvalue() == "2 of 2 cells are done already; nothing to run\n"
