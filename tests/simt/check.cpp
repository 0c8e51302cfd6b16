// SPDX-License-Identifier: MIT
#include "check.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "report.h"
#include "statistics.h"

namespace fastconv::simt {

namespace {

inline bool is_ordered(const Touch& earlier, const Thread& now) {
  if (earlier.block == block_serial) {
    if (earlier.slot == now.slot || earlier.epoch < epoch) return true;
  } else if (earlier.block < blocks[0].serial) {  // of another cluster
    return false;
  }
  return earlier.slot < now.knows.size() && now.knows[earlier.slot] >= earlier.clock;
}

std::string who_did(const Touch& touch) {
  if (touch.block < blocks[0].serial) return "a thread of another block";
  if (touch.epoch == kEngineEpoch) return "the copy engine";
  const Thread& thread = thread_of_slot(touch.slot);
  return name_of(thread) + (thread.rank == block->rank ? "" : " of another block of the cluster");
}

const char* doing(Kind kind) {
  return kind == Kind::read ? "reads" : kind == Kind::write ? "writes" : "atomically updates";
}

void find_race(const Touch& earlier, const char* did, const Thread& t, uintptr_t address, Kind kind,
               const void* pc) {
  found("race" + place(pc) + place(earlier.pc), "race: " + name_of(t) + " " + doing(kind) + " " +
                                                    describe(address) + " at " + place(pc) + ", which " +
                                                    who_did(earlier) + " " + did + " at " +
                                                    place(earlier.pc) + ", and nothing orders the two");
}

// Where a reader may be forgotten: it is ordered before `now`, so whoever races with it races with `now` or
// is ordered too.
Touch& reader_slot(Cell& cell, const Thread& now) {
  for (Touch& reader : cell.readers)
    if (!reader.epoch || is_ordered(reader, now)) return reader;
  return cell.readers[1];
}

void touch(Cell& cell, const Thread& t, uintptr_t address, uint8_t bytes, Kind kind, bool must_be_defined,
           const void* pc) {
  if (cell.pending & bytes)
    found("pending" + place(pc), name_of(t) + " " + doing(kind) + " " + describe(address) + " at " +
                                     place(pc) +
                                     ", the destination of an asynchronous copy that was not waited for");
  if (cell.held && kind != Kind::read)
    found("held" + place(pc), name_of(t) + " " + doing(kind) + " " + describe(address) + " at " + place(pc) +
                                  ", which an asynchronous operation that was not waited for still reads");
  if (kind != Kind::write && must_be_defined && (cell.defined & bytes) != bytes)
    found("undefined" + place(pc), name_of(t) + " " + doing(kind) + " uninitialised memory, " +
                                       describe(address) + ", at " + place(pc));

  const auto races = [&](const Touch& earlier) {
    return earlier.epoch && (earlier.bytes & bytes) && !is_ordered(earlier, t);
  };
  if (races(cell.writer)) find_race(cell.writer, "wrote", t, address, kind, pc);
  if (kind != Kind::atomic && races(cell.atomic))
    find_race(cell.atomic, "updated atomically", t, address, kind, pc);
  if (kind != Kind::read)
    for (const Touch& reader : cell.readers)
      if (races(reader)) find_race(reader, "read", t, address, kind, pc);

  const auto remember = [&](Touch& slot) {
    const bool again =
        slot.epoch == epoch && slot.slot == t.slot && slot.block == block_serial && slot.clock == t.clock;
    slot = {pc,      block_serial, epoch,
            t.clock, t.slot,       static_cast<uint8_t>(again ? slot.bytes | bytes : bytes)};
  };
  if (kind == Kind::read) return remember(reader_slot(cell, t));
  cell.defined |= bytes;
  if (kind == Kind::atomic) return remember(cell.atomic);
  remember(cell.writer);
  cell.proxy_fences = t.proxy_fences;
  // Whoever races with an access that is forgotten here races with this write too.
  if (bytes == 3) cell.readers[0].epoch = cell.readers[1].epoch = cell.atomic.epoch = 0;
}

// Calls f(cell, bits of its bytes, address) for the cells of a run of bytes.
template <class F>
void for_cells(Cell* cells, size_t offset, size_t bytes, uintptr_t address, F&& f) {
  const size_t end = offset + bytes;
  for (size_t at = offset; at < end;) {
    const size_t next = std::min(end, (at | 1) + 1);
    const unsigned bits = ((1u << (next - at)) - 1) << (at & 1);
    if (!f(cells[at >> 1], static_cast<uint8_t>(bits), address + (at - offset))) return;
    at = next;
  }
}

Cell* shared_cells() {
  static Cell* const cells = [] {
    void* memory = mmap(nullptr, kMaxCluster * kArenaBytes / 2 * sizeof(Cell), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    FASTCONV_CHECK(memory != MAP_FAILED, "no memory for the checker");
    return static_cast<Cell*>(memory);
  }();
  return cells;
}

template <class F>
void for_shared_cells(const void* p, size_t bytes, F&& f) {
  if (is_cluster_shared(p))
    for_cells(shared_cells(), arena_offset(p), bytes, reinterpret_cast<uintptr_t>(p), f);
}

// Of shared memory, or of a buffer that is not an input.
template <class F>
void for_any_cells(const void* p, size_t bytes, F&& f) {
  for_shared_cells(p, bytes, f);
  if (is_cluster_shared(p)) return;
  Buffer* buffer = find_buffer(reinterpret_cast<uintptr_t>(p));
  if (buffer && buffer->cells)
    for_cells(buffer->cells.get(), reinterpret_cast<uintptr_t>(p) - buffer->begin, bytes,
              reinterpret_cast<uintptr_t>(p), f);
}

void out_of_bounds(const Thread& t, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  found("bounds" + place(pc),
        std::string("out of bounds: ") + name_of(t) + " " + doing(kind) + " " + std::to_string(bytes) +
            " bytes at " + describe(address) + ", at " + place(pc),
        After::stop);
}

// `serial`: of the block whose memory it is.
void check_shared(Thread& t, const void* p, size_t bytes, Kind kind, uint32_t serial, const void* pc) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  for_cells(shared_cells(), arena_offset(p), bytes, address, [&](Cell& cell, uint8_t bits, uintptr_t at) {
    if ((cell.inside & bits) != bits) {
      out_of_bounds(t, address, bytes, kind, pc);
      return false;
    }
    if (cell.block != serial) {
      cell.writer.epoch = cell.readers[0].epoch = cell.readers[1].epoch = cell.atomic.epoch = 0;
      cell.defined = cell.pending = cell.held = 0;
      cell.block = serial;
    }
    touch(cell, t, at, bits, kind, true, pc);
    return true;
  });
}

void check_buffer(Buffer& buffer, Thread& t, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  if (!buffer.holds(address - buffer.begin, bytes)) return out_of_bounds(t, address, bytes, kind, pc);
  if (buffer.access == Access::input) {
    if (kind != Kind::read)
      found("input" + place(pc),
            name_of(t) + " " + doing(kind) + " an input, " + describe(address) + ", at " + place(pc),
            After::stop);
    return;
  }
  for_cells(buffer.cells.get(), address - buffer.begin, bytes, address,
            [&](Cell& cell, uint8_t bits, uintptr_t at) {
              touch(cell, t, at, bits, kind, buffer.access != Access::accumulator, pc);
              return true;
            });
}

// The memory of this library: constants, and the index variables.
bool is_constant(uintptr_t address) {
  static const auto own = [] {
    std::vector<std::pair<uintptr_t, uintptr_t>> segments;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          std::vector<std::pair<uintptr_t, uintptr_t>> found;
          bool is_own = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const ElfW(Phdr) & segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr, end = begin + segment.p_memsz;
            found.emplace_back(begin, end);
            is_own = is_own || (begin <= reinterpret_cast<uintptr_t>(&is_constant) &&
                                reinterpret_cast<uintptr_t>(&is_constant) < end);
          }
          if (is_own) *static_cast<decltype(found)*>(result) = found;
          return 0;
        },
        &segments);
    return segments;
  }();
  return std::any_of(own.begin(), own.end(),
                     [&](const auto& s) { return s.first <= address && address < s.second; });
}

