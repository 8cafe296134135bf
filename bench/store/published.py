"""What is published of a study beside its report, so that anyone can run its cells again."""

from __future__ import annotations

from pydantic import BaseModel

from bench.store.manifest import Manifest
from bench.store.records import Configuration, Outcome

STUDY = "study.json"


class PublishedStudy(BaseModel):
    """``study.json``.

    Attributes:
        manifest: of the run.
        cells: what each finished cell was, by its id.
    """

    manifest: Manifest
    cells: dict[str, Configuration]


def published_text(manifest: Manifest, results: dict[str, Outcome]) -> str:
    """``study.json`` of a study: its manifest and its finished cells."""
    done = {id: record.cell for id, record in results.items() if record.status == "done"}
    return (
        PublishedStudy(manifest=manifest, cells=done).model_dump_json(by_alias=True, exclude_unset=True, indent=1)
        + "\n"
    )
