"""Answers on the server's port while the model loads: 503 to everything, so that a probe sees a server that is not
ready rather than none."""

from __future__ import annotations

import json
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

RETRY_AFTER_S = 5
_BACKLOG = 2048  # uvicorn's own, so that nothing changes for clients when it takes over
_MOST_BODY = 1 << 20


class _NotReady(BaseHTTPRequestHandler):
    timeout = 5  # seconds a client may keep a thread waiting

    def _answer(self) -> None:
        # A body left unread would reset the connection before the client has read the answer.
        self.rfile.read(self._body_bytes())
        body = json.dumps(unavailable("loading", "the model is loading")).encode()
        self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", str(RETRY_AFTER_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # http.server's names.
    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    def _body_bytes(self) -> int:
        try:
            return max(0, min(int(self.headers.get("Content-Length") or 0), _MOST_BODY))
        except ValueError:
            return 0

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: probes would fill the log."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client that has left while it was answered is no news."""


def unavailable(status: str, message: str) -> dict[str, object]:
    """The body of a 503, an error as OpenAI's clients read it."""
    return {
        "status": status,
        "error": {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503},
    }


class LoadingServer:
    """Answers 503 on a bound socket until it is stopped; then whoever holds the socket accepts.

    The socket listens from here on and is never closed in between: a client that connects during the change waits in
    its queue and is refused by nobody.

    Args:
        listener: a bound stream socket; it is duplicated, and stays the caller's.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._server = _Server(("", 0), _NotReady, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener.dup()
        self._server.request_queue_size = _BACKLOG
        self._server.server_activate()
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), name="maskpro-loading", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops accepting; answers under way are finished in their own threads. May be called again."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.socket.close()
