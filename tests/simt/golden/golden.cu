// SPDX-License-Identifier: MIT
// One small kernel for each wrapper of csrc/cuda/ptx.cuh, or for a few that belong together.
// tests/test_ptx.py runs them on the emulator and on a GPU and compares with what the PTX manual says.
// Kernels bring operands where the wrapper wants them and results out again, and compute nothing else.
#include <cstring>
#include <string>

#include "cuda/ptx.cuh"

namespace fastconv {
namespace {

struct Call {
  void* const* tensors;
  const int64_t* numbers;
  void* stream;

  template <class T>
  T* tensor(int i) const {
    return static_cast<T*>(tensors[i]);
  }
  int number(int i) const { return static_cast<int>(numbers[i]); }
};

// --- cp.async: two groups of a warp, each of a chunk a lane, of which `counts` bytes are copied

template <int Bytes>
__global__ void cp_async(const unsigned char* in, const int* counts, unsigned char* out) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(64 * Bytes);
  const int lane = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    const int i = group * 32 + lane;
    if (Bytes == 16)
      cp_async16(s + i * Bytes, in + i * Bytes, counts[i]);
    else
      cp_async4(s + i * Bytes, in + i * Bytes, counts[i]);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < Bytes; ++i) out[lane * Bytes + i] = s[lane * Bytes + i];
  cp_async_wait<0>();
  for (int i = 0; i < Bytes; ++i) out[(32 + lane) * Bytes + i] = s[(32 + lane) * Bytes + i];
}
template <int Bytes>
void run_cp_async(const Call& c) {
  launch(cp_async<Bytes>, dim3(1), dim3(32), 64 * Bytes, c.stream, c.tensor<unsigned char>(0),
         c.tensor<int>(1), c.tensor<unsigned char>(2));
}

// --- matrix instructions of a warp

template <bool Transpose>
__global__ void ldmatrix(const uint16_t* in, uint32_t* out) {
  FC_SHARED(uint16_t, s, [256]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) s[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  if (Transpose)
    ldmatrix_x4_trans(r, s + 8 * lane);
  else
    ldmatrix_x4(r, s + 8 * lane);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = r[i];
}
template <bool Transpose>
void run_ldmatrix(const Call& c) {
  launch(ldmatrix<Transpose>, dim3(1), dim3(32), 0, c.stream, c.tensor<uint16_t>(0), c.tensor<uint32_t>(1));
}

enum class Type { f16, bf16, tf32 };

template <Type type>
__global__ void mma(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int lane = threadIdx.x;
  float d[4];
  uint32_t ra[4];
  for (int i = 0; i < 4; ++i) d[i] = c[lane * 4 + i], ra[i] = a[lane * 4 + i];
  const uint32_t b0 = b[lane * 2], b1 = b[lane * 2 + 1];
  if (type == Type::f16) mma_m16n8k16_f16(d, ra, b0, b1);
  if (type == Type::bf16) mma_m16n8k16_bf16(d, ra, b0, b1);
  if (type == Type::tf32) mma_m16n8k8_tf32(d, ra, b0, b1);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = d[i];
}
template <Type type>
void run_mma(const Call& c) {
  launch(mma<type>, dim3(1), dim3(32), 0, c.stream, c.tensor<uint32_t>(0), c.tensor<uint32_t>(1),
         c.tensor<float>(2), c.tensor<float>(3));
}

__global__ void round_to_tf32(const float* in, uint32_t* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  out[i] = to_tf32(in[i]);
}
void run_to_tf32(const Call& c) {
  launch(round_to_tf32, dim3(static_cast<unsigned>(c.number(0)) / 32), dim3(32), 0, c.stream,
         c.tensor<float>(0), c.tensor<uint32_t>(1));
}

// --- barriers: warp 0 hands rows to warp 1 through two buffers, which reverses them

__global__ void ring_of_bars(const int* in, int* out, int rows) {
  FC_SHARED(int, s, [2][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < rows; ++i) {
    const int slot = i % 2;
    if (warp == 0) {
      if (i >= 2) bar_sync(3 + slot, 64);
      s[slot][lane] = in[i * 32 + lane];
      bar_arrive(1 + slot, 64);
    } else {
      bar_sync(1 + slot, 64);
      out[i * 32 + lane] = s[slot][31 - lane];
      if (i + 2 < rows) bar_arrive(3 + slot, 64);
    }
  }
}
__global__ void ring_of_mbars(const int* in, int* out, int rows) {
  FC_SHARED(int, s, [2][32]);
  FC_SHARED(uint64_t, full, [2]);
  FC_SHARED(uint64_t, empty, [2]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) mbar_init(&full[i], 32), mbar_init(&empty[i], 32);
  __syncthreads();
  for (int i = 0; i < rows; ++i) {
    const int slot = i % 2, parity = i / 2 % 2;
    if (warp == 0) {
      if (i >= 2) mbar_wait(&empty[slot], parity ^ 1);
      s[slot][lane] = in[i * 32 + lane];
      mbar_arrive(&full[slot]);
    } else {
      mbar_wait(&full[slot], parity);
      out[i * 32 + lane] = s[slot][31 - lane];
      mbar_arrive(&empty[slot]);
    }
  }
}
template <void (*kernel)(const int*, int*, int)>
void run_ring(const Call& c) {
  launch(kernel, dim3(1), dim3(64), 0, c.stream, c.tensor<int>(0), c.tensor<int>(1), c.number(0));
}

// --- the copy engine

__device__ void copy_out(unsigned char* out, const unsigned char* s, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) out[i] = s[i];
}
__device__ void copy_in(unsigned char* s, const unsigned char* in, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x)) s[i] = in[i];
  fence_proxy_async();
  __syncthreads();
}