bool is_on_stack(const Thread& t, const void* p) {
  return reinterpret_cast<uintptr_t>(p) - t.stack_begin < kStackBytes;
}

bool is_parameter(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(current_launch.params) < current_launch.params_bytes;
}

void check_stack(const Thread& t, uintptr_t address, size_t bytes, Kind kind, const void* pc) {
  for (const Range& range : t.accumulators)
    if (address < range.end && range.begin < address + bytes)
      found("accumulators" + place(pc), name_of(t) + " " + doing(kind) + " accumulators at " + place(pc) +
                                            " of the wgmma issued at " + place(range.pc) +
                                            ", which was not waited for");
}

}  // namespace

void check_access(Thread& t, const void* p, size_t bytes, Kind kind, const void* pc) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (is_on_stack(t, p)) return check_stack(t, address, bytes, kind, pc);
  if (!watching) return;
  if (is_cluster_shared(p)) {
    if (options.statistics) count_access(t, p, bytes, kind, pc);
    if (is_shared(p)) return check_shared(t, p, bytes, kind, block_serial, pc);
    visit(t, host_of(p), pc);
    return check_shared(t, p, bytes, kind, host_of(p).serial, pc);
  }
  if (Buffer* buffer = find_buffer(address)) {
    if (options.statistics) count_access(t, p, bytes, kind, pc);
    return check_buffer(*buffer, t, address, bytes, kind, pc);
  }
  if (kind == Kind::read && (is_parameter(address) || is_constant(address))) return;
  out_of_bounds(t, address, bytes, kind, pc);
}

