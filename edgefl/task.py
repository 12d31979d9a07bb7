"""A learning task: a model, a loss, data and metrics, in one module of the user.

    task = Task(name="digits", model=Net, loss=cross_entropy, train_data=load_part, test_data=load_test,
                metrics={"accuracy": accuracy})

A task is named by `package.module:attribute`, or by a folder whose pyproject.toml has the line
`[tool.edgefl] task = "module:attribute"`. Its folder is sent to the devices as a bundle: a zip whose
bytes depend on the files alone.
Invariant: an exception in the user's code becomes a TaskError that names the user's file and line.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError, TaskError
from edgefl.guards import DEVICES, same_name
from edgefl.process.requirements import refuse_unmet
from edgefl.terminal.extras import extra_of, install_command
from edgefl.terminal.user_code import MAX_QUOTED, BundleFolder, TaskFolder, UserCode
from edgefl.training.metrics import LOSS, direction, refuse_metrics
from edgefl.training.randomness import seeded
from edgefl.trees import Tree

if TYPE_CHECKING:
    import torch

    from edgefl.config import TrainConfig
    from edgefl.training.metrics import Metric

__all__ = [
    "MAX_QUOTED", "FitResult", "Located", "Task", "UserCode", "forget_modules", "import_from", "import_task",
    "load_task", "locate_task", "see_working_folder",
]  # fmt: skip

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_NEVER_REPLACED = sys.stdlib_module_names | {"edgefl", "edge_agent", "cloud"}
_IMPORTING = threading.RLock()  # sys.path and sys.modules belong to the whole process


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """The result of a user's `Task.fit`."""

    tree: Tree  # delta or gradient: names, shapes and dtypes as in the trained parameters
    weight: float  # number of samples
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the training, reported as `train_NAME`
    state: Tree = field(default_factory=dict)  # what the client keeps for its next round, and never sends


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The result of a user's `Task.evaluate_locally`."""

    metrics: Mapping[str, Any]  # by name; numbers, or mappings or arrays of them
    weight: float  # number of samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A learning task. Give `model` and `loss` (PyTorch), or `initial` and `fit` (anything else).

    `train_data(**options)` returns this device's own data; the options come from `edgefl agent start --data k=v`, as
    strings. It is (inputs, targets): each one array or tensor, or a tuple or dict of them to any depth, all of equal
    first dimension. A model's `forward` gets the parts of a tuple as its arguments, and those of a dict by name, if its
    signature accepts them. Or it is a map-style `torch.utils.data.Dataset`, which is read batch by batch; its items are
    (inputs, targets), or whatever `collate` makes (inputs, targets) of.
    `loss(outputs, targets)` is a mean over the batch. A metric is a function of (outputs, targets) that is a mean
    over the batch, too, or an object with torchmetrics' `update`, `compute` and `reset`; it is of the held-out data.
    `dynamic` names the dimensions of the inputs that may have any size when the model is served: `{"tokens": [1]}`,
    with names for those of one size `{"tokens": {1: "length"}, "mask": {1: "length"}}`, or torch's `dynamic_shapes`.
    `higher_is_better` says of a metric which way is better, if neither its attribute of this name nor its name does.

    Federated evaluation: `eval_data(**options)` returns this device's own held-out samples, as `train_data` returns
    those for training. Each device evaluates the parameters that it receives, with the loss and the metrics. A task
    with `fit` has `evaluate_locally(parameters, options)` instead, which returns an `EvalResult`.
    """

    name: str  # of the task, in messages and results
    model: Callable[..., torch.nn.Module] | None = None  # makes a new model; its parameter `rank` is for adapters
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # (outputs, targets)
    train_data: Callable[..., Any] | None = None  # (**data options): (inputs, targets) of one device, or a Dataset
    test_data: Callable[..., Any] | None = None  # held-out data, evaluated on the operator's machine
    collate: Callable[[list[Any]], tuple[Any, Any]] | None = None  # (items of a Dataset): (inputs, targets) of a batch
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # of the held-out data
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)  # metric -> its direction
    dynamic: Any = None  # dimensions of the inputs that are free in the exported model, beside the batch
    optimizer: Callable[..., torch.optim.Optimizer] | None = None  # (parameters, lr[, config or round])
    initial: Callable[[], Tree] | None = None  # the parameters of the first round, of a task with `fit`
    fit: Callable[[Tree, TrainConfig, Mapping[str, str]], FitResult] | None = None  # (parameters, config, options)
    trained: Collection[str] | None = None  # the names that `fit` trains and returns; None = all
    evaluate: Callable[[Tree], Mapping[str, Any]] | None = None  # held-out metrics of a task with `fit`
    eval_data: Callable[..., tuple[Any, Any]] | None = None  # (**data options): held-out samples of one device
    evaluate_locally: Callable[[Tree, Mapping[str, str]], EvalResult] | None = None  # the same for a task with `fit`
    export: Callable[[Tree], Any] | None = None  # the ONNX model of a task with `fit`, see `edgefl.models.own_export`

    def __post_init__(self) -> None:
        torch_task = self.model is not None and self.loss is not None and self.train_data is not None
        if torch_task == (self.initial is not None and self.fit is not None):
            raise ConfigError(f"task {self.name!r} must have either model, loss and train_data, or initial and fit")
        self._check_evaluation(torch_task=torch_task)
        if self.trained is not None and (torch_task or isinstance(self.trained, str)):
            raise ConfigError(
                f"task {self.name!r}: trained={self.trained!r:.200} belongs to a task with fit, and lists names of "
                "tensors; of a model, the parameters that require a gradient are trained"
            )

    def _check_evaluation(self, *, torch_task: bool) -> None:
        if torch_task and self.evaluate is not None:
            raise ConfigError(
                f"task {self.name!r}: evaluate belongs to a task with fit; one with a model has test_data and metrics"
            )
        if torch_task and self.export is not None:
            raise ConfigError(f"task {self.name!r}: export belongs to a task with fit; a model is exported by edgefl")
        if not torch_task and (self.metrics or self.test_data is not None):
            raise ConfigError(
                f"task {self.name!r}: metrics and test_data belong to a task with model and loss; one with fit is "
                "evaluated by its own evaluate(parameters)"
            )
        if torch_task and self.evaluate_locally is not None:
            raise ConfigError(
                f"task {self.name!r}: evaluate_locally belongs to a task with fit; one with a model has eval_data"
            )
        if not torch_task and self.eval_data is not None:
            raise ConfigError(
                f"task {self.name!r}: eval_data belongs to a task with model and loss; one with fit is evaluated on "
                "devices by its own evaluate_locally(parameters, options)"
            )
        refuse_metrics(self.name, self.metrics)
        if odd := next((name for name in self.metrics if name.startswith(DEVICES)), None):
            raise ConfigError(f"task {self.name!r}: metric {odd!r} begins with {DEVICES}, as federated evaluation does")
        if self.eval_data is not None and (fault := same_name((LOSS, *self.metrics))):
            raise ConfigError(f"task {self.name!r}: {fault}")
        if torch_task and (strange := self.higher_is_better.keys() - self.metrics.keys()):
            raise ConfigError(
                f"task {self.name!r}: higher_is_better names {min(strange)!r}, which is no metric of it: "
                f"{', '.join(self.metrics) or 'it has none'}"
            )

    def direction_of(self, metric: str) -> bool | None:
        """Return whether a higher value of a metric is better; None if nothing says so."""
        return self.higher_is_better.get(metric, direction(metric, self.metrics.get(metric)))

    def model_of_rank(self, rank: int) -> torch.nn.Module:
        """Make a model whose adapters have this rank; raises TaskError if `model` takes no `rank`."""
        if self.model is None or "rank" not in inspect.signature(self.model).parameters:
            raise TaskError(
                f"task {self.name!r}: adapters of rank {rank} are asked for, and its model takes no rank. Write "
                "`def model(rank: int = 8)`, or drop train.lora_ranks and the data option lora_rank"
            )
        return self.model(rank=rank)

    def optimizer_of(self, parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
        """Make this task's optimizer for a round; it gets `round` or `config` if it has such a parameter.

        `def optimizer(parameters, lr, round)`, or `(parameters, lr, *, config)` with an `edgefl.TrainConfig`.
        """
        if self.optimizer is None:
            raise ConfigError(f"task {self.name!r} has no optimizer of its own")
        try:
            known = inspect.signature(self.optimizer).parameters
        except ValueError:  # some builtins have no signature
            known = MappingProxyType({})
        told = {"config": config, "round": config.round}
        return self.optimizer(parameters, config.lr, **{name: told[name] for name in told if name in known})


@dataclass(frozen=True, slots=True)
class Located:
    """Where a task is: `module:attribute`, imported from `folder` if one is given."""

    task: str
    folder: Path | None = None

    @property
    def top_module(self) -> str:
        return self.task.partition(":")[0].partition(".")[0]

    @property
    def name(self) -> str:
        """The task's name for people: its folder's or module's name, and the attribute."""
        return self.task if self.folder is None else f"{self.folder.name}:{self.task.partition(':')[2]}"