__global__ void bulk_copy_kernel(const unsigned char* in, unsigned char* out, int bytes) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(bytes, 128);
  FC_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, bytes);
    bulk_copy(s, in, bytes, bar);
  }
  __syncthreads();
  mbar_wait(bar, 0);
  copy_out(out, s, bytes);
}
void run_bulk_copy(const Call& c) {
  launch(bulk_copy_kernel, dim3(1), dim3(64), c.number(0), c.stream, c.tensor<unsigned char>(0),
         c.tensor<unsigned char>(1), c.number(0));
}

// Two groups, the second a copy of the first, whose source is used again as soon as it was read.
__global__ void bulk_store_kernel(const unsigned char* in, unsigned char* out, int bytes) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(2 * bytes, 128);
  copy_in(s, in, 2 * bytes);
  if (threadIdx.x == 0) {
    bulk_store(out, s, bytes);
    bulk_commit();
    bulk_store(out + bytes, s + bytes, bytes);
    bulk_commit();
    bulk_wait_read<1>();
    for (int i = 0; i < bytes; ++i) s[i] = 0;
    bulk_wait<0>();
  }
}
void run_bulk_store(const Call& c) {
  launch(bulk_store_kernel, dim3(1), dim3(64), 2 * c.number(0), c.stream, c.tensor<unsigned char>(0),
         c.tensor<unsigned char>(1), c.number(0));
}

template <int D>
struct Coordinates {
  int at[D];
};

// Numbers: dtype, swizzle, bytes of the box, then for each dimension its size, stride, box and coordinate.
template <int D>
TensorMap map_of(const Call& c, const void* data) {
  int64_t sizes[D], strides[D];
  int box[D];
  for (int d = 0; d < D; ++d)
    sizes[d] = c.numbers[3 + 4 * d], strides[d] = c.numbers[4 + 4 * d], box[d] = c.number(5 + 4 * d);
  return make_tensor_map(static_cast<Dtype>(c.number(0)), data, sizes, strides, box,
                         static_cast<Swizzle>(c.number(1)));
}
template <int D>
Coordinates<D> coordinates_of(const Call& c) {
  Coordinates<D> coordinates;
  for (int d = 0; d < D; ++d) coordinates.at[d] = c.number(6 + 4 * d);
  return coordinates;
}

template <int D>
__global__ void tensor_copy_kernel(const __grid_constant__ TensorMap map, Coordinates<D> coordinates,
                                   unsigned char* out, int bytes) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(bytes, 1024);
  FC_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, bytes);
    tensor_copy(s, map, coordinates.at, bar);
  }
  __syncthreads();
  mbar_wait(bar, 0);
  copy_out(out, s, bytes);
}
template <int D>
void run_tensor_copy(const Call& c) {
  launch(tensor_copy_kernel<D>, dim3(1), dim3(64), c.number(2), c.stream,
         map_of<D>(c, c.tensor<unsigned char>(0)), coordinates_of<D>(c), c.tensor<unsigned char>(1),
         c.number(2));
}

template <int D>
__global__ void tensor_store_kernel(const __grid_constant__ TensorMap map, Coordinates<D> coordinates,
                                    const unsigned char* in, int bytes) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(bytes, 1024);
  copy_in(s, in, bytes);
  if (threadIdx.x == 0) {
    tensor_store(map, coordinates.at, s);
    bulk_commit();
    bulk_wait_read<0>();
  }
}
template <int D>
void run_tensor_store(const Call& c) {
  launch(tensor_store_kernel<D>, dim3(1), dim3(64), c.number(2), c.stream,
         map_of<D>(c, c.tensor<unsigned char>(1)), coordinates_of<D>(c), c.tensor<unsigned char>(0),
         c.number(2));
}

