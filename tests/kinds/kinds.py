"""The kinds of model, and how each is trained: where its task is, for how long, and how exactly engines agree."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

TASKS = Path(__file__).parent / "task"
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A row of the table."""

    title: str
    task: str  # module:attribute in the folder; empty = a Flower app
    folder: Path = TASKS
    library: str = ""  # a module that few installations have
    lr: float = 0.2
    epochs: int = 30  # of one step each: a client's samples are one batch
    tolerance: float = 1e-3  # of parameters and predictions, relative to the largest value
    is_random: bool = False  # the training draws random numbers, so that plain PyTorch cannot repeat it
    sizes: tuple[int, ...] = ()  # further sizes of the second dimension, at serving

    @property
    def name(self) -> str:
        """The name of its task or example, and of its model in the fleet."""
        return self.task.partition(":")[2] if self.folder == TASKS else self.folder.name

    @property
    def cannot(self) -> str:
        """Why this kind cannot be measured here; empty if it can."""
        if not self.library or find_spec(self.library) is not None:
            return ""
        return f"there is no {self.library} here, which `make soak` installs"


KINDS = (
    Kind(title="classification", task="tables:classification"),
    Kind(title="multi-label classification", task="tables:multi_label", lr=0.5),
    Kind(title="regression", task="tables:regression", lr=0.1),
    Kind(title="segmentation", task="pictures:segmentation"),
    Kind(title="autoencoder", task="tables:autoencoder", lr=0.05),
    Kind(title="LSTM over padded sequences with lengths", task="sequences:lstm"),
    Kind(title="GRU over packed sequences", task="sequences:packed_gru"),
    Kind(title="transformer over tokens of two lengths", task="sequences:transformer", lr=0.1, sizes=(6,)),
    Kind(title="1-D convolution", task="sequences:convolution", lr=0.1),
    Kind(title="U-Net with bilinear upsampling", task="pictures:u_net"),
    Kind(title="two inputs as a tuple", task="tables:tuple_inputs", lr=0.1),
    Kind(title="two inputs as a dict", task="tables:dict_inputs", lr=0.1),
    Kind(title="two outputs", task="tables:two_outputs", lr=0.1),
    Kind(title="batch norm and dropout", task="tables:batch_norm", is_random=True),
    Kind(title="embeddings", task="tables:embeddings", lr=0.05),
    Kind(title="float64", task="tables:float64", lr=0.1, tolerance=1e-6),
    Kind(title="bfloat16", task="tables:bfloat16", lr=0.1, tolerance=0.1),
    Kind(title="scikit-learn: scaler and classifier", task="libraries:pipeline"),
    Kind(title="XGBoost: bagged trees", task="task:task", folder=EXAMPLES / "tabular" / "trees", library="xgboost"),
    Kind(title="Keras, as a Flower app", task="", folder=EXAMPLES / "keras-app", library="tensorflow"),
)
