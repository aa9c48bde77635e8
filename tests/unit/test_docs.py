"""The documentation names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from holdfast.model import BatchJob, TrainingJob

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("deployments/*.md")])


def fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += fields(kind, f"{name}.") if nested else [prefix + name]  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("job, pages", [(TrainingJob, ["jobs"]), (BatchJob, ["jobs", "batch"])])
def test_every_field_of_a_job_is_explained(job: type[BaseModel], pages: list[str]) -> None:
    text = "".join((REPOSITORY / f"docs/{page}.md").read_text() for page in pages)
    assert [name for name in fields(job) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_file_that_is_named_as_a_proof_is_there(page: Path) -> None:
    named = re.findall(r"\b(tests/[\w/]+\.py|examples/[\w/]+\.\w+|benchmarks/[\w/]+\.py)", page.read_text())
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
