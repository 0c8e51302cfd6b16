// SPDX-License-Identifier: MIT
// Asynchronous copies into shared memory, done as late as the waits allow, so that a missing wait is seen.
//
// cp.async: the destination is NaN and "pending" until the issuing thread waits for its group; then the bytes
// arrive as if that thread had written them: other threads need a barrier. Bulk copy: the bytes arrive, and
// are counted by the mbarrier, when no thread can run.
#include <cstring>
#include <deque>

#include "check.h"
#include "memory.h"
#include "ptx.h"
#include "report.h"
#include "runtime.h"

namespace fastconv::simt {

namespace {

struct BulkCopy {
  unsigned char* dst;
  const unsigned char* src;
  int bytes;
  uint64_t* bar;
  const void* pc;
};
std::deque<BulkCopy> bulk_copies;

bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Checks both sides and marks the destination.
void begin_copy(void* dst, const void* src, int bytes, int src_bytes, const char* name, const void* pc) {
  if (!is_shared(dst))
    found("copy" + place(pc), std::string(name) + " at " + place(pc) + " writes outside of shared memory",
          After::stop);
  check_access(*current, dst, bytes, Kind::write, pc);
  if (src_bytes) check_access(*current, src, src_bytes, Kind::read, pc);
  set_pending(dst, bytes, true);
  memset(dst, 0xff, bytes);
}

void issue_cp_async(void* dst, const void* src, int bytes, int src_bytes, const void* pc) {
  if (!is_aligned(dst, bytes) || (src_bytes > 0 && !is_aligned(src, bytes)))
    found("copy" + place(pc), "misaligned cp.async at " + place(pc), After::stop);
  if (src_bytes < 0 || src_bytes > bytes)
    found("copy" + place(pc),
          format("cp.async of %d bytes out of %d at %s", src_bytes, bytes, place(pc).c_str()), After::stop);
  begin_copy(dst, src, bytes, src_bytes, "cp.async", pc);
  current->copies.push_back(
      {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes, src_bytes, pc});
  ++current->uncommitted;
}

void land(Thread& t, const CpAsync& copy) {
  const bool counted = options.statistics;  // at issue
  options.statistics = false;
  set_pending(copy.dst, copy.bytes, false);
  check_access(t, copy.dst, copy.bytes, Kind::write, copy.pc);
  options.statistics = counted;
  if (copy.src_bytes) memcpy(copy.dst, copy.src, copy.src_bytes);
  memset(copy.dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
}

}  // namespace

void start_copies() { bulk_copies.clear(); }

void finish_copies() {
  if (!bulk_copies.empty())
    found("bulk end",
          "the block ends while the bulk copy issued at " + place(bulk_copies[0].pc) + " is outstanding");
}

void finish_thread_copies(const Thread& t) {
  if (!t.copies.empty())
    found("copy end" + place(t.copies[0].pc),
          name_of(t) + " ends while its cp.async issued at " + place(t.copies[0].pc) + " is outstanding");
}

bool complete_one_copy() {
  if (bulk_copies.empty()) return false;
  const BulkCopy copy = bulk_copies.front();
  bulk_copies.pop_front();
  set_pending(copy.dst, copy.bytes, false);
  memcpy(copy.dst, copy.src, copy.bytes);
  land_bytes(copy.bar, copy.bytes);
  return true;
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

void cp_async16(void* dst, const void* src, int src_bytes) {
  issue_cp_async(dst, src, 16, src_bytes, __builtin_return_address(0));
}
void cp_async4(void* dst, const void* src, int src_bytes) {
  issue_cp_async(dst, src, 4, src_bytes, __builtin_return_address(0));
}

void cp_async_commit() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void cp_async_wait_groups(int newest) {
  Thread& t = *current;
  int landed = 0;
  while (static_cast<int>(t.groups.size()) > newest) {
    for (int i = 0; i < t.groups[0]; ++i) land(t, t.copies[landed++]);
    t.groups.erase(t.groups.begin());
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + landed);
}

void bulk_copy(void* dst, const void* src, int bytes, uint64_t* bar) {
  const void* pc = __builtin_return_address(0);
  if (!is_aligned(dst, 16) || !is_aligned(src, 16) || bytes % 16)
    found("bulk" + place(pc),
          "a bulk copy needs addresses and a size that are multiples of 16, at " + place(pc), After::stop);
  require_mbarrier(bar, "cp.async.bulk", pc);
  begin_copy(dst, src, bytes, bytes, "cp.async.bulk", pc);
  set_written_by_engine(dst, bytes);
  bulk_copies.push_back(
      {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes, bar, pc});
}

void fence_proxy_async() { ++current->proxy_fences; }

}  // namespace fastconv
