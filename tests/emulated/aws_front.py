"""What stands between the wire and moto: everything AWS does with a request before, or instead of, what moto does."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

from moto.autoscaling.models import autoscaling_backends
from moto.ec2.models import ec2_backends
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS
from moto.iam.models import iam_backends

from tests.emulated import aws_market
from tests.emulated.aws_machines import ACCOUNT, Machines
from tests.emulated.wire import name_of

READ_SERVICES = {"ec2", "autoscaling", "sts", "iam", "ssm", "pricing", "servicequotas", "elasticloadbalancing"}
HIDING = {"DescribeInstances", "TerminateInstances", "GetConsoleOutput", "ModifyInstanceAttribute"}
IDEMPOTENT = {"RunInstances", "CreateFleet"}
USER = f"arn:aws:iam::{ACCOUNT}:user/holdfast"
CONSOLE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Recorded:
    service: str
    """As IAM calls it: ec2, s3, pricing ..."""
    action: str
    region: str
    parameters: Mapping[str, Any]
    """The form's fields, or the JSON; empty for S3."""
    at: float


@dataclass(slots=True)
class Injected:
    action: str
    code: str
    message: str
    status: int
    left: float


@dataclass(slots=True)
class _Done:
    parameters: str
    answer: Answer
    machine_ids: list[str]


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str = "text/xml"


