// What the test of the kernels runs on: memory between protected pages, random numbers, threads.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "kernel.h"

constexpr uint32_t QUIET_NAN = 0x7FC00000, GARBAGE = 0xA5A5A5A5;

// Floats that begin at the begin, or end at the end, of pages between two that may not be touched. All of the pages is
// filled with `pattern`.
class Fenced {
 public:
  Fenced(int64_t floats, bool at_end, uint32_t pattern, int64_t alignment = sizeof(float)) : pattern_(pattern) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = floats * static_cast<int64_t>(sizeof(float));
    pages_ = (bytes + page - 1) / page * page;
    whole_ = pages_ + 2 * page;
    void* const mapped = mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::perror("mmap"), std::exit(1);
    mapped_ = static_cast<char*>(mapped);
    first_ = reinterpret_cast<uint32_t*>(mapped_ + page);
    protect(PROT_READ | PROT_WRITE);
    for (int64_t i = 0; i < pages_ / 4; ++i) first_[i] = pattern;
    begin_ = at_end ? (pages_ - bytes) / alignment * alignment / 4 : 0;
    end_ = begin_ + floats;
  }
  Fenced(const std::vector<float>& values, bool at_end) : Fenced(values.size(), at_end, QUIET_NAN) {
    for (size_t i = 0; i < values.size(); ++i) data()[i] = values[i];
    freeze();
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(mapped_, whole_); }

  float* data() const { return reinterpret_cast<float*>(first_ + begin_); }
  void freeze() { protect(PROT_READ); }
  // Whether float i still is what it was filled with, and whether all around the floats is.
  bool untouched(int64_t i) const { return first_[begin_ + i] == pattern_; }
  bool intact() const {
    for (int64_t i = 0; i < pages_ / 4; ++i)
      if ((i < begin_ || i >= end_) && first_[i] != pattern_) return false;
    return true;
  }

 private:
  void protect(int access) {
    if (pages_ && mprotect(first_, pages_, access) != 0) std::perror("mprotect"), std::exit(1);
  }
  uint32_t pattern_, *first_;
  char* mapped_;
  int64_t pages_, whole_, begin_, end_;
};

// Nearly normal, of variance 1: the sum of twelve uniform numbers.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  float normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<double>(state_ >> 40) / (1 << 24);
    }
    return static_cast<float>(sum);
  }
  std::vector<float> normal(int64_t n, double scale = 1) {
    std::vector<float> values(n);
    for (float& value : values) value = static_cast<float>(scale * normal());
    return values;
  }

 private:
  uint64_t state_;
};

inline convselect::Parallel parallel(int threads) {
  return {threads, [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < n; ++i) others.emplace_back(body, context, i, i + 1);
            body(context, 0, 1);
            for (std::thread& other : others) other.join();
          }};
}