def load_task(reference: str) -> Task:
    """Return the task of `package.module:attribute` or of a folder.

    Raises ConfigError for a reference that cannot be found and for dependencies of a folder that are not installed,
    TaskError if the user's module raises.
    """
    located = locate_task(reference)
    if located.folder is not None:
        refuse_unmet(located.name, located.folder)
    return import_task(located.task, located.folder)


def locate_task(reference: str) -> Located:
    """Find a task without importing it; raises ConfigError."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return Located(_task_of(folder.resolve()), folder.resolve())
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(
            f"task {reference!r}: there is no such folder. Give a folder whose pyproject.toml has "
            '[tool.edgefl] task = "module:attribute", or package.module:attribute.'
        )
    return Located(reference)


def import_task(task: str, folder: Path | None = None, *, unpacked: bool = False) -> Task:
    """Import `module:attribute`, from `folder` if one is given.

    One folder is current at a time: its modules hide modules of the same name elsewhere, and the
    modules of the previous folder are removed from sys.modules (a Task object that was returned keeps working).
    If tasks alternate in one process, call this again at each change, so that late imports find the right files.
    `unpacked`: the folder was made from a bundle, and messages name its files by their names there.
    """
    match = _REFERENCE.fullmatch(task)
    if match is None:
        raise ConfigError(f"task {task!r} is not of the form module:attribute")
    module_name, attribute = match.groups()
    with _IMPORTING:
        if folder is None:
            see_working_folder(module_name.partition(".")[0])
        else:
            _enter(folder.resolve(), module_name, unpacked=unpacked)
        module = _import(task, module_name)
    return _task_in(module, attribute)


def import_from(folder: Path, module_name: str, *, unpacked: bool = False) -> ModuleType:
    """Import a module of a folder, which becomes the current one as in `import_task`; does not convert errors."""
    with _IMPORTING:
        _enter(folder.resolve(), module_name, unpacked=unpacked)
        return import_module(module_name)


def forget_modules(folder: Path) -> None:
    """Remove a folder's modules from sys.modules, so that its next import is a new one."""
    folder = folder.resolve()
    with _IMPORTING:
        for name in _modules_in(folder) - _NEVER_REPLACED:
            for module_name, module in sys.modules.copy().items():
                if module_name.partition(".")[0] == name and _comes_from(module, folder):
                    del sys.modules[module_name]


