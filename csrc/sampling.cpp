// megactx::sample_contexts on the CPU: one token for each of C contexts of different vocabularies.
//
// Nothing is sorted. All three filters mean "keep what comes first in the order (x descending, id ascending)", so
// each one is reduced to a cut, the last symbol kept, and the draw is one pass over the symbols before the cut.
//  1. One pass takes the maximum of every block of 32 logits.
//  2. top-k: the k-th largest block maximum is a floor that at least k symbols reach; the k-th symbol is selected
//     among the few above that floor.
//  3. top-p: exp(x - max) goes into a histogram over x; the bin where the mass crosses top_p is selected exactly.
//  4. Gumbel-max over the blocks that reach the cut. A bound on the noise that costs one conversion says which
//     symbols can still win; the logarithms are taken for those alone, a few dozen of 50,000.
// Every pass skips the blocks below the cut, so after a top-k of 50 about 50 blocks are left of 1,571.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "parallel.h"
#include "philox.h"
#include "vector.h"

namespace megactx {

constexpr int kBlock = 32;
constexpr int kBins = 1024;
constexpr float kBinsPerNat = 32.0f;  // the histogram of top-p covers 32 nats below the maximum: e^-32 = 1e-14
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The logits of one context in one row, cut into blocks of 32; the last one is padded with -inf.
struct Segment {
  const float* data;
  int64_t size;
  int64_t full_blocks;
  alignas(64) float tail[kBlock];

  Segment(const float* logits, int64_t vocab_size) : data(logits), size(vocab_size), full_blocks(size / kBlock) {
    std::fill(std::copy(data + full_blocks * kBlock, data + size, tail), tail + kBlock, -kInfinity);
  }
  int64_t blocks() const { return (size + kBlock - 1) / kBlock; }
  const float* block(int64_t b) const { return b < full_blocks ? data + b * kBlock : tail; }
};

// The last symbol kept, in the order (x descending, id ascending). The initial cut keeps whatever is finite.
struct Cut {
  float x = -FLT_MAX;
  uint32_t id = UINT32_MAX;

  bool keeps(float other_x, uint32_t other_id) const {
    return other_x > x || (other_x == x && other_id <= id);
  }
};

// That order as one integer: a smaller key comes first. Adding 0 turns -0 into +0, which ties with it.
MEGACTX_INLINE uint64_t order_key(float x, uint32_t id) {
  const uint32_t descending = ~(static_cast<uint32_t>(ordered(x + 0.0f)) ^ 0x80000000u);
  return (uint64_t{descending} << 32) | id;
}
Cut cut_at(uint64_t key) {
  const auto descending = static_cast<uint32_t>(key >> 32);
  return {from_ordered(static_cast<int32_t>(~descending ^ 0x80000000u)), static_cast<uint32_t>(key)};
}

struct Scratch {
  std::vector<float> row;        // logits that are not contiguous float32
  std::vector<float> block_max;
  std::vector<float> selection;
  std::vector<uint64_t> keys;
  double bins[kBins];

  static Scratch& local() {
    thread_local Scratch scratch;
    return scratch;
  }
};

struct Range {
  int32_t lowest, highest;  // `ordered` integers, so that NaN shows
};

MEGACTX_CLONES Range scan(const Segment& s, float* block_max) {
  Range range{INT32_MAX, INT32_MIN};
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const float* z = s.block(b);
    int32_t low = INT32_MAX, high = INT32_MIN;
    for (int i = 0; i < kBlock; ++i) {
      const int32_t key = ordered(z[i]);
      low = std::min(low, key);
      high = std::max(high, key);
    }
    block_max[b] = from_ordered(high);
    range = {std::min(range.lowest, low), std::max(range.highest, high)};
  }
  return range;
}

