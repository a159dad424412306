"""Tests for benchmarks/aot: what is counted in the text of a compiled program."""

import pytest

from benchmarks.aot import compile as aot
from benchmarks.aot import targets
from benchmarks.aot.kernels import Module

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/usr/lib/python/numpy.py"
2 "/home/mlip_jax/models/painn.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused_gather (p0: f32[100,8], p1: s32[1000]) -> f32[1000,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[1000]{0} parameter(1)
  %g = f32[1000,8]{1,0} gather(%p0, %p1), offset_dims={1}
  ROOT %m = f32[1000,8]{1,0} multiply(%g, %g)
}

%fused_scatter (p2: f32[100,8], p3: s32[1000], p4: f32[1000,8]) -> f32[100,8] {
  %p2 = f32[100,8]{1,0} parameter(0)
  %p3 = s32[1000]{0} parameter(1)
  %p4 = f32[1000,8]{1,0} parameter(2)
  ROOT %sc = f32[100,8]{1,0} scatter(%p2, %p3, %p4), update_window_dims={1}, to_apply=%add
}

ENTRY %main (x: f32[100,8], i: s32[1000], w: f32[8,4]) -> f32[100,4] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[1000]{0} parameter(1)
  %w = f32[8,4]{1,0} parameter(2)
  %k1 = f32[1000,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_gather, metadata={op_name="f" stack_frame_id=2}
  %k2 = f32[100,8]{1,0} fusion(%x, %i, %k1), kind=kInput, calls=%fused_scatter
  ROOT %d = f32[100,4]{1,0} dot(%k2, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_bytes_operations_and_lines_of_kernels():
    module = Module(TEXT, cache=1e6)
    gather, scatter, product = module.kernels
    array, rows, index = 100 * 8 * 4, 1000 * 8 * 4, 1000 * 4
    assert (gather.read, gather.written) == (rows + index, rows)  # the rows that are fetched
    assert gather.from_memory == array + index + rows  # the array fits into the cache
    assert Module(TEXT).kernels[0].from_memory == gather.bytes  # no cache
    assert gather.source == "models/painn.py:7"  # not the line of NumPy that it calls
    assert (scatter.read, scatter.written) == (2 * rows + index, rows)
    assert [k.atomics for k in module.kernels] == [0, 1, 0]
    assert product.matrix == 2 * 100 * 4 * 8
    unique = TEXT.replace("update_window_dims={1}", "update_window_dims={1}, unique_indices=true")
    assert sum(k.atomics for k in Module(unique).kernels) == 0


LOOP = """HloModule jit_g, is_scheduled=true

%step (t: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %t = (s32[], f32[100,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %v = f32[100,4]{1,0} get-tuple-element(%t), index=1
  %e = f32[100,4]{1,0} exponential(%v)
  ROOT %o = (s32[], f32[100,4]{1,0}) tuple(%n, %e)
}

%cond (c: (s32[], f32[100,4])) -> pred[] {
  %c = (s32[], f32[100,4]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (x: f32[100,4]) -> (s32[], f32[100,4]) {
  %x = f32[100,4]{1,0} parameter(0)
  %big = f32[900,4]{1,0} iota(), iota_dimension=0
  %first = f32[900,4]{1,0} exponential(%big)
  %zero = s32[] constant(0)
  %start = (s32[], f32[100,4]{1,0}) tuple(%zero, %x)
  ROOT %l = (s32[], f32[100,4]{1,0}) while(%start), condition=%cond, body=%step, \
backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_loops_within_a_program_count_with_their_iterations():
    """Detects sums over blocks of edges that are counted for one block only."""
    _, kernels = aot.analyze("h200", LOOP)
    repeated = next(k for k in kernels if k.name == "e")
    assert (repeated.repeats, repeated.bytes) == (6, 6 * 2 * 100 * 4 * 4)
    assert all(k.repeats == 1 for k in kernels if k.name != "e")
    # a loop that moves most of the bytes is the program's, such as that of dynamics: one iteration
    _, kernels = aot.analyze("h200", LOOP.replace("900", "9"))
    assert [(k.name, k.repeats) for k in kernels] == [("e", 1)]


def test_lines_are_sorted_by_bytes():
    first, second, _ = aot.by_line(Module(TEXT, 1e6).kernels, 3)
    assert first.startswith("| fusion Input | 1 |") and second.startswith("| models/painn.py:7 |")


@pytest.mark.skipif(targets.missing("h200") is not None, reason=str(targets.missing("h200")))
def test_programs_for_a_gpu_have_no_atomic_additions_and_no_float64():
    rows = []
    for spec in ("forces:painn:8:slots=20", "train:painn:8:slots=20"):
        rows.append(aot.row("h200", spec, aot.compile_for("h200", spec), 0.0)[0])
    for row, most in zip(rows, (170, 520)):
        assert (row["atomics"], row["callbacks"], row["f64"]) == (0, 0, 0)
        assert row["kernels"] <= most
    assert rows[0]["GB"] < 0.4 and rows[1]["GB"] < 2.0
