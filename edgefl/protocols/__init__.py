"""The protocols between cloud and device: gRPC, MQTT topics, messages, TLS."""
