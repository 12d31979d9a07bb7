"""The cloud: aggregator, gRPC data plane, HTTPS operator plane, registry and rollouts."""
