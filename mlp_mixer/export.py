"""Writes models for other programs: StableHLO and ONNX, verified before they are kept.

    python -m mlp_mixer.export runs/digits digits.onnx digits.stablehlo
    python -m mlp_mixer.export imagenet1k/Mixer-B_16 mixer_b16.onnx

Both kinds hold the parameters, in float32, and take and give the same:

    image       float32 (n, h, w, 3), any n: RGB, levels 0 … 255 mapped to [-1, 1] by
                (level - 127.5) / 127.5
    logits      float32 (n, k); left out if the weights have no head
    pre_logits  float32 (n, c), the features that the head sees
    stage_1 …   float32 (n, h, w, c), the maps of a pyramid's stages; of StableHLO, with
                --stages

What else is known (source, geometry, preprocessing, class names) is in the metadata of
the ONNX file, and beside the StableHLO file as NAME.stablehlo.json.

ONNX is the one to keep. StableHLO is for programs that use JAX of about the same age,
on CPU, CUDA and TPU, without this package and with gradients: JAX promises to read its
exports for six months, so it is no archive.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags

import mlp_mixer
from mlp_mixer import console, graphs, known, models, pretrained, program
from mlp_mixer.fingerprints import leaves
from mlp_mixer.text import listed, printable

logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "tpu")
OPSET = 20  # the first with Gelu
# Flatbuffers (StableHLO) and protobuf (ONNX) end at 2 GiB; the program needs some too.
LIMIT_BYTES = 2**31 - 2**24

BATCHES = (1, 3)
TOLERANCE = 1e-4

Outputs = dict[str, np.ndarray]
Path = str | os.PathLike[str]


class Difference(NamedTuple):
    """How far an output of a written file is from the model's, at one batch size."""

    output: str
    batch: int
    largest: float  # |value| of the model
    difference: float  # largest |Δ|
    allowed: float


def export_stablehlo(
    weights: pretrained.Weights,
    path: Path,
    *,
    gradients: bool = True,
    stages: bool = False,
) -> list[Difference]:
    """Writes a serialised `jax.export.Exported` of image → {output: array}.

        mixer = jax.export.deserialize(pathlib.Path(path).read_bytes())
        mixer.call(image)["logits"]

    Products run at the default precision of the platform, as the model's: GPUs and TPUs
    round the operands.

    Args:
      weights: result of `pretrained.read`.
      path: the file to write; its folder is made.
      gradients: whether the outputs can be differentiated (once) by the image. The
        derivative's program has its own copy of the parameters: twice the size.
      stages: whether the maps of a pyramid's stages, `stage_1`, …, are outputs too.

    Returns:
      How far the reloaded file is from the model.

    Raises:
      ModuleNotFoundError: an optional package is not installed.
      ValueError: the file is not right, and not kept; or the weights have values that
        are not finite, no image size, or more than a file can hold; or the model has
        no stages.
    """
    _require_modules("flatbuffers")
    weights = _in_float32(weights)
    size = sum(x.nbytes for _, x in leaves(weights.variables)) * (1 + gradients)
    if size > LIMIT_BYTES:
        times, instead = ("twice", "--nogradients") if gradients else ("once", "ONNX")
        raise ValueError(
            f"A StableHLO file ends at 2.1 GB, and {path} would hold the parameters "
            f"{times}: {size / 1e9:.1f} GB; try {instead}."
        )
    model = pretrained.create_model(weights)
    also = models.stage_names(model) if stages else ()

    def mixer(image: jax.Array) -> dict[str, Any]:
        return _outputs(model, also, weights.variables, image)

    def write_file(file: pathlib.Path) -> None:
        (n,) = jax.export.symbolic_shape("n")
        shape = (n, *pretrained.checked_image_size(weights), 3)
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        with _locations_without_folders():
            exported = jax.export.export(jax.jit(mixer), platforms=PLATFORMS)(image)
            file.write_bytes(exported.serialize(vjp_order=int(gradients)))
        about = json.dumps(_metadata(weights), indent=2, ensure_ascii=False)
        # What no encoding can write becomes JSON's own escape.
        file.with_name(f"{file.name}.json").write_text(
            about + "\n", encoding="utf-8", errors="backslashreplace"
        )

    def load(file: pathlib.Path) -> Callable[[np.ndarray], Outputs]:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
        # Compiled anew for each batch, so that only one copy of the parameters that
        # compilation makes is held at a time.
        return lambda image: jax.device_get(jax.jit(lambda x: exported.call(x))(image))

    return _write_verified(weights, path, write_file, load, also)


