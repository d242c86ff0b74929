#include "verify.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace convselect {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

constexpr int64_t MOST = int64_t{1} << 40;  // floats of a tensor, and so sizes and strides

struct Number {
  const char* name;
  int64_t value, least;
};

void check_numbers(std::initializer_list<Number> numbers) {
  for (const Number& n : numbers)
    if (n.value < n.least || n.value > MOST)
      fail(n.name, " is ", n.value, ", must be at least ", n.least, " and at most 2^40");
}

int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t result = 1;
  bool fits = true;
  for (int64_t size : sizes) fits = fits && !__builtin_mul_overflow(result, size, &result) && result <= MOST;
  if (fits) return result;
  std::ostringstream text;
  for (int64_t size : sizes) text << size << ' ';
  fail("sizes multiply to more than 2^40: ", text.str());
}

std::string text_of(const Problem& p) {
  std::ostringstream text;
  text << "mb" << p.mb << "_g" << p.g << "ic" << p.ic << "ih" << p.ih << "iw" << p.iw << "oc" << p.oc << "oh" << p.oh()
       << "ow" << p.ow() << "kh" << p.kh << "kw" << p.kw << "sh" << p.sh << "sw" << p.sw << "ph" << p.ph << "pw" << p.pw
       << "dh" << p.dh << "dw" << p.dw;
  return text.str();
}

// Rows of `width` floats, `stride` floats apart; one row has no stride.
struct Span {
  const char* name;
  Address at;
  int64_t rows, stride, width;

  int64_t floats() const { return rows * width == 0 ? 0 : product({rows - 1, stride}) + width; }
};

Span dense(const char* name, const void* at, int64_t floats) { return {name, Address(at), 1, 0, floats}; }

Span strided(const char* name, const void* at, int64_t rows, int64_t stride, int64_t width) {
  if (rows > 1 && (stride < width || stride > MOST))
    fail("the stride of ", name, " is ", stride, ", must be at least ", width, " and at most 2^40");
  return {name, Address(at), rows, rows > 1 ? stride : 0, width};
}

bool overlap(const Span& a, const Span& b) {
  const int64_t floats_a = a.floats(), floats_b = b.floats();
  if (floats_a == 0 || floats_b == 0 || a.at.base() != b.at.base()) return false;
  const int64_t distance = (static_cast<int64_t>(b.at.offset()) - static_cast<int64_t>(a.at.offset())) / 4;
  if (distance >= floats_a || -distance >= floats_b) return false;
  const int64_t stride = a.stride;
  if (stride == 0 || stride != b.stride) return true;
  const int64_t phase = (distance % stride + stride) % stride;  // ranges of the channels of one tensor
  return phase < a.width || phase + b.width > stride;
}

bool same(const Span& a, const Span& b) {
  return a.at.word == b.at.word && a.rows == b.rows && a.stride == b.stride && a.width == b.width;
}

// Absolute ranges that share bytes as one, in order.
void join(std::vector<Memory::Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  size_t count = 0;
  for (const Memory::Range& range : ranges)
    if (count > 0 && range.begin < ranges[count - 1].end)
      ranges[count - 1].end = std::max(ranges[count - 1].end, range.end);
    else
      ranges[count++] = range;
  ranges.resize(count);
}

class Verifier {
 public:
  Verifier(const Memory& memory, const KernelTable& table, int threads)
      : memory_(memory), table_(table), threads_(threads) {}

  void operator()(const Conv& c) const {
    if (c.kernel < 0 || c.kernel >= table_.count) fail("kernel is ", c.kernel, ", must be below ", table_.count);
    const Kernel& kernel = table_.rows[c.kernel];
    const Problem& p = c.call.p;
    const Epilogue& e = c.call.epilogue;
    check_numbers({{"mb", p.mb, 1}});
    check(p);
    check(kernel, p);
    check(e.act);
    const int64_t pixels = product({p.mb, p.oh(), p.ow()});
    auto like_dst = [&](const char* name, const float* at) {
      return kernel.dst_nhwc ? strided(name, at, pixels, c.call.dst_stride, p.oc)
                             : dense(name, at, product({pixels, p.oc}));
    };
    const Span workspace = dense("workspace", c.call.workspace, kernel.workspace_floats(p, threads_));
    if (workspace.at.word % 64) fail("workspace is at byte ", workspace.at.offset(), ", must be aligned to 64");
    allow({like_dst("dst", c.call.dst), workspace},
          {dense("src", c.call.src, product({p.mb, p.ic, p.ih, p.iw})),
           dense("packed", c.call.packed, kernel.packed_floats(p)), dense("bias", e.bias, e.bias ? p.oc : 0),
           e.residual ? like_dst("residual", e.residual) : dense("residual", nullptr, 0)});
  }

