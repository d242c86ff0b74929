// Tests the table of kernels without torch, so that it runs wherever a C++ compiler reaches: on an emulated processor,
// under sanitizers. Reads lines "kernel bound mb ic ih iw oc kh kw sh sw ph pw dh dw g" from stdin, so that what a
// kernel takes, and how exact it must be, is said in one place only. Prints the instruction set, and a line "kernel
// problems worst" for each kernel, worst being the largest fraction of its bound that an error took.
//
// Every buffer ends, or begins, at a page that may not be touched; inputs may not be written; dst is full of NaN before
// a run and the workspace of garbage; an NHWC dst is also a range of the channels of a wider tensor.
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "dispatch.h"
#include "fenced.h"
#include "reference.h"

namespace {

using namespace convselect;

std::string current;  // what is being tested, for the report of a crash
int failures = 0;

void crashed(int signal) {
  const std::string message = "FAILED " + current + ": signal " + std::to_string(signal) +
                              (signal == SIGSEGV ? ", memory outside of a buffer was touched\n" : "\n");
  const ssize_t written = write(STDOUT_FILENO, message.data(), message.size());
  _exit(written < 0 ? 3 : 2);
}

void check(bool right, const std::string& what) {
  if (right) return;
  ++failures;
  std::cout << "FAILED " << current << ": " << what << std::endl;
}

struct Activation {
  Act act;
  float alpha, beta;
};
constexpr Activation ACTIVATIONS[] = {
    {Act::identity, 0, 0}, {Act::relu, 0, 0},      {Act::clamp, -0.5f, 1.5f}, {Act::leaky_relu, 0.1f, 0},
    {Act::silu, 0, 0},     {Act::sigmoid, 0, 0},   {Act::hardswish, 0, 0},    {Act::hardsigmoid, 0, 0},
    {Act::gelu, 0, 0},     {Act::gelu_tanh, 0, 0},
};
constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "neon"};  // of Isa
constexpr double ACTIVATION_BOUND = 5e-7;                                // what the polynomials add to a kernel's error

// Of [mb, channels, pixels], or of [mb, pixels, channels] with pixels `stride` floats apart.
int64_t place(bool nhwc, int64_t channels, int64_t pixels, int64_t stride, int64_t i) {
  const int64_t n = i / pixels / channels, c = i / pixels % channels, q = i % pixels;
  return nhwc ? (n * pixels + q) * stride + c : i;
}

std::vector<float> laid_out(bool nhwc, int64_t channels, int64_t pixels, int64_t stride,
                            const std::vector<float>& values) {
  if (!nhwc || values.empty()) return values;
  std::vector<float> result((values.size() / channels - 1) * stride + channels, NAN);
  for (size_t i = 0; i < values.size(); ++i) result[place(true, channels, pixels, stride, i)] = values[i];
  return result;
}

// rel-L2, as in the Python tests: values are of order 1, and the floor keeps a few that cancel from counting much.
struct Error {
  double difference = 0, norm = 0;
  int64_t n = 0;
  void add(double got, double want) {
    difference += (got - want) * (got - want);
    norm += want * want;
    ++n;
  }
  double value() const { return std::sqrt(difference) / std::fmax(std::sqrt(norm), 0.5 * std::sqrt(double(n))); }
  bool within(double bound) const { return value() <= bound; }  // false for NaN
};

struct Data {
  Problem p{};
  std::vector<float> src, weight, bias, residual;
  std::vector<double> conv;

  void make(const Problem& problem) {
    if (std::memcmp(&p, &problem, sizeof p) == 0) return;
    p = problem;
    Random random(1);
    const int64_t k = p.ic / p.g * p.taps();
    src = random.normal(p.mb * p.ic * p.ih * p.iw);
    weight = random.normal(p.oc * k, std::sqrt(2.0 / k));
    bias = random.normal(p.oc);
    residual = random.normal(p.mb * p.oc * p.oh() * p.ow());
    conv = convolved(p, src, weight);
  }
};

