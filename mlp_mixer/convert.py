"""Converts weights from any source to any form, and reports what they are.

    python -m mlp_mixer.convert runs/mixer_b16                         # only the report
    python -m mlp_mixer.convert imagenet1k/Mixer-B_16 b16.safetensors
    python -m mlp_mixer.convert runs/mixer_b16 b16.npz                 # as published
    python -m mlp_mixer.convert runs/mixer_b16 b16.safetensors --names=timm
    python -m mlp_mixer.convert timm.safetensors runs/from_timm        # a run (Orbax)
    python -m mlp_mixer.convert b16.npz b16_448.npz --grow=2
    python -m mlp_mixer.convert miil.pth b16.safetensors --mean=0 --std=1
    python -m mlp_mixer.convert asym.pth asym.safetensors --field=mlp=asym

What was written is read back, compared bit for bit, and its logits with the source's.
"""

import ast
import dataclasses
import difflib
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from mlp_mixer import console, pretrained, program, runs
from mlp_mixer.fingerprints import leaves

logger = logging.getLogger(__name__)

WRITTEN = (".npz", ".safetensors")
# A target that ends so, or nearly, is a file that we cannot write, and no folder.
FILES = (*pretrained.TORCH_SUFFIXES, ".onnx", ".stablehlo", ".h5", ".msgpack", ".zip")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None = None,
    *,
    names: str = "ours",
    dtype: str | None = None,
    gelu: str | None = None,
    model: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    grow: int | None = None,
    interpolate: tuple[int, int] | None = None,
    step: int | None = None,
    ema: bool | None = None,
    mean: pretrained.Stated | None = None,
    std: pretrained.Stated | None = None,
) -> dict[str, str]:
    """Converts weights, and returns the report as {what: value}.

    Args:
      source: a run's folder, a file of weights or a published name.
      target: a file ending in .npz or .safetensors, or a new folder for a run; None
        only reports.
      names: in a safetensors file: "ours", "timm" or "authors".
      dtype: "float32" or "bfloat16"; None keeps the source's. npz holds float32.
      gelu: "tanh" or "exact", where the source does not say it right.
      model: other fields of the model, where the source does not say them right.
      image_size: (height, width) in pixels, where the source does not say it.
      grow: so many times the patches on each side, the paper's way (section 3).
      interpolate: (height, width) in pixels of another resolution, not the paper's way.
      step: step of a run's checkpoint; the newest by default.
      ema: whether a run's averaged parameters are read, or its last ones; by default
        the averaged ones, if it keeps them.
      mean, std: what the images that the source is for were normalised by, in levels
        from 0 to 1: one number, or red, green, blue; needed where neither the source
        nor a config.json beside it says so.

    Raises:
      FileExistsError: the target is there already.
      FileNotFoundError: there is no such source.
      ValueError: the source is damaged, or an argument does not fit it; or what was
        written is not what is read back.
    """
    if grow is not None and interpolate is not None:
        raise ValueError("Both --grow and --interpolate are given; choose one.")
    if grow is not None and grow < 1:
        raise ValueError(f"grow is {grow}; expected a factor of at least 1.")
    fields = {**(model or {}), **({} if gelu is None else {"gelu": gelu})}
    weights = pretrained.read(
        source, dtype=None, step=step, ema=ema, mean=mean, std=std, model=fields
    )
    if image_size is not None:
        weights = dataclasses.replace(weights, image_size=image_size)
    # Where nothing says the tokens, no image is known that the model takes.
    unknown = target is not None and pretrained.tokens(weights.params) is None
    if weights.image_size or grow or interpolate or unknown:
        height, width = pretrained.checked_image_size(weights)
    if grow is not None:
        size = (grow * height, grow * width)
        weights = pretrained.resized(weights, size, "grow")
    if interpolate is not None:
        weights = pretrained.resized(weights, interpolate, "interpolate")
    before = weights
    if dtype is not None:
        params = pretrained.cast(weights.params, dtype)
        weights = dataclasses.replace(weights, params=params)
    report = {"source": str(weights), **describe(weights)}
    if target is None:
        return report
    target = os.path.expanduser(target)
    _check_target(target, names)
    try:
        _write_target(weights, target, names)
    except FileExistsError:
        raise  # says enough
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{target} cannot be written: {reason}.") from error
    again = pretrained.read(target, dtype=None)
    wanted, got = (dict(leaves(w.params | w.stats)) for w in (weights, again))
    report["dtype"] = _dtypes_in_words(again)
    narrowed = any(x.dtype.itemsize > got[k].dtype.itemsize for k, x in wanted.items())
    # What was widened, bfloat16 in npz, says the same.
    same = {k: x.astype(got[k].dtype) for k, x in wanted.items()}
    wrong = [k for k, x in same.items() if x.tobytes() != got[k].tobytes()]
    if wrong or wanted.keys() != got.keys():
        raise ValueError(f"{target} is not what was written: {', '.join(wrong)}.")
    how = "equal, narrowed to float32" if narrowed else "equal bit for bit"
    folder = ", a run's folder" if os.path.isdir(target) else ""
    report["written"] = f"{target}{folder}, read back: {len(got)} arrays {how}"
    return report | _how_far_outputs_move(before, again)


