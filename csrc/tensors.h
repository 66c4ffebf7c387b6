// Tensors across the stable ABI, and memory for results.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megactx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Pages of 2 MB for memory about to be written in full. Fresh memory costs a fault a page, at 4 KB several times as
// much as the writing itself; what malloc takes from its heap again costs none, and is none the worse for this.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (bytes < 2 * kHuge) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

// A contiguous tensor. A third of the cost of torch::stable::new_empty, which looks its operator up by name at every
// call.
template <size_t N>
Tensor empty_tensor(const std::array<int64_t, N>& sizes, int32_t dtype) {
  std::array<int64_t, N> strides;
  int64_t stride = 1, count = 1;
  for (size_t i = N; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride, count *= sizes[i];
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), /*device_index=*/0, &handle));
  const Tensor result(handle);
  if (count >= 1 << 18) prefer_huge_pages(result.data_ptr(), count * result.element_size());
  return result;
}

}  // namespace megactx
