"""A proxy in front of an S3 server that can be cut like a cable, and can fail a share of requests in five ways."""

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_FAULTS = ("500", "503", "timeout", "cut body", "lost answer")


class FaultyProxy:
    """`share` of requests fail, drawn by seed; `cut_after` requests the listener and all connections go away."""

    def __init__(self, target: int, *, share: float = 0.0, seed: int = 0, cut_after: int | None = None) -> None:
        self.hits: Counter[str] = Counter()
        self._target, self._share, self._cut_after = target, share, cut_after
        self._draws, self._lock = random.Random(seed), threading.Lock()
        self._open: set[socket.socket] = set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                proxy._open.add(self.connection)

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):  # the connection was cut under us: that is what this proxy is for
                    self.close_connection = True

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                fault = proxy._fault()
                if fault in ("500", "503"):
                    self.answer(int(fault), b"", {})
                elif fault == "timeout":
                    time.sleep(4)
                    self.close_connection = True
                elif fault == "gone":
                    self.close_connection = True
                else:
                    self.pass_on(body, fault)

            def pass_on(self, body: bytes, fault: str) -> None:
                server = http.client.HTTPConnection("127.0.0.1", proxy._target, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                found = server.getresponse()
                data, headers = found.read(), dict(found.getheaders())
                server.close()
                if fault == "lost answer":  # done there, and nobody is told: a retry meets its own work
                    self.close_connection = True
                elif self.command == "HEAD":
                    self.answer(found.status, b"", headers, length=headers.get("Content-Length", "0"))
                else:
                    self.answer(found.status, data, headers, cut=fault == "cut body")

            def answer(
                self, status: int, data: bytes, headers: dict[str, str], *, length: str = "", cut: bool = False
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = self.close_connection or cut

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _fault(self) -> str:
        with self._lock:
            self.hits["requests"] += 1
            if self._cut_after is not None and self.hits["requests"] > self._cut_after:
                self.hits["gone"] += 1
                if self.hits["gone"] == 1:
                    threading.Thread(target=self.stop, daemon=True).start()
                return "gone"
            fault = self._draws.choice(_FAULTS) if self._draws.random() < self._share else ""
            self.hits[fault or "passed"] += 1
            return fault

    def stop(self) -> None:
        """Cut: nothing listens any more and open connections end."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)
