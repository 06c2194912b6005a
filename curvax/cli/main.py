"""The command line: training, comparing, looking at runs, planning, making records."""

import argparse
import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from curvax.training.runtime.log_filters import silence_libtpu

Run = Callable[[argparse.Namespace, Sequence[str]], None]

_TOP = """\
Curvature and sharpness in training, from the command line.

  curvax train                 a first run: GSAM beside AdamW on digits with wrong labels
  curvax compare digits --seeds 3 --fair
  curvax inspect runs/digits-compare-20260101-120000
  curvax bench digits
  curvax train pydoc           Sophia and AdaHessian beside AdamW on a text
  curvax configs               what else there is to run
"""

_FIELDS = """\
fields:
  Any field of the config takes a value, dots reaching inside:

    --epochs=30  --data.label_noise=0.2  --model.options.depth=4
    --optimizer="sam_perturb(0.1) | adamw(cosine(1e-3, warmup=100))"

  The optimiser's text is the method: parts joined by `|`, each a call of one of curvax's stages
  or methods or of an Optax transformation. `cosine`, `linear`, `constant` and `step_decay` stretch
  over the run, and the config's top-level numbers, such as `rho`, are names the text may use. So
  are `axes`, what `mean_over` and `pmean_updates` average over in any regime, `kernels`, the mask
  of all kernels for a weight decay, and `layout`, which parameter is what, for `spatial_average`.

  CONFIG is a name that `curvax configs` lists, or a path to a .py file with a `get_config()`.
"""

_PLACE = """\
fields:
  A run keeps its config but for where it computes, which these change for this time:

    --data.path=/data/records  --data.threads=8  --devices=1  --parallelism=jit  --fsdp=True
    --eval_batch=64

  --data.path is where the data that the run was trained on lies now. --devices=none takes all.
"""

_TRAIN = """\
Train a model and leave a run folder: config, figures as JSON lines and TensorBoard events,
checkpoints, final table and curves. Without a config it trains a small MLP-Mixer on 512 handwritten
digits, 40 % of them wrongly labelled, with AdamW and with GSAM, and says what that showed.
"""

_COMPARE = """\
Train the same model on the same data with several methods at matched epochs, over several seeds.
Reported are mean, standard deviation and 95 % interval of the test score (accuracy, loss or squared
error) and of the largest eigenvalue of the Hessian at the end. The first method is the base that
gains are counted from.

  curvax compare digits --seeds 3 --fair
  curvax compare digits --optimizers "adamw(cosine(1e-2))" "sam_perturb(0.2) | adamw(cosine(1e-2))"
  curvax compare digits --sweep rho=0.05,0.1,0.2,0.5 --sweep alpha=0,0.2,0.4
"""

_INSPECT = """\
Look at what runs came to: spectrum of the Hessian, whole and block by block, sharpness, landscapes,
activations, attention, neural tangent kernel, at the newest checkpoints of runs of one task, side
by side. Leaves a folder with one page, report.html, its pictures, and all numbers in inspect.json.

RUN is the folder that `curvax train` or `curvax compare` left, for the first seed of each of its
arms; or an arm in it; or a seed of an arm. The first is what the others are compared with.

  curvax inspect runs/digits-train-20260101-120000
  curvax inspect runs/A/0-sgd/seed* runs/B/1-sam-sgd/seed0 --budget 15
"""

_BENCH = """\
Compile a training step of each method and report its FLOPs, temporary memory and time, also as
ratios to the first method's. Clocks are read in turn in one process.
"""

_PLAN = """\
Compile the very training step of each method for machines that are not at hand, and report what it
needs of each device: memory, FLOPs, and what the devices send each other, also as ratios to the
first method's. Loops count as often as they run. Nothing is trained, and no data is read.

A TOPOLOGY is a TPU generation and its chips in each direction, as v3:4x8, v4:4x4x4, v5e:16x16,
v5p:4x4x8 or v6e:16x16, which takes `pip install 'curvax[tpu]'` and no TPU; or cpu:8 for eight
virtual CPU devices. Where a step does not fit, changes that may help are compiled too. A
compilation takes minutes, and is kept for the next time.

  curvax plan digits_vit --topology cpu:8
  curvax plan imagenet_vit:b16 --topology v5e:16x16
"""

_RESUME = """\
Go on with an interrupted `train` or `compare` from its newest checkpoints. Parameters, optimiser
state, keys and place in the data are restored, and the run ends as it would have, bit for bit; on
other devices but for rounding, and under shard_map and pmap but for dropout, and batch norm and SAM
outside of groups, which go by device there.
"""

_CONVERT = """\
Turn folders of JPEGs, one for each class, into array_record files: what `data.name=records` and
`data.name=imagenet` read. PICTURES holds the class folders, or `train` and `val` around them. Each
picture is decoded once, and those that cannot be are named.

  curvax convert imagenet records/imagenet
  curvax train my_config --data.name=records --data.path=records/mine
"""

