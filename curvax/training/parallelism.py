"""Where a run computes: its devices, how state and batches lie on them, how a step is mapped.

`jit`         one program for all devices; the compiler divides it, parameters too with `fsdp`
`shard_map`   a program for each device, which sees its part of the batch and all parameters
`pmap`        the same, as the papers' code has it

Between steps the state is the same in all three: global arrays over one mesh, so that a checkpoint,
an evaluation or another regime need not know which it was. A regime is what turns a step written
once, `(state, batch) -> (state, measured)` for whatever part of the batch it is given, into the
step of all devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from curvax.arithmetic.trees import Tree, is_float
from curvax.devices.axes import Along, Neighbours
from curvax.training.config import configs, recipe

Prepare = Callable[[Tree, Tree], Tree]
"""(state, batch) ↦ batch, over the whole batch, whatever the regime."""
Core = Callable[[Tree, Tree], tuple[Tree, Tree]]
"""(state, batch) ↦ (state, measured), over a device's part of it under a mapped regime."""

P = PartitionSpec
BATCH, GROUP = "batch", "group"


class RegimeError(ValueError):
    """Devices that a run's batch cannot be divided over."""


@dataclasses.dataclass(frozen=True)
class Jit:
    """One program over the global batch, which the compiler divides among the devices."""

    mesh: Mesh
    fsdp: bool = False
    together: int = 1  # devices that share a group of examples, where each sees its own part

    @property
    def group(self) -> Along | None:
        """Along what such devices lie, if they are several."""
        return None

    @property
    def axes(self) -> tuple[str, ...]:
        """The device axes that a step sees."""
        return ()

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def split(self) -> NamedSharding:
        """Along the leading axis, in contiguous parts."""
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    def layout(self, shapes: Tree) -> Tree:
        """How a state of these shapes lies on the devices.

        With `fsdp` every floating leaf that has an axis which they divide is split along its
        longest such; counts and keys stay whole.
        """
        if not self.fsdp:
            return jax.tree.map(lambda _: self.replicated, shapes)
        spec = lambda x: self._longest(x.shape) if is_float(x) else P()
        return jax.tree.map(lambda x: NamedSharding(self.mesh, spec(x)), shapes)

    def _longest(self, shape: Sequence[int]) -> PartitionSpec:
        fitting = [n for n in shape if n >= self.mesh.size and n % self.mesh.size == 0]
        if not fitting:
            return P()
        axis = shape.index(max(fitting))
        return P(*[None] * axis, self.mesh.axis_names)

    def laid_out(self, shapes: Tree) -> Tree:
        """The shapes with their layout."""
        struct = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(struct, shapes, self.layout(shapes))

    def lay(self, arrays: Tree) -> Tree:
        """NumPy arrays that every process has, laid out like a state of their shapes."""
        lay = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        return jax.tree.map(lay, arrays, self.layout(arrays))

    def create(self, init: Callable[..., Tree], *arguments: Tree) -> Tree:
        """What `init` makes, made where it will lie."""
        shapes = jax.eval_shape(init, *arguments)
        return jax.jit(init, out_shardings=self.layout(shapes))(*arguments)

    def place(self, batch: Tree) -> Tree:
        """This process's part of a batch as a part of the global one."""
        place = functools.partial(jax.make_array_from_process_local_data, self.split)
        return jax.tree.map(place, batch)

    def map(self, prepare: Prepare, core: Core, shapes: Tree) -> Any:
        """The compiled step; it takes the state's buffers over."""
        layout = self.layout(shapes)
        return jax.jit(
            lambda state, batch: self.mapped(core)(state, prepare(state, batch)),
            in_shardings=(layout, self.split),
            out_shardings=(layout, self.replicated),
            donate_argnums=0,
        )

    def mapped(self, core: Core) -> Core:
        return core


class ShardMap(Jit):
    """One program for each device, over its contiguous part of the batch."""

    @property
    def axes(self) -> tuple[str, ...]:
        return self.mesh.axis_names

    @property
    def group(self) -> Along | None:
        return GROUP if self.together > 1 else None

    def mapped(self, core: Core) -> Core:
        return jax.shard_map(
            core,
            mesh=self.mesh,
            in_specs=(P(), P(self.axes)),
            out_specs=P(),
        )


class Pmap(ShardMap):
    """The same by `jax.pmap`, whose arrays are each process's own."""

    @property
    def group(self) -> Along | None:
        return Neighbours(BATCH, self.together) if self.together > 1 else None

    def map(self, prepare: Prepare, core: Core, shapes: Tree) -> "_Pmapped":
        return _Pmapped(self, prepare, core)


