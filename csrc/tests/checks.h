// Every kernel against plain loops in double, at sizes that fill no vector, tile or page. What is wrong is
// printed and counted (numbers.h).
#pragma once

namespace minilm::tests {

void check_norms();
void check_linear_layers();
void check_rope_and_attention();
void check_transformers();
void check_crowding();

}  // namespace minilm::tests
