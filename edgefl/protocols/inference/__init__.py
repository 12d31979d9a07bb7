"""The Open Inference Protocol (v2) over gRPC: its messages, its service, and tensors to and from numpy.

https://github.com/kserve/open-inference-protocol. Clients and servers of Triton and KServe work unchanged.
"""
