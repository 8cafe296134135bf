"""The report's tables for a paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from reports.policy import ENDS, Row, Rows, is_ends

RESULTS = ("task", "variant", "metric", "mean", ENDS, "seeds", "non-embedding", "FLOPs/token", "note")
VERDICTS = ("hypothesis", "task", "verdict", "metric", "gain", ENDS, "corrected p", "p of equivalence", "pairs")
COSTS = ("task", "variant", "FLOPs/token", "KV bytes/token", "activation bytes/sequence")
SPECIAL = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": "{`}",  # behind ? or ! it would turn them around
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        **dict.fromkeys(map(chr, (*range(32), 127)), ""),  # no part of a text
    }
)


def latex(context: dict[str, Any]) -> str:
    """Verdicts, results and costs as ``tabular`` environments; what is given is the page's context."""
    shown = [{**row, "note": row["note"].split(":")[0]} for row in context["summary"]]
    if not any(row["note"] for row in shown):
        shown = [{key: value for key, value in row.items() if key != "note"} for row in shown]
    summary = Rows(shown, context["summary"].ends)
    parts = ["% Needs \\usepackage{booktabs}. Every table is a tabular of its own, for a table of yours."]
    for title, rows, chosen in (
        ("verdicts", context["verdicts"], VERDICTS),
        ("results on test data, n = seeds done/planned", summary, RESULTS),
        ("costs", context["costs"], COSTS),
    ):
        if rows:
            added = [key for key in rows[0] if key.endswith(" adds")]
            named = {ENDS if is_ends(key) else key: key for key in rows[0]}
            columns = [named[key] for key in (*chosen, *added) if key in named]
            ends = getattr(rows, "ends", "").rstrip(".")
            about = f"{title}. {ends}" if ends else title
            parts.append(f"\n% {_line(about)}; from {context['cells']['all']}\n{_tabular(columns, rows)}")
    return "\n".join(parts)


def latex_text(value: Any) -> str:
    """A value as text in a field of a LaTeX table, shown as it is."""
    return _line(value).translate(SPECIAL).replace("--", "-{}-").replace("--", "-{}-")  # two would be a dash


def _line(value: Any) -> str:
    """A value in one line: a comment ends with its line, and a field with its paragraph."""
    return " ".join(str(value).split())


def _tabular(columns: Sequence[str], rows: Sequence[Row]) -> str:
    fields = [columns, *([row.get(key, "") for key in columns] for row in rows)]
    head, *body = (f"{_row(map(latex_text, line))} \\\\" for line in fields)
    inner = ["\\toprule", head, "\\midrule", *body, "\\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{'l' * len(columns)}}}", *inner, "\\end{tabular}", ""])


def _row(fields: Iterable[str]) -> str:
    line = " & ".join(fields)
    return f"{{}}{line}" if line.startswith(("[", "*")) else line  # not an argument of the end of the row before
