"""Google's errors, translated once into what to do next.

A refusal may be an HTTP error (its `errors` are dicts with a `reason`) or the error of an operation that was accepted
(they are messages with a `code`). Source: https://cloud.google.com/compute/docs/troubleshooting/troubleshooting-vm-creation
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from holdfast.errors import CapacityError, ConfigError, CredentialsError, HoldfastError, QuotaError, TransientError

if TYPE_CHECKING:
    from google.cloud import compute_v1

ROLE_FILE = "deployments/gcp-role.yaml"

STOCKOUT = re.compile(
    r"ZONE_RESOURCE_POOL_EXHAUSTED|RESOURCE_POOL_EXHAUSTED|STOCKOUT|INSUFFICIENT_CAPACITY|VM_MIN_COUNT_NOT_REACHED"
    r"|does not have enough resources available|resources? (?:is|are) currently unavailable",
    re.IGNORECASE,
)
TOO_OFTEN = re.compile(
    r"rateLimitExceeded|RATE_LIMIT_EXCEEDED|RESOURCE_OPERATION_RATE_EXCEEDED|per minute", re.IGNORECASE
)
QUOTA = re.compile(r"\bQUOTA_EXCEEDED|\bquotaExceeded|Quota '\w+' exceeded|limitExceeded", re.IGNORECASE)
QUOTA_WORDS = re.compile(r"Quota '(\w+)' exceeded\.?\s+Limit: ([\d.]+)(?: in region ([\w-]+)| (globally))?")
PASSING = re.compile(
    r"INTERNAL_ERROR|RESOURCE_NOT_READY|resourceNotReady|OPERATION_CANCELED|conditionNotMet|CONDITION_NOT_MET"
    r"|RESOURCE_IN_USE|resourceInUse|backendError|DEADLINE_EXCEEDED"
)
PERMISSION = re.compile(r"Required '([\w.]+)' permission|Permission '([\w.]+)' denied|permission '([\w.]+)'")
NOT_ENABLED = re.compile(r"accessNotConfigured|SERVICE_DISABLED|has not been used in project|is disabled")
ALREADY_EXISTS = re.compile(r"alreadyExists|ALREADY_EXISTS|already exists")
PROTECTED = re.compile(r"protected against deletion|deletion ?protection", re.IGNORECASE)


class OperationFailedError(Exception):
    """An operation that was accepted ended with an error."""

    def __init__(self, operation: compute_v1.Operation) -> None:
        self.errors = list(operation.error.errors)
        self.code = operation.http_error_status_code or 0
        self.message = operation.http_error_message or "; ".join(one.message or one.code for one in self.errors)
        super().__init__(self.message)


@contextmanager
def translated(doing: str, permission: str = "") -> Iterator[None]:
    """Errors of Google's libraries inside become ours, with what was being done, and the permission it takes."""
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:
        ours = translate(error, doing, permission)
        if ours is None:
            raise
        raise ours from error


def translate(error: BaseException, doing: str, permission: str = "") -> HoldfastError | None:
    """None for an error that is none of Google's: a mistake of ours is not to be retried."""
    import google.auth.exceptions
    import requests
    from google.api_core import exceptions

    if isinstance(error, exceptions.RetryError):
        return translate(error.cause, doing, permission) if error.cause else TransientError(f"{doing}: {error}")
    if isinstance(error, google.auth.exceptions.TransportError):
        return TransientError(f"{doing}: Google's token service can't be reached: {_brief(error)}; it is tried again")
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return CredentialsError(
            f"{doing}: the account's Google credentials are refused or have ended: {_brief(error)}; renew them "
            "(gcloud auth application-default login, or a new key in the credentials block)"
        )
    if isinstance(error, requests.exceptions.RequestException | ConnectionError | TimeoutError):
        return TransientError(f"{doing}: Google can't be reached: {_brief(error)}; it is tried again")
    if isinstance(error, exceptions.GoogleAPICallError):
        return _of_words(error.code or 0, error.message or str(error), error.errors or (), doing, permission)
    if isinstance(error, OperationFailedError):
        return _of_words(error.code, error.message, error.errors, doing, permission)
    return None