// Keys of the symbols that reach `floor`, written to `keys`; returns how many.
MEGACTX_CLONES int64_t gather_above(
    const Segment& s, const float* block_max, float temperature, float floor, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    if (block_max[b] / temperature < floor) continue;
    const float* z = s.block(b);
    const int64_t size = std::min<int64_t>(kBlock, s.size - b * kBlock);
    uint64_t block_keys[kBlock];
    bool reaches[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const float x = z[i] / temperature;
      block_keys[i] = order_key(x, static_cast<uint32_t>(b * kBlock + i));
      reaches[i] = x >= floor;
    }
    for (int64_t i = 0; i < size; ++i) {
      keys[count] = block_keys[i];
      count += reaches[i];
    }
  }
  return count;
}

// The k-th symbol of the order, 0 < k < vocabulary.
Cut top_k_cut(const Segment& s, float temperature, int64_t k, Scratch& scratch) {
  float floor = -kInfinity;
  if (k <= s.blocks()) {
    scratch.selection.assign(scratch.block_max.begin(), scratch.block_max.begin() + s.blocks());
    const auto kth = scratch.selection.begin() + (k - 1);
    std::nth_element(scratch.selection.begin(), kth, scratch.selection.end(), std::greater<float>());
    floor = *kth / temperature;
  }
  scratch.keys.resize(s.size);
  uint64_t* keys = scratch.keys.data();
  const int64_t count = gather_above(s, scratch.block_max.data(), temperature, floor, keys);
  std::nth_element(keys, keys + (k - 1), keys + count);
  return cut_at(keys[k - 1]);
}

MEGACTX_INLINE int32_t bin_of(float x, float x_max) {
  const float bin = (x_max - x) * kBinsPerNat;
  return static_cast<int32_t>(bin < kBins - 1 ? bin : static_cast<float>(kBins - 1));
}

// Mass exp(x - x_max) of the symbols that `cut` keeps, by bins of x.
MEGACTX_CLONES void histogram(
    const Segment& s, const float* block_max, float temperature, float x_max, const Cut& cut, double* bins) {
  for (int64_t b = 0; b < s.blocks(); ++b) {
    if (block_max[b] / temperature < cut.x) continue;
    const float* z = s.block(b);
    float mass[kBlock];
    int32_t bin[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const float x = z[i] / temperature;
      const auto id = static_cast<uint32_t>(b * kBlock + i);
      const bool kept = (x > cut.x) | ((x == cut.x) & (id <= cut.id));
      mass[i] = kept ? exp_nonpositive(x - x_max) : 0.0f;
      bin[i] = bin_of(x, x_max);
    }
    for (int i = 0; i < kBlock; ++i) bins[bin[i]] += mass[i];
  }
}

// Keys of the symbols of one bin that `cut` keeps; returns how many.
MEGACTX_CLONES int64_t gather_bin(
    const Segment& s, const float* block_max, float temperature, float x_max, const Cut& cut, int32_t wanted,
    uint64_t* keys) {
  int64_t count = 0;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const float top = block_max[b] / temperature;
    if (top < cut.x || bin_of(top, x_max) > wanted) continue;
    const float* z = s.block(b);
    int32_t hits[kBlock];
    int32_t any = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float x = z[i] / temperature;
      const auto id = static_cast<uint32_t>(b * kBlock + i);
      hits[i] = (bin_of(x, x_max) == wanted) & ((x > cut.x) | ((x == cut.x) & (id <= cut.id)));
      any |= hits[i];
    }
    if (!any) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (hits[i]) keys[count++] = order_key(z[i] / temperature, static_cast<uint32_t>(b * kBlock + i));
    }
  }
  return count;
}

