// What a launch costs: operations as the source states them (what nvcc makes of it may differ), and how well the accesses of a
// warp fit the memories.
//
// Shared memory, as in the CUDA C++ programming guide (compute capabilities 5.x to 9.0, shared memory): 32 banks; successive
// words of 4 bytes lie in successive banks; a bank gives or takes one word at a time, to all lanes that want the same one. What
// the banks do at once is a wavefront, 128 bytes at most. So an access of 4 bytes a lane is served for the whole warp, one of 16
// bytes for 8 lanes after another, and ldmatrix for a matrix, 8 rows of 16 bytes, after another. Each of these takes as many
// wavefronts as its busiest bank has words to give; 1 is the minimum. (Where shared memory begins doesn't matter.)
//
// Global memory moves in sectors of 32 bytes; a warp's access touches at least as many as hold its bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace soft_mask::emulation {

struct Transactions {
  int64_t actual, minimum;
};

// Fields as in counters.py.
struct Counters {
  int64_t blocks, block_barriers;            // barriers: once for all threads of a block
  int64_t mma;                               // of a warp
  int64_t exp2, log2;                        // of a lane
  int64_t bytes_copied, bytes_zero_filled;   // by copy_async_16
  int64_t bytes_stored;                      // by store_16
  Transactions load_matrix;                  // wavefronts
  Transactions copies, stores, words;        // wavefronts of copy_async_16, store_16 and store_shared_4
  Transactions sectors_read, sectors_written;
};

// The wavefronts for `num` lanes (at most 32) that access `size` bytes each, at multiples of it and all at once.
inline int count_wavefronts(const uint32_t* offsets, int num, uint32_t size) {
  const uint32_t places = 128 / size;  // pieces of `size` bytes side by side in the banks
  uint32_t taken = 0;
  for (int i = 0; i < num; ++i) taken |= 1u << (offsets[i] / size % places);
  if (__builtin_popcount(taken) == num) return 1;
  int busy[32] = {}, busiest = 0;
  for (int i = 0; i < num; ++i) {
    if (std::find(offsets, offsets + i, offsets[i]) != offsets + i) continue;
    busiest = std::max(busiest, ++busy[offsets[i] / size % places]);
  }
  return busiest;
}

// The sectors that `num` lanes touch, 16 bytes each. Sorts the addresses.
inline Transactions count_sectors(uint64_t* addresses, int num) {
  if (!std::is_sorted(addresses, addresses + num)) std::sort(addresses, addresses + num);
  int64_t sectors = 0, pieces = 0;
  for (int i = 0; i < num; ++i) {
    sectors += i == 0 || addresses[i] / 32 != addresses[i - 1] / 32;
    pieces += i == 0 || addresses[i] != addresses[i - 1];
  }
  return {sectors, (pieces + 1) / 2};
}

enum class Access { copy, store, word };  // copy_async_16, store_16, store_shared_4
constexpr int num_accesses = 3;

// The accesses of a warp since its last collective operation. Lanes make them one lane after the other here; the i-th of a kind
// are taken for one instruction. That is exact if a lane that leaves one out leaves out all up to the next collective.
class WarpAccesses {
 public:
  // `global`: 0 if none is accessed.
  void add(Access access, int lane, uint32_t offset, const void* global) {
    std::vector<Instruction>& of_kind = instructions_[static_cast<int>(access)];
    const std::size_t i = made_[lane][static_cast<int>(access)]++;
    if (i == of_kind.size()) of_kind.emplace_back();
    of_kind[i].lanes |= 1u << lane;
    of_kind[i].offsets[lane] = offset;
    of_kind[i].addresses[lane] = reinterpret_cast<uint64_t>(global);
    empty_ = false;
  }

  void count(Counters& counters) {
    if (empty_) return;
    count_kind(Access::copy, counters.copies, &counters.sectors_read);
    count_kind(Access::store, counters.stores, &counters.sectors_written);
    count_kind(Access::word, counters.words, nullptr);
    clear();
  }

  void clear() {
    for (auto& of_kind : instructions_) of_kind.clear();
    std::fill(&made_[0][0], &made_[0][0] + 32 * num_accesses, 0);
    empty_ = true;
  }

 private:
  struct Instruction {
    Instruction() : lanes(0) {}
    uint32_t lanes;
    uint32_t offsets[32];
    uint64_t addresses[32];
  };

  void count_kind(Access access, Transactions& wavefronts, Transactions* sectors) {
    const int lanes_at_once = access == Access::word ? 32 : 8;
    for (const Instruction& instruction : instructions_[static_cast<int>(access)]) {
      uint64_t addresses[32];
      int num_addresses = 0;
      for (int first = 0; first < 32; first += lanes_at_once) {
        uint32_t offsets[32];
        int num = 0;
        for (int lane = first; lane < first + lanes_at_once; ++lane) {
          if ((instruction.lanes >> lane & 1u) == 0) continue;
          offsets[num++] = instruction.offsets[lane];
          if (instruction.addresses[lane] != 0) addresses[num_addresses++] = instruction.addresses[lane];
        }
        if (num == 0) continue;
        wavefronts.actual += count_wavefronts(offsets, num, access == Access::word ? 4 : 16);
        ++wavefronts.minimum;
      }
      if (sectors == nullptr) continue;
      const Transactions touched = count_sectors(addresses, num_addresses);
      sectors->actual += touched.actual;
      sectors->minimum += touched.minimum;
    }
  }

  std::vector<Instruction> instructions_[num_accesses];
  uint32_t made_[32][num_accesses] = {};
  bool empty_ = true;
};

}  // namespace soft_mask::emulation
