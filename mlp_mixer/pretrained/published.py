"""Published weights: a name → a local file, downloaded once and verified.

    path = published.fetch("imagenet1k/Mixer-B_16")
    path = published.fetch("timm/resmlp_24_224.fb_distilled_in1k")

No checksums of these files are published. The first download is held to TLS, to the
size that follows from the model, and to its arrays: of the model that the name says,
every value finite. Its SHA-256 is recorded beside it, in the format of `sha256sum`, and
every later load is compared with that. A file that is put into the cache by hand is
treated alike.

What authors have released as torch files has the address that their READMEs give; to
read it, or to check it when it first comes, torch has to be installed.

Environment: `MLP_MIXER_CACHE` is the folder of the files; `MLP_MIXER_WEIGHTS_URL` a
mirror (https) of the Mixer authors' bucket, `HF_ENDPOINT` one of the hub, as for its
own programs, `MLP_MIXER_AUTHORS_URL` one of all authors' torch files, with the paths
that they have at home; `SSL_CERT_FILE` the certificates to trust.
"""

import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mlp_mixer import files, known, models
from mlp_mixer.models.model import IMAGENET
from mlp_mixer.pretrained import (
    downloads,
    foreign,
    npz,
    safetensors,
    torch_files,
    tree,
)
from mlp_mixer.pretrained.normalisation import CENTRED, Normalisation
from mlp_mixer.text import brief, listed

logger = logging.getLogger(__name__)


class Host(NamedTuple):
    """A server of published files.

    Attributes:
      url: its address.
      variable: environment variable that names a mirror.
      path: path of a file there, by its {name}; a file's own otherwise.
    """

    url: str
    variable: str
    path: str = ""


BUCKET = Host(
    "https://storage.googleapis.com/mixer_models", "MLP_MIXER_WEIGHTS_URL", "{name}.npz"
)
HUB = Host(
    "https://huggingface.co", "HF_ENDPOINT", "{name}/resolve/main/model.safetensors"
)
# Where authors have put torch files, which may hold more than weights.
GITHUB, SHI_LABS, MS_MLP = (
    Host(url, "MLP_MIXER_AUTHORS_URL")
    for url in (
        "https://github.com",
        "https://shi-labs.com",
        "https://tsciencescu.blob.core.windows.net",
    )
)
IMAGE_SIZE = (224, 224)  # that all files here are for
# The weights, their average, and two moments of AdamW, and one to spare.
MOST_IN_A_TORCH_FILE = 5
# Names and headers of the largest file's 510 arrays; the sizes that are listed of the
# bucket's files need 0.085 MiB.
OVERHEAD_BYTES = 2**20 // 10


@dataclasses.dataclass(frozen=True)
class Published:
    """One published file: float32 weights for 224 px.

    A torch file may also hold what else its training program saves.

    Attributes:
      model: name of a size of an architecture.
      num_classes: number of classes of its head.
      overrides: fields of the model that differ from the table's.
      note: what a user should know before comparing it with the paper.
      host: where it is published.
      normalisation: what its images are normalised by.
      preprocess: the evaluation protocol of its published accuracy, a key of
        `data.image_ops.PROTOCOLS`; None: the default.
      path: path of the file on its host, where its name does not say it.
      ema: whether the published accuracy is that of the averaged weights, where a file
        holds both; None: nothing says so, and the averaged ones are read.
    """

    model: str
    num_classes: int = 1000
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    host: Host = BUCKET
    normalisation: Normalisation = CENTRED
    preprocess: str | None = None
    path: str = ""
    ema: bool | None = None

    @property
    def suffix(self) -> str:
        """Of its file."""
        return pathlib.PurePath(self.path or self.host.path).suffix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in our tree: shape} of its parameters and statistics."""
        model = models.create(
            self.model, num_classes=self.num_classes, **self.overrides
        )
        stats = dict(tree.variables(model, IMAGE_SIZE))
        return tree.shapes(stats.pop("params")) | tree.shapes(stats)

    @property
    def num_bytes(self) -> int:
        """Of its parameters and statistics."""
        return 4 * sum(map(math.prod, self.shapes.values()))

    @property
    def sizes(self) -> range:
        """The sizes in bytes that its file can have."""
        least = self.num_bytes
        factor = MOST_IN_A_TORCH_FILE if self.suffix in torch_files.SUFFIXES else 1
        return range(least, factor * least + OVERHEAD_BYTES + 1)


_ONLY = "pre-trained only, never fine-tuned to ImageNet's 1,000 classes"
_SAM = "not of the Mixer paper: trained with SAM (arXiv 2106.01548)"
_GSAM = "not of the Mixer paper: trained with GSAM (arXiv 2203.08065)"
_DISTILLED = "trained with a teacher (distillation)"
_IN22K = "pre-trained on ImageNet-22k, then fine-tuned to ImageNet-1k"
_DINO = "pre-trained without labels (DINO), for its features"
_UNREAD = "a torch file that nobody has read here: it may hold more than weights"


def _resmlp(size: str, note: str = "") -> Published:
    """A ResMLP of its authors, who evaluate on the centre 0.9 of an image."""
    return Published(
        size,
        note=note,
        host=HUB,
        normalisation=Normalisation(*IMAGENET),
        preprocess="timm-0.9",
    )


def _released(
    size: str,
    host: Host,
    path: str,
    *,
    preprocess: str = "timm",
    ema: bool | None = None,
) -> Published:
    """A torch file of a paper's authors, at the address that their README gives."""
    return Published(
        size,
        note=_UNREAD,
        host=host,
        normalisation=Normalisation(*IMAGENET),
        preprocess=preprocess,
        path=path,
        ema=ema,
    )


