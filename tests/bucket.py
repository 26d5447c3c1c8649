"""A folder served as a bucket of Google Cloud Storage, over HTTP as TensorStore speaks it: objects, ranges and lists."""

import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    root: Path
    ranges: list[int]

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        _, _, name = url.path.partition("/o/")
        if not name:
            names = sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())
            listed = [name for name in names if query.get("startOffset", "") <= name < query.get("endOffset", "~")]
            self._answer(200, json.dumps({"items": [self._describe(name) for name in listed]}).encode())
            return
        file = self.root / urllib.parse.unquote(name)
        if not file.is_file():
            self._answer(404, b"")
        elif query["alt"] == "json":
            self._answer(200, json.dumps(self._describe(urllib.parse.unquote(name))).encode())
        else:
            data, asked = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                self._answer(200, data)
                return
            start, stop = int(asked[1]), int(asked[2] or len(data)) + 1
            part = data[start:stop]
            place = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
            self.ranges.append(len(part))  # before who asked has the answer
            self._answer(206 if part else 416, part, place if part else {})

    def _describe(self, name: str) -> dict[str, str]:
        return {"name": name, "bucket": "bucket", "generation": "1", "size": str((self.root / name).stat().st_size)}

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "x-goog-generation": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[int]]]:
    """(address, sizes of the ranges that were asked for so far); for TENSORSTORE_GCS_HTTP_URL."""
    ranges: list[int] = []
    handler = type("Handler", (_Handler,), {"root": root, "ranges": ranges})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", ranges
        finally:
            server.shutdown()
            thread.join()
