// Every CPU kernel, in every instruction set that this machine runs, against plain loops in double; without
// torch, so that it can run where there is none: under an emulator, or a sanitizer. Memory is taken from the
// heap in exactly the sizes that the kernels are told.
//
//     driver [instruction set]       prints what was compared; exit status 1 if a result is wrong
#include "checks.h"
#include "cpu/dispatch.h"
#include "numbers.h"

using namespace minilm;
using namespace minilm::tests;

int main(int count, char** arguments) {
  for (const std::string& name : runnable_isas()) {
    if (count > 1 && name != arguments[1]) continue;
    select_isa(isa = name);
    state = 1;
    compared = 0;
    check_norms();
    check_linear_layers();
    check_rope_and_attention();
    check_transformers();
    std::printf("%s: %ld numbers compared\n", name.c_str(), compared);
  }
  check_crowding();
  std::printf(wrong ? "%ld are wrong\n" : "all are right\n", wrong);
  return wrong != 0 || compared == 0;
}
