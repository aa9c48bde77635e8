"""The metadata service of one machine, on loopback, in the dialect of its zone.

botocore's and google-auth's own clients work against it unchanged. Standard library only: it lives in the machine's host.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

GCP_PREFIX = "/computeMetadata/v1/"
TOKEN_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
ROLE = "holdfast-machine"
LOOPBACK = "127.0.0.1"
"""All machines of this cloud are one computer; only their ports differ."""
GCP_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@dataclass
class Facts:
    """What the service knows of its machine; the host changes the last three."""

    machine_id: str
    dialect: str
    zone: str
    region: str
    instance_type: str
    user_data: str
    name: str = ""
    """Of a GCP instance, where it is not `machine_id`."""
    number: str = ""
    """Likewise its `id`."""
    attributes: dict[str, str] = field(default_factory=dict)
    reclaim_at: datetime | None = None
    rebalance_at: datetime | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def change(self, **values: datetime) -> None:
        with self.changed:
            for name, value in values.items():
                setattr(self, name, value)
            self.changed.notify_all()


def serve(facts: Facts) -> ThreadingHTTPServer:
    """Answer on an ephemeral port of loopback, from threads of its own."""
    handler = type("Handler", (AwsHandler if facts.dialect == "aws" else GcpHandler,), {"facts": facts, "tokens": {}})
    server = ThreadingHTTPServer((LOOPBACK, 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metadata", daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    facts: Facts
    tokens: dict[str, float]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        return

    def answer(self, status: int, body: str = "", **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class AwsHandler(_Handler):
    """IMDSv2 only: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html"""

    def do_PUT(self) -> None:
        if self.path != "/latest/api/token":
            return self.answer(405)
        ttl = self.headers.get(TOKEN_TTL_HEADER, "")
        if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
            return self.answer(400, "a token needs a lifetime of 1 to 21600 seconds")
        token = secrets.token_urlsafe(32)
        self.tokens[token] = time.monotonic() + int(ttl)
        self.answer(200, token, **{TOKEN_TTL_HEADER: ttl})

    def do_GET(self) -> None:
        if self.tokens.get(self.headers.get(TOKEN_HEADER, ""), 0.0) < time.monotonic():
            return self.answer(401)
        value = self._value(urlsplit(self.path).path)
        self.answer(404) if value is None else self.answer(200, value)

    def _value(self, path: str) -> str | None:
        facts = self.facts
        path = path.removeprefix("/latest/")
        match path.removeprefix("meta-data/").rstrip("/"):
            case "instance-id":
                return facts.machine_id
            case "instance-type":
                return facts.instance_type
            case "local-ipv4":
                return LOOPBACK
            case "placement/availability-zone":
                return facts.zone
            case "placement/region":
                return facts.region
            case "instance-life-cycle":
                return facts.attributes.get("life-cycle", "spot")
            case "spot/instance-action" if facts.reclaim_at:
                return json.dumps({"action": "terminate", "time": _zulu(facts.reclaim_at)})
            case "spot/termination-time" if facts.reclaim_at:
                return _zulu(facts.reclaim_at)
            case "events/recommendations/rebalance" if facts.rebalance_at:
                return json.dumps({"noticeTime": _zulu(facts.rebalance_at)})
            case "iam/security-credentials":
                return ROLE
            case name if name == f"iam/security-credentials/{ROLE}":
                return json.dumps(_credentials())
            case "dynamic/instance-identity/document":
                return json.dumps(
                    {
                        "instanceId": facts.machine_id,
                        "instanceType": facts.instance_type,
                        "availabilityZone": facts.zone,
                        "region": facts.region,
                        "accountId": "000000000000",
                        "version": "2017-09-30",
                    }
                )
            case "user-data":
                return facts.user_data
        return None


class GcpHandler(_Handler):
    """https://cloud.google.com/compute/docs/metadata/querying-metadata"""

    def answer(self, status: int, body: str = "", **headers: str) -> None:
        super().answer(status, body, Metadata_Flavor="Google", Server="Metadata Server for VM", **headers)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            return self.answer(200, "computeMetadata/\n")
        if self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403, "Missing Metadata-Flavor:Google header.")
        if not url.path.startswith(GCP_PREFIX):
            return self.answer(404)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        path = url.path.removeprefix(GCP_PREFIX)
        value = self._value(path, query)
        if value is not None and query.get("wait_for_change", "").lower() == "true":
            value = self._wait(path, query, value)
        if value is None:
            return self.answer(404)
        kind = "application/json" if value.startswith("{") else "application/text"
        self.answer(200, value, ETag=_etag(value), Content_Type=kind)

    def _wait(self, path: str, query: dict[str, str], value: str) -> str | None:
        """Answer when the value differs from `last_etag` (or from now), or after `timeout_sec`."""
        known = query.get("last_etag") or _etag(value)
        give_up_at = time.monotonic() + float(query.get("timeout_sec", 3600))
        with self.facts.changed:
            while _etag(value) == known and (left := give_up_at - time.monotonic()) > 0:
                self.facts.changed.wait(left)
                value = self._value(path, query) or ""
        return value

    def _value(self, path: str, query: dict[str, str]) -> str | None:
        facts = self.facts
        email = f"{ROLE}@local.invalid"
        account = {"aliases": ["default"], "email": email, "scopes": [GCP_SCOPE]}
        match path.rstrip("/").split("/"):
            case ["instance", "id"]:
                return facts.number or facts.machine_id
            case ["instance", "name"]:
                return facts.name or facts.machine_id
            case ["instance", "zone"]:
                return f"projects/0/zones/{facts.zone}"
            case ["instance", "machine-type"]:
                return f"projects/0/machineTypes/{facts.instance_type}"
            case ["instance", "network-interfaces", "0", "ip"]:
                return LOOPBACK
            case ["instance", "preempted"]:
                return "TRUE" if facts.reclaim_at else "FALSE"
            case ["instance", "attributes", name]:
                return facts.attributes.get(name)
            case ["instance", "service-accounts", "default"] if query.get("recursive") == "true":
                return json.dumps(account)
            case ["instance", "service-accounts", "default", "email"]:
                return email
            case ["instance", "service-accounts", _, "identity"] if query.get("audience"):
                return f"local-cloud.identity-for-{query['audience']}.unsigned"
            case ["instance", "service-accounts", _, "token"]:
                return json.dumps({"access_token": "local-cloud-token", "expires_in": 3600, "token_type": "Bearer"})
            case ["project", "project-id"]:
                return "local-project"
            case ["project", "numeric-project-id"]:
                return "0"
            case ["universe", "universe-domain"]:
                return "googleapis.com"
        return None


def _credentials() -> dict[str, str]:
    """Well-formed and worthless: there is no account behind them."""
    return {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": "LOCALCLOUDNOTAKEY",
        "SecretAccessKey": "worthless-outside-this-computer",
        "Token": "local-cloud-token",
        "LastUpdated": _zulu(datetime.now(UTC)),
        "Expiration": _zulu(datetime.now(UTC) + timedelta(hours=6)),
    }


def _zulu(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _etag(value: str) -> str:
    return f"{hash(value) & 0xFFFFFFFFFFFF:012x}"
