"""The link to the fleet: enrolment, certificates, MQTT, gRPC, transfers."""
