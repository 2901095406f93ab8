// The scheduler of the stand-in: runs the threads of a block as fibers, and the blocks of a grid in random
// order.
#include "host_cuda.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <vector>

namespace host_cuda {
namespace {

constexpr std::size_t kStack = 128 * 1024;

struct Barrier {
  unsigned arrived = 0;
  std::uint64_t passed = 0;
};

struct Warp {
  std::map<unsigned, Barrier> barriers;  // keyed by mask
  unsigned live = 0;                     // the lanes that are there and haven't ended
  std::uint64_t slots[32];
  unsigned words[32][6];  // per lane: the arguments a and b of mma_bf16
};

struct Fiber {
  ucontext_t context;  // used to start; later switches use `at`, which needs no system call
  jmp_buf at;
  bool begun = false;
  const Barrier* waits = nullptr;  // continues once waits->passed differs from `passed`
  std::uint64_t passed = 0;
  Place place;
  unsigned index = 0;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned live = 0;
  std::uint64_t progress = 0;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
};

Block* block = nullptr;
std::vector<unsigned char> shared_memory;
std::vector<std::vector<unsigned char>> stacks;
std::mt19937 order(20240229);

void yield() {
  if (_setjmp(block->current->at) == 0) _longjmp(block->scheduler, 1);
}

void wait(const Barrier& barrier, std::uint64_t passed) {
  block->current->waits = &barrier;
  block->current->passed = passed;
  yield();
  block->current->waits = nullptr;
}

void resume(Fiber& fiber) {
  block->current = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void enter() {
  (*block->kernel)();
  block->current->done = true;
  block->warps[block->current->index / 32].live &= ~(1u << block->current->index % 32);
  --block->live;
  ++block->progress;
  yield();
}

void run_block(const std::function<void()>& kernel, const Place& at) {
  const unsigned count = at.block_size.x * at.block_size.y * at.block_size.z;
  Block here;
  here.fibers.resize(count);
  here.warps.resize((count + 31) / 32);
  here.live = count;
  here.kernel = &kernel;
  block = &here;
  if (stacks.size() < count) stacks.resize(count, std::vector<unsigned char>(kStack));
  std::fill(shared_memory.begin(), shared_memory.end(), 0xFF);
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = here.fibers[i];
    fiber.index = i;
    here.warps[i / 32].live |= 1u << i % 32;
    fiber.place = at;
    fiber.place.thread = dim3(i % at.block_size.x, i / at.block_size.x % at.block_size.y,
                              i / (at.block_size.x * at.block_size.y));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> turn(count);
  std::iota(turn.begin(), turn.end(), 0u);
  while (here.live > 0) {
    const std::uint64_t before = here.progress;
    std::shuffle(turn.begin(), turn.end(), order);
    for (unsigned i : turn) {
      Fiber& fiber = here.fibers[i];
      if (fiber.done) continue;
      if (fiber.waits == &here.barrier && here.barrier.arrived >= here.live) {
        here.barrier.arrived = 0;
        ++here.barrier.passed;
        ++here.progress;
      }
      if (fiber.waits != nullptr && fiber.waits->passed == fiber.passed) continue;
      resume(fiber);
    }
    if (here.live > 0 && here.progress == before) {
      std::fprintf(stderr, "host_cuda: %u threads wait for a barrier that the others don't reach\n",
                   here.live);
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace

const Place& here() { return block->current->place; }
unsigned char* dynamic_shared() {
  return shared_memory.data() + (16 - reinterpret_cast<std::uintptr_t>(shared_memory.data()) % 16) % 16;
}
unsigned lane() { return block->current->index % 32; }
std::uint64_t* warp_slots() { return block->warps[block->current->index / 32].slots; }

// A thread that has ended counts as having arrived, as on a GPU.
void block_barrier() {
  Barrier& at = block->barrier;
  const std::uint64_t mine = at.passed;
  ++at.arrived;
  ++block->progress;
  wait(at, mine);
}

void warp_barrier(unsigned mask) {
  Warp& warp = block->warps[block->current->index / 32];
  mask &= warp.live;
  if (!(mask >> lane() & 1u)) {
    std::fprintf(stderr, "host_cuda: a lane calls a warp's operation whose mask leaves it out\n");
    std::abort();
  }
  Barrier& at = warp.barriers[mask];
  const std::uint64_t mine = at.passed;
  if (++at.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    at.arrived = 0;
    ++at.passed;
    ++block->progress;
    return;
  }
  ++block->progress;
  wait(at, mine);
}

void run(const std::function<void()>& kernel, dim3 grid, dim3 block_size, std::size_t shared) {
  const std::size_t count = static_cast<std::size_t>(grid.x) * grid.y * grid.z;
  const std::size_t threads = static_cast<std::size_t>(block_size.x) * block_size.y * block_size.z;
  if (count == 0 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      shared > 227 * 1024) {
    std::fprintf(stderr, "host_cuda: a launch that a GPU would refuse\n");
    std::abort();
  }
  shared_memory.resize(shared + 16);
  std::vector<std::size_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), std::size_t{0});
  std::shuffle(blocks.begin(), blocks.end(), order);
  Place at;
  at.block_size = block_size;
  at.grid_size = grid;
  for (std::size_t i : blocks) {
    at.block = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / (static_cast<std::size_t>(grid.x) * grid.y)));
    run_block(kernel, at);
  }
}

}  // namespace host_cuda

namespace scalpel::device {

void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const auto number = [](unsigned pair, int high) {
    return __uint_as_float(high ? pair & 0xFFFF0000u : pair << 16);
  };
  // Exchanges all six words at once, because barriers dominate the run time.
  using host_cuda::block;
  auto& words = block->warps[block->current->index / 32].words;
  std::memcpy(words[host_cuda::lane()], a, sizeof(a));
  std::memcpy(words[host_cuda::lane()] + 4, b, sizeof(b));
  host_cuda::warp_barrier(0xFFFFFFFFu);
  const unsigned g = host_cuda::lane() / 4, t = host_cuda::lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const unsigned row = g + (e >= 2 ? 8 : 0), column = 2 * t + e % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned part_a = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0), lane_a = row % 8 * 4 + k % 8 / 2;
      const unsigned lane_b = column * 4 + k % 8 / 2;
      d[e] += number(words[lane_a][part_a], k % 2) * number(words[lane_b][4 + (k >= 8)], k % 2);
    }
  }
  host_cuda::warp_barrier(0xFFFFFFFFu);
}

}  // namespace scalpel::device