// --- clusters

// Rank, size, and the word at the neighbour that it has for this thread.
__global__ void neighbour(const int* in, int* out) {
  FC_SHARED(int, s, [32]);
  const int thread = threadIdx.x, at = blockIdx.x * 32 + thread, rank = cluster_rank();
  s[thread] = in[at];
  cluster_arrive();
  cluster_wait();
  out[at * 3] = rank;
  out[at * 3 + 1] = cluster_size();
  out[at * 3 + 2] = *cluster_shared(s + 31 - thread, (rank + 1) % cluster_size());
  cluster_sync();
}
void run_neighbour(const Call& c) {
  launch(neighbour, Grid(dim3(8), static_cast<unsigned>(c.number(0))), dim3(32), 0, c.stream,
         c.tensor<int>(0), c.tensor<int>(1));
}

// Every block writes its number into the array of the next one, and says so at that block's mbarrier.
__global__ void signal_neighbour(int* out) {
  FC_SHARED(int, s, [32]);
  FC_SHARED(uint64_t, bar, [1]);
  const int thread = threadIdx.x, next = (cluster_rank() + 1) % cluster_size();
  if (thread == 0) {
    mbar_init(bar, 32);
    fence_mbar_init();
  }
  cluster_sync();
  *cluster_shared(s + thread, next) = cluster_rank() * 32 + thread;
  mbar_arrive_remote(bar, next);
  mbar_wait_cluster(bar, 0);
  out[blockIdx.x * 32 + thread] = s[31 - thread];
  cluster_sync();
}
void run_signal_neighbour(const Call& c) {
  launch(signal_neighbour, Grid(dim3(8), 4), dim3(32), 0, c.stream, c.tensor<int>(0));
}

// Block 0 brings `bytes` to all blocks whose bit is set, as a run or as a box of one row.
template <bool Box>
__global__ void multicast(const __grid_constant__ TensorMap map, const unsigned char* in, unsigned char* out,
                          int bytes, int blocks) {
  FC_DYN_SMEM(shared);
  unsigned char* s = shared.take<unsigned char>(bytes, 1024);
  FC_SHARED(uint64_t, bar, [1]);
  const int rank = cluster_rank();
  const bool receives = blocks >> rank & 1;
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
    mbar_arrive_expect_tx(bar, bytes);
  }
  cluster_sync();
  if (threadIdx.x == 0 && rank == 0) {
    if (Box)
      tensor_copy_multicast(s, map, {0}, bar, static_cast<uint16_t>(blocks));
    else
      bulk_copy_multicast(s, in, bytes, bar, static_cast<uint16_t>(blocks));
  }
  if (receives) {
    mbar_wait(bar, 0);
    copy_out(out + rank * bytes, s, bytes);
  }
  cluster_sync();
}
template <bool Box>
void run_multicast(const Call& c) {
  const int64_t bytes = c.numbers[0];
  const TensorMap map =
      make_tensor_map(Dtype::f32, c.tensor<float>(0), {bytes / 4}, {1}, {static_cast<int>(bytes / 4)});
  launch(multicast<Box>, Grid(dim3(4), 4), dim3(32), bytes, c.stream, map, c.tensor<unsigned char>(0),
         c.tensor<unsigned char>(1), c.number(0), c.number(1));
}

// --- warpgroups

__global__ void __launch_bounds__(384, 1) move_registers(const int* in, int* out) {
  const int i = threadIdx.x;
  if (i < 128) {
    setmaxnreg_dec<40>();
    out[i] = in[i];
  } else {
    setmaxnreg_inc<232>();
    out[i] = in[i] + 1;
  }
}
void run_setmaxnreg(const Call& c) {
  launch(move_registers, dim3(1), dim3(384), 0, c.stream, c.tensor<int>(0), c.tensor<int>(1));
}

struct Operand {  // see wgmma_operand; `step`: bytes from one instruction's columns to the next one's
  int bytes, leading, stride, step;
  Swizzle swizzle;
};

