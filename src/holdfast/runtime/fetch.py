"""The bundle's way to the machine, and a failed boot's way back to the store, with the machine's own role.

`startup.py` appends this file to every user data, without its comments. So: standard library only, short, and nothing
that Python 3.6 does not know, for an interpreter that is too old must be able to say so. What only a cloud needs is
imported late: on the local cloud a boot is on the way of every recovery.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

STORE_PAUSES = (0.5, 1, 2, 4, 8, 16, 16)
ROLE_PAUSES = (0.5, 1, 2)
"""Seconds between tries. A role may reach the metadata some seconds after the machine is up."""
TAIL_LINES = 50


class BootError(Exception):
    """The machine can't be brought up. The message says what, where, and what to do."""


def object_url(store_url: str, key: str) -> str:
    """The URL of an object: its key belongs to the path, and the query (region, endpoint) stays the query."""
    parts = urlsplit(store_url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/" + quote(key)))


def fetch(url: str, path: str, sha256: str) -> None:
    """Store the object as the file `path`. Raises BootError, also for another SHA-256."""
    with open(path, "w+b") as file:
        if url.startswith("file://"):
            try:
                with open(unquote(urlsplit(url).path), "rb") as source:
                    copy(source, file)
            except OSError as error:
                raise BootError(f"the bundle {url} can't be read: {error}") from error
        else:
            ask_store("GET", url, sink=file)
        file.seek(0)
        digest = hashlib.sha256()
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise BootError(f"the bundle's SHA-256 is {digest.hexdigest()}, expected {sha256}: {url} was changed")


def copy(source: Any, sink: Any) -> None:
    for chunk in iter(lambda: source.read(1 << 20), b""):
        sink.write(chunk)


def report(problem: str, log: str, times: str) -> None:
    """Create the attempt's end.json as the agent would: nobody may have to wait for a machine that failed to boot."""
    import json

    with open(log, errors="replace") as file:
        tail = "".join(file.readlines()[-TAIL_LINES:])
    marks = {kind: cloud_time(at) for kind, at in read_times(times)}
    now = cloud_time(time.time())
    ending = {
        "outcome": "program-failed",
        "exit_status": None,
        "detail": problem,
        "log_tail": tail,
        "at": now,
        "report": {"at": now, "marks": marks},
    }
    key = "runs/{}/attempts/{:04d}/end.json".format(os.environ["HOLDFAST_RUN"], int(os.environ["HOLDFAST_ATTEMPT"]))
    url, data = object_url(os.environ["HOLDFAST_STORE"], key), json.dumps(ending).encode()
    if url.startswith("file://"):
        path = unquote(urlsplit(url).path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".staged", "wb") as staged:
            staged.write(data)
        os.link(path + ".staged", path)
        os.unlink(path + ".staged")
    else:
        ask_store("PUT", url, body=data)


def read_times(path: str) -> list[tuple[str, float]]:
    """What startup.sh noted: marks and their instants, in seconds of the wall since 1970."""
    with open(path) as file:
        return [(line.split()[0], float(line.split()[1].replace(",", "."))) for line in file]


def cloud_time(wall: float) -> str:
    """The instant on the cloud's clock (see holdfast.clock), which may run faster than the wall's."""
    import datetime

    at = datetime.datetime.fromtimestamp(wall, datetime.timezone.utc)  # noqa: UP017  not before Python 3.11
    if os.environ.get("HOLDFAST_CLOCK"):
        origin, speed = os.environ["HOLDFAST_CLOCK"].split()
        began = datetime.datetime.fromisoformat(origin)
        at = began + (at - began) * float(speed)
    return at.isoformat()


def ask_store(method: str, url: str, sink: Any = None, body: bytes = b"") -> None:
    """GET into `sink`, or create. Creating what exists is no error. Raises BootError."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    bucket, key = parts.netloc, unquote(parts.path.lstrip("/"))
    if parts.scheme == "s3":
        role, address, headers = s3_request(method, bucket, key, options, body)
        right = "s3:GetObject" if method == "GET" else "s3:PutObject"
        remedy = f"the role {role} needs {right} on arn:aws:s3:::{bucket}/* (or nothing is there)"
    elif parts.scheme == "gs":
        role, address, headers = gs_request(method, bucket, key, options)
        remedy = f"the service account {role} needs roles/storage.objectUser on the bucket {bucket}"
    else:
        raise BootError(f"no way to fetch {url}: a machine speaks file://, s3:// and gs://")

    status, answer, text = persist(STORE_PAUSES, method, address, headers, body, sink)
    if status == 200 or (method == "PUT" and status == 412):
        return
    said = " ".join(re.findall("<(?:Code|Message)>(.*?)</", text)) or text[:300]
    problem = f"{method} {address}: {status} {said}"
    if status in (401, 403):
        problem += f": {remedy}"
    if status == 404:
        problem += ": nothing is there, or the bucket does not exist"
    if answer.get("x-amz-bucket-region"):
        problem += f": the bucket is in the region {answer['x-amz-bucket-region']}; put it into the store's URL"
    raise BootError(problem)


def s3_request(method: str, bucket: str, key: str, options: dict[str, str], body: bytes) -> tuple[str, str, dict]:
    """Role, address and headers, signed."""
    role, credentials = aws_identity(options.get("role", ""))
    region, path = options.get("region", "us-east-1"), "/" + quote(key, safe="/-_.~")
    if options.get("endpoint"):
        base, path = options["endpoint"].rstrip("/"), f"/{bucket}{path}"
    else:
        domain = f"s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
        if "." in bucket:  # the certificate covers one label only
            base, path = f"https://{domain}", f"/{bucket}{path}"
        else:
            base = f"https://{bucket}.{domain}"
    address, path = base + path, urlsplit(base).path + path
    headers = {"host": urlsplit(base).netloc, "x-amz-content-sha256": hashlib.sha256(body).hexdigest()}
    sign(method, path, "", headers, region, credentials)
    if method == "PUT":
        headers["if-none-match"] = "*"
    return role, address, headers


def sign(method: str, path: str, query: str, headers: dict, region: str, credentials: dict) -> None:
    """Add the signature to `headers`, which are all signed. `path` and `query` as they are sent, the query's names in their
    order. https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    import hmac

    headers["x-amz-date"] = now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if credentials.get("Token"):
        headers["x-amz-security-token"] = credentials["Token"]
    names, scope = ";".join(sorted(headers)), f"{now[:8]}/{region}/s3/aws4_request"
    lines = [method, path, query, *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names]
    request = hashlib.sha256("\n".join([*lines, headers["x-amz-content-sha256"]]).encode()).hexdigest()
    signature = ("AWS4" + credentials["SecretAccessKey"]).encode()
    for part in [*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}"]:
        signature = hmac.new(signature, part.encode(), hashlib.sha256).digest()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials['AccessKeyId']}/{scope}, "
        f"SignedHeaders={names}, Signature={signature.hex()}"
    )


