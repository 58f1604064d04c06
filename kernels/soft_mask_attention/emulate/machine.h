// The emulated multiprocessor: one block at a time, one fiber a CUDA thread, shared memory with a record of who touched
// what (memory_checks.h).
//
// Scheduling. One warp runs until all its lanes are at a block barrier or at their end; only then another does. Of every race
// between warps one side is thus seen with the largest skew there is. Lanes run one after the other from one collective
// operation of their warp to the next. Which warp, lane and block comes first is the Order's.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <vector>

#include "counters.h"
#include "cuda_names.h"
#include "fibers.h"

namespace soft_mask::emulation {

enum class Order : int32_t { ascending = 0, descending = 1, random = 2 };

constexpr int failed = 999;  // what `launch` returns after an error of the kernel; cudaErrorUnknown's number
constexpr int warp_size = 32;
constexpr std::size_t stack_size = 64 << 10;
constexpr std::size_t largest_shared_memory = 227 << 10;  // a block's, on sm_90
constexpr std::size_t guard_size = 256;                   // on both sides of shared memory
constexpr uint32_t address_base = 0x410;                  // of shared memory: no more aligned than CUDA promises
constexpr uint64_t stack_mark = 0x5afe57ac5afe57acu;

// Where the kernel may read or write global memory through the primitives.
struct GlobalRange {
  uint64_t begin, end;
  int32_t writable, unused;
  int32_t* accesses;  // counts them, for every 16 bytes; or null
};

struct Thread;
// What all lanes of a warp do together. The last one to arrive performs it for all.
struct Operation {
  const char* name;
  void (*perform)(Thread* lanes);
};

struct Copy {
  uint32_t offset;
  const void* source;
  bool valid;
  uint32_t group;
};

struct Thread {
  Fiber fiber;
  int index, warp, lane;
  const Operation* operation;
  uint32_t* registers;  // of the operation: ldmatrix's result, mma's a, shuffle's value
  float* accumulator;   // mma's c
  uint32_t operands[2];
  std::vector<Copy> copies;  // issued and not arrived, oldest first
  uint32_t num_groups;       // committed
};

enum class Contents : uint8_t { poison, in_flight, written };

struct Word {
  uint32_t write_block_epoch, write_warp_epoch;
  uint32_t read_block_epoch, read_warp_epoch;
  uint32_t reader_lanes;  // of reader_warp, since its last warp barrier
  int16_t writer;         // a thread
  int16_t reader_warp;    // `several` where more than one has read since the last block barrier
  Contents contents;
  const char* write_name;
};
constexpr int16_t several = -1;

struct Warp {
  enum class State { ready, at_block_barrier, ended } state;
  int num_arrived;
  uint32_t epoch;          // warp and block barriers passed
  uint32_t lane_order[3];  // the i-th lane is ((i * [0] + [1]) % 32) ^ [2]
};

class Machine {
 public:
  Order order = Order::ascending;
  std::vector<GlobalRange> ranges;
  Counters counters{};  // they add up until they are cleared
  char message[1024] = "";
  Thread* current = nullptr;

  void seed(uint64_t value) { random_state_ = value; }
  char* shared() { return shared_; }
  const Thread* threads() const { return threads_.get(); }

  // Runs the grid with `body(context)` as every thread. 0, or an error's number with `message` filled.
  int run(dim3 grid, int num_threads, std::size_t shared_bytes, void (*body)(const void*), const void* context);

  // Called by a thread: waits for the other lanes of the warp and does the operation with them.
  void arrive(const Operation& operation);

  // Ends the emulation with an error; `format` is followed by who did it.
  [[noreturn]] void fail(const Thread& thread, const char* format, ...) __attribute__((format(printf, 3, 4)));

  // Counts an access of one lane; `global` is null if global memory isn't touched.
  void count_access(const Thread& thread, Access access, uint32_t offset, const void* global) {
    accesses_[thread.warp].add(access, thread.lane, offset, global);
  }

  // Checks of accesses, in memory_checks.h.
  uint32_t offset_of(const Thread& thread, const char* name, uint32_t address, uint32_t size);
  void check_global(const Thread& thread, const char* name, const void* pointer, bool write);

  void read(const Thread& thread, const char* name, uint32_t offset, uint32_t size, uint32_t lanes);
  void write(const Thread& thread, const char* name, uint32_t offset, uint32_t size, Contents contents);
  void copy_arrives(Thread& thread, const Copy& copy);
  void pass_warp_barrier(int warp) { ++warps_[warp].epoch; }

 private:
  void record_error(const char* where, const char* format, va_list arguments);
  bool run_block();
  Warp* next_warp();
  void shuffle_lanes(Warp& warp);
  int lane_at(const Warp& warp, int position) const {
    return static_cast<int>(((position * warp.lane_order[0] + warp.lane_order[1]) % warp_size) ^ warp.lane_order[2]);
  }
  uint64_t random();  // splitmix64
  void resume(Thread& thread);
  static void thread_main();
  static void nothing(Thread*) {}
  static void end(Thread* lanes);

