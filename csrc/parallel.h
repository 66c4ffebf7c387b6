// Independent tasks of unequal length over torch's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace megactx {

// Calls f(task) for each task in [0, count). Waking a thread costs about as much as 10,000 elements of work: below
// `inline_below` elements in total everything runs on the caller's thread.
template <class F>
void for_each_task(int64_t count, int64_t elements, int64_t inline_below, const F& f) {
  const int64_t workers =
      elements < inline_below ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < count; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};  // a shared counter, because a long context must not wait behind another one
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
    }
  });
}

}  // namespace megactx
