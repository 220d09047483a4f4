"""A slim model's engine in TensorRT's Python API, without lowpass.

Prints: the class of each image. The images are [B, 3, H, W], normalised as onnx_runtime.py does, in a .npy file.
Takes:  a second. Needs an NVIDIA GPU and the TensorRT that built the engine.
Run:    python examples/without_lowpass/tensorrt_engine.py runs/small/model.fp16.plan images.npy

NOT RUN yet: no GPU was at hand. What is tested is that every name it uses is one of TensorRT's.
"""

import sys
from pathlib import Path

import numpy as np
import tensorrt as trt  # of `lowpass build --runtime tensorrt-rtx`: import tensorrt_rtx as trt
import torch

plan, file = sys.argv[1:]
images = torch.from_numpy(np.load(file).astype(np.float32)).cuda()

logger = trt.Logger(trt.Logger.WARNING)
engine = trt.Runtime(logger).deserialize_cuda_engine(Path(plan).read_bytes())
context = engine.create_execution_context()
stream = torch.cuda.Stream()

# Profile 0 takes every batch size of `export --batch`. Each of the others is for one size, with fewer kernels.
profile = 0
for index in range(engine.num_optimization_profiles):
    least, _, most = engine.get_tensor_profile_shape("images", index)
    if least[0] == most[0] == len(images):
        profile = index
context.set_optimization_profile_async(profile, stream.cuda_stream)
context.set_input_shape("images", tuple(images.shape))

logits = torch.empty(tuple(context.get_tensor_shape("logits")), dtype=torch.float32, device="cuda")
context.set_tensor_address("images", images.data_ptr())
context.set_tensor_address("logits", logits.data_ptr())
torch.cuda.synchronize()
if not context.execute_async_v3(stream.cuda_stream):
    sys.exit("TensorRT could not run the engine")
stream.synchronize()
print(logits.argmax(-1).tolist())
