"""What a client does: a few iterations on its own part."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from sklearn_app.task import load_part, make_model, train

app = ClientApp()


@app.train()
def train_part(message: Message, context: Context) -> Message:
    """Train the global model on this client's part."""
    config = context.run_config
    data = load_part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    model = make_model(
        message.content["arrays"].to_numpy_ndarrays(), epochs=config["local-epochs"], penalty=config["penalty"]
    )
    weights = train(model, data)
    metrics = MetricRecord({"train_accuracy": float(model.score(*data)), "num-examples": len(data[1])})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_part(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's part."""
    data = load_part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    model = make_model(message.content["arrays"].to_numpy_ndarrays())
    metrics = MetricRecord({"eval_accuracy": float(model.score(*data)), "num-examples": len(data[1])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
