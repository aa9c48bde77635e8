"""Machine types of the clouds with their list prices, for when no cloud can be asked: which type has such a GPU at all?

A snapshot is shipped, with the date of each price; `python -m holdfast.market.catalogue FILE` makes a newer one from the
catalogue that the library gpuhunt downloads (https://github.com/dstackai/gpuhunt). Nothing is launched or billed by it:
drivers have prices of their own.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib import resources as packaged
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, TransientError
from holdfast.model import Resources

OWN = Path(".holdfast/catalogue.csv")
"""Preferred to what is shipped, where somebody has made one."""
REGIONS = ("us-east-1", "us-west-2", "eu-west-1", "us-central1", "us-east1", "europe-west4")
HINTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    cloud: str
    region: str
    instance_type: str
    vcpus: int
    memory_gib: float
    gpus: int
    gpu_name: str
    gpu_memory_gib: float
    """Of one of them."""
    usd_per_hour: float
    """On demand, of Linux, without disks."""
    as_of: date

    def fits(self, wanted: Resources) -> bool:
        return (
            self.vcpus >= wanted.vcpus
            and self.memory_gib >= wanted.memory_gib
            and self.gpus >= wanted.gpus
            and wanted.gpu_name.lower() in ("", self.gpu_name.lower())
            and (not wanted.instance_types or self.instance_type in wanted.instance_types)
            and (not wanted.regions or self.region in wanted.regions)
        )


def read_catalogue(path: Path | None = None) -> list[Entry]:
    """Of a file, else of this folder's own, else what is shipped. Raises ConfigError for a file that is none."""
    if path is None and OWN.is_file():
        path = OWN
    try:
        text = path.read_text() if path else packaged.files("holdfast.market").joinpath("catalogue.csv").read_text()
        return [_entry(row) for row in csv.DictReader(io.StringIO(text))]
    except OSError as error:
        raise ConfigError(f"catalogue {path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"catalogue {path}: is none: {error!r}; make it anew: python -m holdfast.market.catalogue {path}"
        ) from error


def fitting(entries: Iterable[Entry], wanted: Resources) -> list[Entry]:
    """The cheapest first."""
    return sorted((one for one in entries if one.fits(wanted)), key=lambda one: (one.usd_per_hour, one.instance_type))


def hint(wanted: Resources, clouds: set[str]) -> str:
    """Of what no machine of the account has: which types would, in words; empty where the catalogue knows none."""
    asked = wanted.model_copy(update={"instance_types": [], "regions": [], "zones": []})
    found: dict[str, Entry] = {}
    for one in fitting(read_catalogue(), asked):
        if one.cloud in clouds:
            found.setdefault(one.instance_type, one)
    if not found:
        return ""
    shown = [f"{one.instance_type} (${one.usd_per_hour:.4g}/h on demand)" for one in list(found.values())[:HINTS]]
    dated = min(one.as_of for one in found.values())
    return f"by the list prices of {dated} these would do: {', '.join(shown)}; add one to the account's machine types"


def parse_gpus(text: str) -> Resources:
    """`A100:8`, `A100`, or `4`. Raises ConfigError."""
    name, _, count = text.partition(":")
    if name.isdigit() and not count:
        name, count = "", name
    if not (count or "1").isdigit() or int(count or 1) < 1:
        raise ConfigError(f"gpus {text!r}: write a GPU's name and how many of it, such as A100:8, or a number alone")
    return Resources(gpus=int(count or 1), gpu_name=name)


# -- a newer one ------------------------------------------------------------------------------------------------------


def refresh(path: Path, today: date, catalog: Any = None, regions: Sequence[str] = REGIONS) -> int:
    """Write on-demand prices of AWS and GCP as gpuhunt has them; how many. Raises ConfigError, TransientError.

    `catalog`: gpuhunt's own, made here where there is none; it downloads what it knows.
    """
    try:
        import gpuhunt
    except ImportError as error:
        raise ConfigError("catalogue: gpuhunt is not installed here; pip install 'holdfast[catalogue]'") from error
    try:
        items = (catalog or gpuhunt.Catalog()).query(provider=["aws", "gcp"], spot=False)
    except (gpuhunt.GPUHuntError, OSError) as error:
        raise TransientError(f"catalogue: gpuhunt could not download it: {error}") from error
    cheapest: dict[tuple[str, str, str], Entry] = {}
    for item in items:
        entry = _from_gpuhunt(item, today)
        key = (entry.cloud, entry.region, entry.instance_type)
        if entry.region in regions and (key not in cheapest or entry.usd_per_hour < cheapest[key].usd_per_hour):
            cheapest[key] = entry
    if not cheapest:
        raise TransientError("catalogue: gpuhunt has no prices of these regions now; what is there stays")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(to_csv([cheapest[key] for key in sorted(cheapest)]))
    new.replace(path)
    return len(cheapest)


def to_csv(entries: Iterable[Entry]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Entry)], lineterminator="\n")
    writer.writeheader()
    for one in entries:
        writer.writerow({**dataclasses.asdict(one), "as_of": one.as_of.isoformat()})
    return text.getvalue()


def _from_gpuhunt(item: Any, today: date) -> Entry:
    region = item.location.rpartition("-")[0] if item.provider == "gcp" else item.location  # GCP's are zones
    return Entry(
        cloud=item.provider,
        region=region,
        instance_type=item.instance_name,
        vcpus=item.cpu,
        memory_gib=item.memory,
        gpus=item.gpu_count,
        gpu_name=item.gpu_name or "",
        gpu_memory_gib=item.gpu_memory or 0.0,
        usd_per_hour=item.price,
        as_of=today,
    )


def _entry(row: dict[str, str]) -> Entry:
    return Entry(
        cloud=row["cloud"],
        region=row["region"],
        instance_type=row["instance_type"],
        vcpus=int(row["vcpus"]),
        memory_gib=float(row["memory_gib"]),
        gpus=int(row["gpus"]),
        gpu_name=row["gpu_name"],
        gpu_memory_gib=float(row["gpu_memory_gib"]),
        usd_per_hour=float(row["usd_per_hour"]),
        as_of=date.fromisoformat(row["as_of"]),
    )


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else OWN
    print(f"{refresh(place, datetime.now(UTC).date())} machine types are in {place}")