def describe(weights: pretrained.Weights) -> dict[str, str]:
    """What weights are, for people."""
    size, images = weights.image_size, weights.normalisation
    place = ", folded into the stem" if images != pretrained.CENTRED else ""
    if "mean" in weights.model:
        mean, std = (weights.model[field] for field in ("mean", "std"))
        images = pretrained.normalisation(mean, std, weights) or images
        place = ", computed by the model"
    broken = pretrained.not_finite(weights.params | weights.stats)
    return {
        "model": weights.model["name"],
        "sizes": pretrained.sizes_of(weights.model),
        "classes": str(weights.num_classes or "no head"),
        "resolution": f"{size[0]} × {size[1]} px" if size else "not said",
        "tokens": str(pretrained.tokens(weights.params) or "not said"),
        "parameters": f"{sum(x.size for _, x in leaves(weights.params)):,}",
        "dtype": _dtypes_in_words(weights),
        **{k: v for k, v in weights.model.items() if k != "name" and type(v) is str},
        "normalisation": f"{images}{place}",
        "not finite": ", ".join(f"{n} in {k}" for k, n in broken.items()) or "none",
    }


def _dtypes_in_words(weights: pretrained.Weights) -> str:
    return ", ".join(sorted({str(x.dtype) for _, x in leaves(weights.params)}))


def _check_target(target: str, names: str) -> None:
    """Nothing is overwritten, and nothing written where it would do harm."""
    suffix = pathlib.PurePath(target).suffix.lower()
    if not target:
        raise ValueError("The target has no name; name a file or a new folder.")
    if suffix in WRITTEN and "://" in target:
        raise ValueError(f"{target} is elsewhere; write the file here and copy it.")
    if suffix in WRITTEN and os.path.exists(target):
        raise FileExistsError(f"{target} is there already; remove it, or name another.")
    near = difflib.get_close_matches(suffix, (*WRITTEN, *FILES), 1, 0.75)
    if suffix not in WRITTEN and near and suffix[1].isalpha():  # run_v1.5 is a folder
        raise ValueError(
            f"{target} ends in {suffix!r}; written are .npz, .safetensors and, without "
            "an ending, the folder of a run."
        )
    if suffix not in WRITTEN and os.path.islink(target) and not os.path.exists(target):
        raise FileExistsError(f"{target} is a link to nothing; name a new folder.")
    for parent in pathlib.Path(target).absolute().parents:
        if os.path.exists(parent) and not os.path.isdir(parent):
            raise NotADirectoryError(f"{parent} is a file; {target} cannot lie in it.")
        if parent.name == "checkpoints" and os.path.exists(
            parent.parent / "config.json"
        ):
            raise ValueError(
                f"{target} lies among the checkpoints of {parent.parent}, which are "
                "the run's own; name another place."
            )
    if names != "ours" and suffix != ".safetensors":
        raise ValueError(
            f"--names={names} is for .safetensors files, not for {target}."
        )


def _write_target(weights: pretrained.Weights, target: str, names: str) -> None:
    suffix = pathlib.PurePath(target).suffix.lower()
    if suffix == ".npz":
        for field, value in pretrained.lost_in_npz(weights).items():
            logger.warning(
                "npz does not say that %s is %s; safetensors does.", field, value
            )
        pretrained.write_npz(weights, target)
    elif suffix == ".safetensors":
        gelu = weights.model.get("gelu", "exact")
        reader = {"timm": "timm", "authors": "the authors' code"}.get(names)
        if reader and gelu != "exact":
            logger.warning(
                "%s computes the exact GELU, these weights are for %s: give its "
                "model act_layer=functools.partial(torch.nn.GELU, approximate='tanh').",
                *(reader, gelu),
            )
        if reader and weights.normalisation != pretrained.CENTRED:
            logger.warning(
                "%s is for %s in %s, not for the source's %s.",
                *(target, pretrained.CENTRED, reader, weights.normalisation),
            )
        pretrained.write_safetensors(weights, target, names=names)
    else:
        runs.write_run(weights, target)


