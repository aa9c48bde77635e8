"""What a machine printed: from its serial port while it lives, from Cloud Logging after that.

The serial port is readable only while the instance runs
(https://cloud.google.com/compute/docs/troubleshooting/viewing-serial-port-output).
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from holdfast.drivers.gcp.api import ComputeApi
from holdfast.drivers.gcp.errors import is_gone, translated, words_of

CONSOLE_BYTES = 64 * 1024
LOG_PAGES = 4
# The image's agent puts its own words before each line of a script:
# "Nov 24 21:49:30 hf-abc google_metadata_script_runner[512]: startup-script: holdfast: step 5"
SCRIPT_LINE = re.compile(
    r"^.*?(?:google_metadata_script_runner|GCEMetadataScripts|gce_workload_cert_refresh)\S*?:"
    r"(?: \d{4}/\d\d/\d\d \d\d:\d\d:\d\d [\w.]+:)? (?:startup|shutdown)-script(?:-url)?: ?",
    re.MULTILINE,
)


def read_serial_port(api: ComputeApi, name: str, zone: str) -> str:
    """The last 64 KiB; empty when the instance is gone or has stopped."""
    try:
        output = api.ask(
            api.instances.get_serial_port_output,
            project=api.project,
            zone=zone,
            instance=name,
            port=1,
            start=-CONSOLE_BYTES,
        )
    except Exception as error:
        if is_gone(error) or "not ready" in words_of(error) or "resourceNotReady" in words_of(error):
            return ""
        with translated(f"reading the console of {name}", "compute.instances.getSerialPortOutput"):
            raise
    return tail(output.contents)


def read_logged(api: ComputeApi, instance_id: str, since: datetime) -> str:
    """The last 64 KiB of what Cloud Logging kept of the serial port. Needs `logging.logEntries.list`."""
    log_name = f"projects/{api.project}/logs/serialconsole.googleapis.com%2Fserial_port_1_output"
    asked: dict[str, Any] = {
        "resourceNames": [f"projects/{api.project}"],
        "filter": f'logName="{log_name}" AND resource.labels.instance_id="{instance_id}" '
        f'AND timestamp>="{since.isoformat()}"',
        "orderBy": "timestamp desc",
        "pageSize": 1000,
    }
    lines: list[str] = []
    for _ in range(LOG_PAGES):
        answer = api.json(
            "POST",
            "logging",
            "v2/entries:list",
            f"reading the console of {instance_id}",
            "logging.logEntries.list",
            json=asked,
        )
        lines += [str(entry.get("textPayload", "")).rstrip("\n") for entry in answer.get("entries", [])]
        token = answer.get("nextPageToken")
        if not token or sum(map(len, lines)) > CONSOLE_BYTES:
            break
        asked["pageToken"] = token
    return tail("".join(f"{line}\n" for line in reversed(lines)))


def tail(console: str) -> str:
    """Lines as the machine's script printed them, the last 64 KiB."""
    text = SCRIPT_LINE.sub("", console.replace("\r\n", "\n"))
    return text.encode(errors="replace")[-CONSOLE_BYTES:].decode(errors="replace")
