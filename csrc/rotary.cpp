// megactx::gaussian_rope on the CPU, forward, in place and backward: one pass over q and k.
//
// The pairs of a head are turned by angles and damped by factors that depend on the token alone, so they are computed
// once per token (rotation.h) and serve all its heads. The gradient is the same pass with the sines negated: the
// transpose of a damped rotation. A head that is normalised is read twice, for its norm first.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "floats.h"
#include "parallel.h"
#include "rotary_head.h"
#include "rotation.h"
#include "tensors.h"
#include "vector.h"

namespace megactx {
namespace {

// [batch, length, heads, channels] of any strides.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, length = 0, heads = 0, channel = 1;

  Heads() = default;
  explicit Heads(const Tensor& t)
      : data(t.data_ptr()), batch(t.stride(0)), length(t.stride(1)), heads(t.stride(2)), channel(t.stride(3)) {}

  template <class T>
  T* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T*>(data) + b * batch + t * length + h * heads;
  }
};

// Positions or levels: [T] or [B, T] of either integer type, zero where there are none.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t batch = 0, length = 0;

  int64_t operator()(int64_t b, int64_t t) const {
    const int64_t i = b * batch + t * length;
    if (data == nullptr) return 0;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// q or k: what is read, what the norm was taken of (in a backward pass), what is written.
struct Side {
  Heads in, normed, out;
  int64_t count;
  Work work;
};

struct Plan {
  const Frequencies* frequencies;
  Integers positions, levels;
  Sigma sigma;
  int64_t block_size, length, pairs;
  bool interleaved, conjugate, backward, norm_after;
  double eps;
  Side sides[2];

  int64_t padded() const { return static_cast<int64_t>(frequencies->damped.size()); }
};

// All heads of one token. `rows` has room for two heads.
template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void turn_side(const Side& side, int64_t b, int64_t t, const Plan& plan, const Rotation<T>& r, T* rows) {
  using Stored = typename Format::Stored;
  const int64_t pairs = plan.pairs, padded = plan.padded();
  const bool even_first = plan.frequencies->even_first;
  for (int64_t h = 0; h < side.count; ++h) {
    const auto read = [&](const Heads& heads) __attribute__((always_inline)) {
      return Members<const Stored>(heads.at<const Stored>(b, t, h), heads.channel, pairs, plan.interleaved);
    };
    const Members<const Stored> x = read(side.in);
    const Members<Stored> y(side.out.at<Stored>(b, t, h), side.out.channel, pairs, plan.interleaved);
    T *row_a = rows, *row_b = row_a + padded, *normed_a = row_b + padded, *normed_b = normed_a + padded;
    if (side.work == Work::turn) {
      turn_head<Format>(x, y, pairs, even_first, r, row_a, row_b);
      continue;
    }
    load_rows<Format>(x, pairs, even_first, row_a, row_b);
    if (side.work == Work::normalise) {
      normalise(row_a, row_b, pairs, r);
    } else {
      load_rows<Format>(read(side.normed), pairs, even_first, normed_a, normed_b);
      normalise_backward(row_a, row_b, normed_a, normed_b, pairs, r);
    }
    store_rows<Format>(row_a, row_b, pairs, even_first, y);
  }
}

template <class Format, class T = typename Format::Computed>
MEGACTX_INLINE void turn_tokens(const Plan& plan, int64_t begin, int64_t end, T* scratch) {
  const int64_t padded = plan.padded();
  T *cosines = scratch, *sines = cosines + padded, *damping = sines + padded, *ones = damping + padded;
  T* rows = ones + padded;
  std::fill(ones, rows, T{1});
  const Rotation<T> r{cosines, sines, damping, plan.norm_after ? damping : ones, static_cast<T>(plan.eps)};
  const T direction = plan.conjugate != plan.backward ? -1 : 1;
  int64_t level = 0;
  double width = spread(plan.sigma, plan.block_size, level);  // tokens of one level mostly follow one another
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / plan.length, t = token % plan.length;
    const int64_t own_level = plan.levels(b, t);
    if (own_level != level) width = spread(plan.sigma, plan.block_size, level = own_level);
    fill_rotation(*plan.frequencies, plan.positions(b, t), level, width, direction, cosines, sines, damping);
#pragma GCC unroll 1
    for (const Side& side : plan.sides) {
      turn_side<Format>(side, b, t, plan, r, rows);
    }
  }
}

