"""What is published of a study beside its report, so that anyone can run its cells again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bench.errors import from_validation
from bench.house import PUBLISHED
from bench.store.manifest import Manifest
from bench.store.records import Configuration, Outcome

STUDY = "study.json"


class PublishedStudy(BaseModel):
    """``study.json``.

    Attributes:
        manifest: of the run.
        cells: what each finished cell was, by its id.
        verdicts: on its hypotheses, the rows of the report's table.
        environment: what the cells ran on, in words.
        params: of the smallest and the largest model.
        train_flops: of the cheapest and the dearest training.
    """

    manifest: Manifest
    cells: dict[str, Configuration]
    verdicts: list[dict[str, str]]
    environment: list[str]
    params: tuple[int, int]
    train_flops: tuple[float, float]


def published_text(
    manifest: Manifest, results: Mapping[str, Outcome], verdicts: list[dict[str, str]], environment: list[str]
) -> str:
    """``study.json`` of a study with its finished cells."""
    done = {id: record for id, record in results.items() if record.status == "done"}
    params = [record.costs.params for record in done.values()] or [0]
    flops = [record.costs.train_flops for record in done.values()] or [0.0]
    whole = PublishedStudy(
        manifest=manifest,
        cells={id: record.cell for id, record in done.items()},
        verdicts=verdicts,
        environment=environment,
        params=(min(params), max(params)),
        train_flops=(min(flops), max(flops)),
    )
    return whole.model_dump_json(by_alias=True, exclude_unset=True, indent=1) + "\n"


def read_published(folder: Path) -> PublishedStudy:
    """What is published in a folder. Raises UserError, in one line, if it cannot be read."""
    path = folder / STUDY
    try:
        return PublishedStudy.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise from_validation(str(path), error) from None


def published_names() -> list[str]:
    """The studies that are published beside the suite, in a form that can be run again."""
    return sorted(path.parent.name for path in PUBLISHED.glob(f"*/{STUDY}"))
