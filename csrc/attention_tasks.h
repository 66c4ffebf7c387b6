// The tasks of attention, for one instruction set: see attention_lanes.h.

namespace megactx::attention::MEGACTX_SET {

// One row of width `plan.width` in T.
template <class T>
MEGACTX_INLINE void load_row(const Plan<T>& plan, const Heads& x, int64_t b, int64_t t, int64_t h, T* to) {
  plan.widen(x.at(b, t, h), x.channel, plan.channels, to);
  std::fill(to + plan.channels, to + plan.width, T{0});
}

// The keys of a panel that are not padding, [panel, width] in T; whether all of them are finite.
template <class T>
bool load_keys(const Plan<T>& plan, const Heads& x, int64_t b, int64_t first, int64_t kv_head, const uint8_t* shown,
               T* rows) {
  constexpr int64_t kAhead = 8;  // rows to ask memory for: a head is a short stretch of it
  const int64_t keys = plan.panel;
  Vec<T> sum{};  // 0, or NaN
  for (int64_t j = 0; j < keys; ++j) {
    T* row = rows + j * plan.width;
    if (j + kAhead < keys && shown[j + kAhead]) {
      const char* next = x.at(b, first + j + kAhead, kv_head);
      for (int64_t byte = 0; byte < plan.row_bytes; byte += 64) __builtin_prefetch(next + byte);
    }
    if (shown[j]) {
      load_row(plan, x, b, first + j, kv_head, row);
    } else {
      std::fill(row, row + plan.width, T{0});
    }
    for (int64_t d = 0; d < plan.width; d += kLanes<T>) sum += at(row + d) * T{0};
  }
  return total<T>(sum) == 0;
}

// Sets what is not finite to zero, and the offset of its key to NaN.
template <class T>
void clean(const Plan<T>& plan, T* rows, T* offsets) {
  const int64_t width = plan.width;
  for (int64_t j = 0; j < plan.panel; ++j) {
    for (int64_t d = 0; d < width; ++d) {
      T& x = rows[j * width + d];
      if (std::isfinite(x)) continue;
      x = 0;
      offsets[j] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

// rows[panel, width] to to[width, panel], four by four.
template <class T>
void transpose(const Plan<T>& plan, const T* rows, T* to) {
  const int64_t width = plan.width, keys = plan.panel;
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), may_alias));
  const auto four = [](auto* p) -> auto& { return *reinterpret_cast<Four*>(const_cast<T*>(p)); };
  for (int64_t j = 0; j < keys; j += 4) {
    for (int64_t d = 0; d < width; d += 4) {
      const T* from = rows + j * width + d;
      const Four a = four(from), b = four(from + width), c = four(from + 2 * width), e = four(from + 3 * width);
      const Four ac = shuffled<0, 4, 1, 5>(a, c), ac2 = shuffled<2, 6, 3, 7>(a, c);
      const Four be = shuffled<0, 4, 1, 5>(b, e), be2 = shuffled<2, 6, 3, 7>(b, e);
      T* into = to + d * keys + j;
      four(into) = shuffled<0, 4, 1, 5>(ac, be);
      four(into + keys) = shuffled<2, 6, 3, 7>(ac, be);
      four(into + 2 * keys) = shuffled<0, 4, 1, 5>(ac2, be2);
      four(into + 3 * keys) = shuffled<2, 6, 3, 7>(ac2, be2);
    }
  }
}

template <class T>
T largest_norm(const Plan<T>& plan, const T* transposed) {
  Vec<T> top{};
  for (int64_t j = 0; j < plan.panel; j += kLanes<T>) {
    Vec<T> sum{};
    for (int64_t d = 0; d < plan.channels; ++d) {
      const Vec<T> x = at(transposed + d * plan.panel + j);
      sum += x * x;
    }
    top = sum > top ? sum : top;
  }
  return std::sqrt(largest<T>(top));
}

template <class T>
void pack(const Plan<T>& plan, int64_t b, int64_t kv_head, int64_t index, bool backward, T* to, Scratch<T>& scratch) {
  const Panel<T> panel(to, plan.area());
  T* rows = scratch.rows.get(plan.area());
  T *k = backward ? panel.k : rows, *v = backward ? rows : panel.v;
  const int64_t first = index * plan.panel;
  const uint8_t* shown = plan.shown + b * plan.panels * plan.panel + first;
  for (int64_t j = 0; j < plan.panel; ++j) panel.offsets[j] = shown[j] ? T{0} : -kInfinity<T>;
  const uint8_t* end = shown + std::min(plan.panel, plan.keys - first);
  *panel.padded = std::find(shown, end, 0) != end;
  const bool finite_k = load_keys(plan, plan.k, b, first, kv_head, shown, k);
  if (!finite_k) clean(plan, k, panel.offsets);
  transpose(plan, k, panel.k_transposed);
  const bool finite_v = load_keys(plan, plan.v, b, first, kv_head, shown, v);
  if (!finite_v) clean(plan, v, panel.offsets);
  if (backward) transpose(plan, v, panel.v_transposed);
  // A key that is not finite shows, however far it is.
  *panel.largest_norm = finite_k && finite_v ? largest_norm(plan, panel.k_transposed) : kInfinity<T>;
}

// Queries of one task and what they need against any panel.
template <class T>
struct Block {
  const Plan<T>& plan;
  int64_t b, count = 0;
  int64_t position[kRows], last[kRows], lowest = INT64_MAX, highest = INT64_MIN;
  T slope[kRows], norm[kRows], reference[kRows];  // the maximum so far, or lse
  T* x;                                           // [rows, width], times scale; zeros for a query that sees no key