def gs_request(method: str, bucket: str, key: str, options: dict[str, str]) -> tuple[str, str, dict]:
    """Service account, address and headers: https://cloud.google.com/storage/docs/xml-api/get-object-download"""
    import json

    base = f"http://{os.environ.get('GCE_METADATA_HOST') or 'metadata.google.internal'}/computeMetadata/v1/instance"
    flavour = {"Metadata-Flavor": "Google"}
    account = f"{base}/service-accounts/default/"
    hint = "the machine has no service account; give the account a service_account"
    token = json.loads(metadata("GET", account + "token", flavour, hint))["access_token"]
    headers = {"Authorization": "Bearer " + token}
    if method == "PUT":
        headers["x-goog-if-generation-match"] = "0"
    endpoint = options.get("endpoint") or "https://storage.googleapis.com"
    address = "{}/{}/{}".format(endpoint.rstrip("/"), bucket, quote(key, safe="/-_.~"))
    return metadata("GET", account + "email", flavour, hint), address, headers


def aws_identity(role: str = "") -> tuple[str, dict[str, str]]:
    """Role and its credentials, by IMDSv2; on a machine of Google's, the `role` that AWS gives its service account.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
    https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRoleWithWebIdentity.html
    """
    import json

    if role and os.environ.get("HOLDFAST_CLOUD") == "gcp":
        return role, web_identity(role)
    base = (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254").rstrip("/") + "/latest/"
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
    hint = "no machine of AWS's, or its metadata service is off"
    token = {"X-aws-ec2-metadata-token": metadata("PUT", base + "api/token", seconds, hint)}
    path, hint = (
        base + "meta-data/iam/security-credentials/",
        "the machine has no role; give the account an instance_profile",
    )
    role = metadata("GET", path, token, hint).split()[0]
    return role, json.loads(metadata("GET", path + role, token, hint))


def web_identity(role: str) -> dict[str, str]:
    hint = "the machine has no service account whose identity AWS could trust; give the account a service_account"
    base = f"http://{os.environ.get('GCE_METADATA_HOST') or 'metadata.google.internal'}/computeMetadata/v1/instance"
    query = "/service-accounts/default/identity?format=full&audience=holdfast"
    token = metadata("GET", base + query, {"Metadata-Flavor": "Google"}, hint)
    address = (os.environ.get("AWS_ENDPOINT_URL_STS") or "https://sts.amazonaws.com").rstrip("/") + "/"
    form = "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleSessionName=holdfast"
    form += f"&RoleArn={quote(role, safe='')}&WebIdentityToken={quote(token, safe='')}"
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    status, _, text = persist(ROLE_PAUSES, "POST", address, kind, form.encode())
    if status != 200:
        said = " ".join(re.findall("<(?:Code|Message)>(.*?)</", text)) or text[:300]
        raise BootError(f"AWS does not give {role} to this machine's service account: {status} {said}")
    names = {"AccessKeyId": "", "SecretAccessKey": "", "SessionToken": "Token", "Expiration": ""}
    found = {names[name] or name: value for name, value in re.findall(r"<(\w+)>([^<>]+)</", text) if name in names}
    return found


def metadata(method: str, address: str, headers: dict[str, str], hint: str) -> str:
    try:
        status, _, text = persist(ROLE_PAUSES, method, address, headers, timeout=2, again=(404,))
    except BootError as error:
        raise BootError(f"{hint}: {error}") from error
    if status != 200 or not text.strip():
        raise BootError(f"{hint}: {method} {address}: {status} {text[:200]}")
    return text


def persist(
    pauses: tuple[float, ...],
    method: str,
    address: str,
    headers: dict[str, str],
    body: bytes = b"",
    sink: Any = None,
    timeout: float = 20,
    again: tuple[int, ...] = (),
) -> tuple[int, Any, str]:
    """Status, headers and text of the answer; asked again after what may pass. Raises BootError when it does not."""
    import http.client

    for pause in [*pauses, None]:
        try:
            if sink:
                sink.seek(0)
                sink.truncate()
            answer = exchange(method, address, headers, body, sink, timeout)
            if pause is None or (answer[0] < 500 and answer[0] not in (408, 429, *again)):
                return answer
            problem = f"status {answer[0]}"
        except (OSError, http.client.HTTPException) as error:
            problem = repr(error)
            if pause is None:
                raise BootError(
                    f"{method} {address}: {problem}, {len(pauses) + 1} times; can the machine reach it?"
                ) from error
        print(f"holdfast: boot: {method} {address}: {problem}; again in {pause} s", flush=True)
        time.sleep(pause)
    raise AssertionError


def exchange(method: str, address: str, headers: dict, body: bytes, sink: Any, timeout: float) -> tuple[int, Any, str]:
    import http.client

    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        path = parts.path + ("?" + parts.query if parts.query else "")
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        if not sink or response.status != 200:
            return response.status, response.headers, response.read().decode(errors="replace")
        copy(response, sink)
        if sink.tell() != int(response.headers.get("Content-Length", sink.tell())):
            raise OSError(f"{sink.tell()} bytes came of {response.headers['Content-Length']}")
        return 200, response.headers, ""
    finally:
        connection.close()


if __name__ == "__main__":
    try:
        if sys.argv[1] == "report":
            report(*sys.argv[2:])
        elif sys.version_info < (3, 11):  # noqa: UP036  a machine's may be older than ours
            raise BootError(
                f"{sys.executable} is Python {sys.version.split()[0]}, and Holdfast needs 3.11 or later; "
                "name a newer one in environment.python"
            )
        else:
            fetch(*sys.argv[2:])
    except (BootError, OSError) as error:
        sys.exit(str(error))