@contextlib.contextmanager
def _locations_without_folders() -> Iterator[None]:
    """Source locations without folders: those of this machine are nobody's business."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, "^.*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def export_onnx(weights: pretrained.Weights, path: Path) -> list[Difference]:
    """Writes the graph of `to_onnx`; parameters above 2 GB go to PATH.data beside it.

    Returns:
      How far onnxruntime, on CPU, is from the model.

    Raises:
      ModuleNotFoundError: an optional package is not installed.
      ValueError: the weights have no graph, no image size, or values that are not
        finite; the file is not right, and not kept; or the path is not UTF-8.
    """
    _require_modules("onnx", "onnxruntime")
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{printable(os.fspath(path))} is not UTF-8 here, and the onnx package "
            "opens no other names; choose another one, or a locale with UTF-8."
        ) from error
    import onnx
    import onnxruntime

    _graph_maker(weights)  # or nothing is written
    weights = _in_float32(weights)
    size = sum(x.nbytes for _, x in leaves(weights.params))

    def write_file(file: pathlib.Path) -> None:
        onnx.save_model(
            to_onnx(weights),
            file,
            save_as_external_data=size > LIMIT_BYTES,
            location=f"{file.name}.data",
        )
        onnx.checker.check_model(file, full_check=True)

    def load(file: pathlib.Path) -> Callable[[np.ndarray], Outputs]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def call(image: np.ndarray) -> Outputs:
            return dict(zip(names, session.run(names, {"image": image}), strict=True))

        return call

    return _write_verified(weights, path, write_file, load)


def to_onnx(weights: pretrained.Weights) -> Any:
    """Returns an `onnx.ModelProto` of the model; its initializers have our names.

    Raises:
      ValueError: the weights have values that are not finite, or no image size; or
        there is no graph of their architecture.
    """
    from onnx import TensorProto, helper, numpy_helper

    make_nodes = _graph_maker(weights)
    weights = _in_float32(weights)
    nodes: list[Any] = []

    def node(to: Any, op: str, *inputs: str, **attributes: Any) -> Any:
        outputs = [to] if isinstance(to, str) else list(to)
        nodes.append(helper.make_node(op, inputs, outputs, outputs[0], **attributes))
        return to

    size = pretrained.checked_image_size(weights)
    made = graphs.Graph(node, weights.model, size, weights.num_classes)
    make_nodes(made)

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])

    graph = helper.make_graph(
        nodes,
        "mlp_mixer",
        [value("image", *size, 3)],
        [value(name, length) for name, length in made.outputs.items()],
        [
            numpy_helper.from_array(x, name)
            for name, x in [*leaves(weights.params), *made.constants.items()]
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        # Not the newest that the onnx package knows: runtimes are older than it.
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="mlp_mixer",
        producer_version=mlp_mixer.__version__,
    )
    known = {
        name: printable(about) if isinstance(about, str) else json.dumps(about)
        for name, about in _metadata(weights).items()
    }
    helper.set_model_props(model, known)
    return model


def _graph_maker(weights: pretrained.Weights) -> Callable[[graphs.Graph], None]:
    if weights.architecture not in graphs.GRAPHS:
        names = {file: name for name, file in models.families().items()}
        raise ValueError(
            f"There is no ONNX graph of {names[weights.architecture]}, only of "
            f"{', '.join(names[file] for file in graphs.GRAPHS)}; write a file ending "
            "in .stablehlo, which every architecture can be."
        )
    return graphs.GRAPHS[weights.architecture]


# --- What both have in common ---------------------------------------------------------


def _require_modules(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Export needs {' and '.join(missing)}; "
            "pip install '.[export]' in the clone."
        )


def _in_float32(weights: pretrained.Weights) -> pretrained.Weights:
    """The weights in float32, after a look at all that an export needs of them."""
    pretrained.checked_image_size(weights)
    params, stats = (
        pretrained.cast(tree, "float32") for tree in (weights.params, weights.stats)
    )
    if bad := pretrained.not_finite(params | stats):
        raise ValueError(
            f"The weights {weights} are not exported: not all of their values "
            "are finite:\n"
            + listed([f"{name}: {count} values" for name, count in bad.items()])
        )
    return dataclasses.replace(weights, params=params, stats=stats)


def _metadata(weights: pretrained.Weights) -> dict[str, Any]:
    """What is known of a model besides its numbers."""
    facts = {
        "source": weights.origin,
        "exported_by": f"mlp_mixer {mlp_mixer.__version__}",
        "input": "image: RGB, (level - 127.5) / 127.5 of levels 0 ... 255",
        **{k: v for k, v in weights.model.items() if k != "name"},
        "model": weights.model["name"],
        "num_classes": weights.num_classes,
        "image_size": weights.image_size,
        "preprocess": weights.preprocess,
        "class_names": weights.class_names,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _outputs(
    model: Any, also: Sequence[str], variables: Any, image: Any
) -> dict[str, Any]:
    logits, out = model.apply(variables, image)
    head = {} if model.num_classes is None else {"logits": logits}
    return head | {name: out[name] for name in ("pre_logits", *also)}


def _write_verified(
    weights: pretrained.Weights,
    path: Path,
    write_file: Callable[[pathlib.Path], None],
    load: Callable[[pathlib.Path], Callable[[np.ndarray], Outputs]],
    also: Sequence[str] = (),
) -> list[Difference]:
    """Writes, loads and compares; files get their names only if they are right."""
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export_") as folder:
        draft = pathlib.Path(folder) / path.name
        write_file(draft)
        logger.info(
            "Comparing %s (%.0f MB) with the model, at batches of %s.",
            path,
            draft.stat().st_size / 1e6,
            " and ".join(map(str, BATCHES)),
        )
        found = _differences(load(draft), weights, also)
        for one in found:
            if not one.difference <= one.allowed:  # nan is not
                raise ValueError(
                    f"{path} is not kept: at a batch of {one.batch} its {one.output} "
                    f"differ by {one.difference:.2g} from the model's; at most "
                    f"{one.allowed:.2g} is right. Try another version of the runtime."
                )
        mode = draft.stat().st_mode  # onnx gives its data file to the owner alone
        # The file itself last: what lies beside it is there before.
        for part in sorted(pathlib.Path(folder).iterdir(), reverse=True):
            part.chmod(mode)
            part.replace(path.with_name(part.name))
    return found


def _differences(
    call: Callable[[np.ndarray], Outputs],
    weights: pretrained.Weights,
    also: Sequence[str],
) -> list[Difference]:
    """Compares with the model, on the CPU: elsewhere products round their operands."""
    model, rng = pretrained.create_model(weights), np.random.default_rng(0)
    reference = jax.jit(functools.partial(_outputs, model, also))
    found = []
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for n in BATCHES:
            shape = (n, *pretrained.checked_image_size(weights), 3)
            image = rng.uniform(-1, 1, shape).astype(np.float32)
            expected = jax.device_get(reference(weights.variables, image))
            given = call(image)
            for name, right in expected.items():
                if given[name].shape != right.shape:
                    raise ValueError(
                        f"{name} has shape {given[name].shape}, the model's "
                        f"{right.shape}."
                    )
                largest = float(np.abs(right).max())
                # Absolute, but relative for values that float32 has no such digits of.
                allowed = TOLERANCE * max(1.0, largest)
                difference = float(np.abs(given[name] - right).max())
                found.append(Difference(name, n, largest, difference, allowed))
    return found


# --- The command line -----------------------------------------------------------------

FORMATS = {".stablehlo": ("flatbuffers",), ".onnx": ("onnx", "onnxruntime")}


def main(arguments: list[str]) -> None:
    """The command line."""
    if len(arguments) < 2:
        raise ValueError(
            "Name the weights and the files to write, e.g. runs/digits digits.onnx."
        )
    source, *paths = map(program.path, arguments)
    for path in paths:
        suffix = pathlib.Path(path).suffix.lower()
        _require_modules(*known.pick(f"{path}: the ending", suffix, FORMATS))
    if flags.FLAGS.stages and any(path.lower().endswith(".onnx") for path in paths):
        raise ValueError(
            "Pyramids have no ONNX graph, and no other model has stages: end all files "
            "in .stablehlo, or leave out --stages."
        )
    weights = pretrained.read(
        source, dtype=None, step=flags.FLAGS.step, ema=flags.FLAGS.ema
    )
    dtypes = {str(x.dtype) for _, x in leaves(weights.params)} - {"float32"}
    if dtypes:
        logger.info("Parameters in %s are exported as float32.", ", ".join(dtypes))
    if weights.dtype != "float32":
        logger.info("The run computes in %s, its export in float32.", weights.dtype)
    if flags.FLAGS.gelu:
        weights = pretrained.with_fields(weights, gelu=flags.FLAGS.gelu)
    if size := program.size("image_size"):
        weights = dataclasses.replace(weights, image_size=size)
    found = {}
    try:
        for path in paths:
            if path.lower().endswith(".onnx"):
                found[path] = export_onnx(weights, path)
            else:
                found[path] = export_stablehlo(
                    weights,
                    path,
                    gradients=flags.FLAGS.gradients,
                    stages=flags.FLAGS.stages,
                )
    finally:  # a stdout that fails costs no file
        for path, differences in found.items():
            console.Table(
                f"{path}, verified on random images",
                ["output", "batch", "largest value", "largest difference", "allowed"],
                [
                    [d.output, str(d.batch), *(f"{x:.2g}" for x in d[2:])]
                    for d in differences
                ],
            ).show()


if __name__ == "__main__":
    flags.DEFINE_integer(
        "step", None, "Of a run's checkpoint; the newest if not set.", lower_bound=0
    )
    program.define_ema()
    flags.DEFINE_list(
        "image_size",
        None,
        "HEIGHT,WIDTH in pixels, or a square's side: of weights that do not say it, or "
        "another one, of a model that takes any.",
    )
    flags.DEFINE_boolean(
        "stages",
        False,
        "Whether the StableHLO file also gives the maps of a pyramid's stages.",
    )
    flags.DEFINE_enum(
        "gelu",
        None,
        list(graphs.GELUS),
        "If not set, the one that the weights are for.",
    )
    flags.DEFINE_boolean(
        "gradients",
        True,
        "Whether the StableHLO file can be differentiated by the image; doubles it.",
    )
    program.run(main)
