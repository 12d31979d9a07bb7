"""What the server does: FedAvg, and an evaluation of each global model on what no client has seen."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_app.task import Net, load_held_out, make_model, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    config = context.run_config
    strategy = FedAvg(fraction_train=config["fraction-train"], fraction_evaluate=config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model(config["seed"]).state_dict()),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate_held_out,
    )
    context.state["arrays"] = result.arrays


def evaluate_held_out(_server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate a global model on the held-out pictures."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(net, load_held_out())
    return MetricRecord({"loss": loss, "accuracy": accuracy})