// The last symbol of the smallest prefix whose share of the mass kept by `cut` reaches top_p. Masses are summed in
// double and compared as floats: 3 of 10 equal symbols do reach 0.3f, which is a little more than 0.3.
Cut top_p_cut(const Segment& s, float temperature, float x_max, float top_p, const Cut& cut, Scratch& scratch) {
  double* bins = scratch.bins;
  const float* block_max = scratch.block_max.data();
  std::fill(bins, bins + kBins, 0.0);
  histogram(s, block_max, temperature, x_max, cut, bins);
  double total = 0.0;
  for (int b = 0; b < kBins; ++b) total += bins[b];
  const float wanted = top_p * static_cast<float>(total);
  const auto reaches = [wanted](double mass) { return static_cast<float>(mass) >= wanted; };

  double before = 0.0;
  int crossing = 0;
  while (crossing < kBins - 1 && !reaches(before + bins[crossing])) before += bins[crossing++];
  scratch.keys.resize(s.size);
  uint64_t* keys = scratch.keys.data();
  uint64_t* end = keys + gather_bin(s, block_max, temperature, x_max, cut, crossing, keys);

  // Quickselect by mass: halve the range of the crossing symbol until one is left.
  const auto mass_of = [&](uint64_t key) { return double{exp_nonpositive(cut_at(key).x - x_max)}; };
  if (keys == end) return cut;
  while (end - keys > 1) {
    uint64_t* middle = keys + (end - keys) / 2;
    std::nth_element(keys, middle, end);
    double first_half = 0.0;
    for (const uint64_t* key = keys; key != middle; ++key) first_half += mass_of(*key);
    if (reaches(before + first_half)) {
      end = middle;
    } else {
      before += first_half;
      keys = middle;
    }
  }
  return cut_at(*keys);
}

// argmax of x + noise over the symbols kept, lowest id on ties.
MEGACTX_CLONES int64_t gumbel_argmax(
    const Segment& s, const float* block_max, float temperature, const Cut& cut, const PhiloxStream& stream) {
  float best = -kInfinity;
  float beatable = -kInfinity;  // best less the rounding of a bound: nothing bounded below this can win
  int64_t best_id = -1;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const float top = block_max[b] / temperature;
    if (top < cut.x || top + kGumbelMax < beatable) continue;
    const float* z = s.block(b);
    const auto first_id = static_cast<uint32_t>(b * kBlock);
    uint32_t high[kBlock], low[kBlock];
    float x[kBlock], bound[kBlock];
    int32_t highest = INT32_MIN;
    philox_words<kBlock>(stream, first_id, high, low);
    for (int i = 0; i < kBlock; ++i) {
      x[i] = z[i] / temperature;
      const bool kept = (x[i] > cut.x) | ((x[i] == cut.x) & (first_id + i <= cut.id));
      bound[i] = kept ? x[i] + gumbel_bound(high[i]) : -kInfinity;
      highest = std::max(highest, ordered(bound[i]));
    }
    if (from_ordered(highest) < beatable) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (bound[i] < beatable || bound[i] == -kInfinity) continue;
      const float score = x[i] + gumbel(high[i], low[i]);
      if (score > best) {
        best = score;
        best_id = first_id + i;
        beatable = best - (1e-4f + 1e-6f * std::fabs(best));
      }
    }
  }
  return best_id;
}

struct Request {
  float temperature;
  int64_t top_k;
  float top_p;
  float min_p;
  PhiloxStream stream;
};

int64_t argmax(const Segment& s, const float* block_max, float z_max) {
  const int64_t b = std::find(block_max, block_max + s.blocks(), z_max) - block_max;
  return b * kBlock + (std::find(s.block(b), s.block(b) + kBlock, z_max) - s.block(b));
}

