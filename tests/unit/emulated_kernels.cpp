// Small kernels that use the primitives of device.cuh one by one, rightly and wrongly. Built and run by test_emulation_*.py.
#include <cstring>

#include "device.cuh"

namespace {

using namespace soft_mask;

struct Arguments {
  const void* in;
  void* out;
  int32_t parameter;
};

template <class T>
const T* input(const Arguments& a) {
  return static_cast<const T*>(a.in);
}
template <class T>
T* output(const Arguments& a) {
  return static_cast<T*>(a.out);
}

__device__ void copy_and_wait(SharedAddress to, const void* from) {
  copy_async_16(to, from, true);
  copy_commit();
  copy_wait<0>();
}

// ---- what the primitives compute

// in: int32 row[32], then the 32 rows of 16 bytes; lane l addresses row[l]. out: uint32 [32][4].
template <bool TRANSPOSED>
__global__ void load_matrix(Arguments a) {
  const int lane = threadIdx.x;
  const SharedAddress base = shared_address(shared_memory());
  copy_and_wait(base + 16 * lane, input<char>(a) + 128 + 16 * lane);
  warp_barrier();
  uint32_t r[4];
  const SharedAddress row = base + 16 * input<int32_t>(a)[lane];
  TRANSPOSED ? load_matrix_x4_transposed(r, row) : load_matrix_x4(r, row);
  std::memcpy(output<uint32_t>(a) + 4 * lane, r, 16);
}

// in: a uint32 [32][4], b uint32 [32][2], c float [32][4]. out: c float [32][4].
template <class T>
__global__ void mma(Arguments a) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float c[4];
  std::memcpy(left, input<uint32_t>(a) + 4 * lane, 16);
  std::memcpy(right, input<uint32_t>(a) + 128 + 2 * lane, 8);
  std::memcpy(c, input<uint32_t>(a) + 192 + 4 * lane, 16);
  mma_16x8x16<T>(c, left, right[0], right[1]);
  std::memcpy(output<float>(a) + 4 * lane, c, 16);
}

__global__ void shuffle(Arguments a) {
  output<float>(a)[threadIdx.x] = shuffle_xor(input<float>(a)[threadIdx.x], a.parameter);
}

// in: float [parameter]. out: uint32 [parameter / 2].
template <class T>
__global__ void pack(Arguments a) {
  for (int i = threadIdx.x; i < a.parameter / 2; i += 32) {
    output<uint32_t>(a)[i] = pack_pair<T>(input<float>(a)[2 * i], input<float>(a)[2 * i + 1]);
  }
}
__global__ void exp2_of(Arguments a) {
  for (int i = threadIdx.x; i < a.parameter; i += 32) output<float>(a)[i] = exp2_fast(input<float>(a)[i]);
}
__global__ void log2_of(Arguments a) {
  for (int i = threadIdx.x; i < a.parameter; i += 32) output<float>(a)[i] = log2_fast(input<float>(a)[i]);
}

// Groups of copies: {0, 1}, {2}, {}, {3 (zeros)}, then 4 without a commit. out: the 80 bytes of shared memory of thread 0 (read past
// all checks) at first, after the copies' issue and after waits for all but 4, 3, 2, 1, 0 groups; at last with 4 committed.
__global__ void copy_groups(Arguments a) {
  const SharedAddress base = shared_address(shared_memory()) + 80 * threadIdx.x;
  int step = 0;
  const auto dump = [&] {
    if (threadIdx.x == 0) std::memcpy(output<char>(a) + 80 * step++, shared_memory(), 80);
  };
  dump();
  const auto copy = [&](int i, bool valid) { copy_async_16(base + 16 * i, valid ? input<char>(a) + 16 * i : nullptr, valid); };
  copy(0, true), copy(1, true), copy_commit();
  copy(2, true), copy_commit();
  copy_commit();
  copy(3, false), copy_commit();
  copy(4, true);
  dump();
  copy_wait<4>(), dump();
  copy_wait<3>(), dump();
  copy_wait<2>(), dump();
  copy_wait<1>(), dump();
  copy_wait<0>(), dump();
  copy_commit(), copy_wait<0>(), dump();
}

