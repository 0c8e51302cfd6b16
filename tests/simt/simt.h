// SPDX-License-Identifier: MIT
// What a kernel file sees of the emulator, through csrc/cuda/platform.cuh: launch, shared memory, barriers,
// warp collectives, atomics and vector access. README.md has the model; the functions are defined in the file
// named above each group. Barriers and collectives take the place of their call (a Site), because threads
// meet at a place in the source.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "words.h"

// Code of the runtime inside a kernel's translation unit: its own memory accesses are not the kernel's.
#define SIMT_RUNTIME_CODE __attribute__((no_sanitize("thread", "undefined")))

namespace fastconv::simt {

struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// --- launch (block.cpp)

struct Launch {
  void (*call)(void* params);  // runs the kernel's body once
  void* params;
  size_t params_bytes;
  const void* kernel;  // for its name
  Grid grid;
  dim3 block;
  size_t shared_bytes;
};
// Runs the whole grid. Throws Error with the report if the checker found anything.
void run(const Launch& launch);

template <class... Params>
struct BoundKernel {
  void (*kernel)(Params...);
  std::tuple<Params...> params;

  SIMT_RUNTIME_CODE static void call(void* self) {
    auto* bound = static_cast<BoundKernel*>(self);
    std::apply(bound->kernel, bound->params);
  }
};

// --- shared memory (memory.cpp)

void* static_shared(const void* key, size_t bytes, const char* name);
void* carve_shared(size_t* offset, int* index, size_t bytes, size_t align, Site site);

struct SmemCarver {
  size_t offset = 0;  // what is used up, as the hardware would lay it out
  int index = 0;

  template <class T>
  T* take(size_t count, size_t align = 16, Site site = Site::here()) {
    return static_cast<T*>(carve_shared(&offset, &index, count * sizeof(T), align, site));
  }
};

// --- memory access (check.cpp)

void load_vector(void* to, const void* p, size_t bytes);
void store_vector(void* p, const void* from, size_t bytes);
void atomic_access(void* p, size_t bytes);

// --- barriers of the block (block.cpp) and warp collectives (warp.cpp)

enum class Reduce { count, all, any };
void sync_block(Site site);
int sync_block_reduce(int predicate, Reduce reduce, Site site);

enum class Shuffle { index, up, down, xor_ };
void sync_warp(unsigned mask, Site site);
uint64_t shuffle(unsigned mask, uint64_t value, int argument, int width, Shuffle kind, Site site);
unsigned ballot(unsigned mask, int predicate, Site site);

template <class T>
inline T shuffle_as(unsigned mask, T value, int argument, int width, Shuffle kind, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, argument, width, kind, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fastconv::simt

// --- CUDA's names

#define FC_SHARED(T, name, dims)    \
  typedef T name##_array dims;      \
  static const char name##_key = 0; \
  name##_array& name =              \
      *static_cast<name##_array*>(::fastconv::simt::static_shared(&name##_key, sizeof(name##_array), #name))
#define FC_DYN_SMEM(name) ::fastconv::simt::SmemCarver name

using SimtSite = fastconv::simt::Site;

inline void __syncthreads(SimtSite site = SimtSite::here()) { fastconv::simt::sync_block(site); }
inline int __syncthreads_count(int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::sync_block_reduce(predicate, fastconv::simt::Reduce::count, site);
}
inline int __syncthreads_and(int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::sync_block_reduce(predicate, fastconv::simt::Reduce::all, site);
}
inline int __syncthreads_or(int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::sync_block_reduce(predicate, fastconv::simt::Reduce::any, site);
}
inline void __syncwarp(unsigned mask = ~0u, SimtSite site = SimtSite::here()) {
  fastconv::simt::sync_warp(mask, site);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SimtSite site = SimtSite::here()) {
  return fastconv::simt::shuffle_as(mask, value, lane, width, fastconv::simt::Shuffle::index, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        SimtSite site = SimtSite::here()) {
  return fastconv::simt::shuffle_as(mask, value, static_cast<int>(delta), width, fastconv::simt::Shuffle::up,
                                    site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          SimtSite site = SimtSite::here()) {
  return fastconv::simt::shuffle_as(mask, value, static_cast<int>(delta), width,
                                    fastconv::simt::Shuffle::down, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                         SimtSite site = SimtSite::here()) {
  return fastconv::simt::shuffle_as(mask, value, lanes, width, fastconv::simt::Shuffle::xor_, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::ballot(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::ballot(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SimtSite site = SimtSite::here()) {
  return fastconv::simt::ballot(mask, predicate, site) == mask;
}

// Atomics: seen by the checker as one atomic access, then done plainly, since one host thread runs
// everything.
template <class T, class F>
SIMT_RUNTIME_CODE inline T simt_atomic(T* p, F&& updated) {
  fastconv::simt::atomic_access(p, sizeof(T));
  const T old = *p;
  *p = updated(old);
  return old;
}
template <class T>
inline T atomicAdd(T* p, T value) {
  return simt_atomic(p, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
inline T atomicMax(T* p, T value) {
  return simt_atomic(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* p, T value) {
  return simt_atomic(p, [&](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicExch(T* p, T value) {
  return simt_atomic(p, [&](T) { return value; });
}
template <class T>
inline T atomicCAS(T* p, T expected, T value) {
  return simt_atomic(p, [&](T old) { return old == expected ? value : old; });
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}

namespace fastconv {

using simt::SmemCarver;

template <class V>
inline V ld(const void* p) {
  V v;
  simt::load_vector(&v, p, sizeof v);
  return v;
}

// Inlined in any case: g++ does not instrument a structure on its way into a function.
template <class V>
__attribute__((always_inline)) inline void st(void* p, V v) {
  simt::store_vector(p, &v, sizeof v);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Grid grid, dim3 block, size_t shared_bytes, void*,
            const Args&... args) {
  simt::BoundKernel<Params...> bound{kernel, {static_cast<Params>(args)...}};
  simt::run(
      {&bound.call, &bound, sizeof bound, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes});
}

}  // namespace fastconv
