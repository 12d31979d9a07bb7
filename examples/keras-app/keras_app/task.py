"""Model, data and training: 8x8 digits from scikit-learn's own wheel, nothing is downloaded.

Deterministic: the same run config gives the same model, whatever the order in which clients train, and
in whichever process. So TensorFlow computes with one thread and deterministic kernels.
"""

import os
from functools import cache

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no word on the machine's instruction sets

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

HELD_OUT = 360  # a fifth of 1,797 pictures: the server's

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()


@cache
def make_model(seed: int, lr: float) -> keras.Model:
    """Make the model that a federation starts from: 8,714 parameters. One a process, since Keras traces each anew."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        optimizer=keras.optimizers.SGD(lr),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@cache
def initial_weights(seed: int, lr: float) -> list[np.ndarray]:
    """Return the weights of round 1; to be called before the model is trained."""
    return make_model(seed, lr).get_weights()


@cache
def load_all() -> tuple[np.ndarray, np.ndarray]:
    """Return all pictures and labels, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(20).permutation(len(digits.target))
    return (digits.images[order, :, :, None] / 16).astype(np.float32), digits.target[order]


def load_part(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every `parts`-th of the pictures that are not held out."""
    pictures, labels = load_all()
    return pictures[HELD_OUT + part :: parts], labels[HELD_OUT + part :: parts]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures that no client trains on."""
    pictures, labels = load_all()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


def train(model: keras.Model, data: tuple[np.ndarray, np.ndarray], *, epochs: int, batch: int) -> float:
    """Train in place, in the order of the data; return the mean loss of the last epoch."""
    history = model.fit(*data, epochs=epochs, batch_size=batch, shuffle=False, verbose=0)
    return float(history.history["loss"][-1])


def test(model: keras.Model, data: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    loss, accuracy = model.evaluate(*data, verbose=0)
    return float(loss), float(accuracy)
