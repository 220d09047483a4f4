// Stands in for TensorRT's NvInfer.h, which no package registry has: what examples/without_lowpass/tensorrt_engine.cpp
// uses, as TensorRT 10 and 11 declare it. For checking syntax and types; there is nothing to link or to run.
#pragma once
#include <cstddef>
#include <cstdint>

struct CUstream_st;
typedef struct CUstream_st *cudaStream_t;

namespace nvinfer1 {
using AsciiChar = char;

class Dims64 {
public:
  static constexpr int32_t MAX_DIMS{8};
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class ILogger {
public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, AsciiChar const *msg) noexcept = 0;
  ILogger() = default;
  virtual ~ILogger() = default;
};

class INoCopy {
protected:
  INoCopy() = default;
  INoCopy(INoCopy const &) = delete;
  INoCopy &operator=(INoCopy const &) = delete;

public:
  virtual ~INoCopy() = default;
};

class IExecutionContext : public INoCopy {
public:
  bool setInputShape(char const *tensorName, Dims const &dims) noexcept;
  Dims getTensorShape(char const *tensorName) const noexcept;
  bool setTensorAddress(char const *tensorName, void *data) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine : public INoCopy {
public:
  Dims getTensorShape(char const *tensorName) const noexcept;
  IExecutionContext *createExecutionContext() noexcept;
};

class IRuntime : public INoCopy {
public:
  ICudaEngine *deserializeCudaEngine(void const *blob, std::size_t size) noexcept;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;
}  // namespace nvinfer1
