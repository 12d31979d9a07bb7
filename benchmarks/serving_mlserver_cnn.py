"""MLServer's runtime for the benchmark's model; `benchmarks.serving_mlserver` puts it into the server's folder."""

from __future__ import annotations

import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Cnn(MLModel):
    """An ONNX model with one input and one output."""

    async def load(self) -> bool:
        """Open the model."""
        self._session = ort.InferenceSession(self.settings.parameters.uri)
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request."""
        values = NumpyCodec.decode_input(payload.inputs[0])
        (result,) = self._session.run(None, {self._input: values})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(self._output, result)])
