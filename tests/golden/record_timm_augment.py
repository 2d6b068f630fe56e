"""Records timm_augment.json and timm_augment.npz from timm and Pillow; see README.md.

What timm does to an image on the host, in timm's own code: RandAugment op by op and
what it draws, the crop of training, the protocols of evaluation.

    python tests/golden/record_timm_augment.py
"""

import collections
import io
import json
import random
import sys
from typing import Any

import cases
import numpy as np
import PIL.Image

RECIPE = "rand-m9-mstd0.5-inc1"


def photo(name: str) -> PIL.Image.Image:
    """A photograph as timm's datasets open it."""
    return PIL.Image.open(io.BytesIO(cases.PHOTOS[name])).convert("RGB")


def training(size: int, interpolation: str) -> list[Any]:
    """timm's steps of training: crop, flip, RandAugment, …"""
    from timm.data import create_transform

    transform = create_transform(
        size, is_training=True, auto_augment=RECIPE, interpolation=interpolation
    )
    return transform.transforms


def without_chance(op: Any, magnitude: float, resample: Any) -> Any:
    """An op that is always applied, at this magnitude and with this filter."""
    op.prob, op.magnitude, op.magnitude_std = 1.0, magnitude, 0
    op.kwargs["resample"] = resample
    return op


def operations() -> tuple[dict[str, Any], dict[str, int]]:
    """The arguments of timm's ops, and checksums of what they make of images."""
    from timm.data import auto_augment

    fair = random.random
    arguments: dict[str, Any] = collections.defaultdict(dict)
    sums, failed = {}, set()
    images = cases.augmented_images(*map(np.array, map(photo, cases.AUGMENTED)))
    for op in training(224, "bicubic")[2].ops:
        for magnitude in cases.TIMM_MAGNITUDES:
            for sign, number in (("+", 0.25), ("-", 0.75)):
                auto_augment.random.random = lambda number=number: number
                if op.level_fn:
                    (argument,) = op.level_fn(magnitude, op.hparams)
                    arguments[op.name][f"{magnitude}{sign}"] = argument
                for key, x in images.items():
                    for name in ("BILINEAR", "BICUBIC"):
                        resample = PIL.Image.Resampling[name]
                        always = without_chance(op, magnitude, resample)
                        where = f"{op.name}/{key}/{magnitude}{sign}/{name}"
                        try:
                            made = np.array(always(PIL.Image.fromarray(x)))
                        except ValueError as error:
                            failed.add(f"{op.name} at {magnitude}: {error}")
                            continue
                        sums[where] = cases.checksum(made)
    auto_augment.random.random = fair
    print("timm fails:", *failed)
    return arguments, without_repetition(sums)


def without_repetition(sums: dict[str, int]) -> dict[str, int]:
    """Leaves out the sign and the filter where they change nothing."""
    kept: dict[str, int] = {}
    for where, value in sums.items():
        name, key, level, _ = where.split("/")
        first = f"{name}/{key}/{level[:-1]}+/BILINEAR"
        if where == first or value != sums[first]:
            kept[where] = value
    return kept


def draws() -> dict[str, Any]:
    """How often timm's RandAugment draws what, of cases.TIMM_DRAWS images."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    augment = training(224, "random")[2]
    drawn: list[tuple[str, Any, Any]] = []

    def recorder(name: str) -> Any:
        def record(image: Any, *arguments: Any, **how: Any) -> Any:
            # As timm's ops do it.
            resample = random.choice(how["resample"])
            drawn.append((name, *(arguments or [None]), int(resample)))
            return image

        return record

    for op in augment.ops:
        op.aug_fn = recorder(op.name)
    counts = []
    for _ in range(cases.TIMM_DRAWS):
        before = len(drawn)
        augment(None)
        counts.append(len(drawn) - before)
    return cases.law(counts, drawn)


def crop_pixels() -> dict[str, Any]:
    """Boxes that timm drew, and checksums of what it made of them."""
    found = {}
    for name in cases.TIMM_PHOTOS:
        image = photo(name)
        for size in (224, 96):
            for interpolation in ("bilinear", "bicubic"):
                crop = training(size, interpolation)[0]
                random.seed(size)
                box = crop.get_params(image, crop.scale, crop.ratio)
                random.seed(size)
                key = f"{name}/{size}/{interpolation.upper()}"
                found[key] = {"box": box, "sum": cases.checksum(np.array(crop(image)))}
    return found


def crops(shape: tuple[int, int]) -> np.ndarray:
    """Rows (y, x, height, width)."""
    random.seed(2021)
    crop = training(224, "bicubic")[0]
    of = PIL.Image.new("RGB", shape[::-1]), crop.scale, crop.ratio
    return np.array([crop.get_params(*of) for _ in range(cases.CROP_DRAWS)])


def protocols() -> dict[str, np.ndarray]:
    """What `transforms_imagenet_eval` gives, before it is normalised."""
    from timm.data import create_transform

    found = {}
    for name in cases.TIMM_PHOTOS:
        for protocol, crop_pct in cases.TIMM_PROTOCOLS.items():
            for size in (*cases.PROTOCOL_SIZES, *cases.TIMM_RECTANGLES):
                transform = create_transform(
                    (size, size) if isinstance(size, int) else size,
                    interpolation="bicubic",
                    crop_pct=crop_pct,
                    normalize=False,
                )
                pixels = transform(photo(name)).permute(1, 2, 0).numpy()
                found[f"{name}/{protocol}/{size}"] = pixels
    return found


def main() -> None:
    """Records everything."""
    import timm
    import torchvision

    arguments, sums = operations()
    made = protocols()
    recorded = {
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "command": " ".join(["record_timm_augment.py", *sys.argv[1:]]),
        "arguments": arguments,
        "timm_randaugment": sums,
        "draws": draws(),
        "timm_crop": crop_pixels(),
        "protocol": {key: cases.checksum(pixels) for key, pixels in made.items()},
    }
    arrays = {f"protocol/{key}": cases.grid(pixels) for key, pixels in made.items()}
    for shape in cases.TIMM_CROP_SHAPES:
        counts = cases.crop_histograms(crops(shape), shape)
        arrays |= {f"timm_crop/{shape}/{k}": v for k, v in counts.items()}
    file = cases.FOLDER / "timm_augment.json"
    file.write_text(json.dumps(recorded, indent=0) + "\n")
    np.savez_compressed(file.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
