// How many threads a pass has beside other programs, by a clock that these checks set.
#include "checks.h"
#include "numbers.h"
#include "threads.h"

namespace minilm::tests {
namespace {

constexpr std::int64_t kMilli = 1000000;

// A pass of 3 milliseconds on two threads, of which `robbed` lost their cores for most of it.
void pass(Crowding& crowding, std::int64_t robbed, std::int64_t now) {
  Crowding::Share shares[2] = {{2 * kMilli, 0}, {2 * kMilli, 0}};
  for (std::int64_t i = 0; i < robbed; ++i) shares[i] = {kMilli / 2, 2 * kMilli};
  crowding.note(shares, 2, 3 * kMilli, now);
}

void expect_threads(const char* what, const Crowding& crowding, std::int64_t now, double want) {
  expect(what, static_cast<double>(crowding.allowed(2, now)), want, 0);
}

}  // namespace

void check_crowding() {
  isa = "crowding";
  Crowding crowding;
  std::int64_t now = kMilli, pause = Crowding::kFirstPause;
  expect_threads("nothing is known", crowding, now, 2);
  pass(crowding, 0, now);
  expect_threads("all had their cores", crowding, now, 2);
  for (int again = 0; again < 12; ++again) {
    pass(crowding, 1, now);
    expect_threads("one was robbed", crowding, now + pause - 1, 1);
    expect_threads("it is tried again", crowding, now + pause, 2);
    now += pause;
    pause = std::min(2 * pause, Crowding::kLongestPause);
  }
  for (int good = 0; good < 5; ++good) pass(crowding, 0, now);
  pass(crowding, 2, now);
  expect_threads("after a good time", crowding, now + Crowding::kFirstPause - 1, 1);
  expect_threads("the pause is short again", crowding, now + Crowding::kFirstPause, 2);

  // 400 milliseconds of a prompt, in which one thread had half a core: still more than one thread would do.
  const Crowding::Share half[2] = {{390 * kMilli, 0}, {200 * kMilli, 200 * kMilli}};
  Crowding other;
  other.note(half, 2, 400 * kMilli, now);
  expect_threads("half a core is worth having", other, now, 2);
  // Of 16 threads one is left at home.
  Crowding::Share many[16];
  for (auto& share : many) share = {3 * kMilli, 0};
  many[5] = {kMilli, 3 * kMilli};
  other.note(many, 16, 6 * kMilli, now);
  expect("of many threads", static_cast<double>(other.allowed(16, now)), 15, 0);
}

}  // namespace minilm::tests
