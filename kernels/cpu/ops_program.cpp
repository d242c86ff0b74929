// The operators that check and run programs, which convselect/graph/program/segment.py writes.
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace {

using namespace convselect;

struct Shape {
  int64_t dim;
  const int64_t *sizes, *strides;

  int64_t floats() const { return extent(dim, sizes, strides); }
};

// A program: threads, floats of the arena, numbers of inputs, outputs and steps; for each input and output its
// dimensions, sizes and strides; then the steps (program.h). Bases are 1 the arena, then the inputs, then the outputs.
struct Program {
  const int64_t *word, *const end;
  const int64_t threads, arena_floats, inputs, outputs, steps;

  explicit Program(const Tensor& words) : Program(longs(words, "program", 5), words.numel()) {}

  // Of the next input, or output after the last input.
  Shape shape() {
    STD_TORCH_CHECK(word < end && *word >= 0 && *word <= (end - word - 1) / 2,
                    "the program ends within the shapes of its inputs and outputs");
    const Shape s{*word, word + 1, word + 1 + *word};
    word += 1 + 2 * s.dim;
    return s;
  }

 private:
  Program(const int64_t* w, int64_t count)
      : word(w + 5), end(w + count), threads(w[0]), arena_floats(w[1]), inputs(w[2]), outputs(w[3]), steps(w[4]) {}
};

// Whether `run` may be given the program: what it could touch of the arena, the inputs, the outputs and the
// `constants`, to which its absolute addresses must point. Raises what is wrong.
void verify_program(Tensor words, std::vector<Tensor> constants) {
  Program program(words);
  check_threads(program.threads);
  STD_TORCH_CHECK(program.arena_floats >= 0 && program.inputs >= 0 && program.outputs >= 0 && program.steps >= 0,
                  "the arena's floats and the numbers of inputs, outputs and steps must not be negative");
  Memory memory;
  memory.bases.push_back({program.arena_floats, true});
  for (int64_t i = 0; i < program.inputs; ++i) memory.bases.push_back({program.shape().floats(), false});
  for (int64_t i = 0; i < program.outputs; ++i) memory.bases.push_back({program.shape().floats(), true});
  for (const Tensor& constant : constants) {
    check_float(constant, "a constant");
    STD_TORCH_CHECK(constant.is_contiguous(), "a constant must be contiguous");
    const uint64_t begin = reinterpret_cast<uint64_t>(constant.const_data_ptr());
    memory.constants.push_back({begin, begin + 4 * static_cast<uint64_t>(constant.numel())});
  }
  verify(program.word, program.end, program.steps, static_cast<int>(program.threads), std::move(memory),
         *loaded().table);
}

// A program's input: itself, or a copy with the strides that the program was made for. Those of a traced value are not
// always the ones that an operator of ATen gives it.
Tensor with_strides(const Tensor& input, const Shape& shape) {
  check_float(input, "an input");
  STD_TORCH_CHECK(input.dim() == shape.dim, "an input has ", input.dim(), " dimensions, the program expects ",
                  shape.dim);
  const int64_t *const sizes = input.sizes().data(), *const strides = input.strides().data();
  bool as_expected = true;
  for (int64_t d = 0; d < shape.dim; ++d) {
    STD_TORCH_CHECK(sizes[d] == shape.sizes[d], "an input has size ", sizes[d], " in dimension ", d,
                    ", the program expects ", shape.sizes[d]);
    as_expected = as_expected && (sizes[d] == 1 || strides[d] == shape.strides[d]);
  }
  if (as_expected || input.numel() == 0) return input;
  Tensor copy = empty_strided(shape.dim, shape.sizes, shape.strides);
  torch::stable::copy_(copy, input);
  return copy;
}

// Runs a program that has been verified. The caller keeps alive what absolute addresses point to.
std::vector<Tensor> run_program(Tensor words, Tensor arena, std::vector<Tensor> inputs,
                                std::optional<Tensor> nanoseconds) {
  Program program(words);
  const auto parallel = parallel_here();
  STD_TORCH_CHECK(parallel.threads == program.threads, "the program is for ", program.threads,
                  " threads, torch now has ", parallel.threads);
  check_float(arena, "arena");
  STD_TORCH_CHECK(arena.is_contiguous() && arena.numel() >= program.arena_floats, "arena has ", arena.numel(),
                  " elements, the program needs ", program.arena_floats, " side by side");
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program.inputs, "there are ", inputs.size(),
                  " inputs, the program has ", program.inputs);
  std::vector<char*> bases{nullptr, static_cast<char*>(arena.mutable_data_ptr())};
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(bases[1]) % 64 == 0, "arena must be aligned to 64 bytes");
  for (Tensor& input : inputs) {
    input = with_strides(input, program.shape());
    bases.push_back(const_cast<char*>(static_cast<const char*>(input.const_data_ptr())));
  }
  std::vector<Tensor> outputs;
  for (int64_t i = 0; i < program.outputs; ++i) {
    const Shape shape = program.shape();
    outputs.push_back(empty_strided(shape.dim, shape.sizes, shape.strides));
    bases.push_back(static_cast<char*>(outputs.back().mutable_data_ptr()));
  }
  int64_t* times = nanoseconds ? const_cast<int64_t*>(longs(*nanoseconds, "nanoseconds", program.steps)) : nullptr;
  execute(program.word, program.steps, bases.data(), *loaded().table, parallel, times);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(convselect, m) {
  m.def("verify(Tensor program, Tensor[] constants) -> ()");
  m.def("run(Tensor program, Tensor(a!) arena, Tensor[] inputs, Tensor(b!)? nanoseconds) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(convselect, CPU, m) {
  m.impl("verify", TORCH_BOX(&verify_program));
  m.impl("run", TORCH_BOX(&run_program));
}
