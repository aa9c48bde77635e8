"""Google's errors say what to do next: each becomes the class that is the advice."""

from __future__ import annotations

import json
from typing import Any

import google.auth.exceptions
import pytest
import requests
from google.api_core import exceptions
from google.cloud import compute_v1

from holdfast.drivers.gcp.errors import OperationFailedError, may_pass, translate, translated
from holdfast.errors import CapacityError, ConfigError, CredentialsError, HoldfastError, QuotaError, TransientError


def http(status: int, reason: str, message: str) -> exceptions.GoogleAPICallError:
    """As the client library builds it from an answer."""
    response = requests.Response()
    response.status_code = status
    said = {"message": message, "domain": "global", "reason": reason}
    response._content = json.dumps({"error": {"code": status, "message": message, "errors": [said]}}).encode()
    response.request = requests.Request("POST", "https://compute.googleapis.com/compute/v1/x").prepare()
    return exceptions.from_http_response(response)


def operation(code: str, message: str, status: int = 0, **quota: Any) -> OperationFailedError:
    error = compute_v1.Errors(code=code, message=message)
    if quota:
        error.error_details = [compute_v1.ErrorDetails(quota_info=compute_v1.QuotaExceededInfo(**quota))]
    return OperationFailedError(
        compute_v1.Operation(error=compute_v1.Error(errors=[error]), http_error_status_code=status)
    )


STOCKOUT = (
    "The zone 'projects/p/zones/us-central1-a' does not have enough resources available to fulfill the request.  "
    "Try a different zone, or try again later."
)
QUOTA = "Quota 'GPUS_ALL_REGIONS' exceeded.  Limit: 0.0 globally."
TABLE: list[tuple[Exception, type[HoldfastError], str]] = [
    # No capacity, however it is said; 503 is not a busy server here.
    (http(503, "ZONE_RESOURCE_POOL_EXHAUSTED", STOCKOUT), CapacityError, "no capacity: ZONE_RESOURCE_POOL_EXHAUSTED"),
    (http(503, "backendError", STOCKOUT), CapacityError, "does not have enough resources"),
    (operation("ZONE_RESOURCE_POOL_EXHAUSTED", STOCKOUT, 503), CapacityError, "Try a different zone"),
    (operation("ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", STOCKOUT), CapacityError, "WITH_DETAILS"),
    (
        operation("VM_MIN_COUNT_NOT_REACHED", "Requested minimum count of 2 VMs could not be created."),
        CapacityError,
        "",
    ),
    (operation("STOCKOUT", "no"), CapacityError, ""),
    # Quotas
    (http(403, "quotaExceeded", QUOTA), QuotaError, r"quota GPUS_ALL_REGIONS is 0 \(whole project\)"),
    (
        operation(
            "QUOTA_EXCEEDED",
            "Quota 'PREEMPTIBLE_NVIDIA_L4_GPUS' exceeded.  Limit: 1.0 in region us-central1.",
            403,
            metric_name="compute.googleapis.com/preemptible_nvidia_l4_gpus",
            limit_name="PREEMPTIBLE-NVIDIA-L4-GPUS-per-project-region",
            limit=1.0,
            dimensions={"region": "us-central1"},
        ),
        QuotaError,
        r"quota PREEMPTIBLE-NVIDIA-L4-GPUS-per-project-region is 1 \(us-central1\)",
    ),
    # What passes
    (http(403, "rateLimitExceeded", "Rate Limit Exceeded"), TransientError, "fewer calls"),
    (http(429, "RATE_LIMIT_EXCEEDED", "Quota exceeded for quota metric 'Queries' per minute"), TransientError, "fewer"),
    (http(500, "backendError", "Internal error"), TransientError, "tried again"),
    (http(502, "", "Bad Gateway"), TransientError, ""),
    (http(503, "backendError", "Service unavailable"), TransientError, ""),
    (http(412, "conditionNotMet", "Labels fingerprint either invalid"), TransientError, "conditionNotMet"),
    (http(400, "resourceNotReady", "The resource is not ready"), TransientError, ""),
    (http(400, "resourceInUseByAnotherResource", "is already being used"), TransientError, ""),
    (operation("INTERNAL_ERROR", "Internal error."), TransientError, "INTERNAL_ERROR"),
    (requests.exceptions.ConnectionError("Connection reset by peer"), TransientError, "can't be reached"),
    (requests.exceptions.ReadTimeout("timed out"), TransientError, "can't be reached"),
    (google.auth.exceptions.TransportError("no route"), TransientError, "token service"),
    # Credentials
    (http(401, "authError", "Invalid Credentials"), CredentialsError, "renew them"),
    (
        google.auth.exceptions.RefreshError("invalid_grant: Token has been expired or revoked."),
        CredentialsError,
        "invalid_grant",
    ),
    (google.auth.exceptions.DefaultCredentialsError("not found"), CredentialsError, "gcloud auth"),
    # What will never work
    (
        http(403, "forbidden", "Required 'compute.instances.create' permission for 'projects/p/zones/z/instances/i'"),
        ConfigError,
        r"permission compute\.instances\.create is missing.*deployments/gcp-role\.yaml.*`- compute\.instances\.create`",
    ),
    (
        http(403, "accessNotConfigured", "Compute Engine API has not been used in project 1"),
        ConfigError,
        "enable the API",
    ),
    (http(404, "notFound", "The resource 'projects/p/global/images/x' was not found"), ConfigError, "images/x"),
    (http(400, "invalid", "Invalid value for field 'resource.machineType': 'x'"), ConfigError, "machineType"),
    (http(409, "alreadyExists", "The resource 'instances/hf' already exists"), ConfigError, "already exists"),
    (
        operation("RESOURCE_NOT_FOUND", "The resource 'projects/p/global/networks/n' was not found"),
        ConfigError,
        "networks/n",
    ),
]


@pytest.mark.parametrize(
    ("error", "kind", "words"), TABLE, ids=[f"{type(e).__name__}-{k.__name__}-{n}" for n, (e, k, _) in enumerate(TABLE)]
)
def test_each_error_becomes_the_advice(error: Exception, kind: type[HoldfastError], words: str) -> None:
    with pytest.raises(kind, match=words or ".") as caught, translated("launching n2 in us-central1-a", "compute.x.y"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith("launching n2 in us-central1-a: ") and caught.value.__cause__ is error
    assert "https://" not in str(caught.value)
    assert may_pass(error) == (kind is TransientError)


def test_the_last_error_of_a_call_that_was_tried_again_is_what_counts() -> None:
    ours = translate(exceptions.RetryError("20 s are over", cause=http(500, "backendError", "x")), "listing")
    assert type(ours) is TransientError and "backendError" in str(ours)


def test_a_mistake_of_ours_is_not_taken_for_google_s() -> None:
    assert translate(KeyError("zone"), "listing") is None
    with pytest.raises(KeyError), translated("listing"):
        raise KeyError("zone")
