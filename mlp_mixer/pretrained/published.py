"""The authors' published weights: a name → a local file, downloaded once and verified.

    path = published.fetch("imagenet1k/Mixer-B_16")

No checksums of these files are published. The first download is held to TLS, to the
size that follows from the model, and to its arrays: of the model that the name says,
every value finite. Its SHA-256 is recorded beside it, in the format of `sha256sum`, and
every later load is compared with that. A file that is put into the cache by hand is
treated alike.

Environment: `MLP_MIXER_CACHE` is the folder of the files, `MLP_MIXER_WEIGHTS_URL` a
mirror (https) of the authors' bucket, `SSL_CERT_FILE` the certificates to trust.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import logging
import math
import os
import pathlib
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mlp_mixer import files, known, models
from mlp_mixer.pretrained import npz, tree
from mlp_mixer.text import brief, listed

logger = logging.getLogger(__name__)

URL = "https://storage.googleapis.com/mixer_models"
# Names and headers of the largest file's 294 arrays; the listed sizes need 0.085 MiB.
OVERHEAD_BYTES = 2**20 // 10
TIMEOUT_SECONDS = 60.0  # Without one byte; for an answer to begin.
# What is slower over this time is given up, and continued by a later call.
SLOWEST_BYTES_PER_SECOND, WINDOW_SECONDS = 4096, 30.0
MAX_ATTEMPTS = 100  # Of one call, however much each of them brings.


@dataclasses.dataclass(frozen=True)
class Published:
    """One published file: float32 parameters for 224 px, without optimiser state.

    Attributes:
      model: name of a size of an architecture.
      num_classes: number of classes of its head.
      overrides: fields of the model that differ from the table's.
      note: what a user should know before comparing it with the paper.
    """

    model: str
    num_classes: int = 1000
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in our tree: shape} of its parameters."""
        model = models.create(
            self.model, num_classes=self.num_classes, **self.overrides
        )
        return tree.shapes(tree.variables(model, (224, 224))["params"])

    @property
    def num_bytes(self) -> int:
        """Of its parameters."""
        return 4 * sum(map(math.prod, self.shapes.values()))

    @property
    def sizes(self) -> range:
        """The sizes in bytes that its npz file can have."""
        return range(self.num_bytes, self.num_bytes + OVERHEAD_BYTES + 1)


_ONLY = "pre-trained only, never fine-tuned to ImageNet's 1,000 classes"
_SAM = "not of the Mixer paper: trained with SAM (arXiv 2106.01548)"
_GSAM = "not of the Mixer paper: trained with GSAM (arXiv 2203.08065)"

# All that vision_transformer's vit_jax.ipynb lists: no JFT model, no S/32, L/32
# or H/14 of the paper's, nothing fine-tuned. What timm tags goog_in21k_ft_in1k are the
# two imagenet1k files, which have seen no other data.
PUBLISHED: dict[str, Published] = {
    "imagenet1k/Mixer-B_16": Published("mixer_b16"),
    "imagenet1k/Mixer-L_16": Published("mixer_l16"),
    "imagenet21k/Mixer-B_16": Published("mixer_b16", 21843, note=_ONLY),
    "imagenet21k/Mixer-L_16": Published("mixer_l16", 21843, note=_ONLY),
    "sam/Mixer-B_16": Published("mixer_b16", note=_SAM),
    "sam/Mixer-B_32": Published("mixer_b32", note=_SAM),
    "gsam/Mixer-B_16": Published("mixer_b16", note=_GSAM),
    "gsam/Mixer-B_32": Published("mixer_b32", note=_GSAM),
    "gsam/Mixer-S_8": Published(
        "mixer_s16", overrides={"patch_size": (8, 8)}, note=_GSAM
    ),
    "gsam/Mixer-S_16": Published("mixer_s16", note=_GSAM),
    "gsam/Mixer-S_32": Published("mixer_s32", note=_GSAM),
}


def is_published(architecture: ModuleType) -> bool:
    """Whether files of an architecture are published."""
    return any(models.family(x.model) is architecture for x in PUBLISHED.values())


def download_url(name: str) -> str:
    """Where a published file is downloaded from.

    Raises:
      ValueError: the mirror's address is not https.
    """
    base = os.environ.get("MLP_MIXER_WEIGHTS_URL") or URL
    if not base.startswith("https://"):
        raise ValueError(
            f"MLP_MIXER_WEIGHTS_URL is {base!r}; expected https://…, since nothing but "
            "TLS vouches for the first download."
        )
    return f"{base.rstrip('/')}/{name}.npz"


def fetch(name: str, *, waits_s: Sequence[float] = (1.0, 4.0, 16.0)) -> pathlib.Path:
    """Returns the verified local file of published weights, downloaded if need be.

    A cut download is continued, by this call or a later one. Any number of processes
    may call this at once: one downloads, the others wait.

    Args:
      name: a key of `PUBLISHED`.
      waits_s: seconds before each further attempt, counted anew whenever some of the
        file arrived.

    Raises:
      FileNotFoundError: it is not here and cannot be downloaded: no network, no such
        file, or too many cuts.
      OSError: no room on the disk.
      ValueError: unknown name; a size that the model's file cannot have; not what was
        recorded when the file first came.
    """
    if name not in PUBLISHED:
        near = known.nearest(name, PUBLISHED)
        raise ValueError(f"No weights {name!r} are published; try {near}.")
    entry = PUBLISHED[name]
    path = files.default_cache_dir() / f"{name}.npz"
    if entry.note:
        logger.info("%s is %s.", name, entry.note)
    try:
        if path.exists() and _record_of(path).exists():
            _verify_or_record(path, path, entry)  # No lock: a cache may be read-only.
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with files.locked(lock, f"downloads {path}"):
            if path.exists():  # Put there by hand, or by the process that had the lock.
                _verify_or_record(path, path, entry)
            else:
                _download(name, path, entry, waits_s)
    except OSError as error:
        if error.errno is None:  # Ours: it says what to do.
            raise
        where = error.filename or path
        raise OSError(f"{name} cannot be kept: {where}: {error.strerror}.") from error
    return path


