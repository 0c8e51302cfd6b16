// SPDX-License-Identifier: MIT
// The block GEMM under every matrix-shaped row: C[m, n] = sum over k of A[m, k] B[k, n].
//
// A task computes one block of C, at most kBlockM x kBlockN. It walks k in steps of kBlockK; each step
// packs A into panels of kRows rows and B into panels of kVectors vectors, both k-major, and runs the
// register-tiled micro-kernel over every pair of panels. Packing is where im2col, strides, layouts and
// 16-bit storage vanish: a caller says how to fill a panel and how to store a finished block, nothing
// else. The scheme is Goto and van de Geijn's (ACM TOMS 34, 2008, section 4).
//
// Included inside an instruction set's namespace (foreach_isa.h), one copy each; it has no include
// guard.

namespace {

constexpr int64_t kBlockM = 120, kBlockN = 192, kBlockK = 192;

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  static constexpr int kColumns = kVectors * kLanes;  // of a micro-tile
};

// C[rows, vectors] (+)= A x B, where a row of A is `a_row` elements from the next and a column
// `a_step`, a row of B `b_step`, a row of C `c_row`.
template <class T, int rows, int vectors>
[[gnu::always_inline]] inline void micro_kernel(int64_t depth, const T* a, int64_t a_row, int64_t a_step,
                                                const T* b, int64_t b_step, T* c, int64_t c_row,
                                                bool accumulate) {
  using Vector = typename Simd<T>::Vector;
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  Vector sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = Vector{};
  // Five rows share a pointer: addresses hold 1, 2 and 4 times a distance.
  constexpr int groups = (rows + 4) / 5;
  const T* from[groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) from[g] = a + g * 5 * a_row;
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    Vector line[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) line[j] = reinterpret_cast<const Unaligned*>(b)[j];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] += from[i / 5][i % 5 * a_row] * line[j];
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) from[g] += a_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    Unaligned* out = reinterpret_cast<Unaligned*>(c + i * c_row);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) out[j] = accumulate ? out[j] + sum[i][j] : sum[i][j];
  }
}

// Products that a sum of the micro-kernel takes before it joins C. Its rounding error grows with their
// number.
template <class T>
constexpr int64_t kTerms = sizeof(T) == sizeof(double) ? 48 : kBlockK;

// The same over packed panels, for a run-time number of rows, 1 to kRows. a: [depth, kRows], b: [depth,
// kColumns].
template <class T, int rows = kRows>
void micro_kernel_rows(int64_t count, int64_t depth, const T* a, const T* b, T* c, bool accumulate) {
  if constexpr (rows > 1) {
    if (count < rows) return micro_kernel_rows<T, rows - 1>(count, depth, a, b, c, accumulate);
  }
  constexpr int columns = Simd<T>::kColumns;
  for (int64_t k = 0; k < depth; k += kTerms<T>)
    micro_kernel<T, rows, kVectors>(std::min(kTerms<T>, depth - k), a + k * kRows, 1, kRows, b + k * columns,
                                    columns, c, kBlockN, accumulate || k > 0);
}

struct Span {
  int64_t begin, size;
};

inline Span block_of(int64_t index, int64_t block, int64_t total) {
  const int64_t begin = index * block;
  return {begin, total - begin < block ? total - begin : block};
}

// One block of C. pack_a(m, k, a) fills a[panel][k][kRows]; pack_b(n, k, b) fills
// b[panel][k][kColumns]; both leave zeros in the lanes past the end; k comes `step` at a time. store(m,
// n, c) takes c[m.size][kBlockN].
template <class T, class PackA, class PackB, class Store>
void gemm_block(Span m, Span n, Span k, const PackA& pack_a, const PackB& pack_b, const Store& store,
                int64_t step = kBlockK) {
  static_assert((kBlockM * kBlockK + kBlockK * kBlockN + kBlockM * kBlockN) * sizeof(double) <=
                kScratchBytes);
  static_assert(kBlockM % kRows == 0 && kBlockN % Simd<T>::kColumns == 0);
  T* a = static_cast<T*>(thread_scratch());
  T* b = a + kBlockM * kBlockK;
  T* c = b + kBlockK * kBlockN;
  if (k.size == 0) std::fill(c, c + m.size * kBlockN, T(0));
  for (int64_t k0 = 0; k0 < k.size; k0 += step) {
    const Span depth{k.begin + k0, std::min(step, k.size - k0)};
    pack_a(m, depth, a);
    pack_b(n, depth, b);
    for (int64_t j = 0; j < n.size; j += Simd<T>::kColumns)
      for (int64_t i = 0; i < m.size; i += kRows)
        micro_kernel_rows<T>(std::min<int64_t>(kRows, m.size - i), depth.size, a + i * depth.size,
                             b + j * depth.size, c + i * kBlockN + j, k0 > 0);
  }
  store(m, n, c);
}

// How C is cut into blocks. Blocks shrink, down to a few micro-tiles, until there
// are enough of them to share out.
struct Blocks {
  int64_t m, n;

  template <class T>
  static Blocks of(int64_t total_m, int64_t total_n, int64_t total_k, int64_t copies) {
    constexpr int64_t kEnough = 16, kLeastMacs = 1 << 16;
    Blocks b{std::min(kBlockM, std::max<int64_t>(total_m, 1)), kBlockN};
    const auto count = [&] { return copies * b.count_m(total_m) * b.count_n(total_n); };
    while (b.n > Simd<T>::kColumns && count() < kEnough && b.m * b.n * total_k > 2 * kLeastMacs)
      b.n = (b.n / 2 + Simd<T>::kColumns - 1) / Simd<T>::kColumns * Simd<T>::kColumns;
    while (b.m > 4 * kRows && count() < kEnough && b.m * b.n * total_k > 2 * kLeastMacs)
      b.m = (b.m / 2 + kRows - 1) / kRows * kRows;
    return b;
  }
  int64_t count_m(int64_t total_m) const { return (total_m + m - 1) / m; }
  int64_t count_n(int64_t total_n) const { return (total_n + n - 1) / n; }
};

// act(sum + bias[channel]); bias may be null.
template <class T, class Element>
inline T activated(T sum, const Element* bias, int64_t channel, Act act) {
  const T value = bias ? sum + T(bias[channel]) : sum;
  return act == Act::relu && value <= T(0) ? T(0) : value;
}

// Calls f(step), with a constant where the step is one, so that the loop inside becomes a vector loop.
template <class F>
inline void with_step(int64_t step, const F& f) {
  if (step == 1) return f(std::integral_constant<int64_t, 1>{});
  f(step);
}

// Rough time of `macs` multiply-adds on one core.
inline double macs_us(double macs) { return macs / (1000.0 * kVectorBytes / 4); }

// Fills panels of `width` lanes from a strided matrix: out[lane / width][k][lane % width] =
// element(lane, k).
template <class T, class Element>
void pack_matrix(const Element* data, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t depth,
                 int width, T* out) {
  for (int64_t lane0 = 0; lane0 < lanes; lane0 += width, data += width * lane_stride, out += width * depth) {
    const int64_t used = std::min<int64_t>(width, lanes - lane0);
    if (used < width) std::fill(out, out + width * depth, T(0));
    if (lane_stride == 1) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t lane = 0; lane < used; ++lane) out[k * width + lane] = T(data[k * k_stride + lane]);
    } else {
      for (int64_t lane = 0; lane < used; ++lane)
        for (int64_t k = 0; k < depth; ++k)
          out[k * width + lane] = T(data[lane * lane_stride + k * k_stride]);
    }
  }
}

}  // namespace
