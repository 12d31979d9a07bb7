"""What a client does: train on its own part, and evaluate on it."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app.task import Net, load_part, test, train

app = ClientApp()


def _load(message: Message, context: Context) -> tuple[Net, tuple[torch.Tensor, torch.Tensor]]:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, load_part(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


@app.train()
def train_part(message: Message, context: Context) -> Message:
    """Train the global model on this client's part."""
    net, data = _load(message, context)
    config = context.run_config
    loss = train(
        net, data, epochs=config["local-epochs"], lr=config["learning-rate"], batch=config["batch-size"]
    )  # fmt: skip
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data[1])})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_part(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's part."""
    net, data = _load(message, context)
    loss, accuracy = test(net, data)
    metrics = MetricRecord({"eval_loss": loss, "eval_accuracy": accuracy, "num-examples": len(data[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