// The id drawn from one segment, or -1 where nothing can be drawn (a NaN, or no symbol above -inf).
int64_t draw(const Segment& s, const Request& request, Scratch& scratch) {
  scratch.block_max.resize(s.blocks());
  float* block_max = scratch.block_max.data();
  const Range range = scan(s, block_max);
  if (range.highest > ordered(kInfinity) || range.lowest < ordered(-kInfinity)) return -1;
  const float z_max = from_ordered(range.highest);
  if (z_max == -kInfinity) return -1;
  if (z_max == kInfinity) {  // the symbols at +inf are equally likely, all others impossible
    std::vector<float> degenerate(s.size);
    for (int64_t i = 0; i < s.size; ++i) degenerate[i] = s.data[i] == kInfinity ? 0.0f : -kInfinity;
    return draw(Segment(degenerate.data(), s.size), request, scratch);
  }
  const float t = request.temperature;
  const float x_max = z_max / t;
  // Where x overflows, the temperature is so low that the distribution is a point.
  if (t == 0.0f || request.top_k == 1 || !std::isfinite(x_max)) return argmax(s, block_max, z_max);

  Cut cut;
  const auto tighten = [&cut](const Cut& other) {
    if (cut.keeps(other.x, other.id)) cut = other;
  };
  if (request.top_k > 0 && request.top_k < s.size) tighten(top_k_cut(s, t, request.top_k, scratch));
  if (request.top_p < 1.0f) tighten(top_p_cut(s, t, x_max, request.top_p, cut, scratch));
  if (request.min_p > 0.0f) tighten({x_max + std::log(request.min_p), UINT32_MAX});
  return gumbel_argmax(s, block_max, t, cut, request.stream);
}

Tensor sample_contexts(const Tensor& logits, torch::headeronly::IntHeaderOnlyArrayRef vocab_sizes,
                       const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                       const Tensor& seeds, const Tensor& step) {
  STD_TORCH_CHECK(logits.dim() == 2, "sample_contexts: logits must have two dimensions, got ", logits.dim());
  const int64_t rows = logits.size(0), contexts = static_cast<int64_t>(vocab_sizes.size());
  std::vector<int64_t> offsets{0};
  for (const int64_t size : vocab_sizes) {
    STD_TORCH_CHECK(size > 0 && size < int64_t{1} << 31,
                    "sample_contexts: vocab_sizes must be positive and below 2^31, got ", size);
    offsets.push_back(offsets.back() + size);
  }
  STD_TORCH_CHECK(logits.size(1) == offsets.back(), "sample_contexts: logits has ", logits.size(1),
                  " columns, vocab_sizes add up to ", offsets.back());
  STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Long && step.is_cpu(),
                  "sample_contexts: step must be one int64 on the CPU");
  const Matrix<float> temperatures(temperature, ScalarType::Float, rows, contexts, "temperature");
  const Matrix<int64_t> ks(top_k, ScalarType::Long, rows, contexts, "top_k");
  const Matrix<float> ps(top_p, ScalarType::Float, rows, contexts, "top_p");
  const Matrix<float> min_ps(min_p, ScalarType::Float, rows, contexts, "min_p");
  const Matrix<int64_t> seed_of(seeds, ScalarType::Long, rows, contexts, "seeds");
  const int64_t step_index = *static_cast<const int64_t*>(step.data_ptr());
  const Convert as_float = converter(logits.scalar_type());
  const void* data = logits.data_ptr();
  const int64_t row_stride = logits.stride(0), column_stride = logits.stride(1);

  const Tensor out = empty_tensor<2>({rows, contexts}, aoti_torch_dtype_int64());
  int64_t* ids = static_cast<int64_t*>(out.data_ptr());
  for_each_task(rows * contexts, rows * offsets.back(), /*inline_below=*/1 << 15, [&](int64_t task) {
    const int64_t row = task / contexts, c = task % contexts;
    Scratch& scratch = Scratch::local();
    const float* z = as_float(data, row * row_stride + offsets[c] * column_stride, column_stride,
                              vocab_sizes[c], scratch.row);
    ids[task] = draw(Segment(z, vocab_sizes[c]),
                     {temperatures(row, c), ks(row, c), ps(row, c), min_ps(row, c),
                      PhiloxStream(seed_of(row, c), c, step_index)},
                     scratch);
  });
  return out;
}

}  // namespace megactx

STABLE_TORCH_LIBRARY_IMPL(megactx, CPU, m) { m.impl("sample_contexts", TORCH_BOX(&megactx::sample_contexts)); }
