"""A Keras model that the processes of a site train together, by TensorFlow's own MultiWorkerMirroredStrategy.

edgefl starts the processes and gives each its TF_CONFIG; TensorFlow does the rest: it averages the gradients, and keeps
the variables equal. With `train.processes = 1` the same code trains in one process.

    edgefl run examples/keras_site --config examples/keras_site/config.toml
"""

import json
import os
from collections.abc import Mapping
from functools import cache

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from edgefl import FitResult, Task, TrainConfig

HELD_OUT = 360  # a fifth of 1,797 pictures


def make_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)])


@cache
def site() -> tuple[tf.distribute.Strategy, keras.Model]:
    """Return the strategy and the model of this process: TensorFlow's server starts once, and stays for all rounds."""
    workers = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])
    several = len(workers) > 1
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if several else tf.distribute.get_strategy()
    with strategy.scope():
        return strategy, make_model()


@cache
def load_all() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    order = np.random.default_rng(20).permutation(len(digits.target))
    return (digits.data[order] / 16).astype(np.float32), digits.target[order]


def load_part(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = load_all()
    return pictures[HELD_OUT + part :: parts], labels[HELD_OUT + part :: parts]


def named(weights: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"weight-{number}": array for number, array in enumerate(weights)}


def fit(parameters: Mapping[str, np.ndarray], config: TrainConfig, options: Mapping[str, str]) -> FitResult:
    """Train on this device's part; every worker takes its share of each batch."""
    strategy, model = site()
    model.set_weights(list(parameters.values()))
    pictures, labels = load_part(int(options.get("part", 0)), int(options.get("parts", 1)))
    workers = strategy.num_replicas_in_sync
    own = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if workers > 1 else 0
    order, losses = np.random.default_rng(config.round), []

    @tf.function(reduce_retracing=True)
    def step(pictures: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        def on_worker(pictures: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(pictures, training=True))
                loss = tf.reduce_mean(each)
            gradients = tape.gradient(loss, model.trainable_variables)
            everyone = tf.distribute.get_replica_context().all_reduce("mean", gradients)
            for variable, gradient in zip(model.trainable_variables, everyone, strict=True):
                variable.assign_sub(config.lr * gradient)
            return loss

        return strategy.reduce("mean", strategy.run(on_worker, args=(pictures, labels)), axis=None)

    for _ in range(config.epochs):
        shuffled = order.permutation(len(labels))
        whole = len(labels) - len(labels) % workers  # every worker has as many samples
        for batch in np.array_split(shuffled[:whole], max(1, whole // config.batch_size)):
            mine = batch[: len(batch) - len(batch) % workers][own::workers]
            losses.append(float(step(tf.constant(pictures[mine]), tf.constant(labels[mine]))))
    deltas = [new - old for new, old in zip(model.get_weights(), parameters.values(), strict=True)]
    return FitResult(
        tree=named(deltas), weight=len(labels), metrics={"loss": float(np.mean(losses)), "workers": workers}
    )


def evaluate(parameters: Mapping[str, np.ndarray]) -> dict[str, float]:
    model = make_model()
    model.set_weights(list(parameters.values()))
    pictures, labels = (one[:HELD_OUT] for one in load_all())
    return {"accuracy": float((model(pictures).numpy().argmax(1) == labels).mean())}


task = Task(name="keras-site", initial=lambda: named(make_model().get_weights()), fit=fit, evaluate=evaluate)
