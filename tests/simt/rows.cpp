// SPDX-License-Identifier: MIT
// The rows of the CUDA tables for Python (ctypes), or of the CPU tables for tests/aarch64.cpp: what csrc/glue
// does between PyTorch and a table. `args` is the argument struct of the row's table (csrc/core/args.h). A
// function that can fail returns a sentence, or null where all is well; the text lives until the next call.
#include <cstddef>
#include <cstring>
#include <new>
#include <sstream>
#include <string>

#include "core/chain.h"
#include "core/error.h"
#include "core/table.h"

#define SIMT_API extern "C" __attribute__((visibility("default")))

namespace fastconv {

#ifdef FASTCONV_SIMT
const Tables cpu::tables = {};  // core/table.cpp asks for it
static const Tables& all_rows = cuda::tables;
#else
const Tables cuda::tables = {};
static const Tables& all_rows = cpu::tables;
#endif

namespace {

template <class Args, class F>
void call_if_named(const Table<Args>& table, const char* name, const void* args, bool& found, const F& f) {
  for (const Row<Args>& row : table)
    if (strcmp(row.name, name) == 0) found = true, f(row, *static_cast<const Args*>(args));
}

// Calls f(row, args) for the row of that name.
template <class F>
void with_row(const char* name, const void* args, const F& f) {
  bool found = false;
  all_rows.each(
      [&](const char*, const char*, const auto& table) { call_if_named(table, name, args, found, f); });
  FASTCONV_CHECK(found, "no row is named ", name);
}

const char* keep(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

const char* type_name(bool) { return "bool"; }
const char* type_name(int) { return "int"; }
const char* type_name(int64_t) { return "int64"; }
const char* type_name(double) { return "double"; }
const char* type_name(const void*) { return "pointer"; }
template <class T, class = std::enable_if_t<std::is_enum_v<T>>>
const char* type_name(T) {
  static_assert(sizeof(T) == 1);
  return "enum";
}

#define STRUCT(S, fields)                        \
  const char* type_name(const S&) { return #S; } \
  void list_fields(std::ostream& lines, const S& each) { lines << #S << ' ' << sizeof(S) fields << '\n'; }
#define FIELD(name)                                     \
  << ' ' << #name << ' ' << type_name(each.name) << ' ' \
  << reinterpret_cast<const char*>(&each.name) - reinterpret_cast<const char*>(&each)

// The structs of core/args.h with all their fields, in order. Python compares sizes and offsets.
STRUCT(Target, FIELD(device) FIELD(level))
STRUCT(Extent3, FIELD(d) FIELD(h) FIELD(w))
STRUCT(View, FIELD(data) FIELD(n) FIELD(c) FIELD(d) FIELD(h) FIELD(w))
STRUCT(Matrix, FIELD(data) FIELD(row) FIELD(col))
STRUCT(Window, FIELD(kernel) FIELD(stride) FIELD(padding) FIELD(dilation) FIELD(out))
STRUCT(Epilogue, FIELD(bias) FIELD(act) FIELD(residual) FIELD(pool) FIELD(offsets))
STRUCT(ConvShape, FIELD(N) FIELD(C) FIELD(D) FIELD(H) FIELD(W) FIELD(K) FIELD(T) FIELD(R) FIELD(S) FIELD(Z)
                      FIELD(P) FIELD(Q) FIELD(groups) FIELD(stride) FIELD(padding) FIELD(dilation))
STRUCT(ConvArgs, FIELD(dtype) FIELD(tf32) FIELD(target) FIELD(layout) FIELD(shape) FIELD(x) FIELD(w) FIELD(y)
                     FIELD(bias_grad) FIELD(epilogue))
STRUCT(ConvActPoolBackwardArgs, FIELD(conv) FIELD(grad_y) FIELD(grad_x) FIELD(grad_w) FIELD(grad_b))
STRUCT(PoolArgs,
       FIELD(dtype) FIELD(target) FIELD(layout) FIELD(N) FIELD(C) FIELD(D) FIELD(H) FIELD(W) FIELD(window)
           FIELD(x) FIELD(y) FIELD(offsets) FIELD(offset) FIELD(gate) FIELD(divide_by) FIELD(divisor))
STRUCT(NormArgs, FIELD(dtype) FIELD(target) FIELD(layout) FIELD(N) FIELD(C) FIELD(D) FIELD(H) FIELD(W)
                     FIELD(eps) FIELD(act) FIELD(window) FIELD(x) FIELD(y) FIELD(offsets) FIELD(offset)
                         FIELD(weight) FIELD(bias) FIELD(mean) FIELD(invstd))
STRUCT(NormBackwardArgs, FIELD(norm) FIELD(grad_y) FIELD(grad_x) FIELD(grad_w) FIELD(grad_b))
STRUCT(LinearArgs, FIELD(dtype) FIELD(tf32) FIELD(target) FIELD(layout) FIELD(M) FIELD(N) FIELD(K) FIELD(x)
                       FIELD(w) FIELD(y) FIELD(bias_grad) FIELD(epilogue))
STRUCT(LinearActBackwardArgs, FIELD(linear) FIELD(grad_y) FIELD(grad_x) FIELD(grad_w) FIELD(grad_b))
STRUCT(ChainStage, FIELD(layer) FIELD(conv) FIELD(padded_h) FIELD(padded_w) FIELD(grad_w) FIELD(grad_b)
                       FIELD(saved_output) FIELD(saved_offsets) FIELD(row))

// An array's: that of its elements, and how many.
template <class T, size_t count>
std::string type_name(const T (&array)[count]) {
  return std::string(type_name(array[0])) + "*" + std::to_string(count);
}

STRUCT(ChainArgs, FIELD(dtype) FIELD(target) FIELD(layout) FIELD(inner) FIELD(count) FIELD(stages) FIELD(x)
                      FIELD(y) FIELD(saved))
STRUCT(ChainBackwardArgs, FIELD(chain) FIELD(forward) FIELD(grad_y) FIELD(grad_x))

template <class... Structs>
std::string all_fields() {
  std::ostringstream lines;
  (list_fields(lines, Structs()), ...);
  return lines.str();
}

template <class Args>
const char* args_name(const Table<Args>&) {
  return type_name(Args());
}

template <class Args>
void make_default(const Table<Args>&, void* args) {
  new (args) Args();
}

}  // namespace
}  // namespace fastconv

using namespace fastconv;

// One line a struct of core/args.h, after those that it holds: name, bytes, and of each field name, type and
// offset.
SIMT_API const char* simt_structs() {
  return keep(all_fields<Target, Extent3, View, Matrix, Window, Epilogue, ConvShape, ConvArgs,
                         ConvActPoolBackwardArgs, PoolArgs, NormArgs, NormBackwardArgs, LinearArgs,
                         LinearActBackwardArgs, ChainStage, ChainArgs, ChainBackwardArgs>());
}

// One line a row: op, pass, name, its argument struct, bits of dtypes, bits of layouts, least level.
SIMT_API const char* simt_rows() {
  std::ostringstream lines;
  all_rows.each([&](const char* op, const char* pass, const auto& table) {
    for (const auto& row : table)
      lines << op << ' ' << pass << ' ' << row.name << ' ' << args_name(table) << ' ' << row.dtypes << ' '
            << row.layouts << ' ' << row.min_level << '\n';
  });
  return keep(lines.str());
}

// Fills `args` with the defaults of the argument struct of a table.
SIMT_API void simt_default_args(const char* op, const char* pass, void* args) {
  all_rows.each([&](const char* its_op, const char* its_pass, const auto& table) {
    if (strcmp(op, its_op) == 0 && strcmp(pass, its_pass) == 0) make_default(table, args);
  });
}

// Fills in the stages of a chain: what a plan says of an input and parameters of these sizes, each its rank,
// then its extents. dtype and target of `args` are there already.
SIMT_API void simt_fill_chain(const int64_t* plan, size_t plan_size, const int64_t* sizes, size_t params,
                              void* args) {
  auto& chain = *static_cast<ChainArgs*>(args);
  std::vector<Sizes<int64_t>> all;
  for (size_t i = 0; i <= params; ++i, sizes += 1 + sizes[0])
    all.emplace_back(sizes + 1, sizes + 1 + sizes[0]);
  const Sizes<int64_t> input = all.front();
  all.erase(all.begin());
  const auto stages = read_plan(plan, plan_size, params);
  chain =
      chain_args(stages, chain_sizes(stages, input, all, dtype_size(chain.dtype)), chain.dtype, chain.target);
}

// Why the row cannot take `args`, or null.
SIMT_API const char* simt_why_not(const char* name, const void* args) {
  const char* reason = nullptr;
  with_row(name, args, [&](const auto& row, const auto& typed) { reason = why_not(row, typed); });
  return reason;
}

SIMT_API int64_t simt_workspace_bytes(const char* name, const void* args) {
  int64_t bytes = 0;
  with_row(name, args, [&](const auto& row, const auto& typed) { bytes = row.workspace_bytes(typed); });
  return bytes;
}

// Launches the row. Returns the report of what was wrong, or null.
SIMT_API const char* simt_run(const char* name, const void* args, void* workspace) {
  try {
    with_row(name, args, [&](const auto& row, const auto& typed) { row.launch(typed, workspace, nullptr); });
    return nullptr;
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}
