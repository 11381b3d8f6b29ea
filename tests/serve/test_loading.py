"""What answers on the port while the model loads, asked by clients that do not behave."""

from __future__ import annotations

import socket

import pytest

from maskpro_serve.loading import LoadingServer


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = LoadingServer(listener)
        yield listener.getsockname()[1]
        server.stop()


def ask(port: int, request: bytes) -> bytes:
    """What one connection is answered, which stays open for writing."""
    with socket.create_connection(("127.0.0.1", port), timeout=4) as connection:
        connection.sendall(request)
        return connection.recv(4096)


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PATCH"])
@pytest.mark.parametrize("length", [b"0", b"-1", b"abc"])
def test_everything_is_503_at_once(port, capfd, method, length):
    answer = ask(port, method + b" /v1/x HTTP/1.0\r\nContent-Length: " + length + b"\r\n\r\n")
    assert answer.split(b"\r\n")[0].endswith(b" 503 Service Unavailable")
    assert capfd.readouterr().err == ""


def test_a_body_is_read_before_the_answer(port):
    body = b"x" * 300_000
    with socket.create_connection(("127.0.0.1", port), timeout=4) as connection:
        connection.sendall(b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert b" 503 " in connection.recv(4096)
