"""A model server out of the standard library: `POST /embed` with {"texts": [...]} answers {"vectors": [[...], ...]}.

`GET /health` answers as soon as the model is loaded. Port: the first argument, else HOLDFAST_PORT, else 8000. Address: the
second, else loopback, which does where machines are one computer. The model is that of `embed.py`. On a fleet:
`examples/serve.yaml`.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from embed import Encoder, load

LARGEST_BYTES = 4 << 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    encoder: Encoder
    one_at_a_time = threading.Lock()

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/embed" or not 0 < length <= LARGEST_BYTES:
            self.close_connection = True  # what it sends is left unread
            return self.answer(404 if self.path != "/embed" else 413, {"error": "POST /embed, at most 4 MiB of JSON"})
        try:
            texts = json.loads(self.rfile.read(length))["texts"]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError("texts is no list of strings")
        except (ValueError, KeyError, TypeError) as error:
            return self.answer(400, {"error": f'send {{"texts": ["...", ...]}}: {error!r}'})
        with self.one_at_a_time:
            vectors = self.encoder.vectors(texts).tolist() if texts else []
        self.answer(200, {"vectors": vectors, "machine": os.environ.get("HOLDFAST_MEMBER", "")})

    def answer(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a line for each request would be most of the log."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128


if __name__ == "__main__":
    port = int(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HOLDFAST_PORT", "8000"))
    Handler.encoder = load()
    print(f"serving on port {port}", flush=True)
    Server((sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1", port), Handler).serve_forever()
