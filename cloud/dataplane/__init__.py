"""The gRPC data plane: plans and models down, updates up."""
