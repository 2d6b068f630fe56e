"""Images in tar archives, indexed in TFDS's order and read without unpacking.

Other files in them are counted by kind, and the log says the counts, as for folders.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mlp_mixer import console, files
from mlp_mixer.data import folders
from mlp_mixer.data.folders import LeftOut
from mlp_mixer.data.preparation.writing import Job
from mlp_mixer.text import printable

# Threads: several reads at once hide a network disk's latency.
_READERS = 16


class Member(NamedTuple):
    """A file inside an archive: its bytes are [offset, offset + size) of the tar."""

    name: str
    offset: int
    size: int


class Archive(NamedTuple):
    """A tar: a file, or the bytes [start, stop) of it, which are the member `inner`."""

    path: pathlib.Path
    label: int = -1
    inner: str = ""
    start: int = 0
    stop: int | None = None

    @property
    def end(self) -> int:
        """The byte of the file at which it ends."""
        return self.path.stat().st_size if self.stop is None else self.stop


@dataclasses.dataclass(frozen=True)
class TarImages:
    """Images of a split, each a range of bytes in one of the tars."""

    paths: tuple[str, ...]
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    name: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.name)

    @property
    def num_bytes(self) -> int:
        """Size of all images together."""
        return int(self.size.sum())

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yields examples `start` to `stop`: image (its bytes), label, file_name."""
        rows = np.arange(start, stop)
        # Read in the order of the disk; a shard fits into memory.
        by_place = rows[np.lexsort((self.offset[rows], self.tar[rows]))].tolist()
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            data = dict(zip(by_place, pool.map(self._bytes, by_place), strict=True))
        for i in rows.tolist():
            yield {
                "image": data.pop(i),
                "label": int(self.label[i]),
                "file_name": self.name[i].decode(),
            }

    def _bytes(self, i: int) -> bytes:
        path, size = self.paths[self.tar[i]], int(self.size[i])
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self.offset[i]))
        if len(data) != size:
            raise ValueError(f"{path} became shorter while it was read.")
        return data

    def shuffled(self, salt: str) -> "TarImages":
        """The images in the order of TFDS's split with the name `salt`.

        TFDS orders by the md5 of split and file name (tensorflow_datasets
        `core/shuffle.py`), so slices such as `train[99%:]` equal those of data that
        TFDS prepared.

        Raises:
          ValueError: two files have the same name.
        """
        seed = hashlib.md5(salt.encode())

        def digest(name: bytes) -> bytes:
            salted = seed.copy()
            salted.update(name)
            return salted.digest()

        digests = bytearray()
        for name in self.name:
            digests += digest(name)
        high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T
        order = np.lexsort((low, high))
        names = self.name[order]
        if (same := names[1:] == names[:-1]).any():
            i = int(np.flatnonzero(same)[0])
            where = sorted({self.paths[tar] for tar in self.tar[order[i : i + 2]]})
            twice = names[i].decode()
            raise ValueError(f"{twice} is there twice, in {' and '.join(where)}.")
        arrays = {f: getattr(self, f)[order] for f in _ARRAYS}
        return TarImages(self.paths, **arrays)


_ARRAYS = ("tar", "offset", "size", "name", "label")


def list_members(
    archive: Archive,
    left_out: LeftOut,
    kind_of: Callable[[str], str | None] = folders.why_left_out,
) -> list[Member]:
    """Lists the files in a tar that are wanted.

    Args:
      archive: the tar.
      left_out: counter to which the others are added.
      kind_of: name of a file → the kind that it is counted under; None: it is wanted.

    Raises:
      ValueError: its headers show that it is cut off or damaged.
    """
    members = []
    with open(archive.path, "rb") as file:
        file.seek(archive.start)
        try:
            with tarfile.TarFile(fileobj=file) as tar:
                for info in tar:
                    _check_size(info, archive.end)
                    name = os.path.basename(info.name)
                    if kind := _why_left_out(info, kind_of(name)):
                        left_out[kind] += 1
                    elif not info.isdir():
                        place = info.offset_data, info.size
                        members.append(Member(printable(name), *place))
            _check_end(file, tar.offset, archive.end)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            inside = f"{archive.inner} in " * bool(archive.inner)
            raise ValueError(
                f"{inside}{archive.path} is cut off or damaged ({error}): download it"
                " again."
            ) from error
    return members


