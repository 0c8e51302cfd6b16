// SPDX-License-Identifier: MIT
// Vector registers as values: loads and stores of every element type, and the shuffles that every
// instruction set has. Arithmetic, comparison and selection are the compiler's own, so that a kernel is
// written once.
//
// Included inside an instruction set's namespace (foreach_isa.h) after cpu/vectors.h, one copy each; it
// has no include guard.

namespace {

template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

// The integer as wide as T: it selects lanes of a Vector<T>, and is what comparing two of them gives.
template <class T>
using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

#if defined(__x86_64__)
// Masked forms with every lane on: what GCC 12 does for the others it warns of itself.
constexpr int kAllLanes = 0xffff, kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

// kLanes<T> consecutive elements, converted.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load(const Element* from) {
  Vector<T> v;
  if constexpr (std::is_same_v<T, Element>) {
    std::memcpy(&v, from, sizeof v);
    return v;
  }
#if defined(__x86_64__)
  if constexpr (sizeof(Element) == 2 && kVectorBytes == 64) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<Element, Half>) return (Vector<T>)_mm512_maskz_cvtph_ps(kAllLanes, bits);
    return (Vector<T>)((Vector<int32_t>)_mm512_maskz_cvtepu16_epi32(kAllLanes, bits) << 16);
  }
  if constexpr (sizeof(Element) == 2 && kVectorBytes == 32) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<Element, Half>) return (Vector<T>)_mm256_cvtph_ps(bits);
    return (Vector<T>)((Vector<int32_t>)_mm256_cvtepu16_epi32(bits) << 16);
  }
  if constexpr (sizeof(Element) == 1 && kVectorBytes > 16) {
    __m128i bytes = _mm_setzero_si128();
    std::memcpy(&bytes, from, kLanes<T>);
    if constexpr (kVectorBytes == 64)
      return (Vector<T>)(sizeof(T) == 8 ? _mm512_maskz_cvtepu8_epi64(0xff, bytes)
                                        : _mm512_maskz_cvtepu8_epi32(kAllLanes, bytes));
    if constexpr (kVectorBytes == 32)
      return (Vector<T>)(sizeof(T) == 8 ? _mm256_cvtepu8_epi64(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(from[i]);
  return v;
}

template <class T, class Element>
[[gnu::always_inline]] inline void store(Vector<T> v, Element* to) {
  if constexpr (std::is_same_v<T, Element>) {
    std::memcpy(to, &v, sizeof v);
    return;
  }
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Element, Half> && kVectorBytes == 64) {
    const __m256i bits = _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, kNearest);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  if constexpr (std::is_same_v<Element, Half> && kVectorBytes == 32) {
    const __m128i bits = _mm256_cvtps_ph((__m256)v, kNearest);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
  }
  if constexpr (std::is_same_v<Element, BFloat16> && kVectorBytes > 16) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    const Bits bits = (Bits)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits upper = v == v ? rounded : Bits{} + 0x7fc0;
    if constexpr (kVectorBytes == 64)
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                                 _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)upper));
    if constexpr (kVectorBytes == 32) {
      const __m256i pairs = _mm256_packus_epi32((__m256i)upper, (__m256i)upper);
      return _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                              _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8)));
    }
  }
  if constexpr (sizeof(Element) == 1 && kVectorBytes == 64) {
    const __m128i bytes = sizeof(T) == 8 ? _mm512_maskz_cvtepi64_epi8(0xff, (__m512i)v)
                                         : _mm512_maskz_cvtepi32_epi8(kAllLanes, (__m512i)v);
    std::memcpy(to, &bytes, kLanes<T>);
    return;
  }
  if constexpr (sizeof(Element) == 1 && kVectorBytes == 32) {  // the lowest byte of each lane
    constexpr int from = static_cast<int>(sizeof(T) == 8 ? 0x80800800 : 0x0c080400);
    const __m256i lowest =
        _mm256_shuffle_epi8((__m256i)v, _mm256_setr_epi32(from, -1, -1, -1, from, -1, -1, -1));
    const __m128i a = _mm256_castsi256_si128(lowest), b = _mm256_extracti128_si256(lowest, 1);
    const __m128i bytes = sizeof(T) == 8 ? _mm_unpacklo_epi16(a, b) : _mm_unpacklo_epi32(a, b);
    std::memcpy(to, &bytes, kLanes<T>);
    return;
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) to[i] = Element(v[i]);
}

