"""A file from an https server: continued where it was cut, and the same one throughout.

A part of a file and what it is a part of, its ETag and its size, lie beside each other
until it is whole. Nothing but TLS says who sends it: addresses and redirections have to
be https, and `SSL_CERT_FILE` names other certificates to trust.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import logging
import os
import pathlib
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from mlp_mixer import files
from mlp_mixer.text import brief

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0  # Without one byte; for an answer to begin.
# What is slower over this time is given up, and continued by a later call.
SLOWEST_BYTES_PER_SECOND, WINDOW_SECONDS = 4096, 30.0
MAX_ATTEMPTS = 100  # Of one call, however much each of them brings.


def check_size(what: str, size: int, sizes: range, advice: str) -> None:
    """Raises ValueError unless a file has one of the sizes that it can have."""
    if size not in sizes:
        raise ValueError(
            f"{what} has {size:,} bytes, expected {sizes[0]:,} (the parameters) to "
            f"{sizes[-1]:,}: {advice}."
        )


class _AttemptFailed(Exception):
    """An attempt ended before the file did."""

    def __init__(self, reason: str, *, again: bool, slow: bool = False):
        super().__init__(brief(reason))
        self.again = again
        self.slow = slow


@dataclasses.dataclass(frozen=True)
class Part:
    """A file that is not complete yet, and of what it is a part."""

    path: pathlib.Path

    @property
    def _note(self) -> pathlib.Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def num_bytes(self) -> int:
        """What is there."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def whole(self) -> tuple[str, int]:
        """(ETag, size) of the whole file; ("", 0) if it cannot be continued."""
        try:
            note = files.read_json(self._note)
        except FileNotFoundError:
            return "", 0
        except (OSError, ValueError) as error:  # Cut while it was written, say.
            logger.warning("%s The download begins anew.", error)
            return "", 0
        etag, size = note.get("etag"), note.get("size")
        # A strong ETag promises the same bytes, a weak one the same meaning.
        strong = isinstance(etag, str) and re.fullmatch(r'"[!#-~]*"', etag)
        return (etag, size) if strong and type(size) is int else ("", 0)

    def begin(self, etag: str | None, size: int) -> None:
        """Begins anew: the old bytes go before the note says of what new ones are."""
        open(self.path, "wb").close()
        self._note.write_text(json.dumps({"etag": etag, "size": size}))

    def remove(self) -> None:
        """Removes it, and what it is a part of."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def rename(self, path: pathlib.Path) -> None:
        """Gives it the name of the whole file, which it is."""
        self.path.replace(path)
        self._note.unlink()


def complete(
    part: Part,
    name: str,
    url: str,
    sizes: range,
    waits_s: Sequence[float],
    otherwise: str,
) -> None:
    """Downloads what is missing of a file, in as many attempts as it takes.

    Args:
      part: what is there of it.
      name: its name, for people.
      url: its address (https).
      sizes: the sizes in bytes that it can have.
      waits_s: seconds before each further attempt, counted anew whenever some of the
        file arrived.
      otherwise: what people can do if it cannot be downloaded.

    Raises:
      FileNotFoundError: no network, no such file, or too many cuts.
      OSError: no room on the disk.
      ValueError: the server has a file of another size.
    """
    most, waits, attempts = part.num_bytes, list(waits_s), 0
    while True:
        try:
            attempts += 1
            _download_missing(name, url, part, sizes)
            break
        except _AttemptFailed as failure:
            if part.num_bytes > most and not failure.slow:
                most, waits = part.num_bytes, list(waits_s)
            if not (failure.again and waits and attempts < MAX_ATTEMPTS):
                kept = part.num_bytes if part.whole[0] else 0
                raise FileNotFoundError(
                    f"{name} cannot be downloaded from {url}: {failure}, at attempt "
                    f"{attempts}. Try again"
                    + f" ({kept:,} bytes are kept)" * bool(kept)
                    + f", or {otherwise}."
                ) from failure
            logger.warning("%s: %s; again in %g s", name, failure, waits[0])
            time.sleep(waits.pop(0))


def _download_missing(name: str, url: str, part: Part, sizes: range) -> None:
    """Asks once for what is missing, and appends what comes.

    Raises:
      _AttemptFailed: it is still not complete.
      OSError: no room on the disk.
      ValueError: the server has a file of another size.
    """
    from mlp_mixer import console  # only a download is shown

    etag, size = part.whole
    have = part.num_bytes if etag else 0
    if have and have == size:  # Killed before it had its name.
        return
    headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
    with _open_url(urllib.request.Request(url, headers=headers), part) as response:
        if response.status == 206:
            span = response.headers["Content-Range"]
            same = response.headers["ETag"] in (None, etag)
            if span != f"bytes {have}-{size - 1}/{size}" or not same:
                part.remove()
                raise _AttemptFailed(
                    f"the server sent another part: {span}", again=True
                )
        else:
            have, size = 0, response.length
            if size is None:
                raise ValueError(
                    f"{url}: the server does not say how long the file is."
                )
            check_size(url, size, sizes, "that is not the published file")
            part.begin(response.headers["ETag"], size)
        folder = part.path.parent
        files.check_room(folder, size - have, name, "MLP_MIXER_CACHE")
        with (
            open(part.path, "ab") as file,
            console.counter(f"{name}: download", size, "bytes", have) as advance,
        ):
            had, since = have, time.monotonic()
            while have < size:
                block = _read_block(response, min(1 << 20, size - have))
                if not block:
                    raise _AttemptFailed(
                        f"cut at {have:,} of {size:,} bytes", again=True
                    )
                file.write(block)
                have += len(block)
                advance(len(block))
                if (seconds := time.monotonic() - since) >= WINDOW_SECONDS:
                    rate = (have - had) / seconds
                    if rate < SLOWEST_BYTES_PER_SECOND:
                        raise _AttemptFailed(
                            f"the server sent {rate:,.1f} bytes/s over "
                            f"{WINDOW_SECONDS:g} s, less than "
                            f"{SLOWEST_BYTES_PER_SECOND:,}",
                            again=True,
                            slow=True,
                        )
                    had, since = have, time.monotonic()
            file.flush()
            os.fsync(file.fileno())


class _Connection(http.client.HTTPSConnection):
    """Waits for an answer so long in all: a socket's own time begins with each byte."""

    def getresponse(self) -> http.client.HTTPResponse:
        connection, late = self.sock, threading.Event()

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):  # It has ended.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

        timer = threading.Timer(TIMEOUT_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():
                raise TimeoutError(f"no whole answer in {TIMEOUT_SECONDS:g} s")


class _Https(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self._trusted = ssl.create_default_context()
        super().__init__(context=self._trusted)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request, context=self._trusted)


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows without reading what an answer says besides, which may have no end."""

    def http_error_302(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any
    ) -> Any:
        fp.close()
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open_url(request: urllib.request.Request, part: Part) -> Any:
    """The response to `request`, over https even if it is redirected."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Https(),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        return opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.remove()
        again = error.code in (408, 416, 429) or error.code >= 500
        # Of a loop the library tells in several lines.
        reason = " ".join(f"{error.code} {error.reason}".split())
        raise _AttemptFailed(reason, again=again) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            reason = f"{error.reason} (SSL_CERT_FILE names the certificates to trust)"
            raise _AttemptFailed(reason, again=False) from error
        # Who has a part has had a network, which may come back.
        raise _AttemptFailed(str(error.reason), again=part.num_bytes > 0) from error
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptFailed(repr(error), again=True) from error


def _read_block(response: Any, most: int) -> bytes:
    try:
        return response.read1(most)
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptFailed(repr(error), again=True) from error