def _why_left_out(info: tarfile.TarInfo, kind: str | None) -> str | None:
    """The kind that a member is counted under; `kind` is that of its name."""
    if info.isdir():
        return None
    if folders.SYSTEM_NAMES & {part.lower() for part in info.name.split("/")}:
        return folders.HIDDEN
    if kind or info.issym() or info.islnk():
        return kind or "linked"
    if not info.isfile():
        return "neither file nor folder"
    if info.issparse():  # its bytes are not in one piece
        return "sparse"
    return None if info.size else "empty"


def _check_size(info: tarfile.TarInfo, stop: int) -> None:
    # A negative size would let tarfile read the same members for ever.
    end = info.offset_data + (0 if info.issparse() else info.size)
    if info.size < 0 or end > stop:
        name = printable(info.name)
        raise tarfile.ReadError(f"{name} has {info.size:,} bytes, not within the tar")


def _check_end(file: BinaryIO, offset: int, stop: int) -> None:
    """Raises unless the archive has an end; tarfile stops at damaged headers too."""
    file.seek(offset)
    if offset + tarfile.BLOCKSIZE > stop or any(file.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"no end of the archive at byte {offset:,} of {stop:,}")


def index(
    job: Job,
    split: str,
    archives: Sequence[Archive],
    label_of: Callable[[Archive, Member], int] = lambda archive, member: archive.label,
) -> TarImages:
    """Returns all images of a split in TFDS's order; cached in the partial folder.

    Raises ValueError as `list_members` and `TarImages.shuffled` do.
    """
    paths = tuple(dict.fromkeys(str(archive.path) for archive in archives))
    cache = job.partial / f"{split}.npz"
    if cache.exists():
        with np.load(cache) as saved:
            return TarImages(paths, **{field: saved[field] for field in _ARRAYS})
    parts: dict[str, list[Any]] = {field: [] for field in _ARRAYS}
    sizes = [archive.end - archive.start for archive in archives]
    where = {path: i for i, path in enumerate(paths)}
    left_out = LeftOut()
    title = f"{job.name} {split}: listing"
    with console.counter(title, sum(sizes), "bytes") as advance:
        for archive, size in zip(archives, sizes, strict=True):
            found = list_members(archive, left_out)
            labels = [label_of(archive, member) for member in found]
            parts["tar"].append(np.full(len(found), where[str(archive.path)], np.int32))
            parts["offset"].append(np.array([m.offset for m in found], np.int64))
            parts["size"].append(np.array([m.size for m in found], np.int64))
            parts["name"].append(np.array([m.name.encode() for m in found], "S"))
            parts["label"].append(np.array(labels, np.int32))
            advance(size)
    folders.log_left_out(f"the tars of {job.name} {split}", left_out)
    arrays = {field: np.concatenate(part) for field, part in parts.items()}
    images = TarImages(paths, **arrays).shuffled(split)
    with files.writing(cache) as file:
        np.savez(file, **{field: getattr(images, field) for field in _ARRAYS})
    return images


def require(paths: Iterable[pathlib.Path], where_from: str) -> None:
    """Raises FileNotFoundError if files are missing, and names them."""
    if missing := [path for path in paths if not path.is_file()]:
        names = " and ".join(path.name for path in missing)
        raise FileNotFoundError(
            f"{names} must lie in {missing[0].parent}; get it from {where_from}, or"
            " name another folder with --manual_dir."
        )


def verify(job: Job, published: dict[pathlib.Path, tuple[int, str]]) -> None:
    """Compares files with their published size and md5, once per preparation.

    Raises:
      ValueError: one differs.
    """
    done = job.partial / "verified.tsv"
    if not job.verify or done.exists():
        return
    advice = "download it again, or pass --noverify if it is meant to be another"
    for path, (size, _) in published.items():
        if (found := path.stat().st_size) != size:
            raise ValueError(
                f"{path} has {found:,} bytes, the published file {size:,}: {advice}."
            )
    for path, (size, md5) in published.items():
        hasher = hashlib.md5()
        with (
            console.counter(f"{path.name}: md5", size, "bytes") as advance,
            open(path, "rb", buffering=0) as file,
        ):
            while block := file.read(1 << 24):
                hasher.update(block)
                advance(len(block))
        if hasher.hexdigest() != md5:
            raise ValueError(
                f"{path} has the md5 {hasher.hexdigest()}, the published file {md5}:"
                f" {advice}."
            )
    done.write_text("".join(f"{path}\n" for path in published))
