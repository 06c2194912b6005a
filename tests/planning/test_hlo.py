"""FLOPs and collectives read from compiled programs, against the same programs without loops."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from looped_programs import DEPTH, LOOPS, WIDTH

from curvax.planning import collectives, flops, hlo

DEVICES = 8
pytestmark = pytest.mark.usefixtures("single_precision")


def compiled(f, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arrays).compile()


def count(f, *shapes):
    program = compiled(f, *shapes)
    return flops.count(program, hlo.read(program))


@pytest.mark.parametrize("name", LOOPS)
def test_flops_of_a_loop_are_those_of_the_unrolled_program(name):
    f, shapes = LOOPS[name]
    looped = compiled(functools.partial(f, unroll=1), *shapes)
    assert hlo.read(looped).loops()
    found = count(functools.partial(f, unroll=1), *shapes)
    expected = count(functools.partial(f, unroll=DEPTH), *shapes)
    assert found == pytest.approx(expected, rel=0.01)
    assert looped.cost_analysis()["flops"] < expected / 2


STRIDED = dict(
    window_strides=(2, 1),
    padding=((1, 2), (0, 3)),
    rhs_dilation=(1, 2),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 8, 6), STRIDED),
        ((3, 3, 8, 6), {**STRIDED, "window_strides": (1, 1), "lhs_dilation": (2, 3)}),
        ((3, 2, 4, 6), {**STRIDED, "feature_group_count": 2}),
    ],
)
def test_flops_of_a_convolution_are_those_of_xla(kernel, options):
    f = lambda x, k: lax.conv_general_dilated(x, k, **options)
    program = compiled(f, (4, 10, 12, 8), kernel)
    found = hlo.read(program).total(flops.of)
    assert found == program.cost_analysis()["flops"]


def test_flops_of_a_batched_product_are_two_for_each_term():
    program = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 3, 4), (7, 4, 5))
    assert hlo.read(program).total(flops.of) == 2 * 7 * 3 * 4 * 5


@pytest.mark.parametrize(("compared", "trips"), [(jnp.less, 4), (jnp.less_equal, 5)])
def test_a_loop_that_may_end_early_counts_up_to_its_bound(compared, trips):
    def f(x, w):
        goes_on = lambda s: compared(s[0], 9) & (jnp.sum(s[1]) < 1e30)
        return lax.while_loop(goes_on, lambda s: (s[0] + 2, s[1] @ w), (1, x))[1]

    program = hlo.read(compiled(f, (32, WIDTH), (WIDTH, WIDTH)))
    assert [program.trips(loop) for loop in program.loops()] == [trips]


def test_conditional_counts_its_dearest_branch():
    def f(x, w):
        branches = [lambda x: x, lambda x: x @ w, lambda x: (x @ w) @ w]
        return lax.switch(jnp.int32(x[0, 0]), branches, x)

    program = hlo.read(compiled(f, (32, WIDTH), (WIDTH, WIDTH)))
    product = lambda each: flops.of(each) if each.opcode == "dot" else 0
    assert program.total(product) == 2 * 2 * 32 * WIDTH**2


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 8 devices")
def test_collectives_in_loops_count_every_trip():
    def f(x, w):
        step = lambda x, _: (lax.pmean(jnp.sum(x) * w, "batch") @ x, None)
        x, _ = lax.scan(step, x, length=4)
        return lax.all_gather(x, "batch"), lax.psum_scatter(w, "batch", tiled=True)

    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P("batch")), check_vma=False
    )
    whole = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    program = hlo.read(jax.jit(mapped).lower(whole, whole).compile())
    size = 64 * 64 * 4
    assert collectives.count(program) == {
        "all-reduce": (4, 4 * size),
        "all-gather": (1, DEVICES * size),
        "reduce-scatter": (1, size),
    }


# In the words of the TPU compiler: no trip counts, layouts with tiles and memory spaces, a counter
# that starts above zero and gains two, asynchronous collectives in two forms.
TPU = """\
HloModule jit_step, is_scheduled=true

%body.1 (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %constant.2 = s32[]{:T(128)} constant(2)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy.1 = s32[]{:T(128)} copy(%counter)
  %next = s32[]{:T(128)} add(%copy.1, %constant.2)
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[8,8]{1,0:T(8,128)S(1)} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%next, %all-reduce.1)
}

%condition.1 (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %constant.9 = s32[]{:T(128)} constant(9)
  %seen = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%constant.9, %seen), direction=GE
}

%start (a: f32[8,8]) -> (f32[8,8], f32[64,8]) {
  %a = f32[8,8]{1,0:T(8,128)} parameter(0)
  %gather.1 = f32[64,8]{1,0:T(8,128)} all-gather(%a), channel_id=2, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %call.1 = (f32[8,8]{1,0}, f32[64,8]{1,0}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%done (b: f32[8,8]) -> f32[64,8] {
  %b = f32[8,8]{1,0:T(8,128)} parameter(0)
  %gather.2 = f32[64,8]{1,0:T(8,128)} all-gather(%b), channel_id=2, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %call.2 = f32[64,8]{1,0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x0: f32[8,8]) -> f32[64,8] {
  %x0 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %constant.1 = s32[]{:T(128)} constant(1)
  %tuple.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) tuple(%constant.1, %x0)
  %while.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) while(%tuple.1), \
condition=%condition.1, body=%body.1
  %y = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%while.1), index=1
  %begun = (f32[8,8]{1,0}, f32[64,8]{1,0}) fusion(%y), kind=kCustom, calls=%start
  %z = f32[8,8]{1,0} get-tuple-element(%begun), index=0
  %permute = (f32[8,8]{1,0}, f32[8,8]{1,0}, /*index=2*/u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%z), channel_id=3
  %permuted = f32[8,8]{1,0} collective-permute-done(%permute)
  ROOT %ended = f32[64,8]{1,0:T(8,128)} fusion(%permuted), kind=kCustom, calls=%done
}
"""


def test_program_of_the_tpu_compiler_is_parsed():
    program = hlo.parse(TPU)
    assert [program.trips(loop) for loop in program.loops()] == [5]
    assert collectives.count(program) == {
        "all-reduce": (5, 5 * 256),
        "all-gather": (1, 8 * 256),
        "collective-permute": (1, 256 + 8),
    }