def _spach(size: str, file: str) -> Published:
    """A model of microsoft/SPACH, whose program evaluates weights of the last step."""
    path = f"microsoft/SPACH/releases/download/v1.0/{file}.pth"
    return _released(size, GITHUB, path, ema=False)


def _cyclemlp(size: str, preprocess: str) -> Published:
    path = f"ShoufaChen/CycleMLP/releases/download/v0.1/CycleMLP_{size.upper()}.pth"
    return _released(f"cyclemlp_{size}", GITHUB, path, preprocess=preprocess, ema=False)


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
    # What timm 1.0.31 lists of ResMLP and gMLP, but for what has no weights.
    "timm/resmlp_12_224.fb_in1k": _resmlp("resmlp_12"),
    "timm/resmlp_24_224.fb_in1k": _resmlp("resmlp_24"),
    "timm/resmlp_36_224.fb_in1k": _resmlp("resmlp_36"),
    "timm/resmlp_big_24_224.fb_in1k": _resmlp("resmlp_big_24"),
    "timm/resmlp_12_224.fb_distilled_in1k": _resmlp("resmlp_12", _DISTILLED),
    "timm/resmlp_24_224.fb_distilled_in1k": _resmlp("resmlp_24", _DISTILLED),
    "timm/resmlp_36_224.fb_distilled_in1k": _resmlp("resmlp_36", _DISTILLED),
    "timm/resmlp_big_24_224.fb_distilled_in1k": _resmlp("resmlp_big_24", _DISTILLED),
    "timm/resmlp_big_24_224.fb_in22k_ft_in1k": _resmlp("resmlp_big_24", _IN22K),
    "timm/resmlp_12_224.fb_dino": _resmlp("resmlp_12", _DINO),
    "timm/resmlp_24_224.fb_dino": _resmlp("resmlp_24", _DINO),
    "timm/gmlp_s16_224.ra3_in1k": Published(
        "gmlp_s16",
        note="trained by timm (its recipe ra3), not by the paper's authors",
        host=HUB,
        preprocess="timm",
    ),
    # What the authors' READMEs link to of models that are here, and have themselves.
    **{
        f"cyclemlp/CycleMLP_B{i}": _cyclemlp(f"b{i}", "timm-0.9" if i < 4 else "timm")
        for i in range(1, 6)
    },
    **{
        f"convmlp/convmlp_{size}_imagenet": _released(
            f"convmlp_{size}",
            SHI_LABS,
            f"projects/convmlp/checkpoints/convmlp_{size}_imagenet.pth",
            preprocess="timm-0.9",
        )
        for size in "sml"
    },
    **{
        f"hiremlp/hire_mlp_{size}": _released(
            f"hiremlp_{size}",
            GITHUB,
            f"ggjy/Hire-Wave-MLP.pytorch/releases/download/log/hire_mlp_{size}.pth",
        )
        for size in ("tiny", "small", "base")
    },
    **{
        f"msmlp/msmlp_{name}_patch4": _released(
            f"msmlp_{name[0]}",
            MS_MLP,
            f"projectshzheng/MSMLP/released_model/msmlp_{name}_patch4/"
            f"msmlp_{name}_patch4_ckpt_epoch299.pth",
        )
        for name in ("tiny", "small", "base")
    },
    "spach/smlp_s": _spach("smlpnet_s", "smlp_s"),
    "spach/smlp_b": _spach("smlpnet_b", "smlp_b"),
    **{
        f"spach/spach_ms_{file}": _spach(f"spach_ms_{size}", f"spach_ms_{file}")
        for file, size in {
            **{f"mlp_{size}": f"{size}_mlp" for size in ("xxs", "s")},
            **{f"conv_{size}": f"{size}_conv" for size in ("xxs", "s")},
            **{f"trans_{size}": f"{size}_attn" for size in ("xxs", "s")},
            **{"hybrid_s": "hybrid_s", "hybrid_s+": "hybrid_s_plus"},
        }.items()
    },
}