// out: 16 bytes a thread, words 4 t .. 4 t + 3, which other lanes of the warp have put into shared memory.
__global__ void stores(Arguments a) {
  const int t = threadIdx.x, warp = t / 32;
  const SharedAddress base = shared_address(shared_memory());
  for (int i = 0; i < 4; ++i) store_shared_4(base + 512 * warp + 4 * (32 * i + t % 32), 128 * warp + 32 * i + t % 32);
  warp_barrier();
  store_16(output<char>(a) + 16 * t, base + 16 * t);
}

// out: int32 count, then for every step taken by a thread 1000 block + thread; two steps, a shuffle after each, a block barrier, one
// more.
__global__ void trace(Arguments a) {
  int32_t* out = output<int32_t>(a);
  const auto note = [&] { out[++out[0]] = 1000 * block_index() + thread_index(); };
  for (int i = 0; i < 2; ++i) note(), shuffle_xor(0.0f, 1);
  block_barrier();
  note();
}

// ---- a pipeline with everything it needs, of which `parameter` leaves out one step (0: none). Two warps.

enum Step { none, commit, wait, barrier_after_wait, barrier_before_reuse, last_commit, last_wait, last_barrier };

__global__ void pipeline(Arguments a) {
  const int t = threadIdx.x, lane = t % 32;
  const auto with = [&](Step step) { return a.parameter != step; };
  const SharedAddress base = shared_address(shared_memory());
  const SharedAddress of_other_warp = base + 512 * (1 - t / 32) + 16 * lane;
  uint32_t r[4], sum = 0;
  copy_async_16(base + 16 * t, input<char>(a) + 16 * t, true);
  if (with(commit)) copy_commit();
  if (with(wait)) copy_wait<0>();
  if (with(barrier_after_wait)) block_barrier();
  load_matrix_x4(r, of_other_warp);
  sum += r[0];
  if (with(barrier_before_reuse)) block_barrier();
  copy_async_16(base + 16 * t, input<char>(a) + 1024 + 16 * t, true);
  if (with(last_commit)) copy_commit();
  if (with(last_wait)) copy_wait<0>();
  if (with(last_barrier)) block_barrier();
  load_matrix_x4_transposed(r, of_other_warp);
  output<uint32_t>(a)[t] = sum + r[0];
}

// ---- kernels with one fault each; most of them with two warps

__global__ void end_with_copies(Arguments a) {  // parameter 1: committed
  copy_async_16(shared_address(shared_memory()) + 16 * threadIdx.x, a.in, true);
  if (a.parameter) copy_commit();
}