// One function per format, since a template cannot be cloned.
MEGACTX_CLONES void turn_float32(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  turn_tokens<Float32>(plan, begin, end, scratch);
}
MEGACTX_CLONES void turn_float64(const Plan& plan, int64_t begin, int64_t end, double* scratch) {
  turn_tokens<Float64>(plan, begin, end, scratch);
}
MEGACTX_CLONES void turn_bfloat16(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  turn_tokens<BFloat16>(plan, begin, end, scratch);
}
MEGACTX_CLONES void turn_float16(const Plan& plan, int64_t begin, int64_t end, float* scratch) {
  turn_tokens<Float16>(plan, begin, end, scratch);
}

template <class T>
void run(const Plan& plan, int64_t batch, void (*turn_tokens)(const Plan&, int64_t, int64_t, T*)) {
  const int64_t tokens = batch * plan.length;
  const int64_t per_token = 2 * plan.pairs * (plan.sides[0].count + plan.sides[1].count);
  if (tokens * per_token == 0) return;
  const int64_t per_task = std::max<int64_t>(1, (1 << 15) / per_token);
  for_each_task((tokens + per_task - 1) / per_task, tokens * per_token, /*inline_below=*/1 << 15, [&](int64_t task) {
    thread_local std::vector<T> scratch;
    scratch.resize(8 * plan.padded());
    turn_tokens(plan, task * per_task, std::min(tokens, (task + 1) * per_task), scratch.data());
  });
}

Sigma sigma_of(const std::string& name) {
  if (name == "none") return Sigma::none;
  if (name == "uniform") return Sigma::uniform;
  STD_TORCH_CHECK(name == "power", "gaussian_rope: sigma must be none, uniform or power, got ", name);
  return Sigma::power;
}

Integers integers(const Tensor& t, const Tensor& q, const char* name) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK((t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int) && t.is_cpu(),
                  "gaussian_rope: ", name, " must be int32 or int64, on the CPU");
  STD_TORCH_CHECK((dims == 1 || (dims == 2 && t.size(0) == q.size(0))) && t.size(dims - 1) == q.size(1),
                  "gaussian_rope: ", name, " must have shape [", q.size(1), "] or [", q.size(0), ", ", q.size(1), "]");
  return {t.data_ptr(), t.scalar_type() == ScalarType::Long, dims == 2 ? t.stride(0) : 0, t.stride(dims - 1)};
}

// Everything that is not q and k. A call that skipped the public function must not read out of bounds.
Plan plan_of(const Tensor& q, const Tensor& k, const Tensor& positions, const std::optional<Tensor>& lods,
             int64_t block_size, double base, const std::string& sigma, int64_t lod_pairs, bool interleaved,
             bool conjugate, bool norm_after) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.is_cpu() && k.is_cpu(),
                  "gaussian_rope: q and k must have four dimensions, on the CPU");
  const int64_t head_dim = q.size(3);
  STD_TORCH_CHECK(head_dim % 2 == 0, "gaussian_rope: q must have an even head dimension, got ", head_dim);
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == head_dim,
                  "gaussian_rope: k must have shape [", q.size(0), ", ", q.size(1), ", Hk, ", head_dim, "] as q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "gaussian_rope: k must have the dtype of q");
  STD_TORCH_CHECK(block_size >= 1, "gaussian_rope: block_size must be >= 1, got ", block_size);
  STD_TORCH_CHECK(base > 0 && std::isfinite(base), "gaussian_rope: base must be positive and finite, got ", base);
  STD_TORCH_CHECK(lod_pairs >= 0 && lod_pairs <= head_dim / 2, "gaussian_rope: lod_pairs must be in [0, ",
                  head_dim / 2, "], got ", lod_pairs);
  Plan plan{};
  const bool even_first = !interleaved && q.element_size() == 2;
  plan.frequencies = &Frequencies::of(base, head_dim, lod_pairs, even_first);
  plan.positions = integers(positions, q, "positions");
  if (lods) plan.levels = integers(*lods, q, "lods");
  plan.sigma = sigma_of(sigma);
  plan.block_size = block_size;
  plan.length = q.size(1);
  plan.pairs = head_dim / 2;
  plan.interleaved = interleaved;
  plan.conjugate = conjugate;
  plan.norm_after = norm_after;
  return plan;
}

Side side(const Tensor& in, const Tensor& out, const std::optional<double>& qk_norm_eps) {
  return {Heads(in), Heads(), Heads(out), in.size(2), qk_norm_eps ? Work::normalise : Work::turn};
}

