"""An ONNX classifier as a model of MLServer, in .venv-servers, which has neither torch nor mekd."""

import os
import signal
import sys
import threading

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


def end_with_the_other_end() -> None:
    """End this server when the pipe to it is closed, however whoever held it ended."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


threading.Thread(target=end_with_the_other_end, daemon=True).start()


class Onnx(MLModel):
    """The file that parameters.uri of its model-settings.json names."""

    async def load(self) -> bool:
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (given,) = payload.inputs
        name = self._session.get_outputs()[0].name
        (answer,) = self._session.run([name], {given.name: NumpyCodec.decode_input(given)})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(name, answer)])
