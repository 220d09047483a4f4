# lowpass for a machine with an NVIDIA GPU, with the versions of packages that are tested.
#
#   docker build --tag lowpass .
#   docker run --rm --gpus 1 lowpass                             # lowpass doctor: what this machine can do
#   docker run --rm --gpus 1 --user "$(id -u):$(id -g)" -v "$PWD":/work lowpass benchmark runs/small
#
# The base is "CUDA" of NVIDIA's container catalogue, tag 13.2.0-base-ubuntu24.04: PyTorch's and TensorRT's wheels bring
# the rest of CUDA. For Hopper, which TensorRT-RTX has no kernels for: --build-arg EXTRAS=tensorrt. How to swap ONNX Runtime
# for the one with CUDA: docs/export-and-runtimes.md.
#
# NOT BUILT yet, and not tried on a GPU: neither was at hand. What is tested is that hadolint finds nothing in it, and that
# what it names is there.
ARG CUDA_TAG=13.2.0-base-ubuntu24.04
FROM nvcr.io/nvidia/cuda:${CUDA_TAG}

ARG EXTRAS=tensorrt-rtx,openvino

# A compiler and Python's headers: torch.compile builds with them.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/lowpass

ENV PATH=/opt/lowpass/bin:$PATH HOME=/tmp

COPY . /src
# geventhttpclient, of Triton's client, is built here; GCC 14 takes one of its warnings for an error.
RUN CFLAGS=-Wno-error=incompatible-pointer-types pip install --no-cache-dir --constraint /src/constraints.txt "/src[${EXTRAS}]"

WORKDIR /work
USER 1000:1000
ENTRYPOINT ["lowpass"]
CMD ["doctor"]