// Two instructions, each a group, on images of shared memory. Fragments of threads: start and out [128][N /
// 2].
template <Type type, int N>
__global__ void __launch_bounds__(128)
    wgmma(const unsigned char* a, const unsigned char* b, const float* start, float* out, Operand ka,
          Operand kb, int add) {
  FC_DYN_SMEM(shared);
  unsigned char* sa = shared.take<unsigned char>(ka.bytes, 1024);
  unsigned char* sb = shared.take<unsigned char>(kb.bytes, 1024);
  copy_in(sa, a, ka.bytes);
  copy_in(sb, b, kb.bytes);
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = start[threadIdx.x * (N / 2) + i];
  wgmma_fence();
  for (int k = 0; k < 2; ++k) {
    const uint64_t da = wgmma_operand(sa + k * ka.step, ka.leading, ka.stride, ka.swizzle);
    const uint64_t db = wgmma_operand(sb + k * kb.step, kb.leading, kb.stride, kb.swizzle);
    if (type == Type::f16) wgmma_f16(d, da, db, k > 0 || add);
    if (type == Type::bf16) wgmma_bf16(d, da, db, k > 0 || add);
    if (type == Type::tf32) wgmma_tf32(d, da, db, k > 0 || add);
    wgmma_commit();
  }
  wgmma_wait<1>();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + i] = d[i];
}

template <Type type, int N>
void launch_wgmma(const Call& c) {
  const auto operand = [&](int i) {
    return Operand{c.number(i), c.number(i + 1), c.number(i + 2), c.number(i + 3),
                   static_cast<Swizzle>(c.number(i + 4))};
  };
  const Operand a = operand(2), b = operand(7);
  const size_t bytes = smem_take<unsigned char>(smem_take<unsigned char>(0, a.bytes, 1024), b.bytes, 1024);
  launch(wgmma<type, N>, dim3(1), dim3(128), bytes, c.stream, c.tensor<unsigned char>(0),
         c.tensor<unsigned char>(1), c.tensor<float>(2), c.tensor<float>(3), a, b, c.number(1));
}
// Numbers: N, whether to add to the start, then both operands.
template <Type type>
void run_wgmma(const Call& c) {
  switch (c.number(0)) {
    case 8:
      return launch_wgmma<type, 8>(c);
    case 16:
      return launch_wgmma<type, 16>(c);
    case 32:
      return launch_wgmma<type, 32>(c);
    case 64:
      return launch_wgmma<type, 64>(c);
    case 128:
      return launch_wgmma<type, 128>(c);
  }
  fail("no wgmma of ", c.number(0), " columns");
}

// --- the cases by name

struct Case {
  const char* name;
  void (*run)(const Call& call);
};

constexpr Case kCases[] = {
    {"cp_async16", run_cp_async<16>},
    {"cp_async4", run_cp_async<4>},
    {"ldmatrix", run_ldmatrix<false>},
    {"ldmatrix_trans", run_ldmatrix<true>},
    {"mma_f16", run_mma<Type::f16>},
    {"mma_bf16", run_mma<Type::bf16>},
    {"mma_tf32", run_mma<Type::tf32>},
    {"to_tf32", run_to_tf32},
    {"bar", run_ring<ring_of_bars>},
    {"mbar", run_ring<ring_of_mbars>},
    {"bulk_copy", run_bulk_copy},
    {"bulk_store", run_bulk_store},
    {"tensor_copy1", run_tensor_copy<1>},
    {"tensor_copy2", run_tensor_copy<2>},
    {"tensor_copy3", run_tensor_copy<3>},
    {"tensor_copy4", run_tensor_copy<4>},
    {"tensor_copy5", run_tensor_copy<5>},
    {"tensor_store1", run_tensor_store<1>},
    {"tensor_store2", run_tensor_store<2>},
    {"tensor_store3", run_tensor_store<3>},
    {"tensor_store4", run_tensor_store<4>},
    {"tensor_store5", run_tensor_store<5>},
    {"neighbour", run_neighbour},
    {"signal_neighbour", run_signal_neighbour},
    {"bulk_multicast", run_multicast<false>},
    {"tensor_multicast", run_multicast<true>},
    {"setmaxnreg", run_setmaxnreg},
    {"wgmma_f16", run_wgmma<Type::f16>},
    {"wgmma_bf16", run_wgmma<Type::bf16>},
    {"wgmma_tf32", run_wgmma<Type::tf32>},
};

std::string wrong;

}  // namespace
}  // namespace fastconv

#define GOLDEN_API extern "C" __attribute__((visibility("default")))

GOLDEN_API const char* golden_name(int i) {
  return i < static_cast<int>(std::size(fastconv::kCases)) ? fastconv::kCases[i].name : nullptr;
}

// Launches a case. Returns null, or what was wrong; the text lives until the next call.
GOLDEN_API const char* golden_run(const char* name, void* const* tensors, const int64_t* numbers,
                                  void* stream) {
  try {
    for (const fastconv::Case& each : fastconv::kCases)
      if (!strcmp(each.name, name)) {
        each.run({tensors, numbers, stream});
        return nullptr;
      }
    fastconv::fail("no case ", name);
  } catch (const std::exception& error) {
    fastconv::wrong = error.what();
  }
  return fastconv::wrong.c_str();
}