_EVALUATE = """\
Test the newest checkpoints of a run: how often the right class is named first, or is among the
first five. Prints a table and keeps evaluate.json, by the place of the data, in the folder of the
run.

Without --data on the run's own test set. PATH is a folder of records or of class folders, named as
the classes the run was trained on, some of them, or their numbers; or such folders in folders, as
ImageNet-C has one for each corruption and strength.

  curvax evaluate runs/imagenet-train-20260101-120000 --data imagenet-r
  curvax evaluate runs/imagenet-train-20260101-120000 --data records/imagenet --labels real.json
  curvax evaluate runs/digits-train-20260101-120000 --corruptions
"""

_CONFIGS = "List the configs, or print what one of them is: paper, command, expected result, cost."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        0; 2 after an error, which is told in one paragraph; 130 after Ctrl-C, 143 after SIGTERM.
        One of several processes that fails alone ends here, so that the others notice.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    silence_libtpu()
    try:
        joined = _join(arguments)
        with _alone() if joined else contextlib.nullcontext():
            arguments.run(arguments, overrides)
    except KeyboardInterrupt as stopped:
        return _fail(str(stopped) or "stopped.", 130)
    except InterruptedError as stopped:
        return _fail(str(stopped), 143)
    except ModuleNotFoundError as error:
        return _fail(f"{error}. The command line needs an extra: pip install 'curvax[train]'", 2)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        if arguments.traceback:
            raise
        return _fail(str(error), 2)
    return 0


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Ends a process of several on an error that may be its own alone, once it is told.

    JAX's runtime would let it wait for the others at its end, and they wait for it in their step.
    What all meet together, a run that is refused, was stopped or is not finite, goes on to `main`.
    """
    from curvax.training.runtime import distributed

    try:
        yield
    except (distributed.Refused, InterruptedError, ArithmeticError, ModuleNotFoundError):
        raise
    except (ValueError, TypeError, OSError) as error:
        distributed.leave(_fail(str(error), 2))
    except KeyboardInterrupt as stopped:
        distributed.leave(_fail(str(stopped) or "stopped.", 130))
    except BaseException:
        traceback.print_exc()
        distributed.leave(1)


def _fail(message: str, code: int) -> int:
    print(f"curvax: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Keeps the lines of its texts, and takes no abbreviations: they would hit config fields."""

    def __init__(self, **options: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def runs(self, run: Run) -> "_Parser":
        self.set_defaults(run=run)
        self.add_argument("--traceback", action="store_true", help="show where an error arose")
        return self

    def takes_a_config(self) -> None:
        self.add_argument(
            "config", nargs="?", default="digits", metavar="CONFIG", help="by default digits"
        )
        self.makes_folders()

    def makes_folders(self) -> None:
        self.add_argument(
            "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go"
        )

    def joins_others(self) -> None:
        """Options of a process among several."""
        group = self.add_argument_group("several processes")
        group.add_argument(
            "--distributed",
            action="store_true",
            help="join the others by what a TPU pod, Slurm or MPI tells JAX",
        )
        group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        group.add_argument("--processes", type=_positive, metavar="N", help="how many there are")
        group.add_argument("--process", type=int, metavar="I", help="this one's number, from 0")

    def takes_methods(self) -> None:
        self.add_argument(
            "--optimizers",
            nargs="+",
            metavar="TEXT",
            help="the methods, the baseline first; by default those of the config",
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="curvax", description=_TOP)
    add = parser.add_subparsers(required=True, metavar="COMMAND").add_parser
    _train_options(add("train", help="train a model", description=_TRAIN, epilog=_FIELDS))
    _compare_options(
        add("compare", help="train by several methods", description=_COMPARE, epilog=_FIELDS)
    )
    _inspect_options(
        add("inspect", help="look at what runs came to", description=_INSPECT, epilog=_PLACE)
    )
    _bench_options(add("bench", help="what a step costs", description=_BENCH, epilog=_FIELDS))
    _plan_options(add("plan", help="what a pod will need", description=_PLAN, epilog=_FIELDS))
    resume = add("resume", help="go on with a run", description=_RESUME, epilog=_PLACE)
    resume.runs(_resume).add_argument("folder", type=Path, metavar="FOLDER")
    resume.joins_others()
    _evaluate_options(
        add("evaluate", help="test on other data", description=_EVALUATE, epilog=_PLACE)
    )
    _convert_options(add("convert", help="pictures to records", description=_CONVERT))
    configs = add("configs", help="what there is to run", description=_CONFIGS)
    configs.runs(_configs).add_argument("config", nargs="?", metavar="CONFIG")
    return parser


def _train_options(train: _Parser) -> None:
    train.runs(_train).takes_a_config()
    train.joins_others()


def _compare_options(compare: _Parser) -> None:
    compare.runs(_compare).takes_a_config()
    compare.takes_methods()
    compare.joins_others()
    compare.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs of each")
    either = compare.add_mutually_exclusive_group()
    either.add_argument(
        "--fair", action="store_true", help="let the base also run twice the epochs"
    )
    either.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=A,B,C",
        help="score a grid of settings on 10 %% of the training set, kept out of training",
    )


