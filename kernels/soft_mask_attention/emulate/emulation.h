// The primitives of ../csrc/device.cuh for g++: what they do on a GPU, checked as strictly as PTX allows a GPU to behave.
//
// Dynamic shared memory begins as NaN in every block. A copy's destination is NaN from its issue to the copy_wait that covers it.
// An access outside of shared memory or of the registered buffers, a misaligned one, a race, lanes of a warp that part, a barrier
// that nobody completes, a copy that nobody awaits: each ends `launch` with an error and a message.
#pragma once

#include <tuple>
#include <type_traits>

#include "machine.h"
#include "memory_checks.h"

namespace soft_mask {

inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline int block_index() { return static_cast<int>(blockIdx.x); }
template <class T>
void forget_origin(const T*&) {}

using SharedAddress = uint32_t;

inline char* shared_memory() { return emulation::machine.shared(); }
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(static_cast<const char*>(pointer) - emulation::machine.shared() + emulation::address_base);
}

namespace emulation {

inline void perform_load_matrix(Thread* lanes, const char* name, bool transposed) {
  uint16_t matrices[4][8][8];
  uint32_t offsets[warp_size];
  for (int lane = 0; lane < warp_size; ++lane) {
    const uint32_t offset = machine.offset_of(lanes[lane], name, lanes[lane].operands[0], 16);
    machine.read(lanes[lane], name, offset, 16, ~0u);
    std::memcpy(matrices[lane / 8][lane % 8], machine.shared() + offset, 16);
    offsets[lane] = offset;
  }
  for (int i = 0; i < 4; ++i) machine.counters.load_matrix.actual += count_wavefronts(offsets + 8 * i, 8, 16);
  machine.counters.load_matrix.minimum += 4;
  for (int lane = 0; lane < warp_size; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = transposed ? matrices[i][column][row] : matrices[i][row][column];
      const uint32_t high = transposed ? matrices[i][column + 1][row] : matrices[i][row][column + 1];
      lanes[lane].registers[i] = low | high << 16;
    }
  }
}
inline constexpr Operation load_matrix_operation{
    "load_matrix_x4", [](Thread* lanes) { perform_load_matrix(lanes, "load_matrix_x4", false); }};
inline constexpr Operation load_matrix_transposed_operation{
    "load_matrix_x4_transposed", [](Thread* lanes) { perform_load_matrix(lanes, "load_matrix_x4_transposed", true); }};

// Products are exact in fp32; they are added to c in fp32 one by one, k ascending. (A GPU adds several at once and truncates.)
template <float (*convert)(uint16_t)>
void perform_mma(Thread* lanes) {
  using Floats = float __attribute__((vector_size(16)));
  ++machine.counters.mma;
  float a[16][16];
  union {
    float of[16][8];
    Floats vector[16][2];
  } b, c;
  for (int lane = 0; lane < warp_size; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    const Thread& thread = lanes[lane];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const auto bits = static_cast<uint16_t>(thread.registers[i] >> (16 * half));
        a[group + 8 * (i % 2)][pair + half + 8 * (i / 2)] = convert(bits);
      }
      for (int i = 0; i < 2; ++i) {
        b.of[pair + half + 8 * i][group] = convert(static_cast<uint16_t>(thread.operands[i] >> (16 * half)));
        c.of[group + 8 * i][pair + half] = thread.accumulator[2 * i + half];
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      c.vector[i][0] += a[i][k] * b.vector[k][0];
      c.vector[i][1] += a[i][k] * b.vector[k][1];
    }
  }
  for (int lane = 0; lane < warp_size; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane].accumulator[i] = c.of[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
  }
}
template <class T>
inline constexpr bool is_half = std::is_same_v<T, __half>;
template <class T>
inline constexpr Operation mma_operation{is_half<T> ? "mma_16x8x16<fp16>" : "mma_16x8x16<bf16>",
                                         perform_mma<is_half<T> ? float_of_half : float_of_bf16>};

inline constexpr Operation shuffle_operation{
    "shuffle_xor", [](Thread* lanes) {
      uint32_t values[warp_size];
      for (int lane = 0; lane < warp_size; ++lane) values[lane] = *lanes[lane].registers;
      for (int lane = 0; lane < warp_size; ++lane) {
        const uint32_t mask = lanes[lane].operands[0];
        if (mask >= warp_size) machine.fail(lanes[lane], "shuffle_xor: a lane mask of %d", static_cast<int>(mask));
        *lanes[lane].registers = values[lane ^ mask];
      }
    }};