void set_inside(const void* p, size_t bytes, bool inside) {
  for_shared_cells(p, bytes, [&](Cell& cell, uint8_t bits, uintptr_t) {
    cell.inside = inside ? cell.inside | bits : cell.inside & ~bits;
    return true;
  });
}

void set_pending(const void* p, size_t bytes, bool pending) {
  for_any_cells(p, bytes, [&](Cell& cell, uint8_t bits, uintptr_t) {
    cell.pending = pending ? cell.pending | bits : cell.pending & ~bits;
    return true;
  });
}

void hold(const void* p, size_t bytes, bool held) {
  for_shared_cells(p, bytes, [&](Cell& cell, uint8_t, uintptr_t) {
    cell.held = static_cast<uint8_t>(held ? cell.held + 1 : cell.held - (cell.held > 0));
    return true;
  });
}

void set_written_by_engine(const void* p, size_t bytes, Phase phase, const void* pc) {
  for_shared_cells(p, bytes, [&](Cell& cell, uint8_t bits, uintptr_t) {
    cell.writer = {pc, cell.block, kEngineEpoch, phase.number, static_cast<uint16_t>(phase.slot), bits};
    return true;
  });
}

void check_proxy(const void* p, size_t bytes, const char* user, const void* pc) {
  for_shared_cells(p, bytes, [&](Cell& cell, uint8_t, uintptr_t at) {
    const Touch& writer = cell.writer;
    if (!writer.epoch || writer.epoch == kEngineEpoch || writer.block < blocks[0].serial) return true;
    if (thread_of_slot(writer.slot).proxy_fences > cell.proxy_fences) return true;
    found("proxy" + place(pc), std::string(user) + " at " + place(pc) + " uses " + describe(at) + ", which " +
                                   who_did(writer) + " wrote at " + place(writer.pc) +
                                   " without a fence_proxy_async after it");
    return false;
  });
}

void forget_accesses() {
  for (Buffer& buffer : buffers())
    if (buffer.cells)
      for (size_t i = 0; i <= (buffer.end - buffer.begin) / 2; ++i) {
        Cell& cell = buffer.cells[i];
        cell.writer.epoch = cell.readers[0].epoch = cell.readers[1].epoch = cell.atomic.epoch = 0;
        cell.pending = 0;
      }
}

