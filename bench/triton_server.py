"""ONNX classifiers behind a Triton Inference Server, until standard input ends.

Runs in .venv-servers, which has neither torch nor mekd: python triton_server.py SETTINGS, as JSON: port, workspace, and
models, each with name, file, max_batch, and queue (requests that wait at most) and slow_s where it is to be busy.
"""

import json
import sys
import time

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor
from pytriton.triton import Triton, TritonConfig

DTYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


def bind(triton, name, file, max_batch, queue=0, slow_s=0.0):
    """Add one model of one input and one output."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (source,), (sink,) = session.get_inputs(), session.get_outputs()

    @batch
    def answer(**tensors):
        time.sleep(slow_s)
        return session.run([sink.name], tensors)

    tensors = [Tensor(name=t.name, dtype=DTYPES[t.type], shape=tuple(t.shape[1:])) for t in (source, sink)]
    policy = QueuePolicy(max_queue_size=queue) if queue else None
    config = ModelConfig(max_batch_size=max_batch, batcher=DynamicBatcher(default_queue_policy=policy))
    triton.bind(model_name=name, infer_func=answer, inputs=tensors[:1], outputs=tensors[1:], config=config)


def main(settings):
    config = TritonConfig(
        http_address="127.0.0.1", http_port=settings["port"], allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config, workspace=settings["workspace"]) as triton:
        for model in settings["models"]:
            bind(triton, **model)
        triton.run()
        sys.stdin.read()  # it ends with the process at the other end, however that one ends


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