// Lane l writes word l, lane l reads words 4 (l % 8) ..: with parameter 1 behind a barrier.
__global__ void race_of_lanes(Arguments a) {
  const SharedAddress base = shared_address(shared_memory());
  store_shared_4(base + 4 * threadIdx.x, threadIdx.x);
  if (a.parameter) warp_barrier();
  if (threadIdx.x < 8) store_16(output<char>(a) + 16 * threadIdx.x, base + 16 * threadIdx.x);
}
__global__ void race_through_shuffle(Arguments a) {  // .sync of another kind doesn't order memory
  const SharedAddress base = shared_address(shared_memory());
  store_shared_4(base + 4 * threadIdx.x, threadIdx.x);
  shuffle_xor(0.0f, 1);
  if (threadIdx.x < 8) store_16(output<char>(a) + 16 * threadIdx.x, base + 16 * threadIdx.x);
}
__global__ void race_of_own_row(Arguments a) {  // ldmatrix hands what a lane has written to others
  const SharedAddress row = shared_address(shared_memory()) + 16 * threadIdx.x;
  copy_and_wait(row, a.in);
  uint32_t r[4];
  load_matrix_x4(r, row);
}
__global__ void write_after_read_of_lanes(Arguments a) {
  const SharedAddress row = shared_address(shared_memory()) + 16 * threadIdx.x;
  uint32_t r[4];
  load_matrix_x4(r, row);
  if (a.parameter) warp_barrier();
  store_shared_4(row, 0);
}
__global__ void write_after_reads(Arguments a) {  // of two lanes; with parameter 1 of one, before a barrier and behind it
  const SharedAddress base = shared_address(shared_memory());
  char* out = output<char>(a) + 32 * threadIdx.x;
  if (threadIdx.x == 0 || (threadIdx.x == 1 && !a.parameter)) store_16(out, base);
  if (a.parameter) warp_barrier();
  if (threadIdx.x == 0 && a.parameter) store_16(out + 16, base);
  if (threadIdx.x == 1) store_shared_4(base, 0);
}
__global__ void write_after_write(Arguments) { store_shared_4(shared_address(shared_memory()) + 4 * (threadIdx.x / 2), 0); }
__global__ void write_after_write_of_warps(Arguments a) {  // parameter 1: one of them behind a barrier of its own
  if (a.parameter && threadIdx.x >= 32) warp_barrier();
  store_shared_4(shared_address(shared_memory()) + 4 * (threadIdx.x % 32), 0);
}
__global__ void warp_barrier_between_warps(Arguments a) {
  const SharedAddress base = shared_address(shared_memory());
  store_shared_4(base + 4 * threadIdx.x, 0);
  warp_barrier();
  if (threadIdx.x < 16) store_16(output<char>(a) + 16 * threadIdx.x, base + 16 * threadIdx.x);
}
// The copy's wait comes after the barrier: of the warp; or with two warps of the block, where the other one reads.
__global__ void wait_behind_barrier(Arguments a) {
  const SharedAddress row = shared_address(shared_memory()) + 16 * (threadIdx.x % 32);
  if (threadIdx.x < 32) copy_async_16(row, a.in, true), copy_commit();
  blockDim.x > 32 ? block_barrier() : warp_barrier();
  copy_wait<0>();
  uint32_t r[4];
  if (blockDim.x == 32 || threadIdx.x >= 32) load_matrix_x4(r, row);
}
__global__ void copy_onto_copy(Arguments a) {
  for (int i = 0; i < 2; ++i) copy_async_16(shared_address(shared_memory()) + 16 * threadIdx.x, a.in, true);
  copy_commit();
  copy_wait<0>();
}

// An access at offset `parameter` of 1024 bytes of shared memory, by thread 37.
enum class Access { load, load_transposed, copy, store, store_word };
template <Access ACCESS>
__global__ void shared_access(Arguments a) {
  const SharedAddress base = shared_address(shared_memory());
  const SharedAddress address = base + (threadIdx.x == 37 ? a.parameter : 0);
  uint32_t r[4];
  if constexpr (ACCESS == Access::load) load_matrix_x4(r, address);
  if constexpr (ACCESS == Access::load_transposed) load_matrix_x4_transposed(r, address);
  if (threadIdx.x != 37) return;
  if constexpr (ACCESS == Access::copy) copy_and_wait(address, a.in);
  if constexpr (ACCESS == Access::store) store_16(a.out, address);
  if constexpr (ACCESS == Access::store_word) store_shared_4(address, 0);
}
__global__ void beside_shared_memory(Arguments a) { shared_memory()[a.parameter] = 1; }

__global__ void global_source(Arguments a) {  // `parameter` bytes from the input's beginning
  copy_and_wait(shared_address(shared_memory()) + 16 * threadIdx.x, input<char>(a) + (threadIdx.x == 37 ? a.parameter : 0));
}
__global__ void global_destination(Arguments a) {
  if (threadIdx.x == 37) store_16(output<char>(a) + a.parameter, shared_address(shared_memory()));
}
__global__ void store_to_input(Arguments a) { store_16(const_cast<void*>(a.in), shared_address(shared_memory())); }
__global__ void store_twice(Arguments a) { store_16(a.out, shared_address(shared_memory())); }