namespace {

void check_vector(const void* p, size_t bytes, Kind kind, const void* pc) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    found("alignment" + place(pc),
          name_of(*current) + " " + doing(kind) + " a misaligned vector of " + std::to_string(bytes) +
              " bytes, " + describe(reinterpret_cast<uintptr_t>(p)) + ", at " + place(pc),
          After::stop);
  check_access(*current, p, bytes, kind, pc);
}

}  // namespace

void load_vector(void* to, const void* p, size_t bytes) {
  check_vector(p, bytes, Kind::read, __builtin_return_address(0));
  memcpy(to, p, bytes);
}

void store_vector(void* p, const void* from, size_t bytes) {
  check_vector(p, bytes, Kind::write, __builtin_return_address(0));
  memcpy(p, from, bytes);
}

void atomic_access(void* p, size_t bytes) {
  check_access(*current, p, bytes, Kind::atomic, __builtin_return_address(0));
}

}  // namespace fastconv::simt

// --- what g++'s instrumentation calls

using fastconv::simt::Kind;

namespace {

// Most calls are about the thread's own variables: they end here.
inline void checked(const void* p, size_t bytes, Kind kind, const void* pc) {
  using namespace fastconv::simt;
  if (!current || (is_on_stack(*current, p) && current->accumulators.empty())) return;
  check_access(*current, p, bytes, kind, pc);
}

}  // namespace

#define SIMT_HOOK(name, bytes, kind) \
  extern "C" void name(void* p) { checked(p, bytes, kind, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                                      \
  SIMT_HOOK(__tsan_read##bytes, bytes, Kind::read)             \
  SIMT_HOOK(__tsan_write##bytes, bytes, Kind::write)           \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, Kind::read)   \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, Kind::write) \
  SIMT_HOOK(__tsan_volatile_read##bytes, bytes, Kind::read)    \
  SIMT_HOOK(__tsan_volatile_write##bytes, bytes, Kind::write)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

#define SIMT_RANGE_HOOK(name, kind) \
  extern "C" void name(void* p, unsigned long bytes) { checked(p, bytes, kind, __builtin_return_address(0)); }
SIMT_RANGE_HOOK(__tsan_read_range, Kind::read)
SIMT_RANGE_HOOK(__tsan_write_range, Kind::write)

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}

namespace {

struct SourceLocation {  // how the instrumentation's static data begin
  const char* file;
  unsigned line, column;
};

void undefined_behaviour(const char* what, const SourceLocation& at) {
  using namespace fastconv::simt;
  const std::string where = place(Site{at.file, static_cast<int>(at.line)});
  if (current)
    return found("undefined behaviour" + where, std::string("undefined behaviour: ") + what + " at " + where);
  fastconv::fail("undefined behaviour on the host: ", what, " at ", where);
}

}  // namespace

#define SIMT_UNDEFINED(name, what) \
  extern "C" void __ubsan_handle_##name(SourceLocation* at) { undefined_behaviour(what, *at); }
SIMT_UNDEFINED(add_overflow, "overflow of an addition")
SIMT_UNDEFINED(sub_overflow, "overflow of a subtraction")
SIMT_UNDEFINED(mul_overflow, "overflow of a multiplication")
SIMT_UNDEFINED(negate_overflow, "overflow of a negation")
SIMT_UNDEFINED(divrem_overflow, "division by zero, or its overflow")
SIMT_UNDEFINED(shift_out_of_bounds, "shift by too many bits")
SIMT_UNDEFINED(out_of_bounds, "index outside of an array")
SIMT_UNDEFINED(type_mismatch_v1, "access through a null or misaligned pointer")
SIMT_UNDEFINED(pointer_overflow, "overflow of a pointer")
SIMT_UNDEFINED(builtin_unreachable, "unreachable code")
SIMT_UNDEFINED(missing_return, "end of a function that returns a value")
SIMT_UNDEFINED(vla_bound_not_positive, "array of no positive length")
SIMT_UNDEFINED(load_invalid_value, "load of a value that its type does not have")
SIMT_UNDEFINED(invalid_builtin, "builtin called with an argument it does not take")
SIMT_UNDEFINED(nonnull_arg, "null where an argument must not be")
SIMT_UNDEFINED(float_cast_overflow, "conversion of a float out of range")