def words_of(error: BaseException) -> str:
    """Everything an error says about itself, in one line to search in."""
    errors = getattr(error, "errors", None) or ()
    return " | ".join([str(getattr(error, "message", error)), *_details(errors)])


def is_stockout(error: BaseException) -> bool:
    return bool(STOCKOUT.search(words_of(error)))


def is_gone(error: BaseException) -> bool:
    return getattr(error, "code", None) == 404 or "RESOURCE_NOT_FOUND" in words_of(error)


def already_exists(error: BaseException) -> bool:
    return bool(ALREADY_EXISTS.search(words_of(error)))


def may_pass(error: Exception) -> bool:
    """Is the same call worth making again at once? What google.api_core.retry asks."""
    ours = translate(error, "")
    return isinstance(ours, TransientError) and not isinstance(ours, CredentialsError)


def _of_words(code: int, message: str, errors: Iterable[Any], doing: str, permission: str) -> HoldfastError:
    errors = list(errors)
    words = " | ".join([message, *_details(errors)])
    said = _said(message, errors)
    # A stockout looks like an overloaded server (503): it is asked for first.
    if STOCKOUT.search(words):
        return CapacityError(f"{doing}: no capacity: {said}")
    if TOO_OFTEN.search(words) or code == 429:
        return TransientError(f"{doing}: Google asks for fewer calls: {said}; it is tried again")
    if QUOTA.search(words):
        return QuotaError(f"{doing}: {_quota(words, errors)} ({said}); ask for more in the console's quota page")
    if code == 401:
        return CredentialsError(f"{doing}: the account's Google credentials are refused: {said}; renew them")
    if NOT_ENABLED.search(words):
        return ConfigError(f"{doing}: {said}; enable the API in this project (gcloud services enable)")
    if code == 403 or "PERMISSION" in words:
        return ConfigError(_missing_permission(doing, said, words, permission))
    if ALREADY_EXISTS.search(words):
        return ConfigError(f"{doing}: {said}; delete it, or choose another name")
    if PASSING.search(words) or code in (408, 409, 412) or code >= 500:
        return TransientError(f"{doing}: {said}; it is tried again")
    if code == 404 or "RESOURCE_NOT_FOUND" in words:
        return ConfigError(f"{doing}: there is no such thing: {said}; correct its name in the account")
    return ConfigError(f"{doing}: refused: {said}; correct it in the account or the job")


def _details(errors: Iterable[Any]) -> Iterator[str]:
    for one in errors:
        if isinstance(one, dict):
            yield " ".join(str(one.get(key, "")) for key in ("code", "reason", "message"))
        else:
            yield f"{getattr(one, 'code', '')} {getattr(one, 'message', one)}"


def _said(message: str, errors: list[Any]) -> str:
    codes = []
    for one in errors:
        code = (one.get("code") or one.get("reason")) if isinstance(one, dict) else getattr(one, "code", "")
        if code and str(code) not in codes:
            codes.append(str(code))
    # An HTTP error's message repeats the address it was sent to.
    message = re.sub(r"^(?:GET|POST|PUT|PATCH|DELETE) https?://\S+: ", "", message.strip())
    return f"{', '.join(codes)}: {message}" if codes else message


def _quota(words: str, errors: list[Any]) -> str:
    for one in errors:
        for detail in getattr(one, "error_details", ()) or ():
            if info := detail.quota_info:
                where = dict(info.dimensions).get("region") or "globally"
                if info.metric_name:
                    return f"quota {info.limit_name or info.metric_name} is {info.limit:g} ({where})"
    if found := QUOTA_WORDS.search(words):
        metric, limit, region, _ = found.groups()
        return f"quota {metric} is {float(limit.rstrip('.')):g} {f'in {region}' if region else '(whole project)'}"
    return "a quota is used up"


def _missing_permission(doing: str, said: str, words: str, permission: str) -> str:
    found = PERMISSION.search(words)
    missing = next((group for group in found.groups() if group), "") if found else permission
    if not missing:
        return f"{doing}: not permitted: {said}; grant this account the role in {ROLE_FILE}"
    return (
        f"{doing}: permission {missing} is missing: {said}; grant this account the role in {ROLE_FILE} "
        f"(its line `- {missing}`)"
    )


def _brief(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text[:300]