struct Variant {
  int threads;
  bool at_end, bias, residual;
  int64_t gap;  // channels of a wider dst beside this one's
  uint32_t workspace;
  Activation activation;
};

double run(const Kernel& kernel, const Data& d, const Variant& v, double bound) {
  const Problem& p = d.p;
  const int64_t pixels = p.oh() * p.ow(), gap = kernel.dst_nhwc ? v.gap : 0, stride = p.oc + gap;
  const Fenced src(laid_out(kernel.src_nhwc, p.ic, p.ih * p.iw, p.ic, d.src), v.at_end), weight(d.weight, v.at_end);
  const Fenced bias(d.bias, v.at_end);
  const Fenced residual(laid_out(kernel.dst_nhwc, p.oc, pixels, stride, d.residual), v.at_end);
  Fenced packed(kernel.packed_floats(p), v.at_end, QUIET_NAN);
  kernel.pack(p, weight.data(), packed.data());
  check(packed.intact(), "pack wrote outside of packed");
  packed.freeze();
  const int64_t floats = (p.mb * pixels - 1) * stride + p.oc;
  const Fenced dst(kernel.dst_nhwc ? floats : p.mb * pixels * p.oc, v.at_end, QUIET_NAN);
  const Fenced workspace(kernel.workspace_floats(p, v.threads), v.at_end, v.workspace, 64);
  kernel.run({p,
              src.data(),
              packed.data(),
              dst.data(),
              stride,
              workspace.data(),
              {v.bias ? bias.data() : nullptr, v.residual ? residual.data() : nullptr, v.activation.act,
               v.activation.alpha, v.activation.beta},
              parallel(v.threads)});
  check(dst.intact(), "wrote outside of dst");
  check(workspace.intact(), "wrote outside of the workspace");
  if (gap)
    for (int64_t i = 0; i < floats; ++i)
      if (i % stride >= p.oc && !dst.untouched(i)) {
        check(false, "wrote between the pixels of dst");
        break;
      }
  Error error;
  for (size_t i = 0; i < d.conv.size(); ++i) {
    const int64_t c = i / pixels % p.oc;
    const double sum = d.conv[i] + (v.bias ? d.bias[c] : 0) + (v.residual ? d.residual[i] : 0);
    error.add(dst.data()[place(kernel.dst_nhwc, p.oc, pixels, stride, i)],
              activated(sum, v.activation.act, v.activation.alpha, v.activation.beta));
  }
  if (v.activation.act >= Act::leaky_relu) bound += ACTIVATION_BOUND;
  if (!error.within(bound)) {
    std::ostringstream what;
    what << "error " << error.value() << " with activation " << int(v.activation.act) << ", bias " << v.bias
         << ", residual " << v.residual << ", dst " << gap << " wider, " << v.threads << " threads";
    check(false, what.str());
  }
  return error.value() / bound;
}

void convolutions(const KernelTable& table) {
  struct Tally {
    int64_t problems = 0;
    double worst = 0;
  };
  std::map<std::string, Tally> tallies;
  std::map<std::string, const Kernel*> kernels;
  for (int i = 0; i < table.count; ++i) tallies[table.rows[i].name], kernels[table.rows[i].name] = &table.rows[i];
  Data data;
  for (int64_t line = 0; std::getline(std::cin, current); ++line) {
    std::istringstream text(current);
    std::string name;
    double bound;
    Problem p;
    text >> name >> bound >> p.mb >> p.ic >> p.ih >> p.iw >> p.oc >> p.kh >> p.kw >> p.sh >> p.sw >> p.ph >> p.pw >>
        p.dh >> p.dw >> p.g;
    if (text.fail() || kernels.count(name) == 0) {
      check(false, "not a line this test knows");
      continue;
    }
    check(kernels[name]->takes(p), "the primitive takes it, the kernel does not");
    data.make(p);
    Tally& tally = tallies[name];
    const int64_t turn = tally.problems++;  // each kernel meets each variant
    const int threads = static_cast<int>(1 + turn % 3);
    const Variant variants[] = {
        {threads, true, false, false, 0, GARBAGE, ACTIVATIONS[0]},
        {3 - threads % 3, turn % 2 == 0, turn % 5 > 0, turn % 3 > 0, turn % 4 * 3, QUIET_NAN, ACTIVATIONS[turn % 10]},
    };
    for (const Variant& variant : variants)
      tally.worst = std::fmax(tally.worst, run(*kernels[name], data, variant, bound));
  }
  for (const auto& [name, tally] : tallies)
    std::cout << name << ' ' << tally.problems << ' ' << tally.worst << std::endl;
}