def _inspect_options(inspect: _Parser) -> None:
    inspect.runs(_inspect).makes_folders()
    inspect.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="what to look at")
    inspect.add_argument(
        "--budget",
        type=_positive_number,
        default=5.0,
        metavar="MINUTES",
        help="for loading and measuring, by default 5; what does not fit is named",
    )
    inspect.add_argument(
        "--examples",
        type=_positive,
        default=256,
        metavar="N",
        help="of the training set to take the loss on, by default the first 256",
    )


def _bench_options(bench: _Parser) -> None:
    bench.runs(_bench).takes_a_config()
    bench.takes_methods()
    bench.add_argument(
        "--pairs", type=_positive, default=30, metavar="N", help="readings of each clock"
    )


def _evaluate_options(evaluate: _Parser) -> None:
    evaluate.runs(_evaluate).add_argument("folder", type=Path, metavar="RUN")
    evaluate.add_argument("--data", type=Path, metavar="PATH", help="what to test on")
    evaluate.add_argument(
        "--labels", type=Path, metavar="FILE", help="ImageNet-ReaL's real.json, or one like it"
    )
    evaluate.add_argument(
        "--corruptions",
        action="store_true",
        help="also the run's own test images under noise, blur, less contrast and pixelation",
    )


def _plan_options(plan: _Parser) -> None:
    plan.runs(_plan).takes_a_config()
    plan.takes_methods()
    plan.add_argument("--topology", required=True, help="what to compile for")
    plan.add_argument(
        "--variants",
        action="store_true",
        help="compile each also with the model's blocks scanned, unrolled and recomputed",
    )
    plan.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="of compilations, by default ~/.cache/curvax/plans",
    )


def _convert_options(convert: _Parser) -> None:
    convert.runs(_convert).add_argument("pictures", type=Path, metavar="PICTURES")
    convert.add_argument("out", type=Path, metavar="FOLDER", help="what is made; a new folder")
    convert.add_argument(
        "--validation", type=Path, metavar="PICTURES", help="class folders of the second part"
    )
    convert.add_argument(
        "--skip", action="store_true", help="leave out pictures that cannot be decoded"
    )


def _join(arguments: argparse.Namespace) -> bool:
    """Whether the options make this process one of several, which it is from here on."""
    given = [getattr(arguments, name, None) for name in ("coordinator", "processes", "process")]
    if any(value is not None for value in given) or getattr(arguments, "distributed", False):
        from curvax.training.runtime import distributed

        distributed.join(*given)
        return True
    return False


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, and is {number}")
    return number


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, and is {text}")
    return number


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands
    from curvax.training.runtime import distributed

    with distributed.together():
        config = commands.configure(arguments.config, overrides)
    methods = commands.methods(config) if config.train_baselines else [config.optimizer]
    commands.start(config, commands.RunSpec("train", methods), arguments.runs)


def _compare(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands, grid_search
    from curvax.training.runtime import distributed

    with distributed.together():
        config = commands.configure(arguments.config, overrides)
        fields = grid_search.read_fields(arguments.sweep)
    if fields:
        methods = arguments.optimizers or [config.optimizer]
        plan = commands.RunSpec("sweep", methods, arguments.seeds, fields=fields)
    else:
        methods = arguments.optimizers or commands.methods(config)
        plan = commands.RunSpec("compare", methods, arguments.seeds, arguments.fair)
    commands.start(config, plan, arguments.runs)


def _inspect(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.inspection import commands

    options = arguments.budget, arguments.examples, arguments.runs
    commands.inspect(arguments.folders, *options, overrides)


def _bench(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands

    config = commands.configure(arguments.config, overrides)
    methods = arguments.optimizers or commands.methods(config)
    commands.measure_costs(config, methods, arguments.pairs, arguments.runs)


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.planning import commands as planning
    from curvax.training.compare import commands

    config = commands.configure(arguments.config, overrides)
    methods = arguments.optimizers or commands.methods(config)
    options = {"variants": arguments.variants, "cache": arguments.cache, "root": arguments.runs}
    planning.plan_for(config, methods, arguments.topology, **options)


def _resume(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.compare import commands

    commands.resume(arguments.folder, overrides)


def _evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.evaluation import commands

    chosen = arguments.data, arguments.labels, arguments.corruptions
    commands.command(arguments.folder, *chosen, overrides)


def _convert(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.data import convert

    if overrides:
        raise ValueError(f"`curvax convert` has no option {overrides[0]}.")
    convert.command(arguments.pictures, arguments.out, arguments.validation, arguments.skip)


def _configs(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from curvax.training.config import configs as config

    if overrides:
        raise ValueError(f"`curvax configs` takes a name alone, and got {' '.join(overrides)}.")
    if arguments.config:
        print(config.docstring(arguments.config))
    else:
        for name in config.names():
            print(f"{name:24}{config.docstring(name).partition(chr(10))[0]}")
