// What one call of attention works on. T is the type of the arithmetic: float, or double for float64 tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace megactx::attention {

constexpr int64_t kRows = 64;   // queries that one task takes
constexpr int64_t kPanel = 64;  // keys that are packed, and scored, together, at most
constexpr int64_t kHeader = kPanel + 16;

// [batch, length, heads, channels] of any strides, counted in bytes but for the channels.
struct Heads {
  char* data = nullptr;
  int64_t batch = 0, length = 0, heads = 0, channel = 1;

  char* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * length + h * heads; }
};

// Memory that grows and is not cleared, on a cache line.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
      size_ = count;
    }
    return data_.get();
  }

  // What one long context needed is not kept for the life of a thread.
  void give_back_above(int64_t bytes) {
    if (size_ * static_cast<int64_t>(sizeof(T)) > bytes) data_.reset(), size_ = 0;
  }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Keys n p .. n p + n - 1 of one sample and key head, in T, padded with zeros: a header (what is added to the scores
// of each key, the largest norm of a key, and whether some key is padding), K transposed, and then V, or K and V
// transposed for a backward pass. A key that is padding is zero and adds -inf; one that is not finite is zero and adds
// NaN. n is 64, or less where there are fewer keys, so that many short samples do not cost what long ones do.
template <class T>
struct Panel {
  T *offsets, *largest_norm, *padded, *k_transposed, *v, *k, *v_transposed;

  static int64_t size(int64_t area, bool backward) { return kHeader + (backward ? 3 : 2) * area; }
  Panel(T* data, int64_t area)
      : offsets(data), largest_norm(data + kPanel), padded(largest_norm + 1), k_transposed(data + kHeader),
        v(k_transposed + area), k(v), v_transposed(k + area) {}
};

template <class T>
struct Plan {
  int64_t batch, queries, keys, heads, kv_heads, channels;
  int64_t width;   // channels, padded to whole vectors
  int64_t panel;   // keys of a panel: 64, or all of them in whole vectors where that is less
  int64_t panels;  // per sample and key head
  int64_t row_bytes;  // of the channels of one head
  bool causal;
  T scale;
  Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  void (*widen)(const void* from, int64_t stride, int64_t count, T* to);
  void (*narrow)(const T* from, int64_t count, void* to);
  const int64_t *positions_q, *positions_k;  // of one sample after the other, or the same for all of them
  bool shared_positions_q, shared_positions_k;
  const T *slopes, *sinks;    // or null
  const uint8_t* shown;       // [B, panels * panel]: keys that are not padding
  const uint8_t* any_shown;   // [B, panels]
  const int64_t* first_shown; // [B]: the first key that is not padding, or the number of keys
  T* packed;                  // [B, Hk, panels] panels, or null: a task packs what it needs
  T* lse;                     // [B, Hq, Tq]
  T *key_sums, *value_sums;   // [B, Hq, panels * panel, width]: gradients of keys by query head, or null
  T* sink_sums;               // [B, Hq]

  int64_t group() const { return heads / kv_heads; }
  int64_t area() const { return panel * width; }  // of K or V in a panel
  const int64_t* queries_at(int64_t b) const { return positions_q + (shared_positions_q ? 0 : b * queries); }
  const int64_t* keys_at(int64_t b) const { return positions_k + (shared_positions_k ? 0 : b * keys); }
  T* packed_at(int64_t b, int64_t kv_head, int64_t panel, bool backward) const {
    return packed + ((b * kv_heads + kv_head) * panels + panel) * Panel<T>::size(area(), backward);
  }
  // The last key that query i of sample b may see by index, or -1 where all of those are padding.
  int64_t last_key(int64_t b, int64_t i) const {
    const int64_t last = causal ? i + keys - queries : keys - 1;
    return last < first_shown[b] ? -1 : last;
  }
};

// Room of one thread. All but `keys` and `values`, which grow with the context, is a few rows.
template <class T>
struct Scratch {
  Buffer<T> queries, results, scores, grads, grad_queries, panel, rows, keys, values;

  static Scratch& local() {
    thread_local Scratch scratch;
    return scratch;
  }
};

// A function per instruction set, chosen when it is first needed.
template <class T>
struct Tasks {
  void (*pack)(const Plan<T>&, int64_t b, int64_t kv_head, int64_t panel, bool backward, T* to, Scratch<T>&);
  // The queries [first, first + count) of the heads [head, head + heads), which share a key head.
  void (*forward)(const Plan<T>&, int64_t b, int64_t head, int64_t heads, int64_t first, int64_t count, Scratch<T>&);
  void (*backward)(const Plan<T>&, int64_t b, int64_t head, Scratch<T>&);
  // Gradients of the keys of one panel, from those of the query heads that share them.
  void (*finish)(const Plan<T>&, int64_t b, int64_t kv_head, int64_t panel);
};

}  // namespace megactx::attention