// What the table offers beside convolutions, on every combination of sizes around whole registers.
void others(const KernelTable& table) {
  constexpr int64_t SIZES[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 70};
  Random random(2);
  for (int64_t channels : SIZES)
    for (int64_t pixels : SIZES)
      for (int turn = 0; turn < 4; ++turn) {
        const bool nhwc = turn % 2, at_end = turn / 2;
        const int64_t mb = 1 + pixels % 2, n = mb * channels * pixels;
        const std::string sizes = std::to_string(channels) + " channels, " + std::to_string(pixels) + " pixels";
        const std::vector<float> values = random.normal(n), scales = random.normal(channels);
        const Fenced src(laid_out(nhwc, channels, pixels, channels, values), at_end), scale(scales, at_end);
        const Activation a = ACTIVATIONS[(channels + pixels) % 10];

        // Each operand that may be absent is so in some turns; in NHWC dst is a range of the channels of a wider
        // tensor.
        const bool scales_images = pixels % 2, adds = channels % 2;
        const int64_t gap = nhwc ? 3 : 0, wide = channels + gap;
        const std::vector<float> images = random.normal(mb * channels), addends = random.normal(n);
        const Fenced image_scale(images, at_end), addend(laid_out(nhwc, channels, pixels, channels, addends), at_end);
        current = "scale_shift of " + sizes;
        const Fenced scaled(n + gap * (mb * pixels - 1), at_end, QUIET_NAN);
        ScaleShift s{mb, channels, pixels, nhwc, src.data(), scale.data(), scale.data(), nullptr, scaled.data()};
        s.src_stride = channels, s.dst_stride = wide, s.act = a.act, s.alpha = a.alpha, s.beta = a.beta;
        if (scales_images) s.scale = image_scale.data(), s.scale_stride = channels;
        if (adds) s.addend = addend.data(), s.shift = nullptr;
        table.scale_shift(s, parallel(1 + turn));
        current = "a layout transform of " + sizes;
        const Fenced other(n, at_end, QUIET_NAN);
        (nhwc ? table.to_nchw : table.to_nhwc)(src.data(), other.data(), mb, channels, pixels, parallel(1 + turn));
        Error error;
        bool exact = true;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t channel = i / pixels % channels, image = i / pixels / channels;
          const double factor = scales_images ? images[image * channels + channel] : scales[channel];
          const double sum = double(values[i]) * factor + (adds ? addends[i] : scales[channel]);
          error.add(scaled.data()[place(nhwc, channels, pixels, wide, i)], activated(sum, a.act, a.alpha, a.beta));
          exact = exact && other.data()[place(!nhwc, channels, pixels, channels, i)] == values[i];
        }
        check(exact && other.intact(), "a wrong value, or one out of place");
        current = "scale_shift of " + sizes;
        check(error.within(1e-6) && scaled.intact(), "error " + std::to_string(error.value()));

        current = "linear of " + sizes;  // mb rows of `pixels` inputs, `channels` outputs
        const std::vector<float> rows = random.normal(mb * pixels), matrix = random.normal(channels * pixels);
        const Fenced inputs(rows, at_end), weight(matrix, at_end), outputs(mb * channels, at_end, QUIET_NAN);
        table.linear({mb, channels, pixels, inputs.data(), weight.data(), nhwc ? scale.data() : nullptr, outputs.data(),
                      a.act, a.alpha, a.beta},
                     parallel(1 + turn));
        Error of_linear;
        for (int64_t i = 0; i < mb * channels; ++i) {
          double sum = nhwc ? scales[i % channels] : 0;
          for (int64_t x = 0; x < pixels; ++x)
            sum += double(rows[i / channels * pixels + x]) * matrix[i % channels * pixels + x];
          of_linear.add(outputs.data()[i], activated(sum, a.act, a.alpha, a.beta));
        }
        check(of_linear.within(2e-6) && outputs.intact(), "error " + std::to_string(of_linear.value()));
      }
}

