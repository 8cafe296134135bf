"""What is published of a study beside its report, so that anyone can run its cells again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bench.errors import UserError, first_line, from_validation, unknown
from bench.house import OWN, PUBLISHED
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
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def published_folder(name: str) -> Path:
    """Where a study is published.

    name: a folder, or the name of a study that is published beside the suite, or in the working folder, which
    ``report --publish`` writes to. Raises UserError if there is none, or both.
    """
    if (Path(name) / STUDY).is_file():
        return Path(name)
    places = dict.fromkeys(place.resolve() for place in (PUBLISHED, OWN))
    found = [place / name for place in places if (place / name / STUDY).is_file()]
    if len(found) > 1:
        raise UserError(f"published study {name!r} is there twice (allowed: one of {' and '.join(map(str, found))})")
    if not found:
        known = {path.parent.name for place in places for path in place.glob(f"*/{STUDY}")}
        raise unknown("published study", name, known)
    return found[0]