  static constexpr Operation end_operation_{"its end", end};

  Fiber scheduler_;
  int num_threads_ = 0, stacks_for_ = 0;
  std::unique_ptr<Thread[]> threads_;
  std::unique_ptr<char[]> stacks_, memory_;
  std::vector<Warp> warps_;
  std::vector<WarpAccesses> accesses_;  // of every warp
  std::vector<Word> words_;
  std::vector<std::vector<bool>> written_;  // of every writable range, in 16 bytes
  char* shared_ = nullptr;
  uint32_t shared_bytes_ = 0, block_epoch_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  uint64_t random_state_ = 0;
  bool failed_ = false;

 public:
  static constexpr Operation block_barrier_operation{"block_barrier", nothing};
};

inline Machine machine;

inline uint64_t Machine::random() {
  uint64_t z = (random_state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline void Machine::record_error(const char* where, const char* format, va_list arguments) {
  failed_ = true;
  const int length = std::vsnprintf(message, sizeof message, format, arguments);
  const auto used = std::min<std::size_t>(std::max(length, 0), sizeof message - 1);
  std::snprintf(message + used, sizeof message - used, " (%s, block (%u, %u, %u))", where, blockIdx.x, blockIdx.y, blockIdx.z);
}

inline void Machine::fail(const Thread& thread, const char* format, ...) {
  char where[64];
  std::snprintf(where, sizeof where, "thread %d", thread.index);
  va_list arguments;
  va_start(arguments, format);
  record_error(where, format, arguments);
  va_end(arguments);
  current->fiber.switch_to(scheduler_);  // for good: a kernel's locals need no destructor
  __builtin_unreachable();
}

inline void Machine::arrive(const Operation& operation) {
  Thread& self = *current;
  Warp& warp = warps_[self.warp];
  Thread* lanes = &threads_[self.warp * warp_size];
  self.operation = &operation;
  const Thread& first = lanes[lane_at(warp, 0)];
  if (first.operation != &operation) {
    fail(self, "divergence: thread %d is at %s, but thread %d of its warp at %s", self.index, operation.name, first.index,
         first.operation->name);
  }
  if (++warp.num_arrived < warp_size) {
    Thread& next = lanes[lane_at(warp, warp.num_arrived)];
    resume(next);
    self.fiber.switch_to(next.fiber);
    return;
  }
  warp.num_arrived = 0;
  accesses_[self.warp].count(counters);
  operation.perform(lanes);
  shuffle_lanes(warp);
  if (&operation == &end_operation_ || &operation == &block_barrier_operation) {
    warp.state = &operation == &end_operation_ ? Warp::State::ended : Warp::State::at_block_barrier;
    self.fiber.switch_to(scheduler_);
    return;
  }
  Thread& next = lanes[lane_at(warp, 0)];
  if (&next == &self) return;
  resume(next);
  self.fiber.switch_to(next.fiber);
}

// Makes `thread` the running one; the switch to its fiber follows.
inline void Machine::resume(Thread& thread) {
  current = &thread;
  threadIdx = {static_cast<unsigned>(thread.index), 0, 0};
}

inline void Machine::end(Thread* lanes) {
  for (int lane = 0; lane < warp_size; ++lane) {
    const Thread& thread = lanes[lane];
    if (thread.copies.empty()) continue;
    const bool committed = thread.copies.front().group < thread.num_groups;
    machine.fail(thread, "the kernel ends with %zu copies under way: %s is missing", thread.copies.size(),
                 committed ? "copy_wait" : "copy_commit");
  }
}

inline void Machine::thread_main() {
  machine.body_(machine.context_);
  machine.arrive(end_operation_);
  __builtin_unreachable();
}

inline void Machine::shuffle_lanes(Warp& warp) {
  if (order != Order::random) return;
  const auto bits = static_cast<uint32_t>(random() >> 32);
  warp.lane_order[0] = (bits % warp_size) | 1u;
  warp.lane_order[1] = (bits >> 5) % warp_size;
  warp.lane_order[2] = (bits >> 10) % warp_size;
}

inline Warp* Machine::next_warp() {
  const int num_warps = static_cast<int>(warps_.size());
  const int start = order == Order::random ? static_cast<int>(random() % num_warps) : 0;
  for (int i = 0; i < num_warps; ++i) {
    const int index = order == Order::descending ? num_warps - 1 - i : (start + i) % num_warps;
    if (warps_[index].state == Warp::State::ready) return &warps_[index];
  }
  return nullptr;
}

inline bool Machine::run_block() {
  std::memset(shared_ - guard_size, 0xFF, shared_bytes_ + 2 * guard_size);
  std::fill(words_.begin(), words_.end(), Word{});
  block_epoch_ = 1;  // 0 is never
  ++counters.blocks;
  for (WarpAccesses& accesses : accesses_) accesses.clear();
  for (std::size_t w = 0; w < warps_.size(); ++w) {
    warps_[w] = {Warp::State::ready, 0, 1, {1, 0, order == Order::descending ? warp_size - 1u : 0u}};
    shuffle_lanes(warps_[w]);
  }
  for (int t = 0; t < num_threads_; ++t) {
    char* stack = stacks_.get() + t * stack_size;
    std::memcpy(stack, &stack_mark, sizeof stack_mark);
    Thread& thread = threads_[t];
    thread.index = t, thread.warp = t / warp_size, thread.lane = t % warp_size;
    thread.operation = nullptr;
    thread.copies.clear();
    thread.num_groups = 0;
    thread.fiber.prepare(stack, stack_size, thread_main);
  }
  const auto report = [this](const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    record_error("all threads", format, arguments);
    va_end(arguments);
    return false;
  };
  for (;;) {
    while (Warp* warp = next_warp()) {
      Thread& thread = threads_[(warp - warps_.data()) * warp_size + lane_at(*warp, 0)];
      resume(thread);
      scheduler_.switch_to(thread.fiber);
      if (failed_) return false;
    }
    std::size_t num_ended = 0;
    int waiting = 0;
    for (std::size_t w = 0; w < warps_.size(); ++w) {
      if (warps_[w].state == Warp::State::ended) ++num_ended;
      else waiting = static_cast<int>(w);
    }
    if (num_ended == warps_.size()) break;
    if (num_ended > 0) return report("deadlock: warp %d waits at block_barrier, but %zu warps have ended", waiting, num_ended);
    ++block_epoch_;
    ++counters.block_barriers;
    for (Warp& warp : warps_) {
      ++warp.epoch;
      warp.state = Warp::State::ready;
    }
  }
  for (int t = 0; t < num_threads_; ++t) {
    if (std::memcmp(stacks_.get() + t * stack_size, &stack_mark, sizeof stack_mark) != 0) {
      return report("thread %d needs more than %zu bytes of stack", t, stack_size);
    }
  }
  const auto untouched = [](const char* bytes) {
    return std::all_of(bytes, bytes + guard_size, [](char byte) { return byte == static_cast<char>(0xFF); });
  };
  if (!untouched(shared_ - guard_size) || !untouched(shared_ + shared_bytes_)) {
    return report("the kernel has written beside its %u bytes of shared memory", shared_bytes_);
  }
  return true;
}

inline int Machine::run(dim3 grid, int num_threads, std::size_t shared_bytes, void (*body)(const void*), const void* context) {
  message[0] = 0;
  failed_ = false;
  const uint64_t num_blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (num_blocks == 0 || grid.y > 65535 || grid.z > 65535 || num_threads <= 0 || num_threads > 1024 ||
      num_threads % warp_size != 0 || shared_bytes > largest_shared_memory) {
    std::snprintf(message, sizeof message,
                  "a launch of %u x %u x %u blocks of %d threads with %zu bytes of shared memory is not possible: 1 to 65535 "
                  "blocks (x: 2^32 - 1) of whole warps, 1024 threads and %zu bytes at most",
                  grid.x, grid.y, grid.z, num_threads, shared_bytes, largest_shared_memory);
    return cudaErrorInvalidConfiguration;
  }
  if (num_threads > stacks_for_) {
    stacks_.reset(new char[num_threads * stack_size + 16]);
    threads_.reset(new Thread[num_threads]());
    stacks_for_ = num_threads;
  }
  num_threads_ = num_threads;
  shared_bytes_ = static_cast<uint32_t>(shared_bytes);
  memory_.reset(new char[shared_bytes + 2 * guard_size + 64]);
  // 16 bytes off a multiple of 32, like address_base
  shared_ = memory_.get() + guard_size;
  shared_ += 16 + (32 - reinterpret_cast<uintptr_t>(shared_) % 32) % 32;
  warps_.resize(num_threads / warp_size);
  accesses_.resize(num_threads / warp_size);
  words_.resize((shared_bytes + 3) / 4);
  written_.clear();
  for (const GlobalRange& range : ranges) written_.emplace_back((range.end - range.begin + 15) / 16, false);
  gridDim = grid;
  blockDim = dim3(num_threads);
  body_ = body, context_ = context;

  std::vector<uint64_t> blocks(num_blocks);
  for (uint64_t i = 0; i < num_blocks; ++i) blocks[i] = order == Order::descending ? num_blocks - 1 - i : i;
  if (order == Order::random) {
    for (uint64_t i = num_blocks; i > 1; --i) std::swap(blocks[i - 1], blocks[random() % i]);
  }
  for (const uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    if (!run_block()) return failed;
  }
  return 0;
}

}  // namespace soft_mask::emulation