void pooling(const KernelTable& table) {
  Random random(3);
  for (int64_t channels : {1, 5, 16, 33, 70})
    for (int64_t turn = 0; turn < 100; ++turn) {
      Pool p{};
      p.max = turn % 2, p.include_pad = turn / 2 % 2, p.divisor = turn % 7 == 0 ? 5 : 0;
      p.mb = 1 + turn % 2, p.channels = channels, p.ih = 5 + turn % 5, p.iw = 6 + turn % 3;
      p.kh = 1 + turn % 4, p.kw = 1 + turn % 3, p.sh = 1 + turn / 4 % 2, p.sw = 1 + turn / 8 % 3;
      p.ph = p.kh / 2 * (turn / 16 % 2), p.pw = p.kw / 2 * (turn / 32 % 2);
      p.dh = p.max ? 1 + turn / 4 % 2 : 1, p.dw = p.max ? 1 + turn / 8 % 2 : 1;
      if (turn >= 96) {  // of many taps
        p.max = p.ph = p.pw = 0, p.dh = p.dw = 1;
        p.kh = p.ih = 29 + turn % 4, p.kw = p.iw = 55 + 2 * (turn % 4);
      }
      p.oh = (p.ih + 2 * p.ph - p.dh * (p.kh - 1) - 1) / p.sh + 1;
      p.ow = (p.iw + 2 * p.pw - p.dw * (p.kw - 1) - 1) / p.sw + 1;
      if (p.dh * (p.kh - 1) >= p.ih + 2 * p.ph || p.dw * (p.kw - 1) >= p.iw + 2 * p.pw) continue;
      current = "pooling " + std::to_string(turn) + " of " + std::to_string(channels) + " channels";
      const std::vector<float> values = random.normal(p.mb * p.ih * p.iw * channels);
      const bool at_end = turn % 3 > 0;
      const Fenced src(values, at_end), dst(p.mb * p.oh * p.ow * channels, at_end, QUIET_NAN);
      p.src = src.data(), p.dst = dst.data(), p.dst_stride = channels;
      table.pool(p, parallel(static_cast<int>(1 + turn % 3)));
      Error error;
      for (int64_t i = 0; i < p.mb * p.oh * p.ow * channels; ++i) {
        const int64_t c = i % channels, x = i / channels % p.ow, y = i / channels / p.ow % p.oh;
        const int64_t n = i / channels / p.ow / p.oh;
        double sum = 0, most = -INFINITY;
        int64_t inside = 0, padded = 0;
        for (int64_t tap = 0; tap < p.kh * p.kw; ++tap) {
          const int64_t iy = y * p.sh - p.ph + tap / p.kw * p.dh, ix = x * p.sw - p.pw + tap % p.kw * p.dw;
          padded += iy < p.ih + p.ph && ix < p.iw + p.pw;
          if (iy < 0 || iy >= p.ih || ix < 0 || ix >= p.iw) continue;
          const double value = values[((n * p.ih + iy) * p.iw + ix) * channels + c];
          sum += value, most = std::fmax(most, value), ++inside;
        }
        error.add(dst.data()[i], p.max ? most : sum / double(p.divisor ? p.divisor : p.include_pad ? padded : inside));
      }
      check(error.within(p.max ? 0 : 1e-6) && dst.intact(), "error " + std::to_string(error.value()));
    }
}

