"""A pipeline of scikit-learn as a task with its own `fit` and `export`."""

from __future__ import annotations

import numpy as np
from common import HELD_OUT, PART_SIZES, normal
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from edgefl import FitResult, Task

NUM_FEATURES = 6


def samples(seed, count):
    rng = np.random.default_rng(seed)
    table = normal(rng, count, NUM_FEATURES)
    return 5.0 * table.astype(np.float64) + 2, table[:, :3].argmax(1)


def initial():
    return {
        "mean": np.zeros(NUM_FEATURES), "scale": np.ones(NUM_FEATURES), "coef": np.zeros((3, NUM_FEATURES)),
        "intercept": np.zeros(3),
    }  # fmt: skip


def pipeline_of(parameters, lr=0.1):
    """Return a fitted pipeline with these parameters."""
    scaler = StandardScaler()
    scaler.mean_, scaler.scale_, scaler.var_ = parameters["mean"], parameters["scale"], parameters["scale"] ** 2
    scaler.n_features_in_ = NUM_FEATURES
    scaler.n_samples_seen_ = 1
    last = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=lr, random_state=0)
    last.classes_, last.n_features_in_ = np.arange(3), NUM_FEATURES
    last.coef_, last.intercept_ = parameters["coef"].copy(), parameters["intercept"].copy()
    return make_pipeline(scaler, last)


def fit(parameters, config, options):
    part = int(options.get("part", 0))
    table, wanted = samples(1 + part, PART_SIZES[part])
    own = StandardScaler().fit(table)
    pipeline = pipeline_of({**parameters, "mean": own.mean_, "scale": own.scale_}, config.lr)
    last = pipeline[-1]
    for _ in range(config.epochs):
        last.partial_fit(own.transform(table), wanted)
    trained = {"mean": own.mean_, "scale": own.scale_, "coef": last.coef_, "intercept": last.intercept_}
    return FitResult(tree={name: trained[name] - parameters[name] for name in trained}, weight=len(wanted))


def evaluate(parameters):
    table, wanted = samples(0, HELD_OUT)
    pipeline = pipeline_of(parameters)
    return {"loss": log_loss(wanted, pipeline.predict_proba(table)), "accuracy": pipeline.score(table, wanted)}


def held_out_and_predicted(parameters):
    """Return inputs, and what the library predicts for them, by output."""
    table, _ = samples(0, HELD_OUT)
    table = table.astype(np.float32)
    pipeline = pipeline_of(parameters)
    return table, {"label": pipeline.predict(table), "probabilities": pipeline.predict_proba(table)}


def export(parameters):
    import skl2onnx

    table, predicted = held_out_and_predicted(parameters)
    model = skl2onnx.to_onnx(pipeline_of(parameters), table[:1], options={"zipmap": False})
    return model, table, predicted


pipeline = Task(name="pipeline", initial=initial, fit=fit, evaluate=evaluate, export=export)