__global__ void lane_skips(Arguments) {
  if (threadIdx.x != 37) shuffle_xor(0.0f, 1);
}
__global__ void lanes_part(Arguments) {
  threadIdx.x < 48 ? warp_barrier() : block_barrier();
}
__global__ void lane_skips_block_barrier(Arguments) {
  if (threadIdx.x != 37) block_barrier();
}
__global__ void warp_skips_block_barrier(Arguments) {
  if (threadIdx.x < 32) block_barrier();
}
__global__ void warp_leaves_later(Arguments) {
  for (int i = 0; i < 3 - static_cast<int>(threadIdx.x / 32); ++i) block_barrier();
}
__global__ void second_block_fails(Arguments) {
  if (block_index() == 1 && threadIdx.x == 40) return;
  warp_barrier();
}

struct Named {
  const char* name;
  void (*kernel)(Arguments);
};
constexpr Named kernels[] = {
    {"load_matrix", load_matrix<false>},
    {"load_matrix_transposed", load_matrix<true>},
    {"mma_bf16", mma<__nv_bfloat16>},
    {"mma_fp16", mma<__half>},
    {"shuffle", shuffle},
    {"pack_bf16", pack<__nv_bfloat16>},
    {"pack_fp16", pack<__half>},
    {"exp2", exp2_of},
    {"log2", log2_of},
    {"copy_groups", copy_groups},
    {"stores", stores},
    {"trace", trace},
    {"pipeline", pipeline},
    {"end_with_copies", end_with_copies},
    {"race_of_lanes", race_of_lanes},
    {"race_through_shuffle", race_through_shuffle},
    {"race_of_own_row", race_of_own_row},
    {"write_after_read_of_lanes", write_after_read_of_lanes},
    {"write_after_reads", write_after_reads},
    {"write_after_write", write_after_write},
    {"write_after_write_of_warps", write_after_write_of_warps},
    {"warp_barrier_between_warps", warp_barrier_between_warps},
    {"wait_behind_barrier", wait_behind_barrier},
    {"copy_onto_copy", copy_onto_copy},
    {"load_at", shared_access<Access::load>},
    {"load_transposed_at", shared_access<Access::load_transposed>},
    {"copy_at", shared_access<Access::copy>},
    {"store_at", shared_access<Access::store>},
    {"store_word_at", shared_access<Access::store_word>},
    {"beside_shared_memory", beside_shared_memory},
    {"global_source", global_source},
    {"global_destination", global_destination},
    {"store_to_input", store_to_input},
    {"store_twice", store_twice},
    {"lane_skips", lane_skips},
    {"lanes_part", lanes_part},
    {"lane_skips_block_barrier", lane_skips_block_barrier},
    {"warp_skips_block_barrier", warp_skips_block_barrier},
    {"warp_leaves_later", warp_leaves_later},
    {"second_block_fails", second_block_fails},
};

}  // namespace

// Runs the kernel of that name; `in` may be read and `out` written. Returns what `launch` does, -1 for an unknown name.
extern "C" __attribute__((visibility("default"))) int run_kernel(const char* name, int32_t parameter, int32_t blocks,
                                                                 int32_t threads, int64_t shared_bytes, int32_t order,
                                                                 uint64_t seed, const void* in, int64_t in_bytes, void* out,
                                                                 int64_t out_bytes, char* message, int64_t message_size) {
  emulation::Machine& machine = emulation::machine;
  machine.order = static_cast<emulation::Order>(order);
  machine.seed(seed);
  const auto address = [](const void* pointer) { return reinterpret_cast<uint64_t>(pointer); };
  machine.ranges = {{address(in), address(in) + in_bytes, 0, 0}, {address(out), address(out) + out_bytes, 1, 0}};
  for (const Named& named : kernels) {
    if (std::strcmp(named.name, name) != 0) continue;
    const Arguments arguments{in, out, parameter};
    const int code = launch(named.kernel, dim3(blocks), threads, static_cast<size_t>(shared_bytes), nullptr, arguments);
    std::snprintf(message, message_size, "%s", machine.message);
    return code;
  }
  return -1;
}
