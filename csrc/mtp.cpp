// The row primitives of the multi-token cross-entropy on the CPU: megactx::mtp_rows (log-probabilities of the targets),
// megactx::mtp_rows_ (those, and the gradient in place of the logits) and megactx::mtp_rows_backward (the gradient).
//
// mtp_row.h has the arithmetic of one context of one row, which is the unit of work: its bits depend on its own logits,
// targets and weights, not on the rows around it or on the number of threads. A context without a target is not read.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "floats.h"
#include "mtp_row.h"
#include "parallel.h"
#include "tensors.h"
#include "vector.h"

namespace megactx {
namespace {

using mtp::Results;
using mtp::Scratch;
using mtp::Symbols;
using torch::headeronly::IntHeaderOnlyArrayRef;

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// [N, C, K] of any strides.
struct Entries {
  const void* data = nullptr;
  bool wide = true;  // int64 or float64; float32 otherwise
  int64_t row = 0, context = 0, step = 0;

  Entries() = default;
  explicit Entries(const Tensor& t)
      : data(t.data_ptr()), wide(t.element_size() == 8), row(t.stride(0)), context(t.stride(1)), step(t.stride(2)) {}

  int64_t at(int64_t n, int64_t c, int64_t k) const { return n * row + c * context + k * step; }
  int64_t integer(int64_t n, int64_t c, int64_t k) const { return static_cast<const int64_t*>(data)[at(n, c, k)]; }
  double number(int64_t n, int64_t c, int64_t k) const {
    return wide ? static_cast<const double*>(data)[at(n, c, k)] : static_cast<const float*>(data)[at(n, c, k)];
  }
};

// What the three operators are told. A call that skipped the public function must not read out of bounds.
struct Call {
  int64_t rows, contexts, steps, ignore_index;
  std::vector<int64_t> offsets{0};  // of the contexts in a row, and their end
  ScalarType dtype;
  const void* data;  // the logits [N, sum V]
  int64_t row, column;
  Entries targets, weights;
  mtp::Options options;
  // Where results go; null where they do not.
  void *grad = nullptr, *log_p = nullptr, *mean_log_p = nullptr, *lse = nullptr;
  int64_t grad_row = 0, grad_column = 0;

  Call(const Tensor& logits, const Tensor& targets, IntHeaderOnlyArrayRef vocab_sizes, int64_t ignore_index,
       const std::optional<double>& softcap, double label_smoothing, double z_loss)
      : ignore_index(ignore_index), options{softcap.value_or(0.0), label_smoothing, z_loss, false} {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.is_cpu(), "mtp_rows: logits must have two dimensions, on the CPU");
    for (const int64_t size : vocab_sizes) {
      STD_TORCH_CHECK(size > 0 && size < int64_t{1} << 31,
                      "mtp_rows: vocab_sizes must be positive and below 2^31, got ", size);
      offsets.push_back(offsets.back() + size);
    }
    dtype = logits.scalar_type(), data = logits.data_ptr();
    row = logits.stride(0), column = logits.stride(1);
    rows = logits.size(0), contexts = static_cast<int64_t>(vocab_sizes.size());
    STD_TORCH_CHECK(logits.size(1) == offsets.back(), "mtp_rows: logits has ", logits.size(1),
                    " columns, vocab_sizes add up to ", offsets.back());
    STD_TORCH_CHECK(targets.dim() == 3 && targets.size(0) == rows && targets.size(1) == contexts &&
                        targets.scalar_type() == ScalarType::Long && targets.is_cpu(),
                    "mtp_rows: targets must be int64 of shape [", rows, ", ", contexts, ", K], on the CPU");
    STD_TORCH_CHECK(!softcap || *softcap > 0, "mtp_rows: softcap must be positive, got ", softcap.value_or(0.0));
    steps = targets.size(2);
    this->targets = Entries(targets);
  }

  void read_weights(const Tensor& weights) {
    STD_TORCH_CHECK(weights.dim() == 3 && weights.size(0) == rows && weights.size(1) == contexts &&
                        weights.size(2) == steps && weights.is_cpu() &&
                        (weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double),
                    "mtp_rows: weights must be float32 or float64 of shape [", rows, ", ", contexts, ", ", steps,
                    "], on the CPU");
    this->weights = Entries(weights);
  }

  void write_gradient(const Tensor& to) {
    grad = to.data_ptr();
    grad_row = to.stride(0), grad_column = to.stride(1);
  }

  std::tuple<Tensor, Tensor, Tensor> results(bool mean) {
    options.mean = mean;
    const int32_t type = dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    std::tuple<Tensor, Tensor, Tensor> tensors(
        empty_tensor<3>({rows, contexts, steps}, type),
        mean ? empty_tensor<2>({rows, contexts}, type) : empty_tensor<1>({0}, type),
        empty_tensor<2>({rows, contexts}, type));
    log_p = std::get<0>(tensors).data_ptr();
    mean_log_p = mean ? std::get<1>(tensors).data_ptr() : nullptr;
    lse = std::get<2>(tensors).data_ptr();
    return tensors;
  }
};

template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void run_contexts(const Call& call, int64_t begin, int64_t end, Scratch<T>& scratch) {
  using Stored = typename Format::Stored;
  const auto* logits = static_cast<const Stored*>(call.data);
  const auto part = [](void* of, int64_t i) { return of == nullptr ? nullptr : static_cast<T*>(of) + i; };
  scratch.targets.resize(call.steps);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / call.contexts, c = i % call.contexts;
    const int64_t offset = call.offsets[c], size = call.offsets[c + 1] - offset;
    for (int64_t k = 0; k < call.steps; ++k) {
      const int64_t y = call.targets.integer(n, c, k);
      const int64_t id = y == call.ignore_index ? mtp::kIgnored : y < 0 || y >= size ? mtp::kBad : y;
      scratch.targets[k] = {id, call.weights.data == nullptr || id < 0 ? 0.0 : call.weights.number(n, c, k), 0.0};
    }
    auto* grad = static_cast<Stored*>(call.grad);
    if (grad != nullptr) grad += n * call.grad_row + offset * call.grad_column;
    mtp::run<Format>({logits + n * call.row + offset * call.column, call.column}, {grad, call.grad_column}, size,
                     call.options,
                     Results<T>{part(call.log_p, i * call.steps), part(call.mean_log_p, i), part(call.lse, i)},
                     scratch);
  }
}

