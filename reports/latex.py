"""The report's tables for a paper."""

from __future__ import annotations

from typing import Any

import pandas as pd

from reports.policy import ENDS, Rows, is_ends

RESULTS = ("task", "variant", "metric", "mean", ENDS, "seeds", "non-embedding", "FLOPs/token", "note")
VERDICTS = ("hypothesis", "task", "verdict", "gain", ENDS, "corrected p", "pairs")
COSTS = ("task", "variant", "FLOPs/token", "KV bytes/token", "activation bytes/sequence")


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
            frame = pd.DataFrame(rows)[[named[k] for k in (*chosen, *added) if k in named]]
            ends = getattr(rows, "ends", "").rstrip(".")
            about = f"{title}. {ends}" if ends else title
            parts.append(f"\n% {about}; from {context['cells']['all']}\n{_tabular(frame)}")
    return "\n".join(parts)


def _tabular(frame: pd.DataFrame) -> str:
    style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    table = style.to_latex(hrules=True, column_format="l" * frame.shape[1])
    return table.replace("<", r"\textless{}").replace(">", r"\textgreater{}")  # a table has none of its own
