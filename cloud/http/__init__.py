"""The HTTPS plane: enrolment for devices, REST for operators."""
