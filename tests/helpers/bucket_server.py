"""An S3 server on 127.0.0.1 (moto) behind a proxy that fails when it is told to."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "deepgen-tests"
FAULTS = ("500", "cut", "slow", "away")
SLOW_S = 0.3


class BucketProxy(ThreadingHTTPServer):
    """Passes requests on. fault: what happens to all of them, or "". asked: method and path of those that arrived."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.fault, self.asked = port, "", list[str]()
        self.left: int | None = None  # requests that are still answered before the fault; None: no limit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def written(self) -> list[str]:
        """Names of the objects that were written or deleted, in order, without repetitions in a row."""
        found = [one for one in self.asked if one.split()[0] in ("PUT", "DELETE")]
        names = [f"{method} {path.split('?')[0]}" for method, path in (one.split(" ", 1) for one in found)]
        return [name for n, name in enumerate(names) if not n or names[n - 1] != name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BucketProxy

    def _pass_on(self) -> None:
        body = self._body()
        server = self.server
        server.asked.append(f"{self.command} {self.path}")
        fault = server.fault
        if server.left is not None:
            server.left -= 1
            fault = fault if server.left < 0 else ""
        if fault == "away":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "500":
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        behind = http.client.HTTPConnection("127.0.0.1", server.behind, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        behind.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
        reply = behind.getresponse()
        content = reply.read()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")}
        if fault == "cut" and content:
            headers["Content-Length"] = str(len(content))
            self._answer(reply.status, headers, content[: len(content) // 2])
            self.close_connection = True
            return
        self._answer(reply.status, headers, content)
        behind.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return body

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, format: str, *arguments: object) -> None: ...


@contextmanager
def bucket_server() -> Iterator[BucketProxy]:
    """The server with an empty bucket called NAME."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = BucketProxy(int(moto.get_host_and_port()[1]))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.behind, timeout=60)
        connection.request("PUT", f"/{NAME}")
        assert connection.getresponse().status == 200
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


def variables(proxy: BucketProxy) -> dict[str, str]:
    """What a program needs in its environment to use the bucket."""
    return {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_EC2_METADATA_DISABLED": "true",
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy", ""), "127.0.0.1"])),
    }
