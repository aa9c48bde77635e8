"""BigQuery as far as a query goes: Google's own client speaks to it over HTTP, and DuckDB carries out the very SQL.

The SQL is translated by sqlglot; `_PARTITIONTIME` is a column of the tables here, as it is of BigQuery's.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import duckdb
import sqlglot

TYPES = {"VARCHAR": "STRING", "DOUBLE": "FLOAT", "BIGINT": "INTEGER", "TIMESTAMP WITH TIME ZONE": "TIMESTAMP"}


class BigQueryEmulator:
    """`with BigQueryEmulator() as bigquery: bigquery.load("acme.billing.export", rows); bigquery.endpoint`"""

    def __init__(self) -> None:
        self.database = duckdb.connect()
        self.database.execute("SET TimeZone = 'UTC'")
        self.queries: list[dict[str, Any]] = []
        self.refuse: tuple[int, str, str] | None = None
        """Status, reason and message of every further query."""
        self._results: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def load(self, table: str, rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> None:
        """`columns`: by name, as DuckDB calls their types."""
        project, dataset, name = table.split(".")
        self.database.execute(f'ATTACH \':memory:\' AS "{project}"; CREATE SCHEMA "{project}"."{dataset}"')
        place = f'"{project}"."{dataset}"."{name}"'
        self.database.execute(
            f"CREATE TABLE {place} ({', '.join(f'{column} {kind}' for column, kind in columns.items())})"
        )
        for row in rows:
            marks = ", ".join(f"CAST(? AS {kind})" for kind in columns.values())
            self.database.execute(f"INSERT INTO {place} VALUES ({marks})", [row[column] for column in columns])

    def __enter__(self) -> Self:
        emulator = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/token":  # of a service account's key
                    self._answer(200, {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"})
                else:
                    self._answer(*emulator._begin(json.loads(body)))

            def do_GET(self) -> None:
                found = re.search(r"/(jobs|queries)/([^/?]+)", self.path)
                assert found, self.path
                self._answer(*emulator._told(found[1], found[2]))

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="bigquery").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.database.close()

    def _begin(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.refuse:
            status, reason, message = self.refuse
            errors = [{"reason": reason, "message": message}]
            return status, {"error": {"code": status, "message": message, "errors": errors}}
        query, job = asked["configuration"]["query"], asked["jobReference"]
        self.queries.append(query)
        with self._lock:
            try:
                schema, rows = self._carry_out(query)
            except duckdb.CatalogException:
                words = f"Not found: Table {query['query'].split('`')[1]} was not found in location US"
                return 404, {"error": {"code": 404, "message": words, "errors": [{"reason": "notFound"}]}}
            self._results[job["jobId"]] = {"job": asked, "schema": schema, "rows": rows}
        return self._told("jobs", job["jobId"])

    def _carry_out(self, query: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
        sql = sqlglot.transpile(query["query"], read="bigquery", write="duckdb")[0]
        values = {
            one["name"]: _parameter(one["parameterType"]["type"], one["parameterValue"]["value"])
            for one in query["queryParameters"]
        }
        found = self.database.execute(sql, {name: value for name, value in values.items() if f"${name}" in sql})
        schema = [{"name": column[0], "type": TYPES[str(column[1])]} for column in found.description or []]
        return schema, [{"f": [{"v": _cell(value)} for value in row]} for row in found.fetchall()]

    def _told(self, kind: str, job_id: str) -> tuple[int, dict[str, Any]]:
        result = self._results[job_id]
        reference = {**result["job"]["jobReference"], "location": "US"}
        if kind == "jobs":
            return 200, {
                **result["job"],
                "jobReference": reference,
                "id": job_id,
                "status": {"state": "DONE"},
                "statistics": {"query": {"statementType": "SELECT"}},
            }
        return 200, {
            "jobReference": reference,
            "jobComplete": True,
            "schema": {"fields": result["schema"]},
            "totalRows": str(len(result["rows"])),
            "rows": result["rows"],
        }


def _parameter(kind: str, value: str) -> Any:
    return datetime.fromisoformat(value.replace(" UTC", "+00:00")) if kind == "TIMESTAMP" else value


def _cell(value: Any) -> Any:
    if isinstance(value, datetime):
        return str(int(value.astimezone(UTC).timestamp() * 1e6))
    return None if value is None else str(value)
