"""An haproxy that a run has started beside the orchestrator: who ends it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from holdfast.errors import TransientError
from holdfast.model import Haproxy
from holdfast.serving.connections import free_port
from holdfast.serving.haproxy import HaproxyBalancer, own_haproxies
from holdfast.storage import DirectoryStore
from holdfast.supervision.ownership import Ownership
from holdfast.supervision.reap import reap
from tests.chaos.runs import cloud

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="no haproxy on the path: apt-get install haproxy")


def test_one_whose_run_nobody_takes_up_again_is_found_and_ended(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    listens = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    left, kept, closed = (
        HaproxyBalancer(Haproxy(listen=listen), run_id, store.url)
        for listen, run_id in zip(listens, ("left", "kept", "closed"), strict=True)
    )
    for one in (left, kept, closed):
        one.open()
    closed.close()
    mine = [one for one in own_haproxies() if one.store_url == store.url]
    assert sorted(one.run_id for one in mine) == ["kept", "left"]
    owner = Ownership(store, "kept")
    owner.claim()
    driver = cloud(tmp_path, [])
    assert [(one.machine, one.run_id) for one in reap(driver, store)] == [("haproxy of left", "left")]
    with pytest.raises(TransientError):
        left.standings()
    assert kept.standings() is not None and reap(driver, store) == []
    owner.release()
    assert [one.run_id for one in reap(driver, store)] == ["kept"]
    records = [one.record for one in mine]
    assert not any(path.with_suffix(end).exists() for path in records for end in (".json", ".cfg", ".sock"))
