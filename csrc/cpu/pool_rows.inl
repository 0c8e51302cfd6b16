// SPDX-License-Identifier: MIT
// What the row-wise pooling kernels share: pieces of tensors, scratch, stores of rows that end amid a vector.
//
// Included inside an instruction set's namespace after cpu/vectors.inl, one copy each.

namespace {

constexpr int64_t kBandElements = 3072;  // of scratch that a band fills
constexpr int64_t kMostBands = 16;       // bands in flight, so that none is read right after it is written
constexpr double kElementUs = 1e-4;      // rough time of an element of the larger tensor

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
  int64_t begin, size;
};
inline Span part(int64_t index, int64_t size, int64_t total) {
  return {index * size, std::min(size, total - index * size)};
}

// The steps of a window axis that lie inside the input.
inline Span steps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = naive::first_step(start, dilation);
  const int64_t end = start < size ? std::min(kernel, ceil_div(size - start, dilation)) : 0;
  return {begin, std::max<int64_t>(0, end - begin)};
}

// The mask of the first `count` lanes, which may be none or more than there are.
template <class T>
[[gnu::always_inline]] inline unsigned first_lanes(int64_t count) {
  return (1u << std::clamp<int64_t>(count, 0, kLanes<T>)) - 1;
}

#if defined(__x86_64__)
// kLanes<T> elements as they lie in memory, zeros where the mask has none; those are not touched.
template <class T, class Element>
[[gnu::always_inline]] inline auto load_masked(const Element* from, unsigned mask) {
  if constexpr (sizeof(Element) == 8) return _mm512_maskz_loadu_epi64(mask, from);
  if constexpr (sizeof(Element) == 4 && kLanes<T> == 16) return _mm512_maskz_loadu_epi32(mask, from);
  if constexpr (sizeof(Element) == 4 && kLanes<T> == 8) return _mm256_maskz_loadu_epi32(mask, from);
  if constexpr (sizeof(Element) == 2) return _mm256_maskz_loadu_epi16(mask, from);
  if constexpr (sizeof(Element) == 1) return _mm_maskz_loadu_epi8(mask, from);
}
template <class T, class Element, class Bits>
[[gnu::always_inline]] inline void store_masked(Bits bits, Element* to, unsigned mask) {
  if constexpr (sizeof(Element) == 8) _mm512_mask_storeu_epi64(to, mask, bits);
  if constexpr (sizeof(Element) == 4 && kLanes<T> == 16) _mm512_mask_storeu_epi32(to, mask, bits);
  if constexpr (sizeof(Element) == 4 && kLanes<T> == 8) _mm256_mask_storeu_epi32(to, mask, bits);
  if constexpr (sizeof(Element) == 2) _mm256_mask_storeu_epi16(to, mask, bits);
  if constexpr (sizeof(Element) == 1) _mm_mask_storeu_epi8(to, mask, bits);
}
#endif

// Lanes [begin, end) of the vector that would lie at `from`; the others are zero, and their memory untouched.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_part(const Element* from, int64_t begin, int64_t end) {
  if (begin <= 0 && end >= kLanes<T>) return load<T>(from);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    const auto bits = load_masked<T>(from, first_lanes<T>(end) & ~first_lanes<T>(begin));
    Element some[kLanes<T>];
    std::memcpy(some, &bits, sizeof some);
    return load<T>(some);
  }
#endif
  return load_between<T>(from, begin, end);
}

// The first `count` lanes, which may be none or more than there are.
template <class T, class Element>
[[gnu::always_inline]] inline Vector<T> load_lanes(const Element* from, int64_t count) {
  return load_part<T>(from, 0, count);
}
template <class T, class Element>
[[gnu::always_inline]] inline void store_lanes(Vector<T> v, Element* to, int64_t count) {
  if (count >= kLanes<T>) return store<T>(v, to);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    Element some[kLanes<T>];
    store<T>(v, some);
    decltype(load_masked<T>(to, 0)) bits = {};
    std::memcpy(&bits, some, sizeof some);
    return store_masked<T>(bits, to, first_lanes<T>(count));
  }
#endif
  Element some[kLanes<T>];
  store<T>(v, some);
  copy_few<kLanes<T> / 2>(some, to, std::max<int64_t>(count, 0));
}

// Whether elements [n, c, d, h, w] follow each other without gaps.
inline bool is_dense(const View& v, int64_t images, int64_t channels, const Extent3& size) {
  const auto steps = [](int64_t stride, int64_t count, int64_t dense) {
    return count <= 1 || stride == dense;
  };
  return steps(v.w, size.w, 1) && steps(v.h, size.h, size.w) && steps(v.d, size.d, size.h * size.w) &&
         steps(v.c, channels, size.cells()) && steps(v.n, images, channels * size.cells());
}

template <class Element>
const Element* end_of(const View& v, int64_t n, int64_t c, const Extent3& size) {
  return &naive::at<Element>(v, n - 1, c - 1, size.d - 1, size.h - 1, size.w - 1) + 1;
}

