// SPDX-License-Identifier: MIT
#include "report.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <unistd.h>

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

struct Frame {
  std::string function, place;
};

// Starts addr2line for a library. It stays, because it reads all of the library's lines at its start.
bool start_addr2line(const char* library, FILE*& questions, FILE*& answers) {
  int to[2], from[2];
  if (pipe2(to, O_CLOEXEC) || pipe2(from, O_CLOEXEC)) return false;
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  posix_spawn_file_actions_adddup2(&files, to[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&files, from[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  const char* command[] = {"addr2line", "-a", "-f", "-C", "-i", "-e", library, nullptr};
  pid_t process;
  const int error = posix_spawnp(&process, command[0], &files, nullptr, const_cast<char**>(command), environ);
  posix_spawn_file_actions_destroy(&files);
  close(to[0]), close(from[1]);
  questions = fdopen(to[1], "w"), answers = fdopen(from[0], "r");
  return error == 0;
}

// The frames of a pc of this library, that of the innermost inlined function first; none without addr2line.
std::vector<Frame> frames(const void* pc) {
  static FILE *questions, *answers;
  std::vector<Frame> found;
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return found;
  static const bool has_started = start_addr2line(info.dli_fname, questions, answers);
  if (!has_started) return found;

  // Each answer begins with its address; that to a second question says where the first one's ends.
  const char* const end = "0xffffffffffffffff";
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase);
  fprintf(questions, "0x%zx\n%s\n", offset, end);
  fflush(questions);
  const auto next = [] {
    char line[4096] = "";
    if (fgets(line, sizeof line, answers)) line[strcspn(line, "\n")] = '\0';
    return std::string(line);
  };
  next();  // the address
  for (std::string function = next(); !function.empty() && function != end; function = next())
    found.push_back({function, next()});
  next(), next();
  return found;
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
  for (auto& [function, frame] : frames(static_cast<const char*>(pc) - 1)) {
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
    const std::vector<Frame> found = frames(current_launch.kernel);
    name = found.empty() ? "a kernel" : found[0].function;
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
