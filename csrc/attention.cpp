// megactx::alibi_attention on the CPU, forward and backward: flash attention with a bias from positions.
//
// Keys are packed in panels of 64 or fewer, float32, transposed where a product needs it, and cleaned of what is not
// finite or is padding. A task takes 64 queries of one head through the panels it may see, with a running maximum and
// sum; a backward task takes one head. Nothing is ever as large as queries times keys, and nothing depends on the
// other samples of the batch or on the number of threads.
//
// Panels whose every weight is exactly zero are skipped: with a bias most of a long context is out of reach.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention_plan.h"
#include "floats.h"
#include "parallel.h"
#include "tensors.h"
#include "vector.h"

#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions of this file alone
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(MEGACTX_BASELINE)
#define MEGACTX_SETS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#define MEGACTX_SET avx512
#define MEGACTX_BYTES 64
#include "attention_lanes.h"
#include "attention_tasks.h"
#undef MEGACTX_SET
#undef MEGACTX_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MEGACTX_SET avx2
#define MEGACTX_BYTES 32
#include "attention_lanes.h"
#include "attention_tasks.h"
#undef MEGACTX_SET
#undef MEGACTX_BYTES
#pragma GCC pop_options
#endif
#define MEGACTX_SET baseline
#define MEGACTX_BYTES 16
#include "attention_lanes.h"
#include "attention_tasks.h"

namespace megactx {
namespace {

using attention::Buffer;
using attention::Heads;
using attention::kPanel;
using attention::kRows;
using attention::Panel;
using attention::Plan;
using attention::Scratch;
using attention::Tasks;

template <class T>
const Tasks<T>& tasks() {
#ifdef MEGACTX_SETS
  static const Tasks<T>& chosen = []() -> const Tasks<T>& {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (avx512 && avx2) return attention::avx512::kTasks<T>;
    return avx2 ? attention::avx2::kTasks<T> : attention::baseline::kTasks<T>;
  }();
  return chosen;
#else
  return attention::baseline::kTasks<T>;
#endif
}

template <class Format>
MEGACTX_INLINE void widen_channels(const void* from, int64_t stride, int64_t count, typename Format::Computed* to) {
  const auto* x = static_cast<const typename Format::Stored*>(from);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = Format::widen(x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = Format::widen(x[i * stride]);
  }
}
template <class Format>
MEGACTX_INLINE void narrow_channels(const typename Format::Computed* from, int64_t count, void* to) {
  auto* x = static_cast<typename Format::Stored*>(to);
  for (int64_t i = 0; i < count; ++i) x[i] = Format::narrow(from[i]);
}

// One function per format, since a template cannot be cloned.
#define MEGACTX_FORMAT(Format)                                                                          \
  MEGACTX_CLONES void widen##Format(const void* from, int64_t stride, int64_t count, Format::Computed* to) { \
    widen_channels<Format>(from, stride, count, to);                                                    \
  }                                                                                                     \
  MEGACTX_CLONES void narrow##Format(const Format::Computed* from, int64_t count, void* to) {           \
    narrow_channels<Format>(from, count, to);                                                           \
  }
MEGACTX_FORMAT(Float32)
MEGACTX_FORMAT(Float64)
MEGACTX_FORMAT(BFloat16)
MEGACTX_FORMAT(Float16)
#undef MEGACTX_FORMAT

void set_format(Plan<double>& plan, ScalarType) {
  plan.widen = widenFloat64;
  plan.narrow = narrowFloat64;
}
void set_format(Plan<float>& plan, ScalarType dtype) {
  const bool half = dtype == ScalarType::Half, brain = dtype == ScalarType::BFloat16;
  plan.widen = half ? widenFloat16 : brain ? widenBFloat16 : widenFloat32;
  plan.narrow = half ? narrowFloat16 : brain ? narrowBFloat16 : narrowFloat32;
}

int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

