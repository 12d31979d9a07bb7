"""What travels between cloud and device: gRPC, MQTT topics, messages, TLS."""
