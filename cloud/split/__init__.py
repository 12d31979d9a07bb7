"""The cloud's side of training in parts: a server beside the cloud, whose children train the cloud's layers."""