// Copies `count` elements, fewer than two pieces; a piece is a power of two.
template <int piece, class Element>
[[gnu::always_inline]] inline void copy_few(const Element* from, Element* to, int64_t count) {
  if (count & piece) {
    std::memcpy(to, from, piece * sizeof(Element));
    from += piece, to += piece;
  }
  if constexpr (piece > 1) copy_few<piece / 2>(from, to, count);
}

// 0, 1, 2, ...
template <class L, int... lane>
[[gnu::always_inline]] inline Vector<L> numbered(std::integer_sequence<int, lane...>) {
  return Vector<L>{lane...};
}
// What load_between does without AVX-512's masks; not inlined, since it is long and only ever at an end.
template <class T, class Element>
[[gnu::noinline]] Vector<T> load_few(const Element* from, int64_t begin, int64_t end) {
  begin = std::max<int64_t>(begin, 0), end = std::min<int64_t>(end, kLanes<T>);
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Element> && kVectorBytes == 32) {
    const Vector<Lane<T>> lane = numbered<Lane<T>>(std::make_integer_sequence<int, kLanes<T>>{});
    const __m256i lanes = (__m256i)((lane >= Lane<T>(begin)) & (lane < Lane<T>(end)));
    if constexpr (sizeof(T) == 4)
      return (Vector<T>)_mm256_maskload_epi32(reinterpret_cast<const int*>(from), lanes);
    if constexpr (sizeof(T) == 8)
      return (Vector<T>)_mm256_maskload_epi64(reinterpret_cast<const long long*>(from), lanes);
  }
  if constexpr (sizeof(Element) == 1 && kVectorBytes == 32) {
    uint64_t bytes = 0;
    for (int64_t i = begin; i < end; ++i) bytes |= uint64_t{from[i]} << (8 * i);
    return load<T>(reinterpret_cast<const Element*>(&bytes));
  }
#endif
  Element some[kLanes<T>] = {};
  copy_few<kLanes<T> / 2>(from + begin, some + begin, end - begin);
  return load<T>(some);
}

// Elements [begin, end) of those that a vector holds, which may be none; zero in the other lanes, whose
// memory is not touched.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_between(const Element* from, int64_t begin, int64_t end) {
  if (begin <= 0 && end >= kLanes<T>) return load<T>(from);
  if (begin >= end || begin >= kLanes<T> || end <= 0) return Vector<T>{};
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Element> && kVectorBytes == 64) {
    const unsigned below = ~0u << std::max<int64_t>(begin, 0);
    const unsigned lanes = below & ((1u << std::min<int64_t>(end, kLanes<T>)) - 1);
    if constexpr (sizeof(T) == 4)
      return (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
    if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  }
#endif
  return load_few<T>(from, begin, end);
}

// The same for `count` elements, which may be none or more than there are lanes.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_some(const Element* from, int64_t count) {
  if (count >= kLanes<T>) return load<T>(from);
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Element> && kVectorBytes == 64) {
    const unsigned lanes = (1u << std::max<int64_t>(count, 0)) - 1;
    if constexpr (sizeof(T) == 4)
      return (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
    if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  }
#endif
  return load_between<T>(from, 0, count);
}
template <class T, class Element>
[[gnu::always_inline]] inline void store_some(Vector<T> v, Element* to, int64_t count) {
  if (count >= kLanes<T>) return store<T>(v, to);
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Element> && kVectorBytes == 64) {
    const unsigned lanes = (1u << std::max<int64_t>(count, 0)) - 1;
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), (__m512)v);
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes), (__m512d)v);
  }
#endif
  Element some[kLanes<T>];
  store<T>(v, some);
  copy_few<kLanes<T> / 2>(some, to, std::max<int64_t>(count, 0));
}

// Has a value loaded now, and not again at each use, where there are enough registers.
template <class V>
[[gnu::always_inline]] inline void keep([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) asm("" : "+v"(v));
#endif
}

// Lanes first, first + step, ... of a and b laid end to end.
template <class T, int first, int step, int... lane>
[[gnu::always_inline]] inline Vector<T> every(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  return __builtin_shuffle(a, b, Vector<Lane<T>>{first + lane * step...});
}
// The even (or odd) lanes of a and b laid end to end.
template <class T, bool odd>
[[gnu::always_inline]] inline Vector<T> alternate(Vector<T> a, Vector<T> b) {
  return every<T, odd, 2>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}
