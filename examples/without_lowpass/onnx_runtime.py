"""A slim model in ONNX Runtime, without lowpass: how a picture is prepared stands in the file itself.

Prints: the three best classes of a picture, with probabilities.
Takes:  a second.
Run:    python examples/without_lowpass/onnx_runtime.py runs/digits/model.fp32.onnx deploy/digit.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

file, picture = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
told = session.get_modelmeta().custom_metadata_map
(_, height, width), prep = json.loads(told["input_size"]), json.loads(told["preprocessing"])

# Crop mode `center`: the shorter side is resized, then the middle is cut out.
image = Image.open(picture).convert("RGB")
scale = int(height / prep["crop_pct"]) / min(image.size)
size = int(image.width * scale), int(image.height * scale)
image = image.resize(size, Image.Resampling[prep["interpolation"].upper()])
left, top = round((image.width - width) / 2), round((image.height - height) / 2)
pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
images = ((pixels - prep["mean"]) / prep["std"]).transpose(2, 0, 1)[None].astype(np.float32)

(logits,) = session.run(["logits"], {"images": images})  # any batch size
shares = np.exp(logits[0] - logits[0].max())
shares /= shares.sum()
classes = json.loads(Path(file).with_name("classes.json").read_text())
for index in shares.argsort()[::-1][:3]:
    print(f"{classes[index]}: {shares[index]:.3f}")
