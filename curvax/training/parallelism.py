"""The devices of a run, the sharding of state and batches, and how a step is mapped over them.

`jit`         one program for all devices, partitioned by the compiler; with `fsdp` parameters too
`shard_map`   one program per device, which sees its part of the batch and all parameters
`pmap`        as `shard_map`, by the older API that the papers' code uses

Each maps a step that is written once, `(state, batch) -> (state, measured)` for any part of a
batch, over all devices. Between steps the state is the same in all three: global arrays on one
mesh, so that checkpoints and evaluation work under any parallelism.
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
from curvax.parameter_roles.layouts import Layout
from curvax.pipes.parts import name_of, options_of, walk
from curvax.training.config import configs, recipe
from curvax.training.runtime.errors import ConfigError

Prepare = Callable[[Tree, Tree], Tree]
"""(state, batch) ↦ batch; always applied to the whole batch."""
Core = Callable[[Tree, Tree], tuple[Tree, Tree]]
"""(state, batch) ↦ (state, measured); under shard_map and pmap applied to a device's part."""

P = PartitionSpec
BATCH, GROUP = "batch", "group"


@dataclasses.dataclass(frozen=True)
class Jit:
    """One program over the global batch, partitioned by the compiler."""

    mesh: Mesh
    fsdp: bool = False
    group_devices: int = 1  # devices per group of examples, under shard_map and pmap

    @property
    def group(self) -> Along | None:
        """The axis along which the devices of a group lie; None for groups of one device."""
        return None

    @property
    def axes(self) -> tuple[str, ...]:
        """The device axes that a step is mapped over."""
        return ()

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def split(self) -> NamedSharding:
        """The sharding of a batch: along its leading axis, in contiguous parts."""
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    def layout(self, shapes: Tree) -> Tree:
        """The sharding of each leaf of a state.

        With `fsdp` a floating leaf is split along its longest axis that is divisible by the number
        of devices. Leaves without such an axis, counts and keys are replicated.
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

    def sharded_shapes(self, shapes: Tree) -> Tree:
        """The shapes with their shardings."""
        struct = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.tree.map(struct, shapes, self.layout(shapes))

    def shard(self, arrays: Tree) -> Tree:
        """Shards NumPy arrays, of which every process has all, by `layout`."""
        shard = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        return jax.tree.map(shard, arrays, self.layout(arrays))

    def create(self, init: Callable[..., Tree], *arguments: Tree) -> Tree:
        """The state `init(*arguments)`, computed directly in its sharding."""
        shapes = jax.eval_shape(init, *arguments)
        return jax.jit(init, out_shardings=self.layout(shapes))(*arguments)

    def place(self, batch: Tree) -> Tree:
        """The global batch, from each process's part."""
        place = functools.partial(jax.make_array_from_process_local_data, self.split)
        return jax.tree.map(place, batch)

    def map(self, prepare: Prepare, core: Core, shapes: Tree) -> Any:
        """The compiled step of all devices; it donates the state's buffers."""
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
    """One program per device, over its contiguous part of the batch."""

    @property
    def axes(self) -> tuple[str, ...]:
        return self.mesh.axis_names

    @property
    def group(self) -> Along | None:
        return GROUP if self.group_devices > 1 else None

    def mapped(self, core: Core) -> Core:
        return jax.shard_map(
            core,
            mesh=self.mesh,
            in_specs=(P(), P(self.axes)),
            out_specs=P(),
        )


class Pmap(ShardMap):
    """One program per device by `jax.pmap`, whose arrays are local to each process."""

    @property
    def group(self) -> Along | None:
        return Neighbours(BATCH, self.group_devices) if self.group_devices > 1 else None

    def map(self, prepare: Prepare, core: Core, shapes: Tree) -> "_Pmapped":
        return _Pmapped(self, prepare, core)


class _Pmapped:
    """A step of two programs, since `prepare` needs the whole batch and pmap cannot be nested."""

    def __init__(self, parallelism: Pmap, prepare: Prepare, core: Core):
        self._mesh = parallelism.mesh
        self._prepare = jax.jit(prepare, out_shardings=parallelism.split)
        self._core = jax.pmap(
            core,
            axis_name=BATCH,
            in_axes=(None, 0),
            out_axes=None,
            donate_argnums=0,
            devices=list(parallelism.mesh.devices.flat),
        )

    def __call__(self, state: Tree, batch: Tree) -> tuple[Tree, Tree]:
        batch = self._prepare(state, batch)
        if jax.process_count() == 1:
            return self._core(state, self._stacked(batch))
        batch = multihost_utils.global_array_to_host_local_array(batch, self._mesh, P(BATCH))
        state, measured = self._core(state, self._stacked(batch))
        return _as_global(state, self._mesh), measured

    def lower(self, state: Tree, batch: Tree) -> Any:
        """Lowers the mapped program; `prepare` is a program of its own."""
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
        """A process's part [n, ...] reshaped to [devices, n / devices, ...]."""
        return jax.tree.map(lambda x: x.reshape(self._here, -1, *x.shape[1:]), batch)

    @property
    def _here(self) -> int:
        """The number of devices of a process, the same in all."""
        return self._mesh.size // jax.process_count()