  void operator()(const ToLayout& t) const {
    const int64_t floats = activation(t.mb, t.channels, t.pixels);
    allow({dense("dst", t.dst, floats)}, {dense("src", t.src, floats)});
  }

  void operator()(const ScaleShift& s) const {
    const int64_t floats = activation(s.mb, s.channels, s.pixels);
    check(s.act);
    auto value = [&](const char* name, const float* at, int64_t stride) {
      return s.nhwc ? strided(name, at, s.mb * s.pixels, stride, s.channels) : dense(name, at, floats);
    };
    const int64_t images = s.scale_stride == 0 ? 1 : s.mb;
    const Span dst = value("dst", s.dst, s.dst_stride), src = value("src", s.src, s.src_stride);
    const Span addend = value("addend", s.addend, s.channels), none = dense("", nullptr, 0);
    allow({dst}, {same(src, dst) ? none : src, !s.addend || same(addend, dst) ? none : addend,
                  s.scale ? strided("scale", s.scale, images, s.scale_stride, s.channels) : none,
                  dense("shift", s.shift, s.shift ? s.channels : 0)});
  }

  void operator()(const Linear& l) const {
    check_numbers({{"m", l.m, 1}, {"n", l.n, 1}, {"k", l.k, 0}});
    check(l.act);
    allow({dense("dst", l.dst, product({l.m, l.n}))},
          {dense("src", l.src, product({l.m, l.k})), dense("weight", l.weight, product({l.n, l.k})),
           dense("bias", l.bias, l.bias ? l.n : 0)});
  }

  void operator()(const Pool& p) const {
    check(p);
    allow({strided("dst", p.dst, p.mb * p.oh * p.ow, p.dst_stride, p.channels)},
          {dense("src", p.src, p.mb * p.ih * p.iw * p.channels)});
  }

  void operator()(const Upsample& u) const {
    check(u);
    allow({strided("dst", u.dst, u.mb * u.oh * u.ow, u.dst_stride, u.channels)},
          {dense("src", u.src, u.mb * u.ih * u.iw * u.channels)});
  }

 private:
  static int64_t activation(int64_t mb, int64_t channels, int64_t pixels) {
    check_numbers({{"mb", mb, 1}, {"channels", channels, 1}, {"pixels", pixels, 1}});
    return product({mb, channels, pixels});
  }

  // What is written lies apart from all else.
  void allow(std::initializer_list<Span> written, std::initializer_list<Span> read) const {
    for (const Span& span : read) inside(span, false);
    for (const Span& span : written) {
      inside(span, true);
      for (const auto& others : {written, read})
        for (const Span& other : others)
          if (&other != &span && overlap(span, other)) fail(span.name, " and ", other.name, " overlap");
    }
  }

  void inside(const Span& span, bool written) const {
    const int64_t floats = span.floats();
    if (floats == 0) return;
    const uint64_t base = span.at.base(), begin = span.at.offset(), end = begin + 4 * static_cast<uint64_t>(floats);
    if (begin % 4) fail(span.name, " is at byte ", begin, ", must be aligned to 4");
    if (base == 0) {
      if (written) fail(span.name, " is written and at an absolute address, must be in the arena or in an output");
      const auto& ranges = memory_.constants;
      auto after = std::upper_bound(ranges.begin(), ranges.end(), begin,
                                    [](uint64_t at, const Memory::Range& range) { return at < range.begin; });
      if (after == ranges.begin() || end > (after - 1)->end)
        fail(span.name, ", ", floats, " floats at ", reinterpret_cast<const void*>(begin), ", is in no constant");
      return;
    }
    if (base > memory_.bases.size())
      fail("the base of ", span.name, " is ", base, ", must be at most ", memory_.bases.size());
    const Memory::Base& region = memory_.bases[base - 1];
    if (end > 4 * static_cast<uint64_t>(region.floats))
      fail(span.name, ", ", floats, " floats from ", begin / 4, " on, is not inside of base ", base, ", which has ",
           region.floats);
    if (written && !region.writable) fail(span.name, " is written and in base ", base, ", which is an input");
  }

  const Memory& memory_;
  const KernelTable& table_;
  const int threads_;
};

// Of a Problem or a Pool.
template <class P>
void check_window(const P& p) {
  check_numbers({{"kh", p.kh, 1},
                 {"kw", p.kw, 1},
                 {"sh", p.sh, 1},
                 {"sw", p.sw, 1},
                 {"ph", p.ph, 0},
                 {"pw", p.pw, 0},
                 {"dh", p.dh, 1},
                 {"dw", p.dw, 1}});
}

constexpr const char* NAMES[] = {"conv", "to_layout", "scale_shift", "linear", "pool", "upsample"};
constexpr int64_t KINDS = std::variant_size_v<Step>;
static_assert(sizeof NAMES / sizeof *NAMES == KINDS);

}  // namespace

