"""What obstore raises, translated once into what to do next."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError, CredentialsError, HoldfastError, NotFoundError, TransientError
from holdfast.storage.address import Address

CREDENTIALS = {
    "ExpiredToken",
    "TokenRefreshRequired",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthFailure",
    "AuthenticationRequired",
    "InvalidSecurity",
    "RequestTimeTooSkewed",
}
"""https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html,
https://docs.cloud.google.com/storage/docs/xml-api/reference-status"""
PASSING = {
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "NoSuchUpload",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "SlowDown",
    "InternalError",
}
OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
PASSING_STATUS = {408, 409, 412, 425, 429}
ACTIONS = {
    "put": ("s3:PutObject", "storage.objects.create"),
    "create": ("s3:PutObject", "storage.objects.create"),
    "get": ("s3:GetObject", "storage.objects.get"),
    "list": ("s3:ListBucket", "storage.objects.list"),
    "delete": ("s3:DeleteObject", "storage.objects.delete"),
}


def code_of(error: BaseException) -> str:
    """The provider's own: NoSuchKey, SlowDown ..., or nothing."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else ""


def status_of(error: BaseException) -> int:
    """Of HTTP; 0 when nothing was answered."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else 0


def translated(error: Exception, verb: str, key: str, address: Address) -> HoldfastError:
    """The error to raise `from error`."""
    if isinstance(error, HoldfastError):
        return error
    code, status = code_of(error), status_of(error)
    what = f"{address.url}: can't {verb} {key!r}"
    if code == "NoSuchBucket":
        return ConfigError(f"{what}: there is no bucket {address.bucket!r}; create it, or correct the URL")
    if (
        code in CREDENTIALS
        or status == 401
        or type(error).__name__ == "UnauthenticatedError"
        or _asked_for_token(error, address)
    ):
        remedy = (
            "set this computer's clock" if code == "RequestTimeTooSkewed" else "renew them, or give the machine a role"
        )
        return CredentialsError(f"{what}: the credentials were not accepted or not found; {remedy}: {_short(error)}")
    if code in OTHER_REGION or status in (301, 307) or "incorrectly configured region" in str(error):
        return ConfigError(
            f"{what}: the bucket is in another region than {address.options.get('region', 'us-east-1')!r}; "
            f"say it in the URL (?region=...): {_short(error)}"
        )
    if status == 403:
        return ConfigError(f"{what}: {_needed(verb, address)}: {_short(error)}")
    if code not in PASSING and verb in ("get", "delete") and (status == 404 or isinstance(error, FileNotFoundError)):
        return NotFoundError(f"{key} is not in {address.url}")
    if code in PASSING or status in PASSING_STATUS or not 400 <= status < 500:
        return TransientError(f"{what}: {_short(error)}")
    return ConfigError(f"{what}: it was refused; correct the request, or the store's settings: {_short(error)}")


def _needed(verb: str, address: Address) -> str:
    s3, gcs = ACTIONS[verb]
    if address.scheme == "gs":
        return (
            f"the account needs the permission {gcs} on bucket {address.bucket!r}; grant it: gcloud storage buckets "
            f"add-iam-policy-binding gs://{address.bucket} --member=serviceAccount:NAME --role=roles/storage.objectUser"
        )
    arn = f"arn:aws:s3:::{address.bucket}"
    if verb != "list":
        arn += f"/{address.prefix}/*" if address.prefix else "/*"
    # Without s3:ListBucket, S3 answers 403 where nothing is: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html
    also = (
        f' (and s3:ListBucket on "arn:aws:s3:::{address.bucket}", if the object may be missing)'
        if verb == "get"
        else ""
    )
    policy = f'{{"Effect": "Allow", "Action": "{s3}", "Resource": "{arn}"}}'
    return f"the account needs {s3} on bucket {address.bucket!r}; add to its policy: {policy}{also}"


def _asked_for_token(error: BaseException, address: Address) -> bool:
    """Did a metadata or a token service fail? Then the bucket is not in the path; sensitive addresses are left out."""
    asked = re.search(r"Error performing \w+ (\S+) in ", str(error))
    return bool(asked and address.bucket not in unquote(urlsplit(asked[1]).path).split("/"))


def _short(error: BaseException) -> str:
    """One line: what the provider said, or the system's reason for no answer."""
    text = str(error)
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if code := code_of(error):
        return f"HTTP {status_of(error)} {code}" + (f", {said[1].strip()}" if said else "")
    reasons = ["".join(found) for found in re.findall(r'(?:message|error): "([^"]+)"|source: (TimedOut),', text)]
    first = " ".join(text.partition("\n\nDebug source")[0].split())
    return first + (f" ({reasons[-1]})" if reasons else "")
