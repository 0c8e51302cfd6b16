// SPDX-License-Identifier: MIT
// The copy engine: runs of bytes and boxes of tensors, cut into pieces of at most 16 bytes, between global
// and shared memory, done as late as the waits allow.
//
// Into shared memory: the destination is NaN and "pending" until no thread can run; then the bytes arrive and
// the mbarrier counts them. Who reads them must have learnt that the mbarrier's phase is over. Out of shared
// memory: the source is held until the issuing thread waits for its group to be read, the destination pending
// until it waits for the group to be complete, or ends.
#include <cstring>
#include <deque>

#include "check.h"
#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"

namespace fastconv::simt {

namespace {

struct BulkCopy {  // into the shared memory of one block
  std::vector<Piece> pieces;
  int bytes;
  uint64_t* bar;
  const void* pc;
};
std::deque<BulkCopy> copies;

void require(bool holds, const char* operation, const char* rule, const void* pc) {
  if (!holds)
    found("bulk" + place(pc), std::string(operation) + " at " + place(pc) + " needs " + rule, After::stop);
}

bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

constexpr int kPiece = 16;

std::vector<Piece> pieces_of_run(void* dst, const void* src, int bytes) {
  std::vector<Piece> pieces;
  for (int i = 0; i < bytes; i += kPiece)
    pieces.push_back(
        {static_cast<unsigned char*>(dst) + i, static_cast<const unsigned char*>(src) + i, kPiece});
  return pieces;
}

// Calls f(place in shared memory, place in the tensor or null where that is outside, bytes).
template <class F>
void for_box(const TensorLayout& t, const int* at, unsigned char* shared, F&& f) {
  const int64_t item = dtype_size(t.dtype);
  const uintptr_t bits = t.swizzle == Swizzle::none ? 0 : swizzle_bytes(t.swizzle) / 16 - 1;
  int64_t rows = 1;
  for (int d = 1; d < t.dims; ++d) rows *= t.box[d];
  uintptr_t to = reinterpret_cast<uintptr_t>(shared);
  for (int64_t row = 0; row < rows; ++row) {
    unsigned char* begin = static_cast<unsigned char*>(t.data);
    bool is_inside = true;
    int64_t rest = row;
    for (int d = 1; d < t.dims; ++d) {
      const int64_t i = at[d] + rest % t.box[d];
      rest /= t.box[d];
      is_inside = is_inside && i >= 0 && i < t.sizes[d];
      begin += i * t.strides[d] * item;
    }
    for (int64_t x = 0; x < t.box[0] * item; x += kPiece, to += kPiece) {
      auto* chunk = reinterpret_cast<unsigned char*>(to ^ (to >> 7 & bits) << 4);
      for (int64_t i = 0; i < kPiece;) {  // runs of elements that are all inside or all outside
        const auto inside = [&](int64_t byte) {
          const int64_t element = at[0] + (x + byte) / item;
          return is_inside && element >= 0 && element < t.sizes[0];
        };
        int64_t end = i + item;
        while (end < kPiece && inside(end) == inside(i)) end += item;
        f(chunk + i, inside(i) ? begin + at[0] * item + x + i : nullptr, static_cast<int>(end - i));
        i = end;
      }
    }
  }
}

int box_bytes(const TensorLayout& t) {
  int64_t bytes = dtype_size(t.dtype);
  for (int d = 0; d < t.dims; ++d) bytes *= t.box[d];
  return static_cast<int>(bytes);
}

void require_tensor(const TensorLayout& t, int dims, const void* shared, const char* operation,
                    const void* pc) {
  require(t.dims == dims, operation, "as many coordinates as the tensor map has dimensions", pc);
  require(is_aligned(shared, 128), operation, "an address in shared memory that is a multiple of 128", pc);
}

// For one block: checks both sides, and marks the destination.
void issue_copy(std::vector<Piece> pieces, uint64_t* bar, const char* operation, const void* pc) {
  const Phase phase = phase_of(bar, operation, pc);
  int bytes = 0;
  for (const Piece& piece : pieces) {
    require(is_cluster_shared(piece.dst), operation, "a destination in shared memory", pc);
    check_access(*current, piece.dst, piece.bytes, Kind::write, pc);
    if (piece.src) check_access(*current, piece.src, piece.bytes, Kind::read, pc);
    set_written_by_engine(piece.dst, piece.bytes, phase, pc);
    set_pending(piece.dst, piece.bytes, true);
    memset(piece.dst, 0xff, piece.bytes);
    bytes += piece.bytes;
  }
  copies.push_back({std::move(pieces), bytes, bar, pc});
}

void issue_multicast(const std::vector<Piece>& pieces, uint64_t* bar, unsigned to, const char* operation,
                     const void* pc) {
  require(to && to >> blocks_in_cluster == 0, operation, "a mask of blocks of the cluster", pc);
  for (int rank = 0; rank < blocks_in_cluster; ++rank) {
    if (!(to >> rank & 1)) continue;
    std::vector<Piece> moved = pieces;
    for (Piece& piece : moved) piece.dst = in_block(piece.dst, rank);
    issue_copy(std::move(moved), in_block(bar, rank), operation, pc);
  }
}

// What a thread wrote to the destination, the engine overwrites only after a proxy fence.
void check_overwritten(const void* dst, int bytes, const char* operation, const void* pc) {
  require(is_shared(dst), operation, "a destination in the block's shared memory", pc);
  check_proxy(dst, bytes, operation, pc);
}

void issue_store(std::vector<Piece> pieces, const char* operation, const void* pc) {
  for (const Piece& piece : pieces) {
    require(is_shared(piece.src), operation, "a source in the block's shared memory", pc);
    check_access(*current, piece.src, piece.bytes, Kind::read, pc);
    check_proxy(piece.src, piece.bytes, operation, pc);
    hold(piece.src, piece.bytes, true);
    if (!piece.dst) continue;
    require(!is_cluster_shared(piece.dst), operation, "a destination in global memory", pc);
    check_access(*current, piece.dst, piece.bytes, Kind::write, pc);
    set_pending(piece.dst, piece.bytes, true);
  }
  current->stores.issue({std::move(pieces), {}, pc});
}

void read_source(BulkStore& store) {
  if (!store.taken.empty()) return;
  for (const Piece& piece : store.pieces) {
    hold(piece.src, piece.bytes, false);
    store.taken.insert(store.taken.end(), piece.src, piece.src + piece.bytes);
  }
}

void complete(BulkStore& store) {
  read_source(store);
  const unsigned char* from = store.taken.data();
  for (const Piece& piece : store.pieces) {
    if (piece.dst) {
      set_pending(piece.dst, piece.bytes, false);
      memcpy(piece.dst, from, piece.bytes);
    }
    from += piece.bytes;
  }
}

}  // namespace

void start_bulk_copies() { copies.clear(); }

void finish_bulk_copies() {
  for (auto copy = copies.begin(); copy != copies.end();) {
    if (!is_shared(copy->bar)) {
      ++copy;
      continue;
    }
    const std::string where = place(copy->pc);
    found("bulk end" + where, "the block ends while the bulk copy issued at " + where + " is outstanding");
    copy = copies.erase(copy);
  }
}

void finish_bulk_stores(Thread& t) {
  for (BulkStore& store : t.stores.issued) {
    const std::string where = place(store.pc);
    if (store.taken.empty())
      found("store end" + where,
            name_of(t) + " ends while the copy engine reads for the store issued at " + where);
    complete(store);
  }
}

bool complete_one_copy() {
  if (copies.empty()) return false;
  const BulkCopy copy = std::move(copies.front());
  copies.pop_front();
  for (const Piece& piece : copy.pieces) {
    set_pending(piece.dst, piece.bytes, false);
    if (piece.src)
      memcpy(piece.dst, piece.src, piece.bytes);
    else
      memset(piece.dst, 0, piece.bytes);
  }
  land_bytes(copy.bar, copy.bytes);
  return true;
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

namespace {

constexpr const char* kMultiplesOf16 = "addresses and a size that are multiples of 16";

bool is_run(const void* dst, const void* src, int bytes) {
  return is_aligned(dst, 16) && is_aligned(src, 16) && bytes > 0 && bytes % 16 == 0;
}

std::vector<Piece> pieces_of_box(const TensorMap& map, const int* at, int dims, void* shared,
                                 const char* operation, const void* pc) {
  require_tensor(map.layout, dims, shared, operation, pc);
  std::vector<Piece> pieces;
  for_box(
      map.layout, at, static_cast<unsigned char*>(shared),
      [&](unsigned char* to, const unsigned char* from, int bytes) { pieces.push_back({to, from, bytes}); });
  return pieces;
}

}  // namespace

void fence_proxy_async() {
  ++current->proxy_fences;
  fence_mbar_init();
}

void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) {
  const void* pc = __builtin_return_address(0);
  require(is_run(dst, src, bytes), "cp.async.bulk", kMultiplesOf16, pc);
  check_overwritten(dst, bytes, "cp.async.bulk", pc);
  issue_copy(pieces_of_run(dst, src, bytes), bar, "cp.async.bulk", pc);
}

void bulk_copy_multicast(void* dst, const void* src, int bytes, uint64_t* bar, uint16_t to) {
  const void* pc = __builtin_return_address(0);
  require(is_run(dst, src, bytes), "cp.async.bulk", kMultiplesOf16, pc);
  check_overwritten(dst, bytes, "cp.async.bulk", pc);
  issue_multicast(pieces_of_run(dst, src, bytes), bar, to, "cp.async.bulk", pc);
}

void copy_box(void* dst, const TensorMap& map, const int* at, int dims, uint64_t* bar) {
  const void* pc = __builtin_return_address(0);
  check_overwritten(dst, box_bytes(map.layout), "cp.async.bulk.tensor", pc);
  issue_copy(pieces_of_box(map, at, dims, dst, "cp.async.bulk.tensor", pc), bar, "cp.async.bulk.tensor", pc);
}

void copy_box_multicast(void* dst, const TensorMap& map, const int* at, int dims, uint64_t* bar,
                        uint16_t to) {
  const void* pc = __builtin_return_address(0);
  check_overwritten(dst, box_bytes(map.layout), "cp.async.bulk.tensor", pc);
  issue_multicast(pieces_of_box(map, at, dims, dst, "cp.async.bulk.tensor", pc), bar, to,
                  "cp.async.bulk.tensor", pc);
}

void bulk_store(void* dst, const void* src, int bytes) {
  const void* pc = __builtin_return_address(0);
  require(is_run(dst, src, bytes), "cp.async.bulk", kMultiplesOf16, pc);
  issue_store(pieces_of_run(dst, src, bytes), "cp.async.bulk", pc);
}

void store_box(const TensorMap& map, const int* at, int dims, const void* src) {
  const void* pc = __builtin_return_address(0);
  constexpr const char* kOperation = "cp.async.bulk.tensor";
  std::vector<Piece> pieces = pieces_of_box(map, at, dims, const_cast<void*>(src), kOperation, pc);
  for (Piece& piece : pieces) {
    const unsigned char* from = piece.dst;
    piece.dst = const_cast<unsigned char*>(piece.src);
    piece.src = from;
  }
  issue_store(std::move(pieces), kOperation, pc);
}

void bulk_commit() { current->stores.commit(); }

void bulk_wait_groups(int newest) {
  current->stores.wait(newest, [](BulkStore& store) { complete(store); });
}

void bulk_wait_groups_read(int newest) {
  Groups<BulkStore>& stores = current->stores;
  size_t older = 0;
  for (int i = 0; i < static_cast<int>(stores.sizes.size()) - newest; ++i) older += stores.sizes[i];
  for (size_t i = 0; i < older; ++i) read_source(stores.issued[i]);
}

}  // namespace fastconv
