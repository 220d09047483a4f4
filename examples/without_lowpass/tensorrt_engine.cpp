// A slim model's engine in TensorRT's C++ API, without lowpass.
//
// Prints: the class of each image. The images are raw floats, [B, 3, H, W], normalised as onnx_runtime.py does.
// Takes:  a second. Needs an NVIDIA GPU and the TensorRT that built the engine.
// Run:    g++ -std=c++17 examples/without_lowpass/tensorrt_engine.cpp -o classify -lnvinfer -lcudart &&
//         ./classify runs/small/model.fp16.plan images.bin
//
// NOT RUN to its end yet: no GPU was at hand. The tests compile it against the headers of TensorRT 10.14. By hand it was
// compiled against those of 11.1, too, linked with TensorRT-RTX 1.7, and run as far as that goes without a GPU.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, char const *message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << message << '\n';
  }
};

std::vector<char> read(char const *path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int main(int count, char **arguments) {
  if (count != 3) return std::cerr << "usage: classify PLAN IMAGES\n", 2;
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
  if (!runtime) return std::cerr << "TensorRT does not start here\n", 1;
  auto const plan = read(arguments[1]), pixels = read(arguments[2]);
  std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
  if (!engine) return 1;
  std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};

  // Profile 0 takes every batch size of `export --batch`, and is chosen already.
  auto shape = engine->getTensorShape("images");
  shape.d[0] = static_cast<int>(pixels.size() / (sizeof(float) * shape.d[1] * shape.d[2] * shape.d[3]));
  if (!context->setInputShape("images", shape)) return 1;
  auto const out = context->getTensorShape("logits");
  std::vector<float> logits(out.d[0] * out.d[1]);

  void *images{}, *answer{};
  cudaStream_t stream{};
  cudaStreamCreate(&stream);
  cudaMalloc(&images, pixels.size());
  cudaMalloc(&answer, logits.size() * sizeof(float));
  cudaMemcpyAsync(images, pixels.data(), pixels.size(), cudaMemcpyHostToDevice, stream);
  context->setTensorAddress("images", images);
  context->setTensorAddress("logits", answer);
  if (!context->enqueueV3(stream)) return 1;
  cudaMemcpyAsync(logits.data(), answer, logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(stream);

  for (auto row = logits.begin(); row != logits.end(); row += out.d[1])
    std::cout << std::max_element(row, row + out.d[1]) - row << '\n';
}
