"""A slim model behind a Triton server, asked without lowpass: a picture goes out as it is, labels come back.

Prints: the three best labels of a picture, with probabilities.
Takes:  a second. The server: `lowpass deploy DIR --repository models --name digits --decode && lowpass serve models`.
Run:    python examples/without_lowpass/triton_client.py 127.0.0.1:8000 digits deploy/digit.png
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton

url, model, file = sys.argv[1:]
picture = triton.InferInput("picture", [1, 1], "BYTES")
picture.set_data_from_numpy(np.array([[Path(file).read_bytes()]], dtype=object))

# `--decode` has put NAME-pictures before NAME: it reads JPEG, PNG and WebP, and prepares them as the model expects.
answer = triton.InferenceServerClient(url).infer(f"{model}-pictures", [picture])
labels, probabilities = answer.as_numpy("labels")[0], answer.as_numpy("probabilities")[0]
for label, probability in list(zip(labels, probabilities, strict=True))[:3]:
    print(f"{label.decode()}: {probability:.3f}")
