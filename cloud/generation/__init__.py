"""The tail of a language model in the cloud: sequences of many devices, decoded together."""
