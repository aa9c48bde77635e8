"""Budgets: hard caps that all runs which name them share."""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field

from blocks.loading import load_saved
from holdfast.ledger.budget import Budget


class SpendingBudget(Block):
    """No machine is launched whose worst case would pass these caps. The store's conditional writes hold them."""

    _block_type_name: ClassVar[str] = "Spending Budget"
    _block_type_slug: ClassVar[str] = "spending-budget"

    max_usd: float = Field(gt=0, title="Dollars at most", description="Of all runs with this budget together.")
    max_machines: int = Field(8, ge=1, title="Machines at most", description="Living at the same time.")

    max_machine_hours: float | None = Field(
        None, gt=0, title="Machine hours at most", description="Of all runs with this budget together. Empty: no cap."
    )

    def budget(self, name: str) -> Budget:
        return Budget(
            name=name, max_usd=self.max_usd, max_machines=self.max_machines, max_machine_hours=self.max_machine_hours
        )


def load_budget(name: str) -> Budget:
    """The saved budget of that name. Raises ConfigError."""
    block = load_saved(name, "budget", [SpendingBudget], {})
    return block.budget(name)
