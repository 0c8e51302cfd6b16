// SPDX-License-Identifier: MIT
#include "core/table.h"

#include <cstring>

#include "core/error.h"

namespace fastconv {

namespace {

// What a struct says of itself; a fused struct answers for the layer inside it.
const ConvArgs& common(const ConvActPoolBackwardArgs& a) { return a.conv; }
const NormArgs& common(const NormBackwardArgs& a) { return a.norm; }
const LinearArgs& common(const LinearActBackwardArgs& a) { return a.linear; }
const ChainArgs& common(const ChainBackwardArgs& a) { return a.chain; }
template <class Args>
const Args& common(const Args& a) {
  return a;
}

const char* below_level(Device device, int min_level) {
  if (device == Device::cuda) return "needs a newer GPU than this one";
  return min_level == static_cast<int>(Isa::avx512) ? "needs a processor with AVX-512F, BW, DQ and VL"
                                                    : "needs a processor with AVX2, FMA and F16C";
}

// Whether `name` stands in the comma-separated list.
bool listed(const char* list, const char* name) {
  const size_t length = strlen(name);
  for (const char* at = list; (at = strstr(at, name)); at += length) {
    const bool starts = at == list || at[-1] == ',';
    if (starts && (at[length] == ',' || at[length] == '\0')) return true;
  }
  return false;
}

}  // namespace

template <class Args>
const char* why_not(const Row<Args>& row, const Args& args) {
  const auto& a = common(args);
  if (!(row.dtypes & dtype_bit(a.dtype))) return "does not take this dtype";
  if (!(row.layouts & layout_bit(a.layout))) return "does not take this memory layout";
  if (a.target.level < row.min_level) return below_level(a.target.device, row.min_level);
  return row.reject(args);
}

template <class Args>
const Row<Args>& choose(const Table<Args>& table, const Args& args, const char* forced) {
  const Row<Args>* best = nullptr;
  double best_cost = 0;
  for (const Row<Args>& row : table) {
    const bool is_forced = *forced && listed(forced, row.name);
    if (const char* reason = why_not(row, args)) {
      if (is_forced) fail("kernel ", row.name, " cannot take this call: it ", reason);
      continue;
    }
    if (is_forced) return row;
    const double cost = row.cost_us(args);
    if (!best || cost < best_cost) best = &row, best_cost = cost;
  }
  FASTCONV_CHECK(best, "no kernel takes this call");
  return *best;
}

#define FASTCONV_INSTANTIATE(Args)                                   \
  template const char* why_not<Args>(const Row<Args>&, const Args&); \
  template const Row<Args>& choose<Args>(const Table<Args>&, const Args&, const char*);
FASTCONV_INSTANTIATE(ConvArgs)
FASTCONV_INSTANTIATE(ConvActPoolBackwardArgs)
FASTCONV_INSTANTIATE(PoolArgs)
FASTCONV_INSTANTIATE(NormArgs)
FASTCONV_INSTANTIATE(NormBackwardArgs)
FASTCONV_INSTANTIATE(LinearArgs)
FASTCONV_INSTANTIATE(LinearActBackwardArgs)
FASTCONV_INSTANTIATE(ChainArgs)
FASTCONV_INSTANTIATE(ChainBackwardArgs)
#undef FASTCONV_INSTANTIATE

bool is_row_name(const std::string& name) {
  bool found = false;
  for (const Device device : {Device::cpu, Device::cuda})
    tables(device).each([&](const char*, const char*, const auto& table) {
      for (const auto& row : table) found = found || name == row.name;
    });
  return found;
}

}  // namespace fastconv
