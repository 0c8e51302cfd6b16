// SPDX-License-Identifier: MIT
// C[m, n] = sum over k of A[m, k] * B[k, n] on tensor cores (mma.sync, sm_80), for the Gemms of gemm.cuh.
//
//   global --cp.async, 16 bytes--> shared, kMmaStages tiles of 64 bytes along K --ldmatrix--> registers --mma
//
// A block computes kM x kN; each warp keeps kWarpM x kWarpN sums in float32. float32 itself is multiplied in
// three products (MmaSums below), or as Tf32 in one. Where an operand's neighbours come in aligned runs of 16
// bytes (Access, plan.h), a thread copies runs and leaves out those that are zero. Where they do not,
// elements are copied one by one; those of 16 bits, too short for cp.async, through registers, behind the
// arithmetic on another tile.
//
// Which way a tile lies in shared memory follows its neighbours in memory: [line][k], or [k][line], which
// ldmatrix transposes. Runs of 16 bytes are permuted within rows, so that neither copies nor ldmatrix meet a
// bank twice. Lines and steps are worked out once, by one thread each, in shared memory.
//
// K may be cut into slices (plan.h): then partial sums go to workspace, and a second kernel adds them in
// order. No atomics.
#pragma once

#include <cmath>

#include "cuda/gemm.cuh"
#include "cuda/ptx.cuh"

namespace fastconv::cuda {

inline constexpr int kMmaStages = 4;

// A float32 that is multiplied as the TF32 next to it, of 10 bits of mantissa; that is infinity from
// 2^128 - 2^116 on.
struct Tf32 {
  float value;

  Tf32() = default;
  FASTCONV_HD explicit Tf32(float value) : value(value) {}
  FASTCONV_HD operator float() const { return value; }
};

// One stage of an operand in shared memory: kLines by kK.
template <class Element, int kLines>
struct StageTile {
  static constexpr int kRun = 16 / sizeof(Element);  // elements of 16 bytes
  static constexpr int kK = kMmaRowBytes / sizeof(Element);
  static constexpr int kRunsAlong = kK / kRun, kRunsAcross = kLines / kRun;
  static constexpr int kTurn = sizeof(Element) / 2;  // float32 is read element by element across k

  // Where run `run` of row `row` lies, of rows of `runs`. Eight rows below each other meet every bank once;
  // or two runs of four rows do, where a turn is two runs.
  template <int runs, int turn>
  static FASTCONV_HD int place(int row, int run) {
    constexpr int kRowsOfBanks = runs < 8 ? 8 / runs : 1, kTurns = runs < 8 ? runs : 8;
    return (row * runs + (run ^ (row / kRowsOfBanks * turn % kTurns))) * kRun;
  }
  static FASTCONV_HD int along_k(int line, int run) { return place<kRunsAlong, 1>(line, run); }
  static FASTCONV_HD int across_k(int step, int run) { return place<kRunsAcross, kTurn>(step, run); }
};

// The part of an operand's tile that one thread carries from global to shared memory.
template <class Operand, class Element, int kLines, int kThreads, bool kGathers>
struct MmaShare {
  using Tile = StageTile<Element, kLines>;
  static constexpr int kRun = Tile::kRun, kK = Tile::kK;
  static constexpr int kRuns = kLines * kK / kRun / kThreads;  // of 16 bytes, of one thread
  static constexpr int kElements = kLines * kK / kThreads, kPairs = kElements / 2;
  static constexpr bool kIsWord = sizeof(Element) == 4;  // as much as cp.async takes, so nothing is put()
  static_assert(kRuns * kRun * kThreads == kLines * kK && kThreads % kLines == 0);

  uint32_t pairs[kGathers && !kIsWord ? kPairs : 1];  // of elements on their way through registers

  __device__ static int line(bool along_k, int i) {
    const int thread = threadIdx.x;
    return along_k ? thread / kK + i * (kThreads / kK) : thread % kLines;
  }
  __device__ static int step(bool along_k, int i) {
    const int thread = threadIdx.x;
    return along_k ? thread % kK : thread / kLines + i * (kThreads / kLines);
  }
  __device__ static int place(bool along_k, int line, int step) {
    return along_k ? Tile::along_k(line, step / kRun) + step % kRun
                   : Tile::across_k(step, line / kRun) + line % kRun;
  }

