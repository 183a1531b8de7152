"""Running the staging hub: in the foreground, or from a thread for the length of a `with`."""

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from converter.errors import ConvertError, UsageError

_START_TIMEOUT_S = 30.0


def check_loopback(host: str) -> None:
    """`UsageError` unless the address can be reached from this machine only."""
    if host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            f"The staging hub has no accounts and must not be reachable from other machines: "
            f"--host {host} is not a loopback address. Use 127.0.0.1 and, to reach it from "
            f"elsewhere, forward the port over ssh."
        )


def _config(app: FastAPI, *, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConvertError(
            f"The staging hub cannot listen on {host} port {port}: {error.strerror}. "
            f"Stop what is using the port, or choose another with --port."
        ) from error
    return bound


def serve_app(app: FastAPI, *, host: str, port: int) -> None:
    """Serve until interrupted."""
    check_loopback(host)
    with _bind(host, port) as bound:
        uvicorn.Server(_config(app, host=host, port=port)).run(sockets=[bound])


@contextmanager
def background_server(app: FastAPI, *, port: int = 0) -> Iterator[str]:
    """Serve on 127.0.0.1 from a daemon thread and yield the endpoint URL."""
    with _bind("127.0.0.1", port) as bound:
        port = bound.getsockname()[1]
        server = uvicorn.Server(_config(app, host="127.0.0.1", port=port))
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [bound]}, name="staging-hub", daemon=True
        )
        thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        try:
            while not server.started:
                if not thread.is_alive() or time.monotonic() > deadline:
                    raise ConvertError("The staging hub did not start")
                time.sleep(0.005)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)
