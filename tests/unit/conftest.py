from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.started import Started


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(tmp_path, monkeypatch)
