"""What the server does: FedAvg, and an evaluation of each global model on what no client has seen."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from keras_app.task import initial_weights, load_held_out, make_model, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    config = context.run_config
    seed, lr = config["seed"], config["learning-rate"]

    def evaluate_held_out(_server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = make_model(seed, lr)
        model.set_weights(arrays.to_numpy_ndarrays())
        loss, accuracy = test(model, load_held_out())
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_weights(seed, lr)),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate_held_out,
    )
    context.state["arrays"] = result.arrays