void check(const Problem& p) {
  check_numbers({{"mb", p.mb, 0}, {"ic", p.ic, 1}, {"ih", p.ih, 1}, {"iw", p.iw, 1}, {"oc", p.oc, 1}, {"g", p.g, 1}});
  check_window(p);
  if (p.ic % p.g || p.oc % p.g) fail("g is ", p.g, ", must divide ic=", p.ic, " and oc=", p.oc);
  if (product({p.dh, p.kh - 1}) >= p.ih + 2 * p.ph || product({p.dw, p.kw - 1}) >= p.iw + 2 * p.pw)
    fail("the kernel ", p.kh, "x", p.kw, " (dilation ", p.dh, "x", p.dw, ") does not fit into ", p.ih, "x", p.iw,
         " padded by ", p.ph, "x", p.pw);
  // Of a padded copy of src, also by phases of the stride, of dst, of the weights.
  const int64_t images = std::max<int64_t>(p.mb, 1);
  product({images, p.ic, std::max(p.ih + 2 * p.ph, p.sh), std::max(p.iw + 2 * p.pw, p.sw)});
  product({images, p.oc, p.oh(), p.ow()});
  product({p.oc, p.ic / p.g, p.kh, p.kw});
}

void check(const Kernel& kernel, const Problem& p) {
  if (!kernel.takes(p)) fail(kernel.name, " does not take ", text_of(p));
}

void check(Act act) {
  if (act < Act::identity || act > Act::gelu_tanh)
    fail("activation is ", static_cast<int64_t>(act), ", must be an index of ACTIVATIONS");
}

void check(const Pool& p) {
  check_numbers({{"mb", p.mb, 1},
                 {"channels", p.channels, 1},
                 {"ih", p.ih, 1},
                 {"iw", p.iw, 1},
                 {"oh", p.oh, 1},
                 {"ow", p.ow, 1},
                 {"divisor", p.divisor, 0}});
  check_window(p);
  auto check_windows = [](const char* name, int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                          int64_t dilation) {
    if (padding > product({dilation, kernel - 1}) || product({out - 1, stride}) >= in + padding)
      fail("a window lies outside of src: ", name, " is ", in, ", with ", out, " windows of ", kernel, ", stride ",
           stride, ", padding ", padding, ", dilation ", dilation);
  };
  check_windows("ih", p.ih, p.oh, p.kh, p.sh, p.ph, p.dh);
  check_windows("iw", p.iw, p.ow, p.kw, p.sw, p.pw, p.dw);
  product({p.mb, p.channels, p.ih, p.iw});
  product({p.mb, p.channels, p.oh, p.ow});
}

void check(const Upsample& u) {
  check_numbers({{"mb", u.mb, 1}, {"channels", u.channels, 1}});
  for (int64_t length : {u.ih, u.iw, u.oh, u.ow})
    if (length < 1 || length > INT32_MAX)
      fail("a height or width is ", length, ", must be at least 1 and at most ", INT32_MAX);
  for (float step : {u.step_h, u.step_w})
    if (!std::isfinite(step)) fail("a step is ", step, ", must be finite");
  product({u.mb, u.channels, u.ih, u.iw});
  product({u.mb, u.channels, u.oh, u.ow});
}

int64_t extent(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t last = 0;
  for (int64_t d = 0; d < dim; ++d) {
    check_numbers({{"a size", sizes[d], 0}});
    if (sizes[d] == 0) return 0;
    if (sizes[d] == 1) continue;
    check_numbers({{"a stride", strides[d], 0}});
    last += product({sizes[d] - 1, strides[d]});
  }
  return last + 1;
}

void verify(const int64_t* begin, const int64_t* end, int64_t count, int threads, Memory memory,
            const KernelTable& table) {
  join(memory.constants);
  const Verifier verifier(memory, table, threads);
  for (int64_t i = 0; i < count; ++i) {
    if (end - begin < 2) fail("the program ends before step ", i, " of ", count);
    const int64_t kind = begin[0], length = begin[1];
    if (kind < 0 || kind >= KINDS) fail("the kind of step ", i, " is ", kind, ", must be below ", KINDS);
    try {
      if (length < 2 || length > std::min<int64_t>(LONGEST, end - begin))
        fail("its length is ", length, ", must be at least 2, at most ", LONGEST, " and within the program");
      int64_t record[LONGEST] = {};  // decoding reads no further than this
      std::copy(begin, begin + length, record);
      const int64_t* word = record;
      const Step step = decode(word, nullptr);
      if (word - record != length) fail("its length is ", length, ", must be ", word - record);
      std::visit(verifier, step);
      begin += length;
    } catch (const std::runtime_error& error) {
      fail("step ", i, " (", NAMES[kind], "): ", error.what());
    }
  }
  if (begin != end) fail("the program has ", end - begin, " words after its last step");
}

}  // namespace convselect