def _as_global(tree: Tree, mesh: Mesh) -> Tree:
    """Global replicated arrays from arrays that are replicated within each process."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    keys = jax.tree.map(is_key, tree)
    raw = jax.tree.map(lambda x, key: jax.random.key_data(x) if key else x, tree, keys)
    whole = multihost_utils.host_local_array_to_global_array(raw, mesh, P())
    back = lambda x, key: jax.random.wrap_key_data(x) if key else x
    return jax.tree.map(back, whole, keys)


PARALLELISMS = {"jit": Jit, "shard_map": ShardMap, "pmap": Pmap}


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Jit:
    """The parallelism of a config, on its devices or on those given.

    Devices are ordered by process, so that a process's part of a batch is contiguous. If the `m` of
    `per_group(m, ...)` exceeds the examples per device, several devices share a group. Under
    `shard_map` they lie along a second mesh axis, "group"; under `pmap` they are neighbours on its
    one axis. A method without groups uses the config's number `m`, for its batch norm.

    Raises:
        ConfigError: an unknown `parallelism`, options that exclude each other, or devices or
            groups that do not divide the batch.
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
        raise ConfigError(
            f"A batch is divided equally among the devices, and {config.batch} examples do not "
            f"divide over {len(found)} devices. Use a multiple as `batch`, or {fewer}."
        )
    names: tuple[str, ...] = (BATCH,)
    shape: tuple[int, ...] = (len(found),)
    group_devices = _devices_of_a_group(config, 1 if config.parallelism == "jit" else len(found))
    if config.parallelism == "shard_map" and group_devices > 1:
        names, shape = (BATCH, GROUP), (len(found) // group_devices, group_devices)
    mesh = Mesh(np.array(found).reshape(shape), names)
    return PARALLELISMS[config.parallelism](mesh, config.fsdp, group_devices)


def _check(config: ConfigDict) -> None:
    if config.parallelism not in PARALLELISMS:
        known = ", ".join(PARALLELISMS)
        raise ConfigError(f"`parallelism` is one of {known}, and was `{config.parallelism}`.")
    if config.fsdp and config.parallelism != "jit":
        raise ConfigError(
            "`fsdp` lets the compiler divide the parameters, which needs `parallelism=jit`, and "
            f"`parallelism` is `{config.parallelism}`. Leave out one of the two."
        )


def _first(devices: list[jax.Device], count: int) -> list[jax.Device]:
    if not 0 < count <= len(devices) or jax.process_count() > 1:
        raise ConfigError(
            f"`devices` selects the first of the {len(devices)} devices of a single process, and "
            f"was {count} with {jax.process_count()} processes. `--devices=none` uses all."
        )
    return devices[:count]


def group_sizes(config: ConfigDict) -> set[int]:
    """The sizes m of the groups that a config's optimiser has, `per_group(m, ...)`.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    # Neither the length of the run nor these names change the groups.
    unused = dict.fromkeys(("axes", "kernels", "embeddings", "like"))
    names: dict[str, Any] = {**unused, "layout": Layout({}), "examples": 1, "outputs": 1}
    names = configs.numbers(config) | names
    optimizer = recipe.parse(config.optimizer, steps=2**31 - 1, names=names)
    groups = (part for part in walk(optimizer) if name_of(part) == "per_group")
    return {options_of(group)["m"] for group in groups}


def _devices_of_a_group(config: ConfigDict, devices: int) -> int:
    """The number of devices that share a group, at least 1."""
    sizes, named, per_device = group_sizes(config), config.get("m"), config.batch // devices
    m = max(sizes, default=named)
    fits = lambda n: config.batch % n == 0 and 0 in (n % per_device, per_device % n)
    if not isinstance(m, int) or m < 1:
        return 1
    if fits(m):
        return max(m // per_device, 1)
    if not sizes:
        return 1
    fitting = next(n for n in (math.gcd(m, config.batch), per_device) if fits(n))
    cure = f"--m={fitting}" if m == named else f"per_group({fitting}, ...)"
    each = f" and the {per_device} of each of {devices} devices" if devices > 1 else ""
    raise ConfigError(
        f"Groups of {m} examples do not divide a batch of {config.batch}{each} evenly. With "
        f"`--batch={config.batch}` use for instance `{cure}`."
    )
