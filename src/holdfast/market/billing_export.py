"""GCP's bill by its export to BigQuery, standard or detailed.

https://cloud.google.com/billing/docs/how-to/export-data-bigquery-tables/standard-usage
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, timedelta
from typing import Any

from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.market.bills import RUN_TAG, STORE_TAG, Asked, Bill, Part, lines_of

TABLE = re.compile(r"[a-z][a-z0-9.:-]{3,}\.\w+\.[\w-]+")
# What the drivers price: cores, memory, GPUs, and the local SSDs that some types bring.
MACHINES = re.compile(r"\b(Core|Ram|GPU|VM|Instance)\b.* (running|attached)|^SSD backed Local Storage", re.I)
QUERY_SECONDS = 300.0
EXPORTED_WITHIN = timedelta(days=5)
"""Of usage; partitions are by the time of the export, and only those are read (and billed)."""

# Dollars by run and SKU. A row has a label once, so the two joins repeat none. No alias may be called as a column is:
# GROUP BY would take the column.
QUERY = """\
SELECT
  of_run.value AS run_value,
  sku.description AS sku_description,
  SUM(cost / IFNULL(currency_conversion_rate, 1)) AS usd,
  SUM(IFNULL((SELECT SUM(credit.amount) FROM UNNEST(credits) AS credit), 0) / IFNULL(currency_conversion_rate, 1))
    AS credits_usd,
  MAX(usage_end_time) AS reaches
FROM `{table}`
JOIN UNNEST(labels) AS of_run ON of_run.key = @run_label
JOIN UNNEST(labels) AS of_store ON of_store.key = @store_label AND of_store.value = @store
WHERE usage_start_time >= @start AND usage_start_time < @end
  AND _PARTITIONTIME >= TIMESTAMP_TRUNC(@start, DAY) AND _PARTITIONTIME < @exported_before
  AND cost_type NOT IN ('tax', 'rounding_error')
GROUP BY run_value, sku_description
ORDER BY run_value, sku_description
"""


def read_billing_export(table: str, client_of: Callable[[str], Any], asked: Asked) -> Bill:
    """`table`: project.dataset.table; `client_of`: a google.cloud.bigquery.Client for a project, which pays for the query.

    Raises ConfigError, CredentialsError, TransientError.
    """
    if not TABLE.fullmatch(table):
        raise ConfigError(
            f"bill 'bigquery://{table}': names no table; write bigquery://PROJECT.DATASET.gcp_billing_export_v1_ACCOUNT"
        )
    project = table.rsplit(".", 2)[0]
    amounts: list[tuple[str, Part, float]] = []
    reaches = None
    for row in _rows(client_of(project), table, asked):
        amounts.append(
            (row["run_value"], "machines" if MACHINES.search(row["sku_description"]) else "other", float(row["usd"]))
        )
        if row["credits_usd"]:
            amounts.append((row["run_value"], "credits", float(row["credits_usd"])))
        end = row["reaches"].astimezone(UTC)
        reaches = max(reaches or end, end)
    return Bill(cloud="gcp", source=f"BigQuery {table}", lines=lines_of(amounts), reaches=reaches)


def _rows(client: Any, table: str, asked: Asked) -> list[Any]:
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import bigquery
    from requests.exceptions import RequestException

    parameters = [
        bigquery.ScalarQueryParameter("run_label", "STRING", RUN_TAG),
        bigquery.ScalarQueryParameter("store_label", "STRING", STORE_TAG),
        bigquery.ScalarQueryParameter("store", "STRING", asked.store),
        bigquery.ScalarQueryParameter("start", "TIMESTAMP", asked.start),
        bigquery.ScalarQueryParameter("end", "TIMESTAMP", asked.end),
        bigquery.ScalarQueryParameter("exported_before", "TIMESTAMP", asked.end + EXPORTED_WITHIN),
    ]
    try:
        job = client.query(
            QUERY.format(table=table),
            job_config=bigquery.QueryJobConfig(query_parameters=parameters),
            timeout=QUERY_SECONDS,
        )
        return list(job.result(timeout=QUERY_SECONDS))
    except exceptions.NotFound as error:
        raise ConfigError(
            f"BigQuery has no table {table!r}: {error.message}; the export fills it a day after it was switched on"
        ) from error
    except exceptions.Forbidden as error:
        raise ConfigError(
            f"BigQuery refuses {table!r}: {error.message}; grant roles/bigquery.jobUser on the project and "
            "roles/bigquery.dataViewer on the table"
        ) from error
    except exceptions.BadRequest as error:
        raise ConfigError(
            f"BigQuery refuses the query on {table!r}: {error.message}; is it a billing export?"
        ) from error
    except (exceptions.Unauthorized, GoogleAuthError) as error:
        raise CredentialsError(f"BigQuery refuses the credentials: {error}; renew them") from error
    except (exceptions.GoogleAPICallError, exceptions.RetryError, RequestException, TimeoutError) as error:
        raise TransientError(f"BigQuery does not answer: {error}") from error
