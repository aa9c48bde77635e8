"""Which capacity pools fit, in the order in which runs would try them."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from blocks import load_driver, load_store
from holdfast.market.plots import draw_offers
from holdfast.market.table import cells, to_markdown
from holdfast.model import Resources
from tasks.market import Wanted, price_histories, rank_offers

NO_RESOURCES = Resources()


@flow(name="rank", flow_run_name="rank-{account}")
def rank(
    resources: Resources = NO_RESOURCES,
    account: str | list[str] = "local",
    store: str = "local",
    job: str = "",
) -> list[dict[str, Any]]:
    """A table of every pool that fits: prices, interruptions with their evidence, expected dollars, and why the first is.

    Args:
        resources: What one machine must have.
        account: Name of the account block whose pools are looked at, or several.
        store: Name of the checkpoint-store block whose history and profiles count.
        job: Name of a job that was calibrated, or has run: then steps are priced, not hours.

    Returns the rows, the best first.
    """
    driver = load_driver(account)
    rows = rank_offers(driver, load_store(store).store(), Wanted(resources=resources, job=job))
    name = account if isinstance(account, str) else "-".join(account)
    create_table_artifact(cells(rows), key=f"offers-{name}", description=rows[0].why)
    image = base64.b64encode(draw_offers(rows, price_histories(driver, rows))).decode()
    create_markdown_artifact(
        f"{to_markdown(rows)}\n\n![Expected dollars, and spot prices of the last days](data:image/png;base64,{image})\n",
        key=f"ranking-{name}",
        description="Capacity pools in the order in which runs try them",
    )
    get_run_logger().info("%s", rows[0].why)
    return [dataclasses.asdict(row) for row in rows]
