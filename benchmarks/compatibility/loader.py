"""Run one ONNX file in one runtime, alone: python loader.py RUNTIME PRECISION FILE IMAGES.npy LOGITS.npy

Knows nothing of lowpass, for environments that hold NumPy and a runtime alone. Ends with 1 and the reason where the
runtime does not read the file.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # what OpenVINO is told to compute in, as `OpenVino` tells it


def onnxruntime_logits(content: bytes, precision: str, images: Any) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def openvino_logits(content: bytes, precision: str, images: Any) -> Any:
    import openvino

    core = openvino.Core()
    model = core.read_model(content)
    model.reshape(list(images.shape))
    hint = {"INFERENCE_PRECISION_HINT": HINTS[precision]} if precision in HINTS else {}
    request = core.compile_model(model, "CPU", hint).create_infer_request()
    request.set_input_tensor(openvino.Tensor(images))
    request.infer()
    return request.get_output_tensor().data


if __name__ == "__main__":
    runtime, precision, file, images, logits = sys.argv[1:]
    run = {"onnxruntime": onnxruntime_logits, "openvino": openvino_logits}[runtime]
    try:
        np.save(logits, run(Path(file).read_bytes(), precision, np.load(images)))
    except Exception as error:  # whatever the runtime says of the file is the answer
        sys.exit(" ".join(str(error).split()))