// Of more columns than a task has, of fewer channels than a register has and of more, into a range of the channels of a
// wider tensor and into one of its own.
void upsampling(const KernelTable& table) {
  constexpr int64_t LENGTHS[][2] = {{1, 1}, {1, 7}, {6, 1}, {5, 5}, {4, 8}, {3, 11}, {13, 4}, {7, 300}};  // from, to
  constexpr float STEPS[] = {-1, 0.3f, 1.25f, 1e6f};
  Random random(4);
  for (int64_t channels : {1, 3, 4, 15, 17, 33, 64})
    for (int64_t turn = 0; turn < 96; ++turn) {
      Upsample u{};
      u.linear = turn % 3 > 0, u.align_corners = turn % 3 == 2;
      u.mb = 1 + turn % 2, u.channels = channels;
      u.ih = LENGTHS[turn % 7][0], u.oh = LENGTHS[turn % 7][1];
      u.iw = LENGTHS[turn / 2 % 8][0], u.ow = LENGTHS[turn / 2 % 8][1];
      u.step_h = STEPS[turn / 4 % 4], u.step_w = STEPS[turn / 5 % 4];
      current = "interpolation " + std::to_string(turn) + " of " + std::to_string(channels) + " channels";
      const int64_t pixels = u.oh * u.ow, gap = turn % 4 == 3 ? 5 : 0, stride = channels + gap;
      const int64_t floats = (u.mb * pixels - 1) * stride + channels;
      const std::vector<float> values = random.normal(u.mb * u.ih * u.iw * channels);
      const bool at_end = turn % 5 > 0;
      const Fenced src(values, at_end), dst(floats, at_end, QUIET_NAN);
      u.src = src.data(), u.dst = dst.data(), u.dst_stride = stride;
      table.upsample(u, parallel(static_cast<int>(1 + turn % 3)));
      check(dst.intact(), "wrote outside of dst");
      Error error;
      for (int64_t i = 0; i < floats; ++i) {
        const int64_t c = i % stride, x = i / stride % u.ow, y = i / stride / u.ow % u.oh, n = i / stride / pixels;
        if (c >= channels) {
          check(dst.untouched(i), "wrote between the pixels of dst");
          continue;
        }
        const Between rows = between(u, u.ih, u.oh, u.step_h, y), columns = between(u, u.iw, u.ow, u.step_w, x);
        auto at = [&](int64_t row, int64_t column) {
          return double(values[((n * u.ih + row) * u.iw + column) * channels + c]);
        };
        const double low = columns.mix(at(rows.low, columns.low), at(rows.low, columns.high));
        error.add(dst.data()[i], rows.mix(low, columns.mix(at(rows.high, columns.low), at(rows.high, columns.high))));
      }
      check(error.within(u.linear ? 1e-6 : 0), "error " + std::to_string(error.value()));
    }
}

}  // namespace

int main() {
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) std::signal(signal, crashed);
  Isa isa;
  std::string error;
  const KernelTable* table = kernels(&isa, &error);
  if (!table) {
    std::cout << "FAILED " << error << std::endl;
    return 1;
  }
  const char* found = NAMES[static_cast<int>(isa)];
  std::cout << found << std::endl;
  const char* wanted = std::getenv("CONVSELECT_ISA");
  if (wanted && std::strcmp(wanted, found) != 0) return 0;  // the caller sees that the processor does not have it
  for (auto* test : {others, pooling, upsampling, convolutions}) test(*table);
  return failures > 0;
}
