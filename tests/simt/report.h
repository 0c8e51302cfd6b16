// SPDX-License-Identifier: MIT
// What went wrong, as text: each finding once, with the kernel, block and thread it was found in.
#pragma once

#include <string>

#include "runtime.h"

namespace fastconv::simt {

// printf into a string.
__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...);

enum class After { go_on, stop };  // stop: the launch cannot go on

// Records a finding. `once` names it: of findings with one name, the first is kept. With After::stop, or
// after too many findings, the launch is aborted, and a call from a thread does not return.
[[gnu::cold]] void found(const std::string& once, const std::string& sentence, After after = After::go_on);

int findings();  // since the last clear_report, repeated ones too
const std::string& report();
void clear_report();

std::string place(Site site);       // "file.cu:12"
std::string place(const void* pc);  // "file.cu:12", and whence it was called where that was inlined
std::string name_of_kernel();
std::string name_of(const Thread& thread);  // "thread (3,0,0)"

}  // namespace fastconv::simt
