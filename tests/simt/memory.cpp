// SPDX-License-Identifier: MIT
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "report.h"

namespace fastconv::simt {

unsigned char *arenas, *arena;
size_t arenas_bytes;

namespace {

struct SharedArray {
  size_t offset, bytes;  // in the arena
  const void* key;       // of a static array
  std::string name;
};

std::vector<SharedArray> static_arrays, dynamic_arrays;
size_t static_bytes;  // as the hardware counts them, without red zones

size_t align_up(size_t value, size_t align) { return (value + align - 1) / align * align; }

template <class F>
void for_copies(const SharedArray& array, F&& f) {
  for (int rank = 0; rank < blocks_in_cluster; ++rank) f(arenas + rank * kArenaBytes + array.offset);
}

// Places an array behind the last one of its kind, a red zone away and never better aligned than it asks for.
// Returns that of the block that runs.
unsigned char* place_array(std::vector<SharedArray>& arrays, size_t base, size_t bytes, size_t align,
                           const void* key, std::string name) {
  const size_t used = arrays.empty() ? base : arrays.back().offset + arrays.back().bytes;
  align = std::max<size_t>(align, 128);
  const size_t offset = align_up(used + kRedZone, 2 * align) + align;
  arrays.push_back({offset, bytes, key, std::move(name)});
  for_copies(arrays.back(), [&](unsigned char* copy) {
    memset(copy, 0xff, bytes);
    set_inside(copy, bytes, true);
  });
  return arena + offset;
}

template <class F>
void for_arrays(F&& f) {
  for (auto* arrays : {&static_arrays, &dynamic_arrays})
    for (const SharedArray& array : *arrays) f(array);
}

}  // namespace

void open_arenas() {
  arenas_bytes = blocks_in_cluster * kArenaBytes;
  if (arenas) return;
  void* memory =
      mmap(nullptr, kMaxCluster * kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  FASTCONV_CHECK(memory != MAP_FAILED, "no memory for shared memory");
  arenas = static_cast<unsigned char*>(memory);
}

void forget_shared_arrays() {
  for_arrays([](const SharedArray& array) {
    for_copies(array, [&](unsigned char* copy) { set_inside(copy, array.bytes, false); });
  });
  static_arrays.clear();
  dynamic_arrays.clear();
  static_bytes = 0;
}

void spoil_shared_arrays() {
  for_arrays([](const SharedArray& array) {
    for_copies(array, [&](unsigned char* copy) { memset(copy, 0xff, array.bytes); });
  });
}

void* static_shared(const void* key, size_t bytes, const char* name) {
  for (const SharedArray& array : static_arrays)
    if (array.key == key) return arena + array.offset;
  static_bytes = align_up(static_bytes, 16) + bytes;
  if (static_bytes > kMaxStaticShared || static_bytes + current_launch.shared_bytes > kMaxShared)
    found(std::string("shared size") + name,
          format("too much shared memory: %zu bytes of static arrays up to '%s', %zu of dynamic ones; at "
                 "most %zu and, "
                 "together, %zu",
                 static_bytes, name, current_launch.shared_bytes, kMaxStaticShared, kMaxShared),
          After::stop);
  return place_array(static_arrays, 0, bytes, 16, key, std::string("shared '") + name + "'");
}

void* carve_shared(size_t* offset, int* index, size_t bytes, size_t align, Site site) {
  *offset = align_up(*offset, align) + bytes;
  if (*offset > current_launch.shared_bytes)
    found("carve size" + place(site),
          format("the kernel carves %zu bytes of dynamic shared memory at %s, the launch gave %zu", *offset,
                 place(site).c_str(), current_launch.shared_bytes),
          After::stop);
  const size_t i = static_cast<size_t>((*index)++);
  if (i == dynamic_arrays.size())
    return place_array(dynamic_arrays, kDynamicBase, bytes, align, nullptr,
                       "the shared array carved at " + place(site));
  if (dynamic_arrays[i].bytes != bytes)
    found("carve" + place(site), "threads carve dynamic shared memory in different pieces at " + place(site),
          After::stop);
  return arena + dynamic_arrays[i].offset;
}

// --- global memory

std::vector<Buffer>& buffers() {
  static std::vector<Buffer> all;
  return all;
}

bool Buffer::holds(size_t offset, size_t bytes) const {
  if (begin + offset + bytes > end) return false;
  if (inside.empty()) return true;
  return std::all_of(inside.begin() + offset, inside.begin() + offset + bytes, [](bool b) { return b; });
}

void register_tensor(const void* data, const char* name, Access access, size_t element_bytes, int dims,
                     const int64_t* sizes, const int64_t* strides) {
  std::vector<size_t> starts{0};  // of elements, in bytes
  for (int d = 0; d < dims; ++d) {
    std::vector<size_t> next;
    for (const size_t start : starts)
      for (int64_t i = 0; i < sizes[d]; ++i)
        next.push_back(start + static_cast<size_t>(i * strides[d]) * element_bytes);
    starts.swap(next);
  }
  const size_t bytes = starts.empty() ? 0 : *std::max_element(starts.begin(), starts.end()) + element_bytes;
  Buffer buffer;
  buffer.begin = reinterpret_cast<uintptr_t>(data);
  buffer.end = buffer.begin + bytes;
  buffer.name = name;
  buffer.access = access;
  if (starts.size() * element_bytes != bytes) {
    buffer.inside.resize(bytes);
    for (const size_t start : starts) std::fill_n(buffer.inside.begin() + start, element_bytes, true);
  }
  if (access != Access::input) buffer.cells.reset(new Cell[bytes / 2 + 1]());
  buffers().push_back(std::move(buffer));
}

namespace {
size_t last_found;
}

void clear_buffers() {
  buffers().clear();
  last_found = 0;
}

Buffer* find_buffer(uintptr_t address) {
  std::vector<Buffer>& all = buffers();
  const auto holds = [&](const Buffer& b) { return b.begin <= address && address < b.end; };
  if (last_found < all.size() && holds(all[last_found])) return &all[last_found];
  for (size_t i = 0; i < all.size(); ++i)
    if (holds(all[i])) return &all[last_found = i];
  return nullptr;
}

void find_unwritten_outputs() {
  for (const Buffer& buffer : buffers()) {
    if (buffer.access != Access::output || !watching) continue;
    for (size_t i = 0; i < buffer.end - buffer.begin; ++i) {
      if (!buffer.inside.empty() && !buffer.inside[i]) continue;
      if (buffer.cells[i >> 1].defined >> (i & 1) & 1) continue;
      found("unwritten" + buffer.name, "never written: " + describe(buffer.begin + i));
      break;
    }
  }
}

std::string describe(uintptr_t address) {
  if (is_cluster_shared(reinterpret_cast<const void*>(address))) {
    const size_t offset = arena_offset(reinterpret_cast<const void*>(address)) % kArenaBytes;
    size_t least = kRedZone + 1;
    std::string text = "a byte of shared memory outside of every array";
    for_arrays([&](const SharedArray& array) {
      const size_t end = array.offset + array.bytes;
      const size_t distance = offset < array.offset ? array.offset - offset
                              : offset >= end       ? offset - end + 1
                                                    : 0;
      if (distance >= least) return;
      least = distance;
      text = format("byte %td of %s (%zu bytes)", static_cast<ptrdiff_t>(offset - array.offset),
                    array.name.c_str(), array.bytes);
    });
    if (!is_shared(reinterpret_cast<const void*>(address)))
      text += format(" of block %d of the cluster", host_of(reinterpret_cast<const void*>(address)).rank);
    return text;
  }
  constexpr uintptr_t kNear = 1 << 16;
  const Buffer* nearest = nullptr;
  uintptr_t least = kNear;
  for (const Buffer& b : buffers()) {
    const uintptr_t distance = address < b.begin  ? b.begin - address
                               : address >= b.end ? address - b.end + 1
                                                  : 0;
    if (distance < least) least = distance, nearest = &b;
  }
  if (!nearest) return format("address 0x%zx, near no tensor", static_cast<size_t>(address));
  const bool is_gap = least == 0 && !nearest->holds(address - nearest->begin, 1);
  return format("byte %td of '%s' (%zu bytes%s)", static_cast<ptrdiff_t>(address - nearest->begin),
                nearest->name.c_str(), static_cast<size_t>(nearest->end - nearest->begin),
                is_gap ? ", but between its elements" : "");
}

}  // namespace fastconv::simt