// A gradient, which passes a norm only where the operator was told what the norm was of.
Side side_backward(const Tensor& grad, const std::optional<Tensor>& normed, const Tensor& out,
                   const std::optional<double>& qk_norm_eps) {
  if (!qk_norm_eps || !normed) return side(grad, out, std::nullopt);
  bool same = normed->dim() == 4 && normed->scalar_type() == grad.scalar_type() && normed->is_cpu();
  for (int i = 0; same && i < 4; ++i) same = normed->size(i) == grad.size(i);
  STD_TORCH_CHECK(same, "gaussian_rope: q and k must have the shapes and the dtype of their gradients");
  return {Heads(grad), Heads(*normed), Heads(out), grad.size(2), Work::normalise_backward};
}

void run(const Plan& plan, const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return run(plan, q.size(0), turn_float32);
    case ScalarType::Double: return run(plan, q.size(0), turn_float64);
    case ScalarType::BFloat16: return run(plan, q.size(0), turn_bfloat16);
    case ScalarType::Half: return run(plan, q.size(0), turn_float16);
    default: STD_TORCH_CHECK(false, "gaussian_rope: q and k must be float16, bfloat16, float32 or float64");
  }
}

Tensor empty_contiguous_like(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return empty_tensor<4>({t.size(0), t.size(1), t.size(2), t.size(3)}, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> gaussian_rope(
    const Tensor& q, const Tensor& k, const Tensor& positions, const std::optional<Tensor>& lods, int64_t block_size,
    double base, const std::string& sigma, int64_t lod_pairs, bool interleaved, bool conjugate,
    const std::optional<double>& qk_norm_eps, bool norm_after) {
  Plan plan = plan_of(
      q, k, positions, lods, block_size, base, sigma, lod_pairs, interleaved, conjugate, norm_after);
  plan.eps = qk_norm_eps.value_or(0.0);
  std::tuple<Tensor, Tensor> out(empty_contiguous_like(q), empty_contiguous_like(k));
  plan.sides[0] = side(q, std::get<0>(out), qk_norm_eps);
  plan.sides[1] = side(k, std::get<1>(out), qk_norm_eps);
  run(plan, q);
  return out;
}

void gaussian_rope_(
    const Tensor& q, const Tensor& k, const Tensor& positions, const std::optional<Tensor>& lods, int64_t block_size,
    double base, const std::string& sigma, int64_t lod_pairs, bool interleaved, bool conjugate,
    const std::optional<double>& qk_norm_eps, bool norm_after) {
  Plan plan = plan_of(
      q, k, positions, lods, block_size, base, sigma, lod_pairs, interleaved, conjugate, norm_after);
  plan.eps = qk_norm_eps.value_or(0.0);
  plan.sides[0] = side(q, q, qk_norm_eps);
  plan.sides[1] = side(k, k, qk_norm_eps);
  run(plan, q);
}

std::tuple<Tensor, Tensor> gaussian_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const std::optional<Tensor>& q, const std::optional<Tensor>& k,
    const Tensor& positions, const std::optional<Tensor>& lods, int64_t block_size, double base,
    const std::string& sigma, int64_t lod_pairs, bool interleaved, bool conjugate,
    const std::optional<double>& qk_norm_eps, bool norm_after) {
  Plan plan = plan_of(
      grad_q, grad_k, positions, lods, block_size, base, sigma, lod_pairs, interleaved, conjugate, norm_after);
  plan.backward = true;
  plan.eps = qk_norm_eps.value_or(0.0);
  std::tuple<Tensor, Tensor> out(empty_contiguous_like(grad_q), empty_contiguous_like(grad_k));
  plan.sides[0] = side_backward(grad_q, q, std::get<0>(out), qk_norm_eps);
  plan.sides[1] = side_backward(grad_k, k, std::get<1>(out), qk_norm_eps);
  run(plan, grad_q);
  return out;
}

}  // namespace megactx

STABLE_TORCH_LIBRARY_IMPL(megactx, CPU, m) {
  m.impl("gaussian_rope", TORCH_BOX(&megactx::gaussian_rope));
  m.impl("gaussian_rope_", TORCH_BOX(&megactx::gaussian_rope_));
  m.impl("gaussian_rope_backward", TORCH_BOX(&megactx::gaussian_rope_backward));
}
