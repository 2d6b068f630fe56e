"""A bucket in memory that speaks the JSON API of Google Cloud Storage.

As much of it as gcsfs, google-cloud-storage and TensorStore use: objects are uploaded
(at once or in chunks), read by ranges, listed by prefix and delimiter, copied, moved,
composed and deleted, all under the preconditions of generations. Nothing can be
appended to, and there are no folders.
"""

import base64
import contextlib
import dataclasses
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
import zlib
from typing import Any

BUCKET = "bucket"


@dataclasses.dataclass
class Object:
    data: bytes
    generation: int


class Bucket:
    """The objects, and what was asked of them, as "GET name" and the like."""

    def __init__(self):
        self.objects = {}
        self.requests = []
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._uploads = {}

    def put(self, name, data, condition=None):
        with self.lock:
            there = self.objects.get(name)
            if condition is not None and condition != getattr(there, "generation", 0):
                raise Refusal(412, f"{name} has another generation than {condition}")
            made = self.objects[name] = Object(data, next(self._generations))
            return described(name, made)

    def begin_upload(self, name, condition):
        with self.lock:
            token = f"upload{len(self._uploads)}"
            self._uploads[token] = name, condition, bytearray()
            return token

    def add_to_upload(self, token, data, first, total):
        """Returns (description or None, bytes so far)."""
        with self.lock:
            name, condition, there = self._uploads[token]
            if data:
                there[first:] = data
            if total is None or len(there) < total:
                return None, len(there)
            return self.put(name, bytes(there), condition), len(there)

    def get(self, name, query):
        with self.lock:
            found = self.objects.get(name)
        if found is None:
            raise Refusal(404, f"No such object: {BUCKET}/{name}")
        wanted = query.get("generation") or query.get("ifGenerationMatch")
        if wanted and int(wanted) != found.generation:
            raise Refusal(404 if "generation" in query else 412, f"{name} was replaced")
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refusal(304, "not modified")
        return found

    def delete(self, name, query):
        with self.lock:
            self.get(name, query)
            del self.objects[name]

    def list(self, query):
        prefix, cut = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        most = int(query.get("maxResults", 1000))
        token = query.get("pageToken", "")
        items: list[dict] = []
        prefixes: list[str] = []
        with self.lock:
            entries = sorted(self.objects.items())
        for name, found in entries:
            if not name.startswith(prefix) or name < first or (last and name >= last):
                continue
            rest = name[len(prefix) :]
            key = name
            if cut and cut in rest:
                key = prefix + rest[: rest.index(cut) + len(cut)]
            if key <= token or key in prefixes:
                continue
            if len(items) + len(prefixes) == most:
                return items, prefixes, max([*prefixes, *(i["name"] for i in items)])
            if key == name:
                items.append(described(name, found))
            else:
                prefixes.append(key)
        return items, prefixes, None