def is_published_as_npz(architecture: ModuleType) -> bool:
    """Whether npz files of an architecture are published, which hold arrays alone."""
    npz_files = [x for x in PUBLISHED.values() if x.host is BUCKET]
    return any(models.family(x.model) is architecture for x in npz_files)


def download_url(name: str) -> str:
    """Where a published file is downloaded from.

    Raises:
      ValueError: the mirror's address is not https.
    """
    host = PUBLISHED[name].host
    base = os.environ.get(host.variable) or host.url
    if not base.startswith("https://"):
        raise ValueError(
            f"{host.variable} is {base!r}; expected https://…, since nothing but TLS "
            "vouches for the first download."
        )
    path = PUBLISHED[name].path or host.path.format(name=name)
    return f"{base.rstrip('/')}/{path}"


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
      ModuleNotFoundError: it is a torch file, and torch is not installed.
      OSError: no room on the disk.
      ValueError: unknown name; a size that the model's file cannot have; not what was
        recorded when the file first came.
    """
    if name not in PUBLISHED:
        near = known.nearest(name, PUBLISHED)
        raise ValueError(f"No weights {name!r} are published; try {near}.")
    entry = PUBLISHED[name]
    path = files.default_cache_dir() / f"{name}{entry.suffix}"
    if entry.note:
        logger.info("%s is %s.", name, entry.note)
    if entry.suffix in torch_files.SUFFIXES:
        torch_files.check_installed(name)
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
    downloads.check_size(str(file), file.stat().st_size, entry.sizes, again)
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
    """Raises ValueError unless a file holds what it should, every value finite."""
    wanted = {name: (shape, "float32") for name, shape in entry.shapes.items()}

    def refuse(wrong: Sequence[str]) -> None:
        if wrong:
            raise ValueError(
                f"{file} is not what its name says, a {entry.model} of "
                f"{entry.num_classes:,} classes; remove it and try again.\n"
                + listed(wrong)
            )

    def check_declared(arrays: Mapping[str, np.ndarray], _: object = None) -> None:
        names = foreign.find(arrays, models.family(entry.model))
        ours = names.with_our_names(arrays) if names else arrays
        found = {name: (x.shape, str(x.dtype)) for name, x in ours.items()}
        refuse(tree.differences(found, wanted))

    # The file's own name may be that of a part, which has another ending.
    if entry.suffix in torch_files.SUFFIXES:
        arrays = torch_files.read(file, check_declared)
    else:
        read = {".npz": npz.read, ".safetensors": safetensors.read}[entry.suffix]
        arrays, _ = read(file, check_declared)
    check_declared(arrays)  # a header of safetensors was read without its dtypes
    refuse(
        [
            f"{name}: values are infinite or no numbers"
            for name, x in arrays.items()
            if not np.isfinite(x).all()
        ]
    )


def _download(
    name: str,
    path: pathlib.Path,
    entry: Published,
    waits_s: Sequence[float],
) -> None:
    """Downloads to `path`, which has its name once it is complete and recorded."""
    url, part = download_url(name), downloads.Part(path.with_name(f"{path.name}.part"))
    otherwise = (
        f"get that file elsewhere and put it there: {path}, or name a mirror in "
        f"{entry.host.variable}"
    )
    downloads.complete(part, name, url, entry.sizes, waits_s, otherwise)
    try:
        _verify_or_record(part.path, path, entry)
    except ValueError as error:
        part.remove()
        raise ValueError(f"What {url} sent is dropped: {error}") from error
    part.rename(path)