Heads heads_of(const Tensor& t) {
  const int64_t size = element_size(t.scalar_type());
  return {static_cast<char*>(t.data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size, t.stride(3)};
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}
Tensor contiguous_like(const Tensor& t) {
  return empty_tensor<4>({t.size(0), t.size(1), t.size(2), t.size(3)}, dtype_of(t));
}

void check_like(const Tensor& t, const Tensor& other, const char* name) {
  bool same = t.dim() == 4 && t.is_cpu() && t.scalar_type() == other.scalar_type();
  for (int i = 0; same && i < 4; ++i) same = t.size(i) == other.size(i);
  STD_TORCH_CHECK(same, "alibi_attention: ", name, " has another shape, dtype or device than expected");
}

// Everything an operator is told but the tensors it differentiates, in memory the kernels can read.
template <class T>
struct Call {
  Plan<T> plan{};
  std::vector<int64_t> positions_q, positions_k, first_shown;
  std::vector<uint8_t> shown, any_shown;
  std::vector<T> slopes, sinks;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions_q, const Tensor& positions_k,
       const std::optional<Tensor>& slopes, const std::optional<Tensor>& sinks, bool causal,
       const std::optional<Tensor>& key_padding_mask, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.is_cpu(), "alibi_attention: q and k must have 4 dimensions");
    check_like(v, k, "v");
    STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type() &&
                        k.is_cpu() && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
                    "alibi_attention: k must have shape [", q.size(0), ", Tk, Hk, ", q.size(3),
                    "], Hk a divisor of ", q.size(2), ", and the dtype of q");
    STD_TORCH_CHECK(!causal || q.size(1) <= k.size(1), "alibi_attention: q must not be longer than k when causal");
    plan.batch = q.size(0), plan.queries = q.size(1), plan.heads = q.size(2), plan.channels = q.size(3);
    plan.keys = k.size(1), plan.kv_heads = k.size(2);
    plan.width = (plan.channels + 15) / 16 * 16;
    plan.row_bytes = plan.channels * element_size(q.scalar_type());
    plan.panel = std::clamp<int64_t>((plan.keys + 15) / 16 * 16, 16, kPanel);
    plan.panels = (plan.keys + plan.panel - 1) / plan.panel;
    plan.causal = causal;
    plan.scale = static_cast<T>(scale);
    plan.q = heads_of(q), plan.k = heads_of(k), plan.v = heads_of(v);
    set_format(plan, q.scalar_type());
    plan.shared_positions_q = read_positions(positions_q, plan.queries, this->positions_q, "positions_q");
    plan.shared_positions_k = read_positions(positions_k, plan.keys, this->positions_k, "positions_k");
    plan.positions_q = this->positions_q.data();
    plan.positions_k = this->positions_k.data();
    plan.slopes = read_per_head(slopes, this->slopes, "slopes");
    plan.sinks = read_per_head(sinks, this->sinks, "sinks");
    read_mask(key_padding_mask);
  }

  bool read_positions(const Tensor& t, int64_t length, std::vector<int64_t>& to, const char* name) {
    const int64_t dims = t.dim();
    const bool wide = t.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK((dims == 1 || (dims == 2 && t.size(0) == plan.batch)) && t.size(dims - 1) == length &&
                        t.is_cpu() && (wide || t.scalar_type() == ScalarType::Int),
                    "alibi_attention: ", name, " must be int32 or int64 of shape [", length, "] or [", plan.batch,
                    ", ", length, "]");
    const int64_t rows = dims == 2 ? plan.batch : 1, row_stride = dims == 2 ? t.stride(0) : 0;
    const int64_t stride = t.stride(dims - 1);
    to.resize(rows * length);
    for (int64_t i = 0; i < rows * length; ++i) {
      const int64_t from = i / length * row_stride + i % length * stride;
      to[i] = wide ? static_cast<const int64_t*>(t.data_ptr())[from] : static_cast<const int32_t*>(t.data_ptr())[from];
    }
    return dims == 1;
  }

  // f(format, its elements) for a tensor of any float dtype.
  template <class F>
  static void with_elements(const Tensor& t, const char* name, const F& f) {
    switch (t.scalar_type()) {
      case ScalarType::Float: return f(Float32(), static_cast<float*>(t.data_ptr()));
      case ScalarType::Double: return f(Float64(), static_cast<double*>(t.data_ptr()));
      case ScalarType::BFloat16: return f(BFloat16(), static_cast<uint16_t*>(t.data_ptr()));
      case ScalarType::Half: return f(Float16(), static_cast<uint16_t*>(t.data_ptr()));
      default: STD_TORCH_CHECK(false, "alibi_attention: ", name, " must be floating point");
    }
  }

  const T* read_per_head(const std::optional<Tensor>& t, std::vector<T>& to, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == plan.heads && t->is_cpu(), "alibi_attention: ", name,
                    " must have shape [", plan.heads, "]");
    to.resize(plan.heads + 1);  // never empty: the pointer says that there are some
    with_elements(*t, name, [&](auto format, const auto* from) {
      for (int64_t h = 0; h < plan.heads; ++h) to[h] = static_cast<T>(format.widen(from[h * t->stride(0)]));
    });
    return to.data();
  }

  void read_mask(const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(!mask || (mask->dim() == 2 && mask->size(0) == plan.batch && mask->size(1) == plan.keys &&
                              mask->scalar_type() == ScalarType::Bool && mask->is_cpu()),
                    "alibi_attention: key_padding_mask must be bool of shape [", plan.batch, ", ", plan.keys, "]");
    shown.resize(plan.batch * plan.panels * plan.panel);
    any_shown.resize(plan.batch * plan.panels);
    first_shown.assign(plan.batch, plan.keys);
    for (int64_t b = 0; b < plan.batch; ++b) {
      for (int64_t j = plan.keys; j-- > 0;) {
        const bool is_shown =
            !mask || static_cast<const bool*>(mask->data_ptr())[b * mask->stride(0) + j * mask->stride(1)];
        if (!is_shown) continue;
        shown[b * plan.panels * plan.panel + j] = any_shown[b * plan.panels + j / plan.panel] = 1;
        first_shown[b] = j;
      }
    }
    plan.shown = shown.data();
    plan.any_shown = any_shown.data();
    plan.first_shown = first_shown.data();
  }

  int64_t work() const { return plan.batch * plan.heads * plan.queries * plan.keys * (plan.channels + 16); }
  static constexpr int64_t kInlineBelow = 1 << 19;
  static constexpr int64_t kKept = 32 << 20;  // bytes of a thread's buffer

  void pack(Buffer<T>& packed, bool backward) {
    const int64_t count = plan.batch * plan.kv_heads * plan.panels;
    plan.packed = packed.get(count * Panel<T>::size(plan.area(), backward));
    for_each_task(count, work(), kInlineBelow, [&](int64_t task) {
      const int64_t panel = task % plan.panels, kv_head = task / plan.panels % plan.kv_heads;
      const int64_t b = task / plan.panels / plan.kv_heads;
      tasks<T>().pack(plan, b, kv_head, panel, backward, plan.packed_at(b, kv_head, panel, backward),
                      Scratch<T>::local());
    });
  }

  void forward() {
    if (plan.batch * plan.heads * plan.queries == 0) return;
    // Few queries: those of all heads that share a key head go together, and nobody else needs its keys.
    const bool together = plan.queries * 2 <= kRows;
    const int64_t heads = together ? std::min(plan.group(), kRows / std::max<int64_t>(plan.queries, 1)) : 1;
    const int64_t blocks = (plan.queries + kRows - 1) / kRows, parts = (plan.group() + heads - 1) / heads;
    Buffer<T> packed;
    if (blocks * parts > 1) pack(packed, false);
    for_each_task(plan.batch * plan.kv_heads * parts * blocks, work(), kInlineBelow, [&](int64_t task) {
      const int64_t block = blocks - 1 - task % blocks, part = task / blocks % parts;
      const int64_t kv_head = task / blocks / parts % plan.kv_heads, b = task / blocks / parts / plan.kv_heads;
      const int64_t first = block * kRows, in_group = std::min(heads, plan.group() - part * heads);
      tasks<T>().forward(plan, b, kv_head * plan.group() + part * heads, in_group, first,
                         std::min(kRows, plan.queries - first), Scratch<T>::local());
    });
  }

  void backward() {
    Buffer<T> packed, sums;
    // A head that shares its keys with nobody, in one task of one block, packs them itself.
    if (plan.group() > 1 || plan.queries > kRows) pack(packed, true);
    const int64_t area = plan.batch * plan.heads * plan.panels * plan.area();
    if (plan.group() > 1) {
      plan.key_sums = sums.get(2 * area);
      plan.value_sums = plan.key_sums + area;
    }
    for_each_task(plan.batch * plan.heads, work(), kInlineBelow, [&](int64_t task) {
      Scratch<T>& scratch = Scratch<T>::local();
      tasks<T>().backward(plan, task / plan.heads, task % plan.heads, scratch);
      scratch.keys.give_back_above(kKept), scratch.values.give_back_above(kKept);
    });
    if (plan.group() == 1) return;
    for_each_task(plan.batch * plan.kv_heads * plan.panels, work(), kInlineBelow, [&](int64_t task) {
      tasks<T>().finish(plan, task / plan.panels / plan.kv_heads, task / plan.panels % plan.kv_heads,
                        task % plan.panels);
    });
  }
};

