"""A proxy on loopback that passes a request on, and does something wrong when told to."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LossyProxy:
    """In front of an HTTP server on loopback. Ended with the context.

    Args:
        port: the server's.
        loses: given method and path of a request that the server answered: whether the reply is
            lost.
        without: headers of requests that it leaves out.
    """

    def __init__(
        self,
        port: int,
        loses: Callable[[str, str], bool] = lambda method, path: False,
        without: Collection[str] = (),
    ) -> None:
        left_out = {"connection", *(name.lower() for name in without)}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
                server.request(self.command, self.path, body, headers)
                reply = server.getresponse()
                data = reply.read()
                server.close()
                if loses(self.command, self.path):
                    proxy.lost += 1
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                shown = reply.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", shown or str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.lost = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> LossyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
