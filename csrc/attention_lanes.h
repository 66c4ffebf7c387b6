// Vectors, and products of small matrices that stay in registers, for one instruction set: attention.cpp includes this
// file once per set, with MEGACTX_SET, the namespace, and MEGACTX_BYTES, the width of a vector, defined, and the
// compiler told what it may use. (Clones of a function would not do: vector types are lowered before one function is
// inlined into another.)
//
// Products are contracted to fused multiply-adds where the set has them, so that bits differ between sets.

namespace megactx::attention::MEGACTX_SET {

template <class T>
struct Vector {
  static constexpr int kLanes = MEGACTX_BYTES / sizeof(T);
  typedef T Type __attribute__((vector_size(MEGACTX_BYTES), may_alias));
};
template <class T>
using Vec = typename Vector<T>::Type;
template <class T>
constexpr int kLanes = Vector<T>::kLanes;

template <class T>
MEGACTX_INLINE Vec<T>& at(T* p) {
  return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
MEGACTX_INLINE const Vec<T>& at(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
MEGACTX_INLINE Vec<T> filled(T x) {
  return x - Vec<T>{};
}

// Registers hold a tile of the result of kTileRows by kTileVectors vectors.
constexpr int kTileRows = 4;
constexpr int kTileVectors = MEGACTX_BYTES == 64 ? 4 : 2;

enum class Start { zero, row, result };  // what a product is added to: nothing, one row for all, the result so far

template <class T>
struct Product {
  int64_t rows, depth;
  const T* a;  // a[i * a_row + l * a_depth]
  int64_t a_row, a_depth;
  const T* b;  // b[l * b_depth + j]
  int64_t b_depth;
  T* c;  // c[i * c_row + j]
  int64_t c_row;
  const T* start;
};

template <int kRowCount, int kVectorCount, Start kStart, class T>
MEGACTX_INLINE void tile(const Product<T>& p, int64_t i, int64_t j) {
  Vec<T> sums[kRowCount][kVectorCount];
  for (int m = 0; m < kRowCount; ++m) {
    for (int n = 0; n < kVectorCount; ++n) {
      const int64_t column = j + n * kLanes<T>;
      if constexpr (kStart == Start::zero) sums[m][n] = Vec<T>{};
      if constexpr (kStart == Start::row) sums[m][n] = at(p.start + column);
      if constexpr (kStart == Start::result) sums[m][n] = at(p.c + (i + m) * p.c_row + column);
    }
  }
  const T* a = p.a + i * p.a_row;
  const T* b = p.b + j;
  for (int64_t l = 0; l < p.depth; ++l, a += p.a_depth, b += p.b_depth) {
    Vec<T> row[kVectorCount];
    for (int n = 0; n < kVectorCount; ++n) row[n] = at(b + n * kLanes<T>);
    for (int m = 0; m < kRowCount; ++m) {
      const T x = a[m * p.a_row];
      for (int n = 0; n < kVectorCount; ++n) sums[m][n] += x * row[n];
    }
  }
  for (int m = 0; m < kRowCount; ++m) {
    for (int n = 0; n < kVectorCount; ++n) at(p.c + (i + m) * p.c_row + j + n * kLanes<T>) = sums[m][n];
  }
}

template <int kVectorCount, Start kStart, class T>
MEGACTX_INLINE void strip(const Product<T>& p, int64_t j) {
  int64_t i = 0;
  for (; i + kTileRows <= p.rows; i += kTileRows) tile<kTileRows, kVectorCount, kStart>(p, i, j);
  for (; i < p.rows; ++i) tile<1, kVectorCount, kStart>(p, i, j);
}

// c (+)= a b, for a number of columns that is whole vectors.
template <Start kStart, class T>
void product(const Product<T>& p, int64_t columns) {
  constexpr int kWide = kTileVectors * kLanes<T>;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) strip<kTileVectors, kStart>(p, j);
  if constexpr (kTileVectors == 4) {
    for (; j + 2 * kLanes<T> <= columns; j += 2 * kLanes<T>) strip<2, kStart>(p, j);
  }
  for (; j < columns; j += kLanes<T>) strip<1, kStart>(p, j);
}

// exp(x) for x <= 0 as in vector.h: 0 below -87, where a float ends.
MEGACTX_INLINE Vec<float> exponential(Vec<float> x) {
  typedef int32_t Integers __attribute__((vector_size(MEGACTX_BYTES)));
  constexpr float kRound = 12582912.0f;
  const Vec<float> clamped = x < -87.0f ? filled(-87.0f) : x;
  const Vec<float> n = (clamped * 1.44269504f + kRound) - kRound;
  const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Integers scale = (__builtin_convertvector(n, Integers) + 127) << 23;
  return x < -87.0f ? Vec<float>{} : p * reinterpret_cast<const Vec<float>&>(scale);
}
MEGACTX_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Below this distance to the maximum a weight is exactly 0.
template <class T>
constexpr T kNegligible = std::is_same_v<T, float> ? 88 : 750;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <size_t... kFrom, class V>
MEGACTX_INLINE V shuffled(const V& a, const V& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Lane Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{static_cast<Lane>(kFrom)...});
#endif
}

// f over all lanes of x, in a fixed order.
template <class T, size_t kHalf = kLanes<T> / 2, class F>
MEGACTX_INLINE T folded(Vec<T> x, const F& f) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    const auto swapped = [&]<size_t... i>(std::index_sequence<i...>) __attribute__((always_inline)) {
      return shuffled<(i ^ kHalf)...>(x, x);
    }(std::make_index_sequence<kLanes<T>>());
    return folded<T, kHalf / 2>(f(x, swapped), f);
  }
}
template <class T>
MEGACTX_INLINE T largest(Vec<T> x) {
  return folded<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a > b ? a : b; });
}
template <class T>
MEGACTX_INLINE T total(Vec<T> x) {
  return folded<T>(x, [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return a + b; });
}

template <class T>
T dot(const T* a, const T* b, int64_t width) {
  Vec<T> sum{};
  for (int64_t i = 0; i < width; i += kLanes<T>) sum += at(a + i) * at(b + i);
  return total<T>(sum);
}

}  // namespace megactx::attention::MEGACTX_SET
