"""What a client does: train on its own part, and evaluate on it."""

import keras
import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from keras_app.task import load_part, make_model, test, train

app = ClientApp()


def _load(message: Message, context: Context) -> tuple[keras.Model, tuple[np.ndarray, np.ndarray]]:
    model = make_model(context.run_config["seed"], context.run_config["learning-rate"])
    model.set_weights(message.content["arrays"].to_numpy_ndarrays())
    return model, load_part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


@app.train()
def train_part(message: Message, context: Context) -> Message:
    """Train the global model on this client's part."""
    model, data = _load(message, context)
    config = context.run_config
    loss = train(model, data, epochs=config["local-epochs"], batch=config["batch-size"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data[1])})
    content = RecordDict({"arrays": ArrayRecord(model.get_weights()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_part(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's part."""
    model, data = _load(message, context)
    loss, accuracy = test(model, data)
    metrics = MetricRecord({"eval_loss": loss, "eval_accuracy": accuracy, "num-examples": len(data[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
