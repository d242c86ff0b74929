#include "program.h"

#include <atomic>
#include <chrono>
#include <cstring>

namespace convselect {
namespace {

// Threads that stay together for a whole program: entering a parallel region for each kernel costs microseconds, and a
// small network has hundreds of kernels of ten microseconds each.
//
// The leader runs the program and offers parts of its loops; the others take what they are offered. Nobody waits for a
// thread that has not taken its part: the leader takes it back, so a program ends even where the threads are run one
// after another.
class Team {
 public:
  static constexpr int MOST = 256;

  explicit Team(int threads) : threads_(threads) {}

  // A member other than the leader: returns when the program has ended.
  void help(int member) {
    Offer& offer = offers_[member];
    for (int state;;) {
      while ((state = offer.state.load(std::memory_order_acquire)) == IDLE) pause();
      if (state == ENDED) return;
      if (!offer.state.compare_exchange_strong(state, TAKEN, std::memory_order_acquire)) continue;
      body_(context_, member, member + 1);
      offer.state.store(IDLE, std::memory_order_release);
    }
  }

  // The leader's, for one loop: parts [0, n), n <= threads.
  void loop(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    body_ = body;
    context_ = context;
    for (int64_t member = 1; member < n; ++member) offers_[member].state.store(OFFERED, std::memory_order_release);
    body(context, 0, 1);
    for (int64_t member = 1; member < n; ++member) {
      std::atomic<int>& state = offers_[member].state;
      int expected = OFFERED;
      if (state.compare_exchange_strong(expected, IDLE, std::memory_order_relaxed))
        body(context, member, member + 1);
      else
        while (state.load(std::memory_order_acquire) != IDLE) pause();
    }
  }

  void end() {
    for (int member = 1; member < threads_; ++member) offers_[member].state.store(ENDED, std::memory_order_release);
  }

 private:
  enum { IDLE, OFFERED, TAKEN, ENDED };
  struct alignas(64) Offer {
    std::atomic<int> state{IDLE};
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
  Offer offers_[MOST];
};

thread_local Team* team = nullptr;  // of the program that this thread leads

struct Reader {
  const int64_t* word;
  char* const* bases;

  int64_t number() { return *word++; }
  float real() {
    double value;
    std::memcpy(&value, word++, sizeof value);
    return static_cast<float>(value);
  }
  float* address() {
    constexpr int64_t OFFSET = (int64_t{1} << 48) - 1;
    const int64_t packed = number();
    return reinterpret_cast<float*>(bases[packed >> 48] + (packed & OFFSET));
  }
};

void run(Step kind, Reader r, const KernelTable& table, const Parallel& parallel) {
  switch (kind) {
    case Step::conv: {
      const Kernel& kernel = table.rows[r.number()];
      Call c{};
      int64_t* const fields[] = {&c.p.mb, &c.p.ic, &c.p.ih, &c.p.iw, &c.p.oc, &c.p.kh, &c.p.kw,
                                 &c.p.sh, &c.p.sw, &c.p.ph, &c.p.pw, &c.p.dh, &c.p.dw, &c.p.g};
      for (int64_t* field : fields) *field = r.number();
      c.src = r.address();
      c.packed = r.address();
      c.dst = r.address();
      c.dst_stride = r.number();
      c.workspace = r.address();
      c.epilogue.bias = r.address();
      c.epilogue.residual = r.address();
      c.epilogue.act = static_cast<Act>(r.number());
      c.epilogue.alpha = r.real();
      c.epilogue.beta = r.real();
      c.parallel = parallel;
      return kernel.run(c);
    }
    case Step::to_layout: {
      const bool nhwc = r.number();
      const int64_t mb = r.number(), channels = r.number(), pixels = r.number();
      const float* src = r.address();
      return (nhwc ? table.to_nhwc : table.to_nchw)(src, r.address(), mb, channels, pixels, parallel);
    }
    case Step::scale_shift: {
      ScaleShift s{};
      s.mb = r.number();
      s.channels = r.number();
      s.pixels = r.number();
      s.nhwc = r.number();
      s.src = r.address();
      s.scale = r.address();
      s.shift = r.address();
      s.addend = r.address();
      s.dst = r.address();
      s.src_stride = r.number();
      s.dst_stride = r.number();
      s.scale_stride = r.number();
      s.act = static_cast<Act>(r.number());
      s.alpha = r.real();
      s.beta = r.real();
      return table.scale_shift(s, parallel);
    }
    case Step::linear: {
      Linear l{};
      l.m = r.number();
      l.n = r.number();
      l.k = r.number();
      l.src = r.address();
      l.weight = r.address();
      l.bias = r.address();
      l.dst = r.address();
      l.act = static_cast<Act>(r.number());
      l.alpha = r.real();
      l.beta = r.real();
      return table.linear(l, parallel);
    }
    case Step::pool: {
      Pool p{};
      int64_t* const fields[] = {&p.mb, &p.channels, &p.ih, &p.iw, &p.oh, &p.ow, &p.kh,
                                 &p.kw, &p.sh,       &p.sw, &p.ph, &p.pw, &p.dh, &p.dw};
      for (int64_t* field : fields) *field = r.number();
      p.max = r.number();
      p.include_pad = r.number();
      p.divisor = r.number();
      p.src = r.address();
      p.dst = r.address();
      p.dst_stride = r.number();
      return table.pool(p, parallel);
    }
    case Step::upsample: {
      Upsample u{};
      int64_t* const fields[] = {&u.mb, &u.channels, &u.ih, &u.iw, &u.oh, &u.ow};
      for (int64_t* field : fields) *field = r.number();
      u.linear = r.number();
      u.align_corners = r.number();
      u.step_h = r.real();
      u.step_w = r.real();
      u.src = r.address();
      u.dst = r.address();
      u.dst_stride = r.number();
      return table.upsample(u, parallel);
    }
  }
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Program {
  const int64_t* steps;
  int64_t count;
  char* const* bases;
  const KernelTable* table;
  int64_t* nanoseconds;
  Parallel parallel;

  void run_all() const {
    const int64_t* step = steps;
    for (int64_t i = 0; i < count; ++i, step += step[1]) {
      const int64_t start = nanoseconds ? now() : 0;
      run(static_cast<Step>(step[0]), {step + 2, bases}, *table, parallel);
      if (nanoseconds) nanoseconds[i] = now() - start;
    }
  }
};

}  // namespace

void execute(const int64_t* steps, int64_t count, char* const* bases, const KernelTable& table,
             const Parallel& parallel, int64_t* nanoseconds) {
  Program program{steps, count, bases, &table, nanoseconds, parallel};
  if (parallel.threads == 1) return program.run_all();
  if (parallel.threads > Team::MOST) program.parallel.threads = Team::MOST;
  program.parallel.loop = [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    team->loop(n, body, context);
  };
  struct Region {
    const Program* program;
    Team team;
  } region{&program, Team(program.parallel.threads)};
  parallel.loop(
      program.parallel.threads,
      [](void* opaque, int64_t begin, int64_t end) {
        Region& region = *static_cast<Region*>(opaque);
        for (int64_t member = begin; member < end; ++member) {
          if (member > 0) {
            region.team.help(static_cast<int>(member));
            continue;
          }
          Team* const outer = team;
          team = &region.team;
          region.program->run_all();
          region.team.end();
          team = outer;
        }
      },
      &region);
}

}  // namespace convselect
