"""A Transformers checkpoint to a Triton server.

Shows:  the folder that `save_pretrained` wrote and a folder of pictures go in; a server that takes pictures and gives
        labels comes out. A client that knows nothing of lowpass asks it.
Prints: MACs and top-1, what was deployed, and the labels that the server gives to a picture.
Takes:  a minute on two cores, without a network. Needs the server that `make triton` puts into .venv-triton, or in
        LOWPASS_TRITON.
Run:    make triton && .venv/bin/python examples/transformers_to_triton.py
"""

# %% Pictures in a folder a class, as you will have them.
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_digits import TEST, learn, scans
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import lowpass
from lowpass.export.triton.decode import DecodeLimits
from lowpass.export.triton.prepared import DeployOptions

folder = Path(tempfile.mkdtemp(prefix="lowpass-"))
ink, labels = scans()
large = np.rint(255 * ink).astype(np.uint8).repeat(2, 1).repeat(2, 2)  # 16x16
for index, (picture, label) in enumerate(zip(large, labels, strict=True)):
    place = folder / "pictures" / ("train" if index < len(labels) - TEST else "val") / str(label)
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).convert("RGB").save(place / f"{index}.png")

# %% A checkpoint, as you will have it, too: a small ViT that has learned them.
names = {index: str(index) for index in range(10)}
torch.manual_seed(0)
vit = ViTForImageClassification(
    ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=16,
        patch_size=4,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
)
pixels = torch.from_numpy(large[:-TEST].astype(np.float32) / 255)[:, None].repeat(1, 3, 1, 1)
learn(vit, (pixels - 0.5) / 0.5, torch.from_numpy(labels[:-TEST]))
vit.save_pretrained(folder / "checkpoint")
ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "checkpoint")

# %% Half of the MACs. How pictures are prepared and what the classes are called comes from the checkpoint.
run = lowpass.compress(
    str(folder / "checkpoint"),
    str(folder / "pictures"),
    folder / "run",
    target_macs=0.5,
    score_images=256,
    measure_images=256,
)
dense, slim = run.metrics.dense, run.metrics.slim
print(f"MACs: {slim.macs / dense.macs:.2f} of dense; top-1: {dense.top1:.1f}% dense, {slim.top1:.1f}% slim")

# %% The file that is served, and a repository in which models for pictures stand around it.
run.export("fp32")
deployed = run.deploy(folder / "models", "digits", DeployOptions(decode=DecodeLimits()))
print(f"deployed: version {deployed.version} of {deployed.path.name}")

# %% The server, on ports that are free. It says when it is ready.
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
http, grpc, metrics = (str(one.getsockname()[1]) for one in sockets)
for one in sockets:
    one.close()
ports = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
serve = [sys.executable, "-m", "lowpass", "serve", str(folder / "models"), *ports, "--json"]
server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
try:
    assert server.stdout is not None and json.loads(server.stdout.readline())["ready"]
    asked = next((folder / "pictures" / "val" / "3").iterdir())
    client = Path(__file__).parent / "without_lowpass" / "triton_client.py"
    told = subprocess.check_output([sys.executable, client, f"127.0.0.1:{http}", "digits", asked], text=True)
    print(f"what the server says of a 3:\n{told}", end="")
finally:
    server.terminate()
    server.wait()
print(f"all of it: {folder}")