  // What lies beyond `lines_there` and `steps_there` is zero.
  __device__ void fetch(const Operand& operand, Element* tile, const typename Operand::Line* lines,
                        const typename Operand::Step* steps, int lines_there, int steps_there) {
    const bool along_k = operand.along_k(!kGathers);
    const auto find = [&](int line, int step) -> const Element* {
      return line < lines_there && step < steps_there ? operand.find(lines[line], steps[step]) : nullptr;
    };
    if (!kGathers || operand.access.vectors) {
#pragma unroll Operand::kAtOnce
      for (int i = 0; i < kRuns; ++i) {
        const int at = threadIdx.x + i * kThreads;
        const int row = along_k ? at / Tile::kRunsAlong : at / Tile::kRunsAcross;
        const int run = along_k ? at % Tile::kRunsAlong : at % Tile::kRunsAcross;
        const Element* found = along_k ? find(row, run * kRun) : find(run * kRun, row);
        cp_async16(tile + (along_k ? Tile::along_k(row, run) : Tile::across_k(row, run)), found,
                   found ? 16 : 0);
      }
      return;
    }
    if constexpr (kIsWord) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const Element* found = find(line(along_k, i), step(along_k, i));
        cp_async4(tile + place(along_k, line(along_k, i), step(along_k, i)), found, found ? 4 : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        uint32_t pair = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (const Element* found = find(line(along_k, 2 * i + j), step(along_k, 2 * i + j)))
            pair |= static_cast<uint32_t>(found->bits) << 16 * j;
        pairs[i] = pair;
      }
    }
  }

  // Ends what fetch() began, for what goes through registers.
  __device__ void put(const Operand& operand, Element* tile) const {
    if (!kGathers || operand.access.vectors) return;
    if constexpr (!kIsWord) {
      const bool along_k = operand.along_k(!kGathers);
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          tile[place(along_k, line(along_k, 2 * i + j), step(along_k, 2 * i + j))].bits =
              static_cast<uint16_t>(pairs[i] >> 16 * j);
    }
  }
};

template <class Tile, class Element>
__device__ __forceinline__ uint32_t load_word(const Element* tile, int line, int step) {
  return bit_cast<uint32_t>(tile[Tile::across_k(step, line / Tile::kRun) + line % Tile::kRun]);
}

// The fragment of 16 lines of A, at step `k` (in units of one mma).
template <class Tile, class Element>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Element* tile, bool along_k, int line, int k) {
  const int lane = threadIdx.x % 32;
  if (along_k)
    ldmatrix_x4(a, tile + Tile::along_k(line + lane % 16, 2 * k + lane / 16));
  else if constexpr (sizeof(Element) == 2)
    ldmatrix_x4_trans(
        a, tile + Tile::across_k(k * 16 + lane % 8 + lane / 16 * 8, line / Tile::kRun + lane / 8 % 2));
  else
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[r] = load_word<Tile>(tile, line + lane / 4 + r % 2 * 8, k * 8 + lane % 4 + r / 2 * 4);
}
// The fragments of 16 lines of B: two for each eight of them.
template <class Tile, class Element>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Element* tile, bool along_k, int line, int k) {
  const int lane = threadIdx.x % 32;
  if (along_k)
    ldmatrix_x4(b, tile + Tile::along_k(line + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  else if constexpr (sizeof(Element) == 2)
    ldmatrix_x4_trans(b, tile + Tile::across_k(k * 16 + lane % 16, line / Tile::kRun + lane / 16));
  else
#pragma unroll
    for (int r = 0; r < 4; ++r)
      b[r] = load_word<Tile>(tile, line + lane / 4 + r / 2 * 8, k * 8 + lane % 4 + r % 2 * 4);
}

// To TF32. Zero is added since that leaves of a NaN bits that TF32 has, too.
template <int kCount>
__device__ __forceinline__ void round(uint32_t (&fragments)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r) fragments[i][r] = to_tf32(bit_cast<float>(fragments[i][r]) + 0.0f);
}

// What a warp sums up: kM x kN fragments of 16 x 8.
template <class Element, int kM, int kN>
struct MmaSums {
  float sums[kM][kN][4] = {};

  __device__ void multiply(uint32_t (&a)[kM][4], uint32_t (&b)[kN / 2][4]) {
    if constexpr (std::is_same_v<Element, Tf32>) {
      round(a);
      round(b);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const uint32_t *pair = &b[j / 2][j % 2 * 2], b0 = pair[0], b1 = pair[1];
        if constexpr (std::is_same_v<Element, Half>)
          mma_m16n8k16_f16(sums[i][j], a[i], b0, b1);
        else if constexpr (std::is_same_v<Element, BFloat16>)
          mma_m16n8k16_bf16(sums[i][j], a[i], b0, b1);
        else
          mma_m16n8k8_tf32(sums[i][j], a[i], b0, b1);
      }
  }
  __device__ void fold(int, int) {}
  __device__ float total(int i, int j, int e) const { return sums[i][j][e]; }
};

// Leaves in x the TF32 next to it and in `rest` the one next to what is lacking. What would round to infinity
// is cut off instead, and so is its rest; infinity has none.
__device__ __forceinline__ void split(uint32_t& x, uint32_t& rest) {
  constexpr uint32_t kInfinity = 0x7f800000u, kNan = 0x7fc00000u, kKept = 0xffffe000u;
  const float value = bit_cast<float>(x);
  const uint32_t magnitude = x & 0x7fffffffu, rounded = to_tf32(value);
  const bool is_cut = (rounded & kInfinity) == kInfinity;
  x = magnitude > kInfinity ? kNan : is_cut ? x & kKept : rounded;
  const float lacking = magnitude == kInfinity ? 0 : value - bit_cast<float>(x);
  rest = is_cut ? bit_cast<uint32_t>(lacking) & kKept : to_tf32(lacking);
}

// float32 by three products in TF32 each (Ootomo and Yokota, "Recovering Single Precision Accuracy from
// Tensor Cores", arXiv:2203.03341). Tensor cores cut sums off, so these are short: two stages, then they are
// added to totals by plain arithmetic. Products with a rest have sums of their own, which count only beside
// finite ones: infinity times a rest of zero is NaN.
template <int kM, int kN>
struct MmaSums<float, kM, kN> {
  float sums[kM][kN][4] = {}, rests[kM][kN][4] = {}, totals[kM][kN][4] = {};

  __device__ void multiply(uint32_t (&a)[kM][4], uint32_t (&b)[kN / 2][4]) {
    uint32_t a_rest[kM][4], b_rest[kN / 2][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int i = 0; i < kM; ++i) split(a[i][r], a_rest[i][r]);
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) split(b[j][r], b_rest[j][r]);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const uint32_t *pair = &b[j / 2][j % 2 * 2], *rest = &b_rest[j / 2][j % 2 * 2];
        mma_m16n8k8_tf32(rests[i][j], a_rest[i], pair[0], pair[1]);
        mma_m16n8k8_tf32(rests[i][j], a[i], rest[0], rest[1]);
        mma_m16n8k8_tf32(sums[i][j], a[i], pair[0], pair[1]);
      }
  }
  // After each stage.
  __device__ void fold(int tile, int tiles) {
    if (tile % 2 == 0 && tile + 1 < tiles) return;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = sums[i][j][e];
          totals[i][j][e] += fabsf(sum) < INFINITY ? sum + rests[i][j][e] : sum;
          sum = rests[i][j][e] = 0;
        }
  }
  __device__ float total(int i, int j, int e) const { return totals[i][j][e]; }
};