// One function per format, since a template cannot be cloned.
#define MEGACTX_FORMAT(Format)                                                                     \
  MEGACTX_CLONES void run##Format(const Call& call, int64_t begin, int64_t end,                    \
                                  Scratch<Format::Computed>& scratch) {                            \
    run_contexts<Format>(call, begin, end, scratch);                                               \
  }
MEGACTX_FORMAT(Float32)
MEGACTX_FORMAT(Float64)
MEGACTX_FORMAT(BFloat16)
MEGACTX_FORMAT(Float16)
#undef MEGACTX_FORMAT

template <class T>
void run(const Call& call, void (*run_contexts)(const Call&, int64_t, int64_t, Scratch<T>&)) {
  const int64_t count = call.rows * call.contexts, symbols = call.rows * call.offsets.back();
  if (count == 0) return;
  const int64_t per_task = std::max<int64_t>(1, (1 << 15) / (symbols / count));
  for_each_task((count + per_task - 1) / per_task, symbols, /*inline_below=*/1 << 15, [&](int64_t task) {
    run_contexts(call, task * per_task, std::min(count, (task + 1) * per_task), Scratch<T>::local());
  });
}

void run(const Call& call) {
  switch (call.dtype) {
    case ScalarType::Float: return run(call, runFloat32);
    case ScalarType::Double: return run(call, runFloat64);
    case ScalarType::BFloat16: return run(call, runBFloat16);
    case ScalarType::Half: return run(call, runFloat16);
    default: STD_TORCH_CHECK(false, "mtp_rows: logits must be float16, bfloat16, float32 or float64");
  }
}

// Whether no two elements can share memory: one dimension steps over all of the other.
bool apart(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1), row = t.stride(0), column = t.stride(1);
  if (rows <= 1 || columns <= 1) return (rows <= 1 || row != 0) && (columns <= 1 || column != 0);
  return (column > 0 && row > (columns - 1) * column) || (row > 0 && column > (rows - 1) * row);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> mtp_rows(
    const Tensor& logits, const Tensor& targets, torch::headeronly::IntHeaderOnlyArrayRef vocab_sizes,
    int64_t ignore_index, const std::optional<double>& softcap, bool mean) {
  Call call(logits, targets, vocab_sizes, ignore_index, softcap, 0.0, 0.0);
  const auto results = call.results(mean);
  run(call);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> mtp_rows_(
    const Tensor& logits, const Tensor& targets, const Tensor& weights,
    torch::headeronly::IntHeaderOnlyArrayRef vocab_sizes, int64_t ignore_index, const std::optional<double>& softcap,
    double label_smoothing, double z_loss) {
  Call call(logits, targets, vocab_sizes, ignore_index, softcap, label_smoothing, z_loss);
  STD_TORCH_CHECK(apart(logits), "mtp_rows_: logits must not overlap itself: it is written, got strides [",
                  logits.stride(0), ", ", logits.stride(1), "]");
  call.read_weights(weights);
  call.write_gradient(logits);
  const auto results = call.results(label_smoothing > 0);
  run(call);
  return results;
}

// log_p and lse are for kernels that have no cache to sum the row from again: p = exp(z - lse) is as wrong as lse is
// rounded, by 5e-4 for logits of 10,000.
Tensor mtp_rows_backward(
    const Tensor& logits, const Tensor& targets, const Tensor& log_p, const Tensor& lse, const Tensor& weights,
    torch::headeronly::IntHeaderOnlyArrayRef vocab_sizes, int64_t ignore_index, const std::optional<double>& softcap,
    double label_smoothing, double z_loss) {
  Call call(logits, targets, vocab_sizes, ignore_index, softcap, label_smoothing, z_loss);
  STD_TORCH_CHECK(log_p.dim() == 3 && lse.dim() == 2 && lse.size(0) == call.rows && lse.size(1) == call.contexts,
                  "mtp_rows_backward: log_p and lse must be those that mtp_rows returned");
  call.read_weights(weights);
  const Tensor grad = empty_tensor<2>({logits.size(0), logits.size(1)}, dtype_of(logits));
  call.write_gradient(grad);
  run(call);
  return grad;
}

}  // namespace megactx

STABLE_TORCH_LIBRARY_IMPL(megactx, CPU, m) {
  m.impl("mtp_rows", TORCH_BOX(&megactx::mtp_rows));
  m.impl("mtp_rows_", TORCH_BOX(&megactx::mtp_rows_));
  m.impl("mtp_rows_backward", TORCH_BOX(&megactx::mtp_rows_backward));
}