  Block(const Plan<T>& plan, int64_t b, T* x) : plan(plan), b(b), x(x) {}

  void add(int64_t i, int64_t head, T start) {
    T* row = x + count * plan.width;
    last[count] = plan.last_key(b, i);
    if (last[count] < 0) {
      std::fill(row, row + plan.width, T{0});
    } else {
      load_row(plan, plan.q, b, i, head, row);
      for (int64_t d = 0; d < plan.width; d += kLanes<T>) at(row + d) *= plan.scale;
    }
    norm[count] = std::sqrt(dot(row, row, plan.width));
    position[count] = plan.queries_at(b)[i];
    lowest = std::min(lowest, position[count]);
    highest = std::max(highest, position[count]);
    slope[count] = plan.slopes ? plan.slopes[head] : T{0};
    reference[count++] = start;
  }

  int64_t panels() const { return (*std::max_element(last, last + count) + plan.panel) / plan.panel; }

  // Whether some weight in a panel may be more than exactly 0: |q| |k| bounds a score before its bias.
  bool sees(const Panel<T>& panel, int64_t index, int64_t low, int64_t high) const {
    if (span(low, high) >> 63) return true;  // some difference wraps, so that far may be near
    for (int64_t r = 0; r < count; ++r) {
      if (last[r] < index * plan.panel) continue;
      const int64_t distance = std::max<int64_t>({0, low - position[r], position[r] - high});
      const T bound = norm[r] * *panel.largest_norm * T{1.0001} - slope[r] * static_cast<T>(distance) * T{0.9999};
      if (!(slope[r] >= 0 && bound < reference[r] - kNegligible<T>)) return true;
    }
    return false;
  }

  // From the lowest position of the queries and of keys in [low, high] to the highest: unsigned, it never overflows.
  uint64_t span(int64_t low, int64_t high) const {
    return static_cast<uint64_t>(std::max(high, highest)) - static_cast<uint64_t>(std::min(low, lowest));
  }

  // scores[rows, panel] of a panel of keys: false where no query sees any of them.
  bool score(const Panel<T>& panel, int64_t index, T* scores) const {
    const int64_t first = index * plan.panel, keys = std::min(plan.panel, plan.keys - first);
    const int64_t* positions = plan.keys_at(b) + first;
    const auto [low, high] = std::minmax_element(positions, positions + keys);
    if (!sees(panel, index, *low, *high)) return false;
    product<Start::row, T>({count, plan.channels, x, plan.width, 1, panel.k_transposed, plan.panel, scores, plan.panel,
                            panel.offsets}, plan.panel);
    if (plan.slopes) add_bias(positions, keys, std::min(*low, lowest), span(*low, *high), scores);
    if (*panel.padded) hide_padding(panel, scores);
    return true;
  }

