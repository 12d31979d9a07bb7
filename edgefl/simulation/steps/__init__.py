"""Fast training steps. Only the names exported here are public; how steps are made fast is internal."""

from edgefl.simulation.steps.batch import Batch
from edgefl.simulation.steps.factored import FactoredGradients
from edgefl.simulation.steps.flat_buffer import FlatModel
from edgefl.simulation.steps.recording import has_compiler
from edgefl.simulation.steps.sample_cache import SampleCache
from edgefl.simulation.steps.step import StackedStep, make_stacked_step, make_step

__all__ = [
    "Batch", "FactoredGradients", "FlatModel", "SampleCache", "StackedStep", "has_compiler", "make_stacked_step",
    "make_step",
]  # fmt: skip