class _Pmapped:
    """A step in two programs: pmap cannot be a part of one that sees the whole batch."""

    def __init__(self, regime: Pmap, prepare: Prepare, core: Core):
        self._mesh = regime.mesh
        self._prepare = jax.jit(prepare, out_shardings=regime.split)
        self._core = jax.pmap(
            core,
            axis_name=BATCH,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=0,
            devices=list(regime.mesh.devices.flat),
        )

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        batch = self._prepare(state, batch)
        if jax.process_count() == 1:
            return self._core(state, self._stacked(batch))
        batch = multihost_utils.global_array_to_host_local_array(batch, self._mesh, P(BATCH))
        state, measured = self._core(state, self._stacked(batch))
        return _as_global(state, self._mesh), measured

    def lower(self, state: Tree, batch: Tree) -> Any:
        """The mapped program, which is all but the draws of a batch."""
        return self._core.lower(*self._shapes(state, batch))

    def eval_shape(self, state: Tree, batch: Tree) -> Any:
        return jax.eval_shape(self._core, *self._shapes(state, batch))

    def _shapes(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        def part(x: Any) -> jax.ShapeDtypeStruct:
            shape = (self._here, x.shape[0] // self._mesh.size, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype)

        whole = jax.eval_shape(self._prepare, state, batch)
        return state, jax.tree.map(part, whole)

    def _stacked(self, batch: Tree) -> Tree:
        """A process's part [n, ...] as [devices, n / devices, ...]."""
        return jax.tree.map(lambda x: x.reshape(self._here, -1, *x.shape[1:]), batch)

    @property
    def _here(self) -> int:
        """The devices of a process, which all have as many."""
        return self._mesh.size // jax.process_count()


def _as_global(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays alike on the devices of each process as arrays of all processes."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    keys = jax.tree.map(is_key, tree)
    raw = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)
    whole = multihost_utils.host_local_array_to_global_array(raw, mesh, P())
    back = lambda x, key: jax.random.wrap_key_data(x) if key else x
    return jax.tree.map(back, whole, keys)


REGIMES = {"jit": Jit, "shard_map": ShardMap, "pmap": Pmap}


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Jit:
    """The regime of a config, on its devices, or on these.

    Neighbouring devices belong to one process, so that its part of a batch is contiguous. Under
    `shard_map` the `m` of `per_group(m, ...)`, where that is above the examples of a device, gives
    the mesh a second axis, "group", along which lie the devices that share a group; `pmap` has one
    axis, along which they lie in a row. A method without groups goes by the config's number `m`,
    for its batch norm.

    Raises:
        RegimeError: an unknown regime, options that do not go together, devices that do not divide
            the batch, or groups that do not.
    """
    _check(config)
    found = list(jax.devices() if devices is None else devices)
    if devices is None and config.devices is not None:
        found = _first(found, config.devices)
    found.sort(key=lambda device: (device.process_index, device.id))
    if config.batch % len(found):
        fewer = f"fewer devices, as with `--devices={math.gcd(config.batch, len(found))}`"
        if devices is not None:
            fewer = "a smaller topology"
        raise RegimeError(
            f"A batch is divided equally, and {config.batch} examples do not go over {len(found)} "
            f"devices. Take a multiple as `batch`, or {fewer}."
        )
    names: tuple[str, ...] = (BATCH,)
    shape: tuple[int, ...] = (len(found),)
    together = _devices_of_a_group(config, 1 if config.parallelism == "jit" else len(found))
    if config.parallelism == "shard_map" and together > 1:
        names, shape = (BATCH, GROUP), (len(found) // together, together)
    mesh = Mesh(np.array(found).reshape(shape), names)
    return REGIMES[config.parallelism](mesh, config.fsdp, together)


def _check(config: ConfigDict) -> None:
    if config.parallelism not in REGIMES:
        known = ", ".join(REGIMES)
        raise RegimeError(f"`parallelism` is one of {known}, and was `{config.parallelism}`.")
    if config.fsdp and config.parallelism != "jit":
        raise RegimeError(
            f"`fsdp` lets the compiler divide the parameters, which it does under `jit`, and the "
            f"`parallelism` is `{config.parallelism}`. Leave out one of the two."
        )


def _first(devices: list[jax.Device], count: int) -> list[jax.Device]:
    if not 0 < count <= len(devices) or jax.process_count() > 1:
        raise RegimeError(
            f"`devices` takes the first of the {len(devices)} that JAX sees in one process, and "
            f"was {count} in {jax.process_count()} processes. `--devices=none` takes all."
        )
    return devices[:count]


def group_sizes(config: ConfigDict) -> set[int]:
    """The examples of a group, each `m` of `per_group` in the method's text."""
    given = recipe.given(config.optimizer, "per_group", "m", configs.numbers(config))
    return {m for m in given if isinstance(m, int)}


def _devices_of_a_group(config: ConfigDict, devices: int) -> int:
    """How many devices share a group, at least 1."""
    sizes, named, here = group_sizes(config), config.get("m"), config.batch // devices
    m = max(sizes, default=named)
    fits = lambda n: config.batch % n == 0 and 0 in (n % here, here % n)
    if not isinstance(m, int) or m < 1:
        return 1  # of which `per_group` says what is wrong
    if fits(m):
        return max(m // here, 1)
    if not sizes:
        return 1
    whole = next(n for n in (math.gcd(m, config.batch), here) if fits(n))
    cure = f"--m={whole}" if m == named else f"per_group({whole}, ...)"
    each = f" and the {here} of each of {devices} devices" if devices > 1 else ""
    raise RegimeError(
        f"Groups of {m} examples do not divide a batch of {config.batch}{each} evenly. The "
        f"two go together: with `--batch={config.batch}` goes `{cure}`."
    )