  // Once more, and last: -inf plus an infinite bias, or plus 0 times an infinite query, is NaN.
  void hide_padding(const Panel<T>& panel, T* scores) const {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < plan.panel; j += kLanes<T>) {
        Vec<T>& x = at(scores + r * plan.panel + j);
        x = at(panel.offsets + j) == -kInfinity<T> ? filled(-kInfinity<T>) : x;
      }
    }
  }

  // Distances are differences of integers. Where all of them are small, so are those to the lowest position, and
  // floats are exact.
  void add_bias(const int64_t* positions, int64_t keys, int64_t low, uint64_t span, T* scores) const {
    constexpr uint64_t kExact = uint64_t{1} << std::numeric_limits<T>::digits;
    alignas(64) T offsets[kPanel] = {};
    const int64_t columns = plan.panel;  // not read again after every store
    if (span <= kExact) {
      for (int64_t j = 0; j < keys; ++j) offsets[j] = static_cast<T>(positions[j] - low);
      for (int64_t r = 0; r < count; ++r) {
        const T own = static_cast<T>(position[r] - low);
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          const Vec<T> distance = own - at(offsets + j);
          at(scores + r * columns + j) -= slope[r] * (distance < 0 ? -distance : distance);
        }
      }
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < keys; ++j) {
        // Unsigned, to wrap as PyTorch's integers do.
        const uint64_t ahead = static_cast<uint64_t>(position[r]) - static_cast<uint64_t>(positions[j]);
        offsets[j] = static_cast<T>(static_cast<int64_t>(ahead >> 63 ? 0 - ahead : ahead));
      }
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        at(scores + r * columns + j) -= slope[r] * at(offsets + j);
      }
    }
  }

  // How many of the keys of a panel the query r may see by index.
  int64_t visible(int64_t r, int64_t index) const {
    return std::clamp<int64_t>(last[r] + 1 - index * plan.panel, 0, plan.panel);
  }
};

template <class T>
Panel<T> panel_of(const Plan<T>& plan, int64_t b, int64_t kv_head, int64_t index, bool backward, Scratch<T>& scratch) {
  if (plan.packed) return Panel<T>(plan.packed_at(b, kv_head, index, backward), plan.area());
  T* data = scratch.panel.get(Panel<T>::size(plan.area(), backward));
  pack(plan, b, kv_head, index, backward, data, scratch);
  return Panel<T>(data, plan.area());
}

template <class T>
void hide(T* row, int64_t visible, int64_t keys, T value) {
  std::fill(row + visible, row + keys, value);
}

// With 0 for the -inf of a query whose every logit is -inf, since -inf - -inf is NaN.
template <class T>
T filled_logarithm(T x) {
  return x == -kInfinity<T> ? T{0} : x;
}