def _how_far_outputs_move(
    before: pretrained.Weights, after: pretrained.Weights
) -> dict[str, str]:
    """How far logits and features of two random images move."""
    # The grid is nothing to a model whose file does not say it: a strip will do.
    ph, pw = before.model["patch_size"]
    size = before.image_size or (ph, pw * (pretrained.tokens(before.params) or 1))
    image = jax.random.uniform(jax.random.key(0), (2, *size, 3), minval=-1)

    def outputs(weights: pretrained.Weights) -> tuple[Any, Any]:
        apply = jax.jit(pretrained.create_model(weights).apply)
        logits, out = apply(weights.variables, image)
        return logits, out["pre_logits"]

    pairs = zip(outputs(before), outputs(after), strict=True)
    moved = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
    zero = "head" not in before.params or not before.params["head"]["kernel"].any()
    most = f"{moved[0]:.1e}" + (" (there is no head, or it is zero)" if zero else "")
    return {"max |Δlogit|": most, "max |Δpre_logits|": f"{moved[1]:.1e}"}


def _numbers_of_flag(name: str) -> list[float] | None:
    """The numbers of a list flag; how many there may be is for `read` to say."""
    words = flags.FLAGS[name].value
    if words is None:
        return None
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(
            f"--{name} is {','.join(words)!r}; expected a number, e.g. 0.5, or RED,"
            "GREEN,BLUE, e.g. 0.485,0.456,0.406."
        ) from error


def fields_of_flags(given: Sequence[str]) -> dict[str, Any]:
    """{field: value} of NAME=VALUE; the model says whether it has such a field."""
    fields = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(
                f"--field is {text!r}; expected NAME=VALUE, e.g. num_heads=8 or "
                "patch_size=8,8."
            )
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            fields[name] = value
    return fields


def main(arguments: list[str]) -> None:
    """The command line."""
    if len(arguments) not in (1, 2):
        raise ValueError(
            "Name a source and, to write one, a target: mlp_mixer.convert SOURCE "
            "[TARGET]; see --help."
        )
    flag = flags.FLAGS
    report = convert(
        *map(program.path, arguments),
        names=flag.names,
        dtype=flag.dtype,
        gelu=flag.gelu,
        model=fields_of_flags(flag.field),
        image_size=program.size("image_size"),
        grow=flag.grow,
        interpolate=program.size("interpolate"),
        step=flag.step,
        ema=flag.ema,
        mean=_numbers_of_flag("mean"),
        std=_numbers_of_flag("std"),
    )
    console.Table("", ["", arguments[-1]], [[k, v] for k, v in report.items()]).show()


if __name__ == "__main__":
    flags.DEFINE_enum(
        "names", "ours", ["ours", "timm", "authors"], "In a safetensors file."
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Of the arrays; the source's if not set.",
    )
    flags.DEFINE_enum(
        "gelu", None, ["tanh", "exact"], "If the source does not say it right."
    )
    flags.DEFINE_multi_string(
        "field",
        [],
        "NAME=VALUE, a field of the model that the source does not say, or not right; "
        "may be given several times.",
    )
    flags.DEFINE_list(
        "image_size", None, "HEIGHT,WIDTH px, if the source does not say."
    )
    flags.DEFINE_list(
        "mean",
        None,
        "Of the images that the source is for, in levels from 0 to 1, if it does not "
        "say: one number or RED,GREEN,BLUE. Folded into the stem.",
    )
    flags.DEFINE_list("std", None, "See --mean.")
    flags.DEFINE_integer(
        "grow", None, "So many times the patches on each side.", lower_bound=1
    )
    flags.DEFINE_list(
        "interpolate",
        None,
        "HEIGHT,WIDTH px of another resolution (not the paper's way).",
    )
    flags.DEFINE_integer(
        "step", None, "Of a run's checkpoint; the newest if not set.", lower_bound=0
    )
    program.define_ema()
    program.run(main)
