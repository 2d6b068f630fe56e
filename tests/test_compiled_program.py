"""What a compiled program reads and writes, and how little of that is not products."""

import json
import os
import subprocess
import sys

import compiled_program
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mlp_mixer.planning import hlo, targets
from mlp_mixer.planning.hlo import kernels

PROGRAM = """HloModule jit_train_step, is_scheduled=true

%in_place (p.0: f32[4,8], p.1: f32[8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} bitcast(%p.1)
  ROOT %set = f32[4,8]{1,0} dynamic-update-slice(%p.0, %row, %zero, %zero)
}

%one_row (q.0: f32[4,8]) -> (f32[8], f32[8]) {
  %q.0 = f32[4,8]{1,0} parameter(0)
  %first = f32[1,8]{1,0} slice(%q.0), slice={[0:1], [0:8]}
  %flat = f32[8]{0} bitcast(%first)
  %tanh.1 = f32[8]{0} tanh(%flat)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%flat, %tanh.1)
}

ENTRY %main (x: bf16[4,16], w: bf16[16,8], b: bf16[8], t: f32[4,8]) -> f32[4,8] {
  %x = bf16[4,16]{1,0} parameter(0)
  %w = bf16[16,8]{1,0} parameter(1)
  %b = bf16[8]{0} parameter(2)
  %t = f32[4,8]{1,0} parameter(3)
  %some = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} slice(%w), slice={[0:4], [0:8]}
  %near = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} copy(%w)
  %product = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, s8[4096]{0}) custom-call(%x, %near, %b), \
custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(train_step)/jvp(MlpMixer)/MixerBlock_0/dot_general"}, \
backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"]},"epilogue":"BIAS_GELU_AUX"}}
  %rows = (f32[8]{0}, f32[8]{0}) fusion(%t), kind=kLoop, calls=%one_row, \
metadata={op_name="jit(train_step)/transpose(jvp(MlpMixer))/MixerBlock_0/tanh"}
  %row.1 = f32[8]{0} get-tuple-element(%rows), index=0
  ROOT %out = f32[4,8]{1,0} fusion(%t, %row.1), kind=kLoop, calls=%in_place
}
"""


def test_a_kernel_reads_and_writes_what_lies_in_the_devices_memory():
    some, copy, product, rows, in_place = kernels(PROGRAM)
    assert (some.kind, some.read, some.written) == ("copy", 4 * 8 * 2, 0)
    assert (copy.kind, copy.read, copy.written) == ("copy", 256, 0)  # goes on chip
    # x and the bias; two results, without the library's workspace.
    assert (product.read, product.written) == (4 * 16 * 2 + 8 * 2, 2 * 4 * 8 * 2)
    assert (rows.read, rows.written) == (8 * 4, 2 * 8 * 4)  # a slice of t
    assert (in_place.read, in_place.written) == (8 * 4, 8 * 4)  # nothing else of t


def test_a_kernel_has_the_name_kind_and_work_of_what_it_computes():
    *_, product, rows, in_place = kernels(PROGRAM)
    assert product.kind == hlo.LIBRARY
    assert product.work == "__cublas$lt$matmul BIAS_GELU_AUX"
    assert product.flops == 2 * 4 * 16 * 8
    assert (product.where, product.part) == ("forward", "MixerBlock_0")
    assert (rows.where, rows.kind, rows.work) == ("backward", "fusion", "slice tanh")
    assert in_place.kind == "copy"


@pytest.mark.parametrize("turns", [1, 3])
def test_a_loops_kernels_count_as_often_as_it_turns(turns):
    def layers(x, kernels):
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    shapes = jnp.zeros((4, 16)), jnp.zeros((turns, 16, 16))
    text = jax.jit(layers).lower(*shapes).compile().as_text()
    found = kernels(text)
    assert sum(k.flops * k.turns for k in found) == turns * 2 * 4 * 16 * 16


NESTED = """HloModule jit_f

%slice_of (s.0: f32[12,64]) -> f32[1,64] {
  %s.0 = f32[12,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,64]{1,0} dynamic-slice(%s.0, %zero, %zero)
}

%outer (o.0: f32[12,64]) -> f32[1,64] {
  %o.0 = f32[12,64]{1,0} parameter(0)
  %inner = f32[1,64]{1,0} fusion(%o.0), kind=kLoop, calls=%slice_of
  ROOT %done = f32[1,64]{1,0} tanh(%inner)
}

ENTRY %main (x: f32[12,64]) -> f32[1,64] {
  %x = f32[12,64]{1,0} parameter(0)
  ROOT %out = f32[1,64]{1,0} fusion(%x), kind=kLoop, calls=%outer
}
"""


def test_of_a_stacked_array_a_fusion_inside_a_fusion_reads_its_slice():
    (kernel,) = kernels(NESTED)
    assert (kernel.read, kernel.written) == (64 * 4, 64 * 4)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        kernels("module @jit_f {}")