// Nearest keys first: with a bias the maximum is found there, and the sums are seldom rescaled.
template <class T>
void forward(const Plan<T>& plan, int64_t b, int64_t head, int64_t heads, int64_t first, int64_t count,
             Scratch<T>& scratch) {
  const int64_t width = plan.width, keys = plan.panel;
  Block<T> block(plan, b, scratch.queries.get(kRows * width));
  for (int64_t h = head; h < head + heads; ++h) {
    for (int64_t i = first; i < first + count; ++i) block.add(i, h, -kInfinity<T>);
  }
  T *results = scratch.results.get(kRows * width), *scores = scratch.scores.get(kRows * keys);
  std::fill(results, results + block.count * width, T{0});
  Vec<T> sums[kRows] = {};
  for (int64_t index = block.panels(); index-- > 0;) {
    if (!plan.any_shown[b * plan.panels + index]) continue;
    const Panel<T> panel = panel_of(plan, b, head / plan.group(), index, false, scratch);
    if (!block.score(panel, index, scores)) continue;
    for (int64_t r = 0; r < block.count; ++r) {
      T* row = scores + r * keys;
      hide(row, block.visible(r, index), keys, -kInfinity<T>);
      Vec<T> tops = at(row);
      for (int64_t j = kLanes<T>; j < keys; j += kLanes<T>) tops = at(row + j) > tops ? at(row + j) : tops;
      const T top = largest<T>(tops);
      if (top > block.reference[r]) {
        const T correction = std::exp(block.reference[r] - top);
        sums[r] *= correction;
        for (int64_t d = 0; d < width; d += kLanes<T>) at(results + r * width + d) *= correction;
        block.reference[r] = top;
      }
      const T shift = filled_logarithm(block.reference[r]);
      for (int64_t j = 0; j < keys; j += kLanes<T>) {
        at(row + j) = exponential(at(row + j) - shift);
        sums[r] += at(row + j);
      }
    }
    product<Start::result, T>({block.count, keys, scores, keys, 1, panel.v, width, results, width, nullptr}, width);
  }
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t h = head + r / count, i = first + r % count;
    T sum = total<T>(sums[r]), top = block.reference[r], *row = results + r * width;
    if (plan.sinks) {
      const T with_sink = std::max(top, plan.sinks[h]);
      const T shift = filled_logarithm(with_sink);
      const T correction = std::exp(top - shift);
      sum = sum * correction + std::exp(plan.sinks[h] - shift);
      for (int64_t d = 0; d < width; d += kLanes<T>) at(row + d) *= correction;
      top = with_sink;
    }
    const bool empty = block.last[r] < 0 || sum == 0;  // or every logit is -inf
    for (int64_t d = 0; d < width; ++d) row[d] = empty ? T{0} : row[d] / sum;
    plan.narrow(row, plan.channels, plan.out.at(b, i, h));
    plan.lse[(b * plan.heads + h) * plan.queries + i] = top + std::log(sum);
  }
}

// dS = P (dP - delta), in place of dP, from the scores, which become P. Zero where a key is hidden, whatever came.
template <class T>
void differentiate(const Block<T>& block, int64_t index, const T* delta, T* scores, T* grads) {
  const int64_t keys = block.plan.panel;
  for (int64_t r = 0; r < block.count; ++r) {
    T *p = scores + r * keys, *d_p = grads + r * keys;
    for (int64_t j = 0; j < keys; j += kLanes<T>) {
      at(p + j) = exponential(at(p + j) - block.reference[r]);
      at(d_p + j) = at(p + j) * (at(d_p + j) - delta[r]);
    }
    hide(p, block.visible(r, index), keys, T{0});
    hide(d_p, block.visible(r, index), keys, T{0});
  }
}

// The gradients of the keys of one panel: the sum over the query heads that share them, nothing for padding.
template <class T>
void write_keys(const Plan<T>& plan, int64_t b, int64_t kv_head, int64_t index, T* key_sums, T* value_sums) {
  const int64_t width = plan.width, area = plan.panels * plan.area();
  const int64_t heads = plan.key_sums ? plan.group() : 1;
  for (int64_t j = index * plan.panel; j < std::min(plan.keys, (index + 1) * plan.panel); ++j) {
    T *d_k = key_sums + j * width, *d_v = value_sums + j * width;
    for (int64_t h = 1; h < heads; ++h) {
      for (int64_t d = 0; d < width; d += kLanes<T>) {
        at(d_k + d) += at(d_k + h * area + d);
        at(d_v + d) += at(d_v + h * area + d);
      }
    }
    if (!plan.shown[b * plan.panels * plan.panel + j]) {
      std::fill(d_k, d_k + width, T{0});
      std::fill(d_v, d_v + width, T{0});
    }
    plan.narrow(d_k, plan.channels, plan.grad_k.at(b, j, kv_head));
    plan.narrow(d_v, plan.channels, plan.grad_v.at(b, j, kv_head));
  }
}