inline constexpr Operation warp_barrier_operation{"warp_barrier",
                                                  [](Thread* lanes) { machine.pass_warp_barrier(lanes->warp); }};

// All copies of the thread's groups before `group` are there.
inline void finish_copies(Thread& thread, int64_t group) {
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group < group; ++copy) machine.copy_arrives(thread, *copy);
  thread.copies.erase(thread.copies.begin(), copy);
}

}  // namespace emulation

inline void copy_async_16(SharedAddress destination, const void* source, bool valid) {
  using emulation::machine;
  emulation::Thread& self = *machine.current;
  const uint32_t offset = machine.offset_of(self, "copy_async_16", destination, 16);
  if (valid) machine.check_global(self, "copy_async_16", source, false);
  machine.write(self, "copy_async_16", offset, 16, emulation::Contents::in_flight);
  machine.count_access(self, emulation::Access::copy, offset, valid ? source : nullptr);
  (valid ? machine.counters.bytes_copied : machine.counters.bytes_zero_filled) += 16;
  std::memset(machine.shared() + offset, 0xFF, 16);
  self.copies.push_back({offset, source, valid, self.num_groups});
}
inline void copy_commit() { ++emulation::machine.current->num_groups; }
template <int N>
inline void copy_wait() {
  emulation::Thread& self = *emulation::machine.current;
  emulation::finish_copies(self, static_cast<int64_t>(self.num_groups) - N);
}

inline void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
  emulation::Thread& self = *emulation::machine.current;
  self.registers = r;
  self.operands[0] = row;
  emulation::machine.arrive(emulation::load_matrix_operation);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
  emulation::Thread& self = *emulation::machine.current;
  self.registers = r;
  self.operands[0] = row;
  emulation::machine.arrive(emulation::load_matrix_transposed_operation);
}

template <class T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "of 16-bit floats");
  emulation::Thread& self = *emulation::machine.current;
  self.registers = const_cast<uint32_t*>(a);
  self.accumulator = c;
  self.operands[0] = b0, self.operands[1] = b1;
  emulation::machine.arrive(emulation::mma_operation<T>);
}

template <class T>
inline uint32_t pack_pair(float low, float high) {
  return T(low).bits | static_cast<uint32_t>(T(high).bits) << 16;
}

inline float shuffle_xor(float value, int lane_mask) {
  emulation::Thread& self = *emulation::machine.current;
  auto bits = emulation::bits_of<uint32_t>(value);
  self.registers = &bits;
  self.operands[0] = static_cast<uint32_t>(lane_mask);
  emulation::machine.arrive(emulation::shuffle_operation);
  return emulation::bits_of<float>(bits);
}

// Of the special function unit: to about 2^-24 here; exp2 takes and gives subnormals as zero.
inline float exp2_fast(float x) {
  ++emulation::machine.counters.exp2;
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) {
  ++emulation::machine.counters.log2;
  return std::log2(x);
}

inline float min_or_nan(float x, float y) { return x != x || x < y ? x : y; }

inline void block_barrier() { emulation::machine.arrive(emulation::Machine::block_barrier_operation); }
inline void warp_barrier() { emulation::machine.arrive(emulation::warp_barrier_operation); }

inline void store_16(void* destination, SharedAddress source) {
  using emulation::machine;
  emulation::Thread& self = *machine.current;
  const uint32_t offset = machine.offset_of(self, "store_16", source, 16);
  machine.check_global(self, "store_16", destination, true);
  machine.read(self, "store_16", offset, 16, 1u << self.lane);
  machine.count_access(self, emulation::Access::store, offset, destination);
  machine.counters.bytes_stored += 16;
  std::memcpy(destination, machine.shared() + offset, 16);
}
inline void store_shared_4(SharedAddress destination, uint32_t value) {
  using emulation::machine;
  emulation::Thread& self = *machine.current;
  const uint32_t offset = machine.offset_of(self, "store_shared_4", destination, 4);
  machine.write(self, "store_shared_4", offset, 4, emulation::Contents::written);
  machine.count_access(self, emulation::Access::word, offset, nullptr);
  std::memcpy(machine.shared() + offset, &value, 4);
}

// Runs the kernel over the grid. 0, or an error's number; the message is emulation::machine.message.
template <class... P>
int launch(void (*kernel)(P...), dim3 grid, int threads, std::size_t shared_bytes, void* /*stream*/, P... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(arguments...)};
  const auto body = [](const void* context) {
    const auto* call = static_cast<const Call*>(context);
    std::apply(call->kernel, call->arguments);
  };
  return emulation::machine.run(grid, threads, shared_bytes, body, &call);
}

}  // namespace soft_mask
