// SPDX-License-Identifier: MIT
// cp.async: the destination is NaN and "pending" until the issuing thread waits for its group; then the bytes
// arrive as if that thread had written them: other threads need a barrier.
#include <cstring>

#include "check.h"
#include "cuda/ptx.cuh"
#include "memory.h"
#include "report.h"

namespace fastconv::simt {

namespace {

bool is_aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

void issue(void* dst, const void* src, int bytes, int src_bytes, const void* pc) {
  if (!is_aligned(dst, bytes) || (src_bytes > 0 && !is_aligned(src, bytes)))
    found("copy" + place(pc), "misaligned cp.async at " + place(pc), After::stop);
  if (src_bytes < 0 || src_bytes > bytes)
    found("copy" + place(pc),
          format("cp.async of %d bytes out of %d at %s", src_bytes, bytes, place(pc).c_str()), After::stop);
  if (!is_shared(dst))
    found("copy" + place(pc), "cp.async at " + place(pc) + " writes outside of the block's shared memory",
          After::stop);
  check_access(*current, dst, bytes, Kind::write, pc);
  if (src_bytes) check_access(*current, src, src_bytes, Kind::read, pc);
  set_pending(dst, bytes, true);
  memset(dst, 0xff, bytes);
  current->copies.issue(
      {static_cast<unsigned char*>(dst), static_cast<const unsigned char*>(src), bytes, src_bytes, pc});
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

void finish_cp_async(const Thread& t) {
  if (t.copies.issued.empty()) return;
  const std::string where = place(t.copies.issued[0].pc);
  found("copy end" + where, name_of(t) + " ends while its cp.async issued at " + where + " is outstanding");
}

}  // namespace fastconv::simt

// --- the twins

namespace fastconv {

using namespace simt;

void cp_async16(void* dst, const void* src, int src_bytes) {
  issue(dst, src, 16, src_bytes, __builtin_return_address(0));
}
void cp_async4(void* dst, const void* src, int src_bytes) {
  issue(dst, src, 4, src_bytes, __builtin_return_address(0));
}
void cp_async_commit() { current->copies.commit(); }
void cp_async_wait_groups(int newest) {
  current->copies.wait(newest, [](const CpAsync& copy) { land(*current, copy); });
}

}  // namespace fastconv