// Gradients of one query head, and those it gives to its keys: P = exp(S - lse), dV = P^T dO, dP = dO V^T,
// dS = P (dP - delta) with delta = sum(dO O), dQ = scale dS K, dK = dS^T (scale Q).
template <class T>
void backward(const Plan<T>& plan, int64_t b, int64_t head, Scratch<T>& scratch) {
  const int64_t width = plan.width, area = plan.panels * plan.area(), kv_head = head / plan.group();
  const int64_t own = (b * plan.heads + head) * area, keys = plan.panel;
  T* key_sums = plan.key_sums ? plan.key_sums + own : scratch.keys.get(area);
  T* value_sums = plan.value_sums ? plan.value_sums + own : scratch.values.get(area);
  std::fill(key_sums, key_sums + area, T{0});
  std::fill(value_sums, value_sums + area, T{0});
  T *scores = scratch.scores.get(kRows * keys), *grads = scratch.grads.get(kRows * keys);
  T *grad_out = scratch.results.get(kRows * width), *grad_q = scratch.grad_queries.get(kRows * width);
  T sink_sum = 0, delta[kRows];
  for (int64_t first = 0; first < plan.queries; first += kRows) {
    const int64_t count = std::min(kRows, plan.queries - first);
    Block<T> block(plan, b, scratch.queries.get(kRows * width));
    for (int64_t r = 0; r < count; ++r) {
      const T lse = filled_logarithm(plan.lse[(b * plan.heads + head) * plan.queries + first + r]);
      block.add(first + r, head, lse);
      T *row = grad_out + r * width, *out = grad_q + r * width;
      if (block.last[r] < 0) {
        std::fill(row, row + width, T{0});
        block.reference[r] = std::numeric_limits<T>::max();
        delta[r] = 0;
        continue;
      }
      load_row(plan, plan.grad_out, b, first + r, head, row);
      load_row(plan, plan.out, b, first + r, head, out);
      // sum_j P dP, without a pass over the keys. That `out` was rounded does no harm: it moves every dP of the row by
      // the same eps |dO| |O|, which is what rounding the operands of dP = dO V^T to that dtype has moved each by.
      delta[r] = dot(row, out, width);
      if (plan.sinks) sink_sum -= std::exp(plan.sinks[head] - lse) * delta[r];
    }
    std::fill(grad_q, grad_q + count * width, T{0});
    for (int64_t index = 0; index < block.panels(); ++index) {
      if (!plan.any_shown[b * plan.panels + index]) continue;
      const Panel<T> panel = panel_of(plan, b, kv_head, index, true, scratch);
      if (!block.score(panel, index, scores)) continue;
      product<Start::zero, T>(
          {count, plan.channels, grad_out, width, 1, panel.v_transposed, keys, grads, keys, nullptr}, keys);
      differentiate(block, index, delta, scores, grads);
      T *d_k = key_sums + index * plan.area(), *d_v = value_sums + index * plan.area();
      product<Start::result, T>({keys, count, scores, 1, keys, grad_out, width, d_v, width, nullptr}, width);
      product<Start::result, T>({keys, count, grads, 1, keys, block.x, width, d_k, width, nullptr}, width);
      product<Start::result, T>({count, keys, grads, keys, 1, panel.k, width, grad_q, width, nullptr}, width);
    }
    for (int64_t r = 0; r < count; ++r) {
      T* row = grad_q + r * width;
      for (int64_t d = 0; d < width; d += kLanes<T>) at(row + d) *= plan.scale;
      plan.narrow(row, plan.channels, plan.grad_q.at(b, first + r, head));
    }
  }
  if (plan.sinks) plan.sink_sums[b * plan.heads + head] = sink_sum;
  if (plan.key_sums) return;
  for (int64_t index = 0; index < plan.panels; ++index) write_keys(plan, b, kv_head, index, key_sums, value_sums);
}

template <class T>
void finish(const Plan<T>& plan, int64_t b, int64_t kv_head, int64_t index) {
  const int64_t area = plan.panels * plan.area(), own = (b * plan.heads + kv_head * plan.group()) * area;
  write_keys(plan, b, kv_head, index, plan.key_sums + own, plan.value_sums + own);
}

template <class T>
constexpr Tasks<T> kTasks{pack<T>, forward<T>, backward<T>, finish<T>};

}  // namespace megactx::attention::MEGACTX_SET
