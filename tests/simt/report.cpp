// SPDX-License-Identifier: MIT
#include "report.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>

namespace fastconv::simt {

namespace {

constexpr int kMaxFindings = 200;     // of one launch; a kernel that is that wrong is stopped
constexpr size_t kMaxSentences = 20;  // in one report

std::string text;
std::set<std::string> seen;
int count;

std::string base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// Files whose inlined functions stand between the kernel and the runtime.
bool is_wrapper(const std::string& file) {
  for (const char* name : {"simt.h", "words.h", "ptx.h", "platform.cuh", "ptx.cuh"})
    if (file == name) return true;
  return false;
}

// Lines of `addr2line` for a pc of a loaded library.
std::vector<std::string> ask_addr2line(const char* options, const void* pc) {
  std::vector<std::string> lines;
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return lines;
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase);
  FILE* pipe =
      popen(format("addr2line %s -e '%s' 0x%zx 2>/dev/null", options, info.dli_fname, offset).c_str(), "r");
  if (!pipe) return lines;
  char line[4096];
  while (fgets(line, sizeof line, pipe)) {
    line[strcspn(line, "\n")] = '\0';
    lines.push_back(line);
  }
  pclose(pipe);
  return lines;
}

}  // namespace

std::string format(const char* pattern, ...) {
  char buffer[2048];
  va_list args;
  va_start(args, pattern);
  vsnprintf(buffer, sizeof buffer, pattern, args);
  va_end(args);
  return buffer;
}

std::string place(Site site) { return base_name(site.file) + ":" + std::to_string(site.line); }

std::string place(const void* pc) {
  static std::map<const void*, std::string> known;
  std::string& result = known[pc];
  if (!result.empty()) return result;
  // A return address belongs to the line after the call, its predecessor to the call.
  for (std::string& frame : ask_addr2line("-i", static_cast<const char*>(pc) - 1)) {
    frame.resize(strcspn(frame.c_str(), " "));  // "(discriminator 2)"
    frame = base_name(frame.c_str());
    if (frame[0] == '?' || is_wrapper(frame.substr(0, frame.find(':')))) continue;
    result += (result.empty() ? "" : " < ") + frame;
    if (result.size() > 100) break;
  }
  if (result.empty()) result = format("code at %p", pc);
  return result;
}

std::string name_of_kernel() {
  static std::map<const void*, std::string> known;
  std::string& name = known[current_launch.kernel];
  if (!name.empty()) return name;
  Dl_info info;
  if (dladdr(current_launch.kernel, &info) && info.dli_sname) {
    char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    name = readable ? readable : info.dli_sname;
    free(readable);
  } else {
    const std::vector<std::string> lines = ask_addr2line("-f -C", current_launch.kernel);
    name = lines.empty() ? "a kernel" : lines[0];
  }
  // Without parameters and enclosing namespaces.
  int depth = 0;
  size_t begin = name.compare(0, 5, "void ") == 0 ? 5 : 0, end = name.size();
  for (size_t i = begin; i < name.size(); ++i) {
    if (name.compare(i, 21, "(anonymous namespace)") == 0) {
      i += 20;
      continue;
    }
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth == 0 && name.compare(i, 2, "::") == 0) begin = i + 2;
    if (depth == 0 && name[i] == '(') {
      end = i;
      break;
    }
  }
  return name = name.substr(begin, end - begin);
}

std::string name_of(const Thread& t) { return format("thread (%u,%u,%u)", t.index.x, t.index.y, t.index.z); }

void found(const std::string& once, const std::string& sentence, After after) {
  ++count;
  if (seen.insert(once).second && seen.size() <= kMaxSentences) {
    text += sentence + "\n";
    if (current_launch.kernel)
      text += "    kernel " + name_of_kernel() +
              format(", block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z) +
              (current ? ", " + name_of(*current) : "") + "\n";
  }
  if (after == After::stop || count > kMaxFindings) {
    aborting = true;
    if (current) abandon_thread();
  }
}

int findings() { return count; }
const std::string& report() { return text; }

void clear_report() {
  text.clear();
  seen.clear();
  count = 0;
}

}  // namespace fastconv::simt