def _task_of(folder: Path) -> str:
    file = folder / "pyproject.toml"
    try:
        tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
        task, app = tool.get("edgefl", {}).get("task"), tool.get("flwr", {}).get("app")
    except FileNotFoundError as cause:
        raise ConfigError(f"{folder} has no pyproject.toml, so it names no task") from cause
    except OSError as cause:
        raise ConfigError(f"cannot read {file}: {cause.strerror}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError) as cause:
        raise ConfigError(f"{file} is not a valid pyproject.toml: {cause}") from cause
    if task is None and app is not None:
        raise ConfigError(
            f"{folder} is a Flower app and no task of edgefl: `edgefl simulate` and `edgefl run` take it, but only its "
            "own code knows its model. Export the model to ONNX with its library, and publish the file: edgefl models "
            "publish NAME --onnx FILE"
        )
    if not isinstance(task, str) or not _REFERENCE.fullmatch(task):
        seen = "is missing" if task is None else f"is {task!r}"
        raise ConfigError(f'{file}: [tool.edgefl] task {seen}; expected task = "module:attribute"')
    return task


def _enter(folder: Path, module_name: str, *, unpacked: bool) -> None:
    names = _modules_in(folder)
    if (top := module_name.partition(".")[0]) not in names:
        raise ConfigError(f"{folder} has no module {top!r}, which its task names")
    before = [entry for entry in sys.path if isinstance(entry, TaskFolder) and entry != str(folder)]
    names = names.union(*(_modules_in(Path(entry)) for entry in before)) - _NEVER_REPLACED
    for name, module in sys.modules.copy().items():
        if name.partition(".")[0] in names and not _comes_from(module, folder):
            del sys.modules[name]
    entry_of = BundleFolder if unpacked else TaskFolder
    sys.path[:] = [entry_of(folder), *(entry for entry in sys.path if not isinstance(entry, TaskFolder))]
    invalidate_caches()  # the files may be seconds old


def see_working_folder(top: str) -> None:
    """Make modules of the working folder importable, as `python -m` does, unless an installed one has the name."""
    here = str(Path.cwd())
    if here not in sys.path and top not in sys.modules and find_spec(top) is None:
        sys.path.insert(0, here)
        invalidate_caches()


def _modules_in(folder: Path) -> set[str]:
    files = {path.stem for path in folder.glob("*.py")}
    return files | {path.parent.name for path in folder.glob("*/*.py") if not path.parent.name.startswith(".")}


def _comes_from(module: ModuleType, folder: Path) -> bool:
    attributes = vars(module)
    homes = [attributes["__file__"]] if attributes.get("__file__") else list(attributes.get("__path__", ()))
    return bool(homes) and all(Path(home).resolve().is_relative_to(folder) for home in homes)


def _import(task: str, module_name: str) -> ModuleType:
    try:
        with seeded(0), UserCode(task, f"importing {module_name!r}"):
            return import_module(module_name)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise ConfigError(f"task {task!r}: there is no module {cause.name!r} here") from cause
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            extra = extra_of(cause.name)
            how = install_command(extra) if extra else f"{sys.executable} -m pip install, and its package's name"
            raise TaskError(f"{error}. It is not installed for {sys.executable}: {how}") from cause
        raise


def _task_in(module: ModuleType, attribute: str) -> Task:
    where = f"{module.__name__} ({module.__file__})"
    if attribute not in vars(module):
        tasks = ", ".join(name for name, value in vars(module).items() if isinstance(value, Task))
        raise ConfigError(f"{where} has no attribute {attribute!r}; tasks in it: {tasks or 'none'}")
    task = vars(module)[attribute]
    if not isinstance(task, Task):
        raise ConfigError(f"{attribute!r} in {where} is of type {type(task).__name__}, not an edgefl.Task")
    return task