template <class T>
void write_sinks(const std::vector<T>& sums, int64_t heads, const Tensor& grad_sinks) {
  Call<T>::with_elements(grad_sinks, "sinks", [&](auto format, auto* to) {
    for (int64_t h = 0; h < heads; ++h) {
      T sum = 0;
      for (size_t i = h; i < sums.size(); i += heads) sum += sums[i];
      to[h] = format.narrow(static_cast<typename decltype(format)::Computed>(sum));
    }
  });
}

template <class F>
void with_arithmetic(const Tensor& q, const F& f) {
  switch (q.scalar_type()) {
    case ScalarType::Double: return f(double());
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half: return f(float());
    default: STD_TORCH_CHECK(false, "alibi_attention: q must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> alibi_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions_q, const Tensor& positions_k,
    const std::optional<Tensor>& slopes, const std::optional<Tensor>& sinks, bool causal,
    const std::optional<Tensor>& key_padding_mask, double scale) {
  std::optional<std::tuple<Tensor, Tensor>> result;
  with_arithmetic(q, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(q, k, v, positions_q, positions_k, slopes, sinks, causal, key_padding_mask, scale);
    const int32_t dtype = std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    const Tensor out = contiguous_like(q), lse = empty_tensor<3>({q.size(0), q.size(2), q.size(1)}, dtype);
    call.plan.out = heads_of(out);
    call.plan.lse = static_cast<T*>(lse.data_ptr());
    call.forward();
    result.emplace(out, lse);
  });
  return *result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const Tensor& positions_q, const Tensor& positions_k, const std::optional<Tensor>& slopes,
    const std::optional<Tensor>& sinks, bool causal, const std::optional<Tensor>& key_padding_mask, double scale) {
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> result;
  with_arithmetic(q, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call(q, k, v, positions_q, positions_k, slopes, sinks, causal, key_padding_mask, scale);
    Plan<T>& plan = call.plan;
    check_like(grad_out, q, "grad_out");
    check_like(out, q, "out");
    const Tensor dense = torch::stable::contiguous(lse);
    STD_TORCH_CHECK(dense.dim() == 3 && dense.size(0) == plan.batch && dense.size(1) == plan.heads &&
                        dense.size(2) == plan.queries && dense.is_cpu() &&
                        dense.scalar_type() == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float),
                    "alibi_attention: lse must be ", std::is_same_v<T, double> ? "float64" : "float32", " of shape [",
                    plan.batch, ", ", plan.heads, ", ", plan.queries, "], as the forward pass returned it");
    Tensor grad_q = contiguous_like(q), grad_k = contiguous_like(k), grad_v = contiguous_like(v);
    const Tensor grad_sinks = empty_tensor<1>({sinks ? plan.heads : 0}, dtype_of(sinks ? *sinks : q));
    plan.grad_out = heads_of(grad_out), plan.out = heads_of(out), plan.lse = static_cast<T*>(dense.data_ptr());
    plan.grad_q = heads_of(grad_q), plan.grad_k = heads_of(grad_k), plan.grad_v = heads_of(grad_v);
    std::vector<T> sink_sums(plan.batch * plan.heads);
    plan.sink_sums = sink_sums.data();
    if (plan.heads == 0) {
      zero_(grad_k), zero_(grad_v);
    } else {
      call.backward();
    }
    if (sinks) write_sinks(sink_sums, plan.heads, grad_sinks);
    result.emplace(grad_q, grad_k, grad_v, grad_sinks);
  });
  return *result;
}

}  // namespace megactx

STABLE_TORCH_LIBRARY_IMPL(megactx, CPU, m) {
  m.impl("alibi_attention", TORCH_BOX(&megactx::alibi_attention));
  m.impl("alibi_attention_backward", TORCH_BOX(&megactx::alibi_attention_backward));
}
