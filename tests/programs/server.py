"""A model server without a model: healthy some seconds after its start, answers with its machine's id after some more."""

import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

port, start_seconds = int(sys.argv[1]), float(sys.argv[2])
assert port == int(os.environ["HOLDFAST_PORT"])
orders = Path(os.environ["ORDERS"])
"""A folder: a file `MACHINE.ill` makes that replica unhealthy, `MACHINE.exit` ends its server."""
machine = os.environ["HOLDFAST_MEMBER"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if (orders / f"{machine}.exit").exists():
            print("this server gives up", flush=True)
            os._exit(3)
        ill = (orders / f"{machine}.ill").exists()
        if url.path == "/health":
            return self._answer(503 if ill else 200, "")
        query = parse_qs(url.query)
        time.sleep(float(query.get("seconds", ["0"])[0]))
        while not all((orders / name).exists() for name in query.get("until", [])):
            time.sleep(0.02)
        self._answer(200, machine)

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


class Server(ThreadingHTTPServer):
    request_queue_size = 128


time.sleep(start_seconds)
if "--broken" in sys.argv:
    print("this server never comes up", flush=True)
    sys.exit(4)
print(f"listening on {port}", flush=True)
Server(("127.0.0.1", port), Handler).serve_forever()
