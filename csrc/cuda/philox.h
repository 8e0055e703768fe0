// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 random bits for each
// counter under a key, without any state. The same sequence and step always give the same bits.
#pragma once

#include <cstdint>

#include "cuda/tiling.h"

namespace minilm::cuda {

struct Random {
  std::uint32_t x[4];
};

MINILM_HD Random philox(const std::uint32_t (&counter)[4], std::uint64_t key) {
  Random c = {{counter[0], counter[1], counter[2], counter[3]}};
  std::uint32_t low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ull * c.x[0], b = 0xCD9E8D57ull * c.x[2];
    c = {{static_cast<std::uint32_t>(b >> 32) ^ c.x[1] ^ low, static_cast<std::uint32_t>(b),
          static_cast<std::uint32_t>(a >> 32) ^ c.x[3] ^ high, static_cast<std::uint32_t>(a)}};
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return c;
}

// 64 random bits for a step of a sequence.
MINILM_HD std::uint64_t random_bits(std::int64_t seed, std::int64_t sequence, std::int64_t step) {
  const std::uint64_t a = static_cast<std::uint64_t>(sequence), b = static_cast<std::uint64_t>(step);
  const Random r = philox({static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(b >> 32),
                           static_cast<std::uint32_t>(a), static_cast<std::uint32_t>(a >> 32)},
                          static_cast<std::uint64_t>(seed));
  return static_cast<std::uint64_t>(r.x[0]) << 32 | r.x[1];
}

}  // namespace minilm::cuda
