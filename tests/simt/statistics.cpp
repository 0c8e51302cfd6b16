// SPDX-License-Identifier: MIT
#include "statistics.h"

#include <algorithm>
#include <map>

#include "memory.h"
#include "report.h"

namespace fastconv::simt {

namespace {

struct Logged {
  const void* pc;
  uintptr_t address;
  uint32_t bytes;
  int lane;
  bool is_write;
};

struct Count {
  uint64_t requests = 0, done = 0, least = 0;  // passes or sectors
  int worst = 0;                               // accesses to one bank in one pass
  bool is_shared = false, is_write = false;
};

std::vector<Logged> logs[kMaxWarps];
std::map<const void*, Count> counts;
std::map<std::string, size_t> dynamic_bytes;  // of kernels

// 32 lanes of 4 bytes are one pass; with 8 bytes half a warp goes at a time, with 16 a quarter.
void count_banks(const std::vector<Logged>& request, Count& count) {
  const int phases = request[0].bytes >= 16 ? 4 : request[0].bytes == 8 ? 2 : 1;
  for (int phase = 0; phase < phases; ++phase) {
    std::vector<uintptr_t> words;
    for (const Logged& access : request) {
      if (access.lane / (kWarp / phases) != phase) continue;
      for (uintptr_t word = access.address / 4; word <= (access.address + access.bytes - 1) / 4; ++word)
        words.push_back(word);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int uses[32] = {}, most = 0;
    for (const uintptr_t word : words) most = std::max(most, ++uses[word % 32]);
    count.done += most;
    count.least += most != 0;
    count.worst = std::max(count.worst, most);
  }
}

void count_sectors(std::vector<Logged>& request, Count& count) {
  std::sort(request.begin(), request.end(),
            [](const Logged& a, const Logged& b) { return a.address < b.address; });
  uintptr_t seen = 0, bytes = 0;  // up to here, and how many of them
  for (const Logged& access : request) {
    const uintptr_t begin = std::max(seen, access.address), end = access.address + access.bytes;
    if (begin >= end) continue;
    const bool goes_on = seen && begin / 32 == (seen - 1) / 32;  // in a sector that is counted
    count.done += (end - 1) / 32 - begin / 32 + !goes_on;
    bytes += end - begin, seen = end;
  }
  count.least += (bytes + 31) / 32;
}

}  // namespace

void count_access(const Thread& t, const void* p, size_t bytes, Kind kind, const void* pc) {
  logs[t.warp].push_back(
      {pc, reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes), t.lane, kind != Kind::read});
}

void close_requests(int warp) {
  std::map<std::pair<const void*, int>, std::vector<Logged>> requests;
  std::map<std::pair<const void*, int>, int> executions;  // of (pc, lane)
  for (const Logged& access : logs[warp])
    requests[{access.pc, executions[{access.pc, access.lane}]++}].push_back(access);
  logs[warp].clear();
  for (auto& [key, request] : requests) {
    Count& count = counts[key.first];
    count.requests++;
    count.is_write = request[0].is_write;
    count.is_shared = is_cluster_shared(reinterpret_cast<const void*>(request[0].address));
    count.is_shared ? count_banks(request, count) : count_sectors(request, count);
  }
}

void count_launch() {
  size_t& most = dynamic_bytes[name_of_kernel()];
  most = std::max(most, current_launch.shared_bytes);
}

void clear_statistics() {
  counts.clear();
  dynamic_bytes.clear();
}

std::string statistics_report() {
  std::map<std::string, Count> lines;
  for (const auto& [pc, count] : counts) {
    Count& line =
        lines[place(pc) + (count.is_shared ? " shared " : " global ") + (count.is_write ? "write" : "read")];
    line.requests += count.requests, line.done += count.done, line.least += count.least;
    line.worst = std::max(line.worst, count.worst), line.is_shared = count.is_shared;
  }
  std::string text;
  for (const auto& [kernel, bytes] : dynamic_bytes)
    text += kernel + ": " + std::to_string(bytes) + " bytes of dynamic shared memory\n";
  for (const auto& [name, line] : lines)
    text += format("%s: %llu requests, %llu %s, at least %llu, worst conflict %d\n", name.c_str(),
                   static_cast<unsigned long long>(line.requests), static_cast<unsigned long long>(line.done),
                   line.is_shared ? "passes" : "sectors", static_cast<unsigned long long>(line.least),
                   line.worst);
  return text;
}

}  // namespace fastconv::simt
