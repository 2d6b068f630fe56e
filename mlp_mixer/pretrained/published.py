"""The authors' published weights: a name → a local file, downloaded once and verified.

    path = published.fetch("imagenet1k/Mixer-B_16")

No checksums of these files are published. The first download is held to TLS and to the
size that follows from the model; its SHA-256 is recorded beside it, in the format of
`sha256sum`, and every later load is compared with that. A file that is put into the
cache by hand is treated alike.

Environment: `MLP_MIXER_CACHE` is the folder of the files, `MLP_MIXER_WEIGHTS_URL` a
mirror (https) of the authors' bucket, `SSL_CERT_FILE` the certificates to trust.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import pathlib
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlp_mixer import metrics, models

logger = logging.getLogger(__name__)

# (what, total, unit, done) → a context that gives `advance(amount)`.
Progress = Callable[
    [str, int, str, int], contextlib.AbstractContextManager[Callable[[int], None]]
]

URL = "https://storage.googleapis.com/mixer_models"
# Names and headers of the largest file's 294 arrays; the listed sizes need 0.085 MiB.
OVERHEAD_BYTES = 2**20 // 10
TIMEOUT_SECONDS = 60.0  # Without one byte.


@dataclasses.dataclass(frozen=True)
class Published:
    """One published file: float32 parameters for 224 px, without optimiser state.

    Attributes:
      model: a key of `models.MODELS`.
      num_classes: of its head.
      overrides: fields of the model that differ from the table's.
      note: what a user should know before comparing it with the paper.
    """

    model: str
    num_classes: int = 1000
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def num_bytes(self) -> int:
        """Of its parameters."""
        model = models.create(
            self.model, num_classes=self.num_classes, **self.overrides
        )
        patch = model.patch_size[0] * model.patch_size[1]
        c, s = model.hidden_dim, 224 * 224 // patch
        tokens, channels = model.tokens_mlp_dim, model.channels_mlp_dim
        stem = patch * 3 * c + c
        token_mixing = 2 * s * tokens + tokens + s
        channel_mixing = 2 * c * channels + channels + c
        norm = 2 * c
        blocks = model.num_blocks * (2 * norm + token_mixing + channel_mixing)
        return 4 * (stem + blocks + norm + (c + 1) * self.num_classes)

    @property
    def sizes(self) -> range:
        """The sizes in bytes that its npz file can have."""
        return range(self.num_bytes, self.num_bytes + OVERHEAD_BYTES + 1)


_ONLY = "pre-trained only, never fine-tuned to ImageNet's 1,000 classes"
_SAM = "not of the Mixer paper: trained with SAM (arXiv 2106.01548)"
_GSAM = "not of the Mixer paper: trained with GSAM (arXiv 2203.08065)"

# The listing in vision_transformer's vit_jax.ipynb, whole: no JFT model, no S/32, L/32
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


def lookup(name: str) -> Published:
    """Returns what is known of a published file.

    Raises:
      ValueError: no such name; the nearest are listed first.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(str(name), PUBLISHED, len(PUBLISHED), 0)
        raise ValueError(f"No weights {name!r} are published; try {', '.join(near)}.")
    return PUBLISHED[name]


def address(name: str) -> str:
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


def default_cache_dir() -> pathlib.Path:
    """$MLP_MIXER_CACHE, or mlp_mixer in $XDG_CACHE_HOME, or in ~/.cache."""
    if chosen := os.environ.get("MLP_MIXER_CACHE"):
        return pathlib.Path(chosen).expanduser()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(parent).expanduser() / "mlp_mixer"


def fetch(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress = metrics.counter,
    waits_s: Sequence[float] = (1.0, 4.0, 16.0),
) -> pathlib.Path:
    """Returns the verified local file of published weights, downloaded if need be.

    A cut download is continued, by this call or a later one. Any number of processes
    may call this at once: one downloads, the others wait.

    Args:
      name: a key of `PUBLISHED`.
      cache_dir: where files are kept, as `<cache_dir>/<name>.npz`; None is
        `default_cache_dir()`.
      progress: (what, total, unit, done) → a context that gives `advance(amount)`.
      waits_s: seconds before each further attempt, counted anew whenever some of the
        file arrived.

    Raises:
      FileNotFoundError: it is not here and cannot be downloaded: no network, no such
        file, or too many cuts.
      OSError: no room on the disk.
      ValueError: unknown name; a size that the model's file cannot have; not what was
        recorded when the file first came.
    """
    entry = lookup(name)
    folder = default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir)
    path = folder.expanduser() / f"{name}.npz"
    if entry.note:
        logger.info("%s is %s.", name, entry.note)
    if path.exists() and _record(path).exists():
        _verify(path, path, entry.sizes)  # No lock: a cache may be read-only.
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if path.exists():  # Put there by hand, or by the process that had the lock.
            _verify(path, path, entry.sizes)
        else:
            _download(name, path, entry.sizes, progress, waits_s)
    return path


# --- The cache ------------------------------------------------------------------------