def counted(chip, *words, tmp_path):
    """What the command finds, in a process without the tests' own settings."""
    out = tmp_path / "kernels.json"
    command = [sys.executable, compiled_program.__file__, "mixer_b16", f"--chip={chip}"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [*command, f"--out={out}", *words], check=True, env=environment, timeout=550
    )
    return json.loads(out.read_text())


def largest(report):
    """The kernels that are no products, the largest first: what to look at."""
    others = (k for k in report["kernels"] if k["kind"] not in hlo.PRODUCTS)
    by_size = sorted(others, key=lambda k: -k["written"] * k["turns"])
    return "\n".join(
        f"{k['written'] / 1e6:8.1f} MB {k['where']} {k['part']}: {k['work']}"
        for k in by_size[:12]
    )


@pytest.mark.slow
@pytest.mark.skipif(
    bool(targets.missing_wheels("h200")),
    reason=targets.missing_wheels("h200"),
)
@pytest.mark.parametrize(
    ("words", "forward", "backward"),
    [
        (("--products=generated",), 3_045, 2_412),
        (("--products=library",), 1_546, 2_717),
        (("--products=library", "--bias_row"), 956, 2_716),
    ],
    ids=["generated", "library", "bias row"],
)
def test_on_an_h200_no_more_is_written_beside_products(
    words, forward, backward, tmp_path
):
    report = counted("h200", "--blocks=1", *words, tmp_path=tmp_path)
    written = report["written_per_image_and_block"]
    names = largest(report)
    assert written["forward"] <= forward * 1e3, names
    assert written["backward"] <= backward * 1e3, names


@pytest.mark.slow
@pytest.mark.skipif(
    bool(targets.missing_wheels("v5e")),
    reason=targets.missing_wheels("v5e"),
)
@pytest.mark.parametrize(
    ("words", "most"),
    [
        # So many that no hidden layer of channel mixing fits into the chip.
        (("--forward", "--blocks=1", "--batch=128"), 0),
        (("--blocks=2", "--batch=64"), 452),
    ],
    ids=["inference", "training"],
)
def test_on_a_v5e_products_take_in_what_surrounds_them(words, most, tmp_path):
    report = counted("v5e", *words, tmp_path=tmp_path)
    written = report["written_per_image_and_block"]
    # Not counted: "other", copies between a chip's memories ahead of time.
    assert written["forward"] + written["backward"] <= most * 1e3, largest(report)


# As a TPU writes a gather that goes on while a product is computed.
MEANWHILE = """HloModule jit_train_step, is_scheduled=true

%begin (p.0: bf16[4,16]) -> (bf16[4,16], bf16[8,16], u32[]) {
  %p.0 = bf16[4,16]{1,0} parameter(0)
  %all-gather.1 = bf16[8,16]{1,0} all-gather(%p.0), channel_id=7, dimensions={0}
  ROOT %begun = (bf16[4,16]{1,0}, bf16[8,16]{1,0}, u32[]) custom-call(%all-gather.1)
}

%go_on (q.0: bf16[4,16], q.1: f32[8,16], q.2: f32[16,8]) -> (f32[8,8], bf16[8,16]) {
  %q.0 = bf16[4,16]{1,0} parameter(0)
  %q.1 = f32[8,16]{1,0} parameter(1)
  %q.2 = f32[16,8]{1,0} parameter(2)
  %all-gather.2 = bf16[8,16]{1,0} all-gather(%q.0), channel_id=7, dimensions={0}
  %dot.1 = f32[8,8]{1,0} dot(%q.1, %q.2), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  ROOT %both = (f32[8,8]{1,0}, bf16[8,16]{1,0}) tuple(%dot.1, %all-gather.2)
}

%end (r.0: bf16[4,16]) -> bf16[8,16] {
  %r.0 = bf16[4,16]{1,0} parameter(0)
  %all-gather.3 = bf16[8,16]{1,0} all-gather(%r.0), channel_id=7, dimensions={0}
  ROOT %ended = bf16[8,16]{1,0} custom-call(%all-gather.3)
}

ENTRY %main (w: bf16[4,16], x: f32[8,16], y: f32[16,8]) -> bf16[8,16] {
  %w = bf16[4,16]{1,0} parameter(0)
  %x = f32[8,16]{1,0} parameter(1)
  %y = f32[16,8]{1,0} parameter(2)
  %start = (bf16[4,16]{1,0}, bf16[8,16]{1,0}, u32[]) fusion(%w), kind=kCustom, \
calls=%begin
  %work = (f32[8,8]{1,0}, bf16[8,16]{1,0}) fusion(%w, %x, %y), kind=kOutput, \
calls=%go_on
  ROOT %done = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_goes_on_beside_a_product_counts_once():
    start, work, done = kernels(MEANWHILE)
    assert (start.kind, work.kind, done.kind) == (
        *("collective", "product fusion"),
        "collective",
    )
    assert work.flops == 2 * 8 * 16 * 8
    assert hlo.collectives([start, work, done]) == {"all-gather": (1, 8 * 16 * 2)}
