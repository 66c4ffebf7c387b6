// Tensors into sample_contexts: parameters of any strides, logits of any float dtype.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "tensors.h"

namespace megactx {

// [rows, contexts] parameters of any strides (an expanded scalar has strides 0).
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;

  Matrix(const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns, const char* name)
      : data(static_cast<const T*>(t.data_ptr())), row_stride(0), column_stride(0) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype,
                    "sample_contexts: ", name, " must be of shape [", rows, ", ", columns,
                    "] and of the dtype that the public function prepares");
    STD_TORCH_CHECK(t.is_cpu(), "sample_contexts: ", name, " must be on the CPU, as logits are");
    row_stride = t.stride(0);
    column_stride = t.stride(1);
  }
  T operator()(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

template <class T>
const float* convert(const void* data, int64_t offset, int64_t stride, int64_t size, std::vector<float>& out) {
  const T* source = static_cast<const T*>(data) + offset;
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) return source;
  }
  out.resize(size);
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(source[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(source[i * stride]);
  }
  return out.data();
}

using Convert = const float* (*)(const void*, int64_t, int64_t, int64_t, std::vector<float>&);
inline Convert converter(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return convert<float>;
    case ScalarType::Double: return convert<double>;
    case ScalarType::Half: return convert<torch::headeronly::Half>;
    case ScalarType::BFloat16: return convert<torch::headeronly::BFloat16>;
    default: STD_TORCH_CHECK(false, "sample_contexts: logits must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace megactx
