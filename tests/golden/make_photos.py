"""Makes photos/*.jpg from scikit-image's sample images; README.md says how.

The files it made are kept, because another encoder makes other bytes.
"""

import argparse
import pathlib

import numpy as np
import PIL.Image

PHOTOS = pathlib.Path(__file__).parent / "photos"
BOX = PIL.Image.Resampling.BOX


def ycck(image: PIL.Image.Image) -> PIL.Image.Image:
    """CMYK whose four planes are, as stored, YCbCr of the colours, and no black."""
    luma = np.asarray(image.convert("YCbCr"))
    white = np.full_like(luma[..., :1], 255)
    # Pillow stores the complement of each plane.
    return PIL.Image.fromarray(255 - np.concatenate([luma, white], axis=2), "CMYK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=pathlib.Path, help="skimage/data of the wheel")
    samples = parser.parse_args().samples

    def shrunk(name: str, width: int, height: int) -> PIL.Image.Image:
        with PIL.Image.open(samples / name) as image:
            return image.convert("RGB").resize((width, height), BOX)

    astronaut = shrunk("astronaut.png", 256, 240)
    coffee = shrunk("coffee.png", 160, 120)
    chelsea = shrunk("chelsea.png", 203, 157)
    rocket = shrunk("rocket.jpg", 157, 203)
    black = np.full((60, 80), 40, np.uint8)
    cmyk = np.asarray(shrunk("coffee.png", 80, 60).convert("CMYK")).copy()
    cmyk[..., 3] = black + np.arange(80, dtype=np.uint8)
    for name, image, options in (
        ("astronaut", astronaut, {"quality": 75}),
        ("coffee-444", coffee, {"quality": 85, "subsampling": 0}),
        ("chelsea-progressive", chelsea, {"quality": 80, "progressive": True}),
        ("rocket-grey", rocket.convert("L"), {"quality": 85}),
        (
            "rocket-422-restart",
            rocket.resize((97, 131), BOX),
            {"quality": 80, "subsampling": 1, "restart_marker_blocks": 5},
        ),
        ("coffee-cmyk", PIL.Image.fromarray(cmyk, "CMYK"), {"quality": 85}),
        ("chelsea-ycck", ycck(chelsea.resize((81, 63), BOX)), {"quality": 85}),
    ):
        path = PHOTOS / f"{name}.jpg"
        image.save(path, **options)
        if name.endswith("ycck"):
            data = bytearray(path.read_bytes())
            # Adobe's marker ends in the colour transform: 0 is CMYK, 2 is YCCK.
            data[data.index(b"Adobe") + 11] = 2
            path.write_bytes(data)


if __name__ == "__main__":
    main()
