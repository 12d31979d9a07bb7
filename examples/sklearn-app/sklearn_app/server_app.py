"""What the server does: FedAvg over the weights of a logistic regression."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearn_app.task import load_held_out, make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    model = make_model()
    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord([model.coef_, model.intercept_]),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate_held_out,
    )
    context.state["arrays"] = result.arrays


def evaluate_held_out(_server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate a global model on the held-out pictures."""
    return MetricRecord({"accuracy": float(make_model(arrays.to_numpy_ndarrays()).score(*load_held_out()))})