@dataclass
class Front:
    app: Callable[[dict[str, Any], Any], Iterable[bytes]]
    machines: Machines
    image_ids: Mapping[str, str]
    """The Deep Learning AMI of each region."""
    requests: list[Recorded] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    denied: set[str] = field(default_factory=set)
    tagged_only: set[str] = field(default_factory=set)
    injected: list[Injected] = field(default_factory=list)
    quotas: dict[str, float] = field(default_factory=dict)
    page_size: int = 1000
    delays: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._done: dict[tuple[str, str, str], _Done] = {}
        self._lock = threading.RLock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        headers = {
            key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")
        }
        headers["content-type"] = environ.get("CONTENT_TYPE", "")
        signed = re.search(r"Credential=[^/]*/[^/]*/([^/]*)/([^/]*)/aws4_request", headers.get("authorization", ""))
        region, service = (signed[1], signed[2]) if signed else ("", "")
        path = environ.get("PATH_INFO", "/")
        if environ.get("QUERY_STRING"):
            path += f"?{environ['QUERY_STRING']}"
        if service not in READ_SERVICES:
            _, action = name_of(environ["REQUEST_METHOD"], path, headers, b"")
            self._record(Recorded(service, action, region, {}, time.monotonic()))
            return self.app(environ, start_response)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        _, action = name_of(environ["REQUEST_METHOD"], path, headers, body)
        form: dict[str, Any] = json.loads(body) if "x-amz-target" in headers else dict(parse_qsl(body.decode()))
        self._record(Recorded(service, action, region, form, time.monotonic()))
        time.sleep(self.delays.get(action, 0.0))
        # One at a time: moto was not made for several threads.
        with self._lock:
            answer = self._answer(service, action, region, form) or self._idempotently(
                environ, action, region, form, body
            )
        status = f"{answer.status} x"
        start_response(status, [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body)))])
        return [answer.body]

    def _record(self, request: Recorded) -> None:
        self.requests.append(request)
        self.calls[request.action] += 1

    # -- answers of our own -------------------------------------------------------------------------------------------

    def _answer(self, service: str, action: str, region: str, form: Mapping[str, Any]) -> Answer | None:
        for one in self.injected:
            if one.action == action and one.left > 0:
                one.left -= 1
                return error(service, one.code, one.message, one.status)
        if action in self.denied or (action in self.tagged_only and "i-00000000000000000" in form.values()):
            code = "UnauthorizedOperation" if service == "ec2" else "AccessDeniedException"
            words = f"You are not authorized to perform this operation. User: {USER} is not authorized to perform: "
            words += f"{service}:{action} because no identity-based policy allows the {service}:{action} action. "
            return error(service, code, words + "Encoded authorization failure message: c2VjcmV0LWVuY29kZWQ", 403)
        if action == "RunInstances" and (profile := form.get("IamInstanceProfile.Name")):
            profiles = iam_backends[ACCOUNT]["aws"].instance_profiles.values()
            if profile not in {one.name for one in profiles}:
                words = f"Value ({profile}) for parameter iamInstanceProfile.name is invalid. Invalid IAM Instance Profile name"
                return error(service, "InvalidParameterValue", words, 400)
        if form.get("DryRun") == "true":
            return error(service, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)
        return self._what_moto_lacks(service, action, region, form)

    def _what_moto_lacks(self, service: str, action: str, region: str, form: Mapping[str, Any]) -> Answer | None:
        match action:
            case "DescribeSpotPriceHistory":
                offered = INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, [])
                return Answer(200, aws_market.spot_price_history(form, offered, self.page_size).encode())
            case "GetSpotPlacementScores":
                return Answer(200, aws_market.placement_scores(form, _ZoneIds()).encode())
            case "GetProducts":
                return _json(aws_market.products(form))
            case "SimulatePrincipalPolicy":
                return self._simulated(form["ActionNames.member.1"])
            case "GetServiceQuota":
                return _json(aws_market.quota(form, self.quotas))
            case "GetParameter" if form["Name"].startswith("/aws/service/deeplearning/"):
                if region not in self.image_ids or "/oss-nvidia-driver-gpu-pytorch-" not in form["Name"]:
                    return error(service, "ParameterNotFound", "", 400)
                return _json({"Parameter": {"Name": form["Name"], "Type": "String", "Value": self.image_ids[region]}})
            case "GetConsoleOutput":
                return self._console(form["InstanceId"])
            case "CreateAutoScalingGroup":
                if form["AutoScalingGroupName"] in autoscaling_backends[ACCOUNT][region].autoscaling_groups:
                    return error(service, "AlreadyExists", "AutoScalingGroup by this name already exists", 400)
            case "DeleteLaunchTemplate" if name := form.get("LaunchTemplateName"):
                if name not in ec2_backends[ACCOUNT][region].launch_template_name_to_ids:
                    words = f"At least one of the launch templates specified in the request does not exist: {name}"
                    return error(service, "InvalidLaunchTemplateName.NotFoundException", words, 400)
        return None

    def _simulated(self, asked: str) -> Answer:
        """For a machine that carries our tag."""
        decision = "implicitDeny" if asked.partition(":")[2] in self.denied else "allowed"
        said = f"<EvalActionName>{asked}</EvalActionName><EvalDecision>{decision}</EvalDecision>"
        return Answer(
            200,
            b'<SimulatePrincipalPolicyResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/">'
            b"<SimulatePrincipalPolicyResult><IsTruncated>false</IsTruncated>"
            + f"<EvaluationResults><member>{said}</member></EvaluationResults>".encode()
            + b"</SimulatePrincipalPolicyResult></SimulatePrincipalPolicyResponse>",
        )

    def _console(self, machine_id: str) -> Answer:
        self.machines.asking.hides = True
        if not self.machines.known(machine_id):
            return error("ec2", "InvalidInstanceID.NotFound", f"The instance ID '{machine_id}' does not exist", 400)
        said = self.machines.host.console(machine_id).encode()[-CONSOLE_BYTES:]
        return Answer(
            200,
            f"<GetConsoleOutputResponse {aws_market.XMLNS}><requestId>r</requestId><instanceId>{machine_id}</instanceId>"
            f"<timestamp>{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}.000Z</timestamp>"
            f"<output>{base64.b64encode(said).decode()}</output></GetConsoleOutputResponse>".encode(),
        )

    # -- answers of moto ----------------------------------------------------------------------------------------------

    def _idempotently(
        self, environ: dict[str, Any], action: str, region: str, form: Mapping[str, Any], body: bytes
    ) -> Answer:
        """A ClientToken is for one request: repeated, it is answered alike; with other parameters, it is refused."""
        token = form.get("ClientToken", "") if action in IDEMPOTENT else ""
        done = self._done.get((region, action, token))
        if not token:
            return self._of_moto(environ, action, form, body)
        parameters = json.dumps({key: value for key, value in form.items() if key != "Version"}, sort_keys=True)
        if done and done.parameters != parameters:
            words = "Arguments on this idempotent request are inconsistent with arguments used in previous request(s)."
            return error("ec2", "IdempotentParameterMismatch", words, 400)
        if done:
            self.machines.refresh()
            if action == "RunInstances" and all(
                self.machines.state_of(one) == "terminated" for one in done.machine_ids
            ):
                words = f"The client token '{token}' has already been used by an instance that is terminated."
                return error("ec2", "IdempotentInstanceTerminated", words, 400)
            return done.answer
        answer = self._of_moto(environ, action, form, body)
        machine_ids = re.findall(rb"<instanceId>(i-[0-9a-f]+)</instanceId>", answer.body)
        if answer.status == 200:
            self._done[region, action, token] = _Done(parameters, answer, [one.decode() for one in machine_ids])
        return answer

    def _of_moto(self, environ: dict[str, Any], action: str, form: Mapping[str, Any], body: bytes) -> Answer:
        if action == "DescribeInstances" and int(form.get("MaxResults", 1000)) > self.page_size:
            body = urlencode({**form, "MaxResults": self.page_size}).encode()
        self.machines.asking.form = form
        self.machines.asking.hides = action in HIDING
        if action in HIDING or "AutoScaling" in action or "Target" in action:
            self.machines.refresh()
        given: dict[str, Any] = {}

        def start_response(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            given["status"], given["headers"] = int(status.split()[0]), dict(headers)

        inner = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        said = b"".join(self.app(inner, start_response))
        self.machines.asking.hides = False
        status = 500 if b"<Code>InsufficientInstanceCapacity</Code>" in said else given["status"]
        kind = next((value for name, value in given["headers"].items() if name.lower() == "content-type"), "text/xml")
        return Answer(status, said, kind)


class _ZoneIds(dict[str, list[str]]):
    def __missing__(self, region: str) -> list[str]:
        return [zone.zone_id for zone in ec2_backends[ACCOUNT][region].describe_availability_zones()]


def error(service: str, code: str, message: str, status: int) -> Answer:
    """In the form of the service."""
    if service == "ec2":
        words = f"<Code>{code}</Code><Message>{escape(message)}</Message>"
        return Answer(
            status, f"<Response><Errors><Error>{words}</Error></Errors><RequestID>r</RequestID></Response>".encode()
        )
    if service in ("ssm", "pricing", "servicequotas"):
        body = json.dumps({"__type": code, "message": message}).encode()
        return Answer(status, body, "application/x-amz-json-1.1")
    words = f"<Type>Sender</Type><Code>{code}</Code><Message>{escape(message)}</Message>"
    return Answer(status, f"<ErrorResponse><Error>{words}</Error><RequestId>r</RequestId></ErrorResponse>".encode())


def _json(content: Mapping[str, Any]) -> Answer:
    return Answer(200, json.dumps(content).encode(), "application/x-amz-json-1.1")
