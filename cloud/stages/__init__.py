"""The stage server: the cloud's part of split models, as processes behind the Open Inference Protocol over gRPC."""