// Stores `count` lanes `step` elements apart. Where the step is one, `room` elements may be overwritten.
template <class T, class Element>
[[gnu::always_inline]] inline void put(Vector<T> v, Element* to, int64_t step, int64_t count, int64_t room) {
  if (step == 1) return store_some<T>(v, to, room);
  for (int i = 0; i < kLanes<T> && i < count; ++i) to[i * step] = Element(v[i]);
}

// Pieces of a tensor along its height and width, in the order of the elements they hold.
struct Bands {
  int64_t C, D, H, W;     // of the tensor
  int64_t height, width;  // of a band; those at the ends may be smaller

  int64_t down() const { return ceil_div(H, height); }
  int64_t across() const { return ceil_div(W, width); }
  int64_t count(int64_t N) const { return N * C * D * down() * across(); }
};

struct Band {
  int64_t n, c, d;
  Span h, w;
};

inline Band band_at(const Bands& b, int64_t i) {
  const naive::Index5 at = naive::unflatten(i, b.C, b.D, b.down(), b.across());
  return {at.n, at.c, at.d, part(at.h, b.height, b.H), part(at.w, b.width, b.W)};
}

inline void next_band(const Bands& b, Band& band) {
  if (band.w.begin + b.width < b.W) {
    band.w = {band.w.begin + b.width, std::min(b.width, b.W - band.w.begin - b.width)};
    return;
  }
  band.w = {0, std::min(b.width, b.W)};
  if (band.h.begin + b.height < b.H) {
    band.h = {band.h.begin + b.height, std::min(b.height, b.H - band.h.begin - b.height)};
    return;
  }
  band.h = {0, std::min(b.height, b.H)};
  if (++band.d < b.D) return;
  band.d = 0;
  if (++band.c < b.C) return;
  band.c = 0, ++band.n;
}

// Where row h of a dense tensor starts, at a band that may be one past the last.
template <class Element>
const Element* dense_at(const View& v, int64_t channels, const Extent3& size, const Band& b, int64_t h) {
  return static_cast<const Element*>(v.data) +
         (((b.n * channels + b.c) * size.d + b.d) * size.h + h) * size.w;
}

// Runs two steps over the bands [begin, end), the second a few bands behind the first: first(band,
// slot) and second(band, slot), where slots count from zero.
template <class First, class Second>
void in_two_steps(const Bands& bands, int64_t begin, int64_t end, int64_t slots, const First& first,
                  const Second& second) {
  Band ahead = band_at(bands, begin), behind = ahead;
  for (int64_t i = begin; i < end; i += slots) {
    const int64_t count = std::min(slots, end - i);
    for (int64_t slot = 0; slot < count; ++slot, next_band(bands, ahead)) first(ahead, slot);
    for (int64_t slot = 0; slot < count; ++slot, next_band(bands, behind)) second(behind, slot);
  }
}

// Hands out the thread's scratch.
class Shelf {
 public:
  explicit Shelf(int64_t bytes = kScratchBytes) : next_(static_cast<char*>(thread_scratch(bytes))) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return piece;
  }

 private:
  char* next_;
};

// A window that max-pool has kernels for: Kernel x Kernel, steps and paddings alike.
template <int Kernel, int Stride, int Padding>
struct Tile {
  static constexpr int kKernel = Kernel, kStride = Stride, kPadding = Padding;
  // Windows before and after an output that reach into the Stride x Stride cells under it, along one axis.
  static constexpr int kBefore = (Kernel - 1 - Padding) / Stride, kAfter = (Stride - 1 + Padding) / Stride;
};

// Calls f with the Tile that the window is, over planes whose rows, or else whose
// channels, lie without gaps. False: it is none.
template <class F>
bool with_tile(const PoolArgs& a, bool channels, const F& f) {
  const Window& v = a.window;
  const auto is = [&](int64_t kernel, int64_t stride, int64_t padding) {
    return v.kernel.h == kernel && v.kernel.w == kernel && v.stride.h == stride && v.stride.w == stride &&
           v.padding.h == padding && v.padding.w == padding;
  };
  const auto dense = [&](const View& view) { return !view.data || (channels ? view.c : view.w) == 1; };
  if (a.D != 1 || v.kernel.d != 1 || v.out.d != 1 || v.dilation.h != 1 || v.dilation.w != 1 ||
      a.offset == Offset::i32 || !dense(a.x) || !dense(a.y) || !dense(a.offsets) || !dense(a.gate))
    return false;
  if (is(2, 2, 0)) return f(Tile<2, 2, 0>()), true;
  if (is(3, 2, 0)) return f(Tile<3, 2, 0>()), true;
  if (is(3, 2, 1)) return f(Tile<3, 2, 1>()), true;
  if (is(3, 1, 1)) return f(Tile<3, 1, 1>()), true;
  return false;
}

// The channels of one pixel: f(c, room) for vectors from channel c. Where the channels do not fill a
// vector, `room` says how many elements may be written; else it is that of a vector.
template <int lanes, class F>
[[gnu::always_inline]] inline void each_vector(int64_t channels, int64_t room, const F& f) {
  if (channels < lanes) return f(int64_t{0}, room);
  for (int64_t c = 0; c + lanes <= channels; c += lanes) f(c, int64_t{lanes});
  if (channels % lanes) f(channels - lanes, int64_t{lanes});
}

}  // namespace