class Refusal(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def described(name, found):
    return {
        "kind": "storage#object",
        "name": name,
        "bucket": BUCKET,
        "id": f"{BUCKET}/{name}/{found.generation}",
        "generation": str(found.generation),
        "metageneration": "1",
        "size": str(len(found.data)),
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
        "etag": f"e{found.generation}",
        "crc32c": base64.b64encode(zlib.crc32(found.data).to_bytes(4, "big")).decode(),
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if status in (204, 304):  # these have no body
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.body()
        bucket = self.server.bucket
        try:
            for pattern, action in ROUTES:
                method, _, route = pattern.partition(" ")
                found = re.fullmatch(route, url.path)
                if method == self.command and found:
                    names = [urllib.parse.unquote(part) for part in found.groups()]
                    bucket.requests.append(f"{method} {' '.join(names)}".strip())
                    action(self, bucket, query, body, *names)
                    return
            raise Refusal(404, f"{self.command} {url.path} is not part of this fake")
        except Refusal as refusal:
            error = {"code": refusal.status, "message": str(refusal)}
            self.answer(refusal.status, {"error": error})

    do_GET = do_PUT = do_POST = do_DELETE = do


def about(handler, bucket, query, body):
    handler.answer(
        200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"}
    )


def listing(handler, bucket, query, body):
    items, prefixes, token = bucket.list(query)
    answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
    handler.answer(200, answer | ({"nextPageToken": token} if token else {}))


def read(handler, bucket, query, body, name):
    found = bucket.get(name, query)
    if query.get("alt") != "media":
        handler.answer(200, described(name, found))
        return
    headers = {"x-goog-generation": found.generation, "ETag": f"e{found.generation}"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers.get("Range", ""))
    if not wanted:
        handler.answer(200, found.data, **headers)
        return
    size, (first, last) = len(found.data), wanted.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1 if first and last else size, size)
    if start >= size:
        raise Refusal(416, f"{name} has {size} bytes")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    handler.answer(206, found.data[start:stop], **headers)


def upload(handler, bucket, query, body):
    condition = query.get("ifGenerationMatch")
    condition = None if condition is None else int(condition)
    kind, name = query["uploadType"], query.get("name")
    if kind == "media":
        handler.answer(200, bucket.put(name, body, condition))
    elif kind == "multipart":
        boundary = handler.headers["Content-Type"].split("boundary=")[1].strip("'\"")
        _, first, second, _ = body.split(f"--{boundary}".encode())
        split = re.compile(rb"\r?\n\r?\n")
        about_it = json.loads(split.split(first, maxsplit=1)[1])
        data = split.split(second, maxsplit=1)[1]
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        handler.answer(200, bucket.put(about_it["name"], data, condition))
    else:
        name = name or json.loads(body)["name"]
        token = bucket.begin_upload(name, condition)
        host = handler.headers["Host"]
        handler.answer(200, {}, Location=f"http://{host}/upload/of/{token}")


def upload_part(handler, bucket, query, body, token):
    span, total = handler.headers["Content-Range"].removeprefix("bytes ").split("/")
    first = span.partition("-")[0].strip("*")
    total = None if total == "*" else int(total)
    made, size = bucket.add_to_upload(token, body, int(first or 0), total)
    if made:
        handler.answer(200, made)
    else:
        handler.answer(308, Range=f"bytes=0-{size - 1}")


def delete(handler, bucket, query, body, name):
    bucket.delete(name, query)
    handler.answer(204)


def rewrite(handler, bucket, query, body, name, to):
    made = bucket.put(to, bucket.get(name, {}).data)
    answer = {"kind": "storage#rewriteResponse", "done": True, "resource": made}
    size = made["size"]
    handler.answer(200, answer | {"totalBytesRewritten": size, "objectSize": size})


def move(handler, bucket, query, body, name, to):
    with bucket.lock:
        made = bucket.put(to, bucket.get(name, {}).data)
        bucket.delete(name, {})
    handler.answer(200, made)


def compose(handler, bucket, query, body, name):
    parts = [part["name"] for part in json.loads(body)["sourceObjects"]]
    data = b"".join(bucket.get(part, {}).data for part in parts)
    handler.answer(200, bucket.put(name, data))


_B = f"/storage/v1/b/{BUCKET}"
ROUTES: list[tuple[str, Any]] = [
    (rf"GET {_B}", about),
    (rf"GET {_B}/o", listing),
    (rf"GET (?:/download)?{_B}/o/([^/]+)", read),
    (rf"POST /upload{_B}/o", upload),
    (r"PUT /upload/of/(\w+)", upload_part),
    (r"POST /upload/of/(\w+)", upload_part),
    (rf"DELETE {_B}/o/([^/]+)", delete),
    (rf"POST {_B}/o/([^/]+)/(?:rewriteTo|copyTo)/b/{BUCKET}/o/([^/]+)", rewrite),
    (rf"POST {_B}/o/([^/]+)/moveTo/o/([^/]+)", move),
    (rf"POST {_B}/o/([^/]+)/compose", compose),
]


def environment(url):
    """What programs need to find the bucket, and nobody's credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCE_METADATA_ROOT": "localhost:1",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC
        "GOOGLE_CLOUD_PROJECT": "none",
    }


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    bucket: Bucket

    def handle_error(self, *_):
        """A client that has hung up is no error here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


@contextlib.contextmanager
def serving():
    """Yields an empty bucket and the address at which it is served meanwhile."""
    with Server(("localhost", 0), Handler) as server:
        server.bucket = Bucket()
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.bucket, f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
