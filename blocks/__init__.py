"""What is configured once and saved in Prefect: accounts, stores, budgets.

`prefect block register -m blocks` shows their forms in the UI. A name that nobody has saved and that has a built-in
meaning (`local`) needs no block at all.
"""

from blocks.accounts import AwsAccount, GcpAccount, LocalAccount, driver_of, load_account, load_driver
from blocks.budget import SpendingBudget, load_budget
from blocks.store import CheckpointStore, load_store

__all__ = [
    "AwsAccount",
    "CheckpointStore",
    "GcpAccount",
    "LocalAccount",
    "SpendingBudget",
    "driver_of",
    "load_account",
    "load_budget",
    "load_driver",
    "load_store",
]
