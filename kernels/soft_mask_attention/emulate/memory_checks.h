// What the emulated machine checks at every access to shared and global memory.
//
// Races. Every 4 bytes of shared memory record their last write and the reads since the last block barrier. Two accesses, one of
// them a write, are ordered if one thread makes both, if a block barrier lies between, or, within a warp, a warp barrier.
// Other collectives (ldmatrix, mma, shuffle) order nothing, though they are `.sync`: that is what PTX promises. An ldmatrix reads
// for all lanes of its warp, whichever gave the address. An asynchronous copy is a write that lasts from its issue to the wait
// of its thread. So a race is found in any order; the orders are there for what is not seen here (plain pointers).
#pragma once

#include "machine.h"

namespace soft_mask::emulation {

// The offset into shared memory of an access, which must lie inside and be aligned to its size.
inline uint32_t Machine::offset_of(const Thread& thread, const char* name, uint32_t address, uint32_t size) {
  const int64_t offset = static_cast<int64_t>(address) - address_base;
  if (offset < 0 || offset + size > shared_bytes_) {
    fail(thread, "%s: %u bytes at offset %lld of shared memory, which has %u bytes", name, size, static_cast<long long>(offset),
         shared_bytes_);
  }
  if (offset % size != 0) {
    fail(thread, "%s: offset %lld of shared memory is not aligned to %u bytes", name, static_cast<long long>(offset), size);
  }
  return static_cast<uint32_t>(offset);
}

inline void Machine::check_global(const Thread& thread, const char* name, const void* pointer, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % 16 != 0) fail(thread, "%s: global address %p is not aligned to 16 bytes", name, pointer);
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (address < ranges[i].begin || address + 16 > ranges[i].end || (ranges[i].writable != 0) != write) continue;
    if (write) {
      auto piece = written_[i][(address - ranges[i].begin) / 16];
      if (piece) fail(thread, "%s: global address %p is written a second time", name, pointer);
      piece = true;
    }
    if (ranges[i].accesses != nullptr) ++ranges[i].accesses[(address - ranges[i].begin) / 16];
    return;
  }
  fail(thread, "%s: global address %p lies in no buffer to %s", name, pointer, write ? "write" : "read");
}

// `lanes`: those of the thread's warp that get the bytes.
inline void Machine::read(const Thread& thread, const char* name, uint32_t offset, uint32_t size, uint32_t lanes) {
  const uint32_t warp_epoch = warps_[thread.warp].epoch;
  for (uint32_t i = offset / 4; i < (offset + size) / 4; ++i) {
    Word& word = words_[i];
    if (word.contents == Contents::in_flight) {
      fail(thread, "%s: reads offset %u of shared memory, to which thread %d has a copy under way: copy_wait is missing", name,
           i * 4, word.writer);
    }
    if (word.write_block_epoch == block_epoch_) {
      const bool same_warp = word.writer / warp_size == thread.warp;
      if (!same_warp || (word.write_warp_epoch == warp_epoch && lanes != 1u << (word.writer % warp_size))) {
        fail(thread, "%s: race: reads offset %u of shared memory, written by thread %d (%s) with no %s in between", name, i * 4,
             word.writer, word.write_name, same_warp ? "warp_barrier" : "block_barrier");
      }
    }
    if (word.read_block_epoch != block_epoch_) {
      word.read_block_epoch = block_epoch_;
      word.reader_warp = static_cast<int16_t>(thread.warp);
      word.read_warp_epoch = warp_epoch;
      word.reader_lanes = lanes;
    } else if (word.reader_warp != thread.warp) {
      word.reader_warp = several;
    } else {
      word.reader_lanes = lanes | (word.read_warp_epoch == warp_epoch ? word.reader_lanes : 0);
      word.read_warp_epoch = warp_epoch;
    }
  }
}

inline void Machine::write(const Thread& thread, const char* name, uint32_t offset, uint32_t size, Contents contents) {
  const uint32_t warp_epoch = warps_[thread.warp].epoch;
  for (uint32_t i = offset / 4; i < (offset + size) / 4; ++i) {
    Word& word = words_[i];
    if (word.contents == Contents::in_flight) {
      fail(thread, "%s: writes offset %u of shared memory, to which thread %d has a copy under way", name, i * 4, word.writer);
    }
    if (word.write_block_epoch == block_epoch_ && word.writer != thread.index) {
      const bool same_warp = word.writer / warp_size == thread.warp;
      if (!same_warp || word.write_warp_epoch == warp_epoch) {
        fail(thread, "%s: race: writes offset %u of shared memory, written by thread %d (%s) with no %s in between", name, i * 4,
             word.writer, word.write_name, same_warp ? "warp_barrier" : "block_barrier");
      }
    }
    if (word.read_block_epoch == block_epoch_) {
      const bool same_warp = word.reader_warp == thread.warp;
      if (!same_warp || (word.read_warp_epoch == warp_epoch && (word.reader_lanes & ~(1u << thread.lane)) != 0)) {
        fail(thread, "%s: race: writes offset %u of shared memory, read by %s with no %s in between", name, i * 4,
             same_warp ? "other lanes of the warp" : "another warp", same_warp ? "warp_barrier" : "block_barrier");
      }
    }
    word.write_block_epoch = block_epoch_;
    word.write_warp_epoch = warp_epoch;
    word.writer = static_cast<int16_t>(thread.index);
    word.contents = contents;
    word.write_name = name;
  }
}

// The source is read now, as late as it can be on a GPU.
inline void Machine::copy_arrives(Thread& thread, const Copy& copy) {
  for (uint32_t i = copy.offset / 4; i < copy.offset / 4 + 4; ++i) {
    words_[i].contents = Contents::written;
    words_[i].write_block_epoch = block_epoch_;
    words_[i].write_warp_epoch = warps_[thread.warp].epoch;
  }
  if (copy.valid) {
    std::memcpy(shared_ + copy.offset, copy.source, 16);
  } else {
    std::memset(shared_ + copy.offset, 0, 16);
  }
}

}  // namespace soft_mask::emulation