template <class Tile, class Element>
constexpr size_t mma_shared_bytes() {
  return smem_take<Element>(smem_take<Element>(0, kMmaStages * Tile::kM * kMmaRowBytes / sizeof(Element)),
                            kMmaStages * Tile::kN * kMmaRowBytes / sizeof(Element));
}

// kGathers: operands may come otherwise than as aligned runs of 16 bytes. That takes more than the 128
// registers a thread that 512 threads can have, and so does float32.
template <class Tile, class Gemm, bool kGathers>
__global__ void __launch_bounds__(Tile::kThreads,
                                  (kGathers || sizeof(typename Gemm::Element) == 4 ? 256 : 512) /
                                      Tile::kThreads) mma_gemm_kernel(const GemmTask<Gemm> task) {
  using Element = typename Gemm::Element;
  using A = typename Gemm::A;
  using B = typename Gemm::B;
  constexpr int kM = Tile::kM, kN = Tile::kN, kThreads = Tile::kThreads;
  using ATile = StageTile<Element, kM>;
  using BTile = StageTile<Element, kN>;
  constexpr int kK = ATile::kK, kMmas = kMmaRowBytes / 32;  // along K of a stage
  constexpr int kAElements = kM * kK, kBElements = kN * kK;
  constexpr int kFragmentsM = Tile::kWarpM / 16, kFragmentsN = Tile::kWarpN / 8;
  FC_DYN_SMEM(shared);
  Element* a_stages = shared.template take<Element>(kMmaStages * kAElements);
  Element* b_stages = shared.template take<Element>(kMmaStages * kBElements);
  FC_SHARED(typename A::Line, a_lines, [kM]);
  FC_SHARED(typename B::Line, b_lines, [kN]);
  FC_SHARED(typename A::Step, a_steps, [2][kK]);
  FC_SHARED(typename B::Step, b_steps, [2][kK]);

  const Gemm& gemm = task.gemm;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const GemmBlock block = gemm_block<Tile>(task);
  const int m_there = task.m - block.m_begin, n_there = task.n - block.n_begin;
  const int k_there = block.k_end - block.k_begin, tiles = (k_there + kK - 1) / kK;

  // The steps of a tile live until the next but one is fetched.
  const auto work_out_steps = [&](int tile) {
    const int at = tile * kK + lane;
    if (lane >= kK || at >= k_there) return;
    if (warp == 0) a_steps[tile % 2][lane] = gemm.a.step(block.k_begin + at);
    if (warp == 1) b_steps[tile % 2][lane] = gemm.b.step(block.k_begin + at);
  };
  for (int i = thread; i < kM && i < m_there; i += kThreads)
    a_lines[i] = gemm.a.line(block.batch, block.m_begin + i);
  for (int i = thread; i < kN && i < n_there; i += kThreads)
    b_lines[i] = gemm.b.line(block.batch, block.n_begin + i);
  work_out_steps(0);
  __syncthreads();

  MmaShare<A, Element, kM, kThreads, kGathers> a;
  MmaShare<B, Element, kN, kThreads, kGathers> b;
  const auto fetch = [&](int tile) {
    const int stage = tile % kMmaStages, there = k_there - tile * kK;
    a.fetch(gemm.a, a_stages + stage * kAElements, a_lines, a_steps[tile % 2], m_there, there);
    b.fetch(gemm.b, b_stages + stage * kBElements, b_lines, b_steps[tile % 2], n_there, there);
    cp_async_commit();
  };
  const auto put = [&](int tile) {
    const int stage = tile % kMmaStages;
    a.put(gemm.a, a_stages + stage * kAElements);
    b.put(gemm.b, b_stages + stage * kBElements);
  };
  for (int tile = 0; tile < kMmaStages - 1; ++tile) {
    if (tile < tiles)
      fetch(tile), put(tile);
    else
      cp_async_commit();
    work_out_steps(tile + 1);
    __syncthreads();
  }

  constexpr int kWarpsM = kM / Tile::kWarpM;
  const int warp_m = warp % kWarpsM * Tile::kWarpM, warp_n = warp / kWarpsM * Tile::kWarpN;
  MmaSums<Element, kFragmentsM, kFragmentsN> sums;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kMmaStages - 2>();
    __syncthreads();
    const int ahead = tile + kMmaStages - 1;
    if (ahead < tiles)
      fetch(ahead);
    else
      cp_async_commit();
    work_out_steps(ahead + 1);

    const Element* a_tile = a_stages + tile % kMmaStages * kAElements;
    const Element* b_tile = b_stages + tile % kMmaStages * kBElements;
#pragma unroll
    for (int k = 0; k < kMmas; ++k) {
      uint32_t a_fragments[kFragmentsM][4], b_fragments[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i)
        load_a<ATile>(a_fragments[i], a_tile, gemm.a.along_k(!kGathers), warp_m + i * 16, k);
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j)
        load_b<BTile>(b_fragments[j], b_tile, gemm.b.along_k(!kGathers), warp_n + j * 16, k);
      sums.multiply(a_fragments, b_fragments);
    }
    sums.fold(tile, tiles);
    if (ahead < tiles) put(ahead);
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
    for (int r = 0; r < 4; r += 2)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          store_sum(task, block, block.m_begin + warp_m + i * 16 + lane / 4 + r * 4,
                    block.n_begin + warp_n + j * 8 + lane % 4 * 2 + e, sums.total(i, j, r + e));
}

// Calls f with a null pointer of the C++ type: with_dtype() of those that the tile takes.
template <class Tile, class F>
void with_mma_dtype(Dtype dtype, F&& f) {
  if constexpr (Tile::kIsTf32) {
    f(static_cast<Tf32*>(nullptr));
  } else {
    if constexpr (Tile::kTakesFloat)
      if (dtype == Dtype::f32) return f(static_cast<float*>(nullptr));
    if (dtype == Dtype::f16) return f(static_cast<Half*>(nullptr));
    f(static_cast<BFloat16*>(nullptr));
  }
}

template <class Tile, class Gemm>
void mma_gemm(const Gemm& gemm, const GemmShape& shape, void* workspace, void* stream) {
  auto* kernel = mma_gemm_kernel<Tile, Gemm, false>;
  if constexpr (Tile::kGathers)
    if (!gemm.a.access.vectors || !gemm.b.access.vectors) kernel = mma_gemm_kernel<Tile, Gemm, true>;
  launch_gemm<Tile>(kernel, mma_shared_bytes<Tile, typename Gemm::Element>(), gemm, shape, workspace, stream);
}

}  // namespace fastconv::cuda