def _record(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    # The kernel releases this lock when its holder dies, however it dies.
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process downloads %s; waiting for it.", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _verify(file: pathlib.Path, path: pathlib.Path, sizes: range) -> None:
    """Compares `file` with what is recorded for `path`, or records it.

    Raises:
      ValueError: another size or another SHA-256.
    """
    _check_size(str(file), file.stat().st_size, sizes, f"remove {file} and try again")
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    record = _record(path)
    if not record.exists():
        unfinished = record.with_name(f".{record.name}")
        unfinished.write_text(f"{found}  {path.name}\n")
        unfinished.replace(record)
        logger.info("%s: recorded its SHA-256 %s", path, found)
        return
    expected = (record.read_text().split() or ["nothing"])[0]
    if found != expected:
        raise ValueError(
            f"{file} has the SHA-256 {found}, expected {expected}, which {record} "
            f"recorded when it first came. Try again without {file}; if the "
            "published file itself has changed, also without that record."
        )


def _check_size(what: str, size: int, sizes: range, advice: str) -> None:
    if size not in sizes:
        raise ValueError(
            f"{what} has {size:,} bytes, expected {sizes[0]:,} (the parameters) to "
            f"{sizes[-1]:,}: {advice}."
        )


# --- The download ---------------------------------------------------------------------


class _Failed(Exception):
    """An attempt ended before the file did."""

    def __init__(self, reason: str, *, again: bool):
        super().__init__(reason)
        self.again = again


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
            note = json.loads(self._note.read_text())
        except (FileNotFoundError, ValueError):  # Cut while it was written.
            return "", 0
        return note["etag"], note["size"]

    def begin(self, etag: str | None, size: int) -> None:
        """Begins anew: the old bytes go before the note says of what new ones are."""
        open(self.path, "wb").close()
        # Equal weak ETags promise the same meaning, not the same bytes.
        strong = etag if etag and not etag.startswith("W/") else ""
        self._note.write_text(json.dumps({"etag": strong, "size": size}))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def rename(self, path: pathlib.Path) -> None:
        self.path.replace(path)
        self._note.unlink()


def _download(
    name: str,
    path: pathlib.Path,
    sizes: range,
    progress: Progress,
    waits_s: Sequence[float],
) -> None:
    """Downloads to `path`, which has its name once it is complete and recorded."""
    url, part = address(name), _Part(path.with_name(f"{path.name}.part"))
    most, waits = part.num_bytes, list(waits_s)
    while True:
        try:
            _attempt(name, url, part, sizes, progress)
            break
        except _Failed as failure:
            if part.num_bytes > most:
                most, waits = part.num_bytes, list(waits_s)
            if not (failure.again and waits):
                kept = part.num_bytes if part.whole[0] else 0
                raise FileNotFoundError(
                    f"{name} cannot be downloaded from {url}: {failure}. Try again"
                    + f" ({kept:,} bytes are kept)" * bool(kept)
                    + f", or get that file elsewhere and put it there: {path}, or name"
                    " a mirror in MLP_MIXER_WEIGHTS_URL."
                ) from failure
            logger.warning("%s: %s; again in %g s", name, failure, waits[0])
            time.sleep(waits.pop(0))
    try:
        _verify(part.path, path, sizes)
    except ValueError:
        part.remove()
        raise
    part.rename(path)


def _attempt(
    name: str, url: str, part: _Part, sizes: range, progress: Progress
) -> None:
    """Asks once for what is missing, and appends what comes.

    Raises:
      _Failed: it is still not complete.
      OSError: no room on the disk.
      ValueError: the server has a file of another size.
    """
    etag, size = part.whole
    have = part.num_bytes if etag else 0
    if have and have == size:  # Killed before it had its name.
        return
    headers = {"Range": f"bytes={have}-", "If-Range": etag} if have else {}
    with _open(urllib.request.Request(url, headers=headers), part) as response:
        if response.status == 206:
            span = response.headers["Content-Range"]
            same = response.headers["ETag"] in (None, etag)
            if span != f"bytes {have}-{size - 1}/{size}" or not same:
                part.remove()
                raise _Failed(f"the server sent another part: {span}", again=True)
        else:
            have, size = 0, response.length
            if size is None:
                raise ValueError(
                    f"{url}: the server does not say how long the file is."
                )
            _check_size(url, size, sizes, "that is not the published file")
            part.begin(response.headers["ETag"], size)
        _check_disk(name, part.path.parent, size - have)
        with (
            open(part.path, "ab") as file,
            progress(f"{name}: download", size, "bytes", have) as advance,
        ):
            while have < size:
                block = _read(response, min(1 << 20, size - have))
                if not block:
                    raise _Failed(f"cut at {have:,} of {size:,} bytes", again=True)
                file.write(block)
                have += len(block)
                advance(len(block))
            file.flush()
            os.fsync(file.fileno())


def _open(request: urllib.request.Request, part: _Part) -> Any:
    """The response to `request`, over https even if it is redirected."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPRedirectHandler(),
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
        raise _Failed(f"{error.code} {error.reason}", again=again) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            said = f"{error.reason} (SSL_CERT_FILE names the certificates to trust)"
            raise _Failed(said, again=False) from error
        # Who has a part has had a network, which may come back.
        raise _Failed(str(error.reason), again=part.num_bytes > 0) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(repr(error), again=True) from error


def _read(response: Any, most: int) -> bytes:
    try:
        return response.read1(most)
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(repr(error), again=True) from error


def _check_disk(name: str, folder: pathlib.Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{name} needs {num_bytes / 1e9:,.3f} GB in {folder}, where "
            f"{free / 1e9:,.3f} GB are free. Make room, or choose another disk with "
            "MLP_MIXER_CACHE."
        )