# --- The cache ------------------------------------------------------------------------


def _record_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.sha256")


def _verify_or_record(file: pathlib.Path, path: pathlib.Path, entry: Published) -> None:
    """Compares `file` with what is recorded for `path`, or checks and records it.

    Raises:
      ValueError: another size or another SHA-256; or, where there is no record yet, not
        the parameters that the name stands for.
    """
    again = f"remove {file} and try again"
    _check_size(str(file), file.stat().st_size, entry.sizes, again)
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    record = _record_of(path)
    if not record.exists():
        _check_content(file, entry)
        files.write_text(record, f"{found}  {path.name}\n")
        logger.info("%s: recorded its SHA-256 %s", path, found)
        return
    expected = _recorded_sha256(record, path)
    if found != expected:
        raise ValueError(
            f"{file} has the SHA-256 {found}, expected {expected}, which {record} "
            f"recorded when it first came. Try again without {file}; if the "
            "published file itself has changed, also without that record."
        )


def _recorded_sha256(record: pathlib.Path, path: pathlib.Path) -> str:
    """The SHA-256 that a record, in the format of `sha256sum`, holds for `path`."""
    text = files.read_bytes(record, 4096).decode(errors="replace")
    line = re.fullmatch(r"([0-9a-fA-F]{64})(?: [ *](.+))?\n?", text)
    if line is None or line[2] not in (None, path.name):
        raise ValueError(
            f"{record} holds {brief(text, 100)!r}; expected a SHA-256 and {path.name}. "
            "Remove it, and also the file if you do not know where that is from."
        )
    return line[1].lower()


def _check_content(file: pathlib.Path, entry: Published) -> None:
    """Raises ValueError unless an npz file holds what it should, every value finite."""
    wanted = {name: (shape, "float32") for name, shape in entry.shapes.items()}

    def refuse(wrong: Sequence[str]) -> None:
        if wrong:
            raise ValueError(
                f"{file} is not what its name says, a {entry.model} of "
                f"{entry.num_classes:,} classes; remove it and try again.\n"
                + listed(wrong)
            )

    def check_declared(arrays: Mapping[str, np.ndarray], _: object) -> None:
        found = {name: (x.shape, str(x.dtype)) for name, x in arrays.items()}
        refuse(tree.differences(found, wanted))

    arrays, _ = npz.read(file, check_declared)
    refuse(
        [
            f"{name}: values are infinite or no numbers"
            for name, x in arrays.items()
            if not np.isfinite(x).all()
        ]
    )


def _check_size(what: str, size: int, sizes: range, advice: str) -> None:
    if size not in sizes:
        raise ValueError(
            f"{what} has {size:,} bytes, expected {sizes[0]:,} (the parameters) to "
            f"{sizes[-1]:,}: {advice}."
        )


# --- The download ---------------------------------------------------------------------


class _AttemptFailed(Exception):
    """An attempt ended before the file did."""

    def __init__(self, reason: str, *, again: bool, slow: bool = False):
        super().__init__(brief(reason))
        self.again = again
        self.slow = slow


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file that is not complete yet, and of what it is a part."""

    path: pathlib.Path

    @property
    def _note(self) -> pathlib.Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def num_bytes(self) -> int:
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
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def rename(self, path: pathlib.Path) -> None:
        self.path.replace(path)
        self._note.unlink()


def _download(
    name: str,
    path: pathlib.Path,
    entry: Published,
    waits_s: Sequence[float],
) -> None:
    """Downloads to `path`, which has its name once it is complete and recorded."""
    url, part = download_url(name), _Part(path.with_name(f"{path.name}.part"))
    most, waits, attempts = part.num_bytes, list(waits_s), 0
    while True:
        try:
            attempts += 1
            _download_missing(name, url, part, entry.sizes)
            break
        except _AttemptFailed as failure:
            if part.num_bytes > most and not failure.slow:
                most, waits = part.num_bytes, list(waits_s)
            if not (failure.again and waits and attempts < MAX_ATTEMPTS):
                kept = part.num_bytes if part.whole[0] else 0
                raise FileNotFoundError(
                    f"{name} cannot be downloaded from {url}: {failure}, at attempt "
                    f"{attempts}. Try again"
                    + f" ({kept:,} bytes are kept)"
                    * bool(kept)
                    + f", or get that file elsewhere and put it there: {path}, or name"
                    " a mirror in MLP_MIXER_WEIGHTS_URL."
                ) from failure
            logger.warning("%s: %s; again in %g s", name, failure, waits[0])
            time.sleep(waits.pop(0))
    try:
        _verify_or_record(part.path, path, entry)
    except ValueError as error:
        part.remove()
        raise ValueError(f"What {url} sent is dropped: {error}") from error
    part.rename(path)


def _download_missing(name: str, url: str, part: _Part, sizes: range) -> None:
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
            _check_size(url, size, sizes, "that is not the published file")
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


def _open_url(request: urllib.request.Request, part: _Part) -> Any:
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
