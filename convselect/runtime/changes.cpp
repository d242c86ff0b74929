// Counts the changes of dictionaries, for `changes.py`. Neither Python.h nor torch is needed, so one binary serves
// every CPython: of objects only addresses are seen. Every function is called with the GIL held, which guards the map.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace {

using Counters = std::vector<uint64_t*>;

// Never destroyed: dictionaries still change while a process ends.
std::unordered_map<const void*, Counters>& watched() {
  static auto* const map = new std::unordered_map<const void*, Counters>;
  return *map;
}

}  // namespace

extern "C" {

// CPython's PyDict_WatchCallback: called before any change of a dictionary that `PyDict_Watch` was called for.
__attribute__((visibility("default"))) int convselect_on_event(int, void* dictionary, void*, void*) noexcept {
  const auto found = watched().find(dictionary);
  if (found != watched().end())
    for (uint64_t* counter : found->second) ++*counter;
  return 0;
}

// From now on each change of the dictionary counts in `counter`. Called once for the two.
__attribute__((visibility("default"))) void convselect_watch(const void* dictionary, uint64_t* counter) {
  watched()[dictionary].push_back(counter);
}

__attribute__((visibility("default"))) void convselect_forget(const void* dictionary, uint64_t* counter) {
  const auto found = watched().find(dictionary);
  if (found == watched().end()) return;
  Counters& counters = found->second;
  counters.erase(std::remove(counters.begin(), counters.end(), counter), counters.end());
  if (counters.empty()) watched().erase(found);
}

// How many dictionaries are watched.
__attribute__((visibility("default"))) int64_t convselect_watched() { return static_cast<int64_t>(watched().size()); }

// The sum of the 64-bit words at these addresses.
__attribute__((visibility("default"))) uint64_t convselect_sum(const uint64_t* addresses, int64_t count) {
  constexpr int64_t AHEAD = 48;
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) __builtin_prefetch(reinterpret_cast<const void*>(addresses[i + AHEAD]));
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const void*>(addresses[i]), sizeof word);
    sum += word;
  }
  return sum;
}
}
