"""Names, labels and tags of instances.

An instance that was preempted or deleted is gone with its labels and metadata; what stays for 14 days are operations
that name it. So the name itself carries digests of what machines are asked for by: with a tag's value in hand, any
process can tell which of the names in the log belong to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast.drivers.protocol import CapacityPool, ProvisioningModel

PREFIX = "hf"
MACHINE_LABEL = "holdfast-machine"
"""Every machine of ours has it."""
TOKEN_LABEL = "holdfast-token"
TAGS_ITEM = "holdfast-tags"
"""The metadata item that holds the tags as they were given: labels can't."""
FLEET_TAG = "holdfast-fleet"
DIGESTED_TAGS = {"holdfast-run": 8, "holdfast-attempt": 4, "holdfast-store": 8, FLEET_TAG: 8}
"""Tags that are found again in a name, and how many characters each takes. The order is the name's."""

_DIGIT = "[a-z2-7]"
_NAME = re.compile(rf"{PREFIX}-({_DIGIT}{{16}})-({_DIGIT}{{28}})-({_DIGIT}{{6}})(-[a-z0-9]{{4}})?")


@dataclass(frozen=True, slots=True)
class ParsedName:
    token_digest: str
    tag_digests: Mapping[str, str]
    pool_digest: str
    of_group: bool
    """A managed instance group made the instance: it appended four characters."""

    def matches(self, tags: Mapping[str, str]) -> bool:
        """Can an instance of this name carry all of `tags`? Of tags that no name carries: no."""
        return all(
            name in self.tag_digests and self.tag_digests[name] == digest(value, DIGESTED_TAGS[name])
            for name, value in tags.items()
        )

    def kind(self, machine_types: Iterable[str]) -> tuple[str, ProvisioningModel]:
        """Machine type and provisioning model; ("", "spot") for a type that is not among these."""
        models: tuple[ProvisioningModel, ...] = ("spot", "on-demand")
        for machine_type in machine_types:
            for model in models:
                if _pool_digest(machine_type, model) == self.pool_digest:
                    return machine_type, model
        return "", "spot"


def digest(text: str, characters: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:characters]


def instance_name(token: str, tags: Mapping[str, str], pool: CapacityPool) -> str:
    """55 characters, valid by RFC 1035, the same for the same token, tags and kind of machine."""
    found = "".join(digest(tags.get(tag, ""), characters) for tag, characters in DIGESTED_TAGS.items())
    return f"{PREFIX}-{digest(token, 16)}-{found}-{_pool_digest(pool.instance_type, pool.provisioning_model)}"


def parse_name(name: str) -> ParsedName | None:
    match = _NAME.fullmatch(name)
    if not match:
        return None
    token, packed, pool, suffix = match.groups()
    digests, start = {}, 0
    for tag, characters in DIGESTED_TAGS.items():
        digests[tag] = packed[start : start + characters]
        start += characters
    return ParsedName(token, digests, pool, bool(suffix))


def labels_of(token: str, tags: Mapping[str, str]) -> dict[str, str]:
    """Labels for people and for the bill; a value that no label may have is told by its digest."""
    labels = {_label(name): _label_value(value) for name, value in tags.items()}
    return {**labels, MACHINE_LABEL: "1", TOKEN_LABEL: digest(token, 16)}


def tags_item(tags: Mapping[str, str]) -> str:
    return json.dumps(dict(tags), sort_keys=True)


def tags_of(metadata: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    try:
        tags = json.loads(metadata.get(TAGS_ITEM, ""))
        return {str(name): str(value) for name, value in tags.items()}
    except (ValueError, AttributeError):  # somebody edited it: the labels are next best
        return {name: value for name, value in labels.items() if name not in (MACHINE_LABEL, TOKEN_LABEL)}


def _pool_digest(machine_type: str, model: str) -> str:
    return digest(f"{machine_type}/{model}", 6)


def _label(name: str) -> str:
    cleaned = re.sub(r"[^a-z0-9_-]", "-", name.lower())
    return cleaned if cleaned == name and re.match(r"[a-z]", name) and len(name) <= 63 else f"tag-{digest(name, 16)}"


def _label_value(value: str) -> str:
    return value if re.fullmatch(r"[a-z0-9_-]{0,63}", value) else f"sha256-{digest(value, 24)}"
