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
    const Address at(number());
    return reinterpret_cast<float*>(bases ? reinterpret_cast<uint64_t>(bases[at.base()]) + at.offset() : at.word);
  }
};

Step conv(Reader& r) {
  Conv step{};
  step.kernel = r.number();
  Problem& p = step.call.p;
  int64_t* const fields[] = {&p.mb, &p.ic, &p.ih, &p.iw, &p.oc, &p.kh, &p.kw,
                             &p.sh, &p.sw, &p.ph, &p.pw, &p.dh, &p.dw, &p.g};
  for (int64_t* field : fields) *field = r.number();
  Call& c = step.call;
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
  return step;
}

Step to_layout(Reader& r) {
  ToLayout t{};
  t.nhwc = r.number();
  t.mb = r.number();
  t.channels = r.number();
  t.pixels = r.number();
  t.src = r.address();
  t.dst = r.address();
  return t;
}

Step scale_shift(Reader& r) {
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
  return s;
}

Step linear(Reader& r) {
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
  return l;
}

Step pool(Reader& r) {
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
  return p;
}

Step upsample(Reader& r) {
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
  return u;
}

struct Run {
  const KernelTable& table;
  const Parallel& parallel;

  void operator()(Conv& c) const {
    c.call.parallel = parallel;
    table.rows[c.kernel].run(c.call);
  }
  void operator()(const ToLayout& t) const {
    (t.nhwc ? table.to_nhwc : table.to_nchw)(t.src, t.dst, t.mb, t.channels, t.pixels, parallel);
  }
  void operator()(const ScaleShift& s) const { table.scale_shift(s, parallel); }
  void operator()(const Linear& l) const { table.linear(l, parallel); }
  void operator()(const Pool& p) const { table.pool(p, parallel); }
  void operator()(const Upsample& u) const { table.upsample(u, parallel); }
};

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
    const int64_t* word = steps;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = nanoseconds ? now() : 0;
      Step step = decode(word, bases);
      std::visit(Run{*table, parallel}, step);
      if (nanoseconds) nanoseconds[i] = now() - start;
    }
  }
};

}  // namespace

Step decode(const int64_t*& word, char* const* bases) {
  static Step (*const kinds[])(Reader&) = {conv, to_layout, scale_shift, linear, pool, upsample};
  static_assert(sizeof kinds / sizeof *kinds == std::variant_size_v<Step>);
  Reader r{word + 2, bases};
  Step step = kinds[word[0]](r);
  word = r.word;
  return step;
}

void execute(const int64_t* steps, int64_t count, char* const* bases, const KernelTable& table,
             const Parallel& parallel, int64_t* nanoseconds) {
  Program program{steps, count, bases, &table, nanoseconds, parallel};
  // Of more threads than a team has, each kernel enters a region of its own.
  if (parallel.threads == 1 || parallel.threads > Team::MOST) return program.run_all();
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