// a[0], b[0], a[1], b[1], ...: the lower or the upper half of it.
template <class T, bool upper, int... lane>
[[gnu::always_inline]] inline Vector<T> interleave(Vector<T> a, Vector<T> b,
                                                   std::integer_sequence<int, lane...>) {
  constexpr int first = upper ? kLanes<T> / 2 : 0;
  return __builtin_shuffle(a, b, Vector<Lane<T>>{first + lane / 2 + (lane % 2 ? kLanes<T> : 0)...});
}
template <class T, bool upper>
[[gnu::always_inline]] inline Vector<T> interleave(Vector<T> a, Vector<T> b) {
  return interleave<T, upper>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// From vectors a and b the lanes of one half: out[l] = (l & block ? b : a)[l with bit `block` = high].
template <class T, int block, bool high, int... lane>
constexpr Vector<Lane<T>> half_of(std::integer_sequence<int, lane...>) {
  return Vector<Lane<T>>{(lane & block ? kLanes<T> : 0) + (high ? lane | block : lane & ~block)...};
}
template <class T, int block, bool high>
[[gnu::always_inline]] inline Vector<T> halves(Vector<T> a, Vector<T> b) {
  return __builtin_shuffle(a, b, half_of<T, block, high>(std::make_integer_sequence<int, kLanes<T>>{}));
}

// r[i][j] and r[j][i] change places.
template <class T, int block = kLanes<T> / 2>
[[gnu::always_inline]] inline void transpose(Vector<T>* r) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (!(i & block)) {
      const Vector<T> low = halves<T, block, false>(r[i], r[i | block]);
      r[i | block] = halves<T, block, true>(r[i], r[i | block]);
      r[i] = low;
    }
  if constexpr (block > 1) transpose<T, block / 2>(r);
}

// out[j][i] = from[i * row + j * col] of `rows` i and `cols` j, at most as many as there are lanes; zero in
// the other lanes. The vectors past `cols` are of no use.
template <class T, class Element>
[[gnu::always_inline]] inline void load_block(const Element* from, int64_t row, int64_t col, int64_t rows,
                                              int64_t cols, Vector<T>* out) {
  constexpr int lanes = kLanes<T>;
  if (row == 1) {
    for (int64_t j = 0; j < std::min<int64_t>(lanes, cols); ++j) out[j] = load_some<T>(from + j * col, rows);
  } else if (col == 1) {
    Vector<T> r[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) r[i] = i < rows ? load_some<T>(from + i * row, cols) : Vector<T>{};
    transpose<T>(r);
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) out[j] = r[j];
  } else {
    for (int64_t j = 0; j < std::min<int64_t>(lanes, cols); ++j)
      for (int i = 0; i < lanes; ++i) out[j][i] = i < rows ? T(from[i * row + j * col]) : T(0);
  }
}

// to[i * row + j * col] = in[j][i] of `rows` i and `cols` j, at most as many as there are lanes.
template <class T, class Element>
[[gnu::always_inline]] inline void store_block(const Vector<T>* in, Element* to, int64_t row, int64_t col,
                                               int64_t rows, int64_t cols) {
  constexpr int lanes = kLanes<T>;
  if (row == 1) {
    for (int64_t j = 0; j < std::min<int64_t>(lanes, cols); ++j) store_some<T>(in[j], to + j * col, rows);
  } else if (col == 1) {
    Vector<T> r[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) r[j] = j < cols ? in[j] : Vector<T>{};
    transpose<T>(r);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (i < rows) store_some<T>(r[i], to + i * row, cols);
  } else {
    for (int64_t j = 0; j < std::min<int64_t>(lanes, cols); ++j)
      for (int64_t i = 0; i < std::min<int64_t>(lanes, rows); ++i) to[i * row + j * col] = Element(in[j][i]);
  }
}

// Lane i of the result is the sum of the lanes of r[i]; r is used up.
template <class T, int block = kLanes<T> / 2>
[[gnu::always_inline]] inline Vector<T> sums_of(Vector<T>* r) {
#pragma GCC unroll 8
  for (int i = 0; i < block; ++i)
    r[i] = halves<T, block, false>(r[i], r[i + block]) + halves<T, block, true>(r[i], r[i + block]);
  if constexpr (block > 1) return sums_of<T, block / 2>(r);
  return r[0];
}

}  // namespace
