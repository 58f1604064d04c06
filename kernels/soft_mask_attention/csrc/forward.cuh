// Soft-mask attention, forward: softmax(scale q k^T + log m) v by tiles, with an online softmax (FlashAttention-2's scheme).
//
// A block of four warps computes 128 rows of one head; a warp owns 32 of them from beginning to end, so that rows never have to
// be reduced over warps. Keys and values come in tiles of 64 (48 for the largest head dim). While scores of a tile are computed
// its values are on their way, and while the values are used the next tile's keys are: one buffer each is enough.
//
//             keys 0..63   64..127   128..191   ...
//   warp 0     diagonal     upper      upper          lower:    nothing to add
//   warp 1     diagonal     upper      upper          diagonal: element by element, as is the tile where the sequence ends
//   warp 2      lower      diagonal    upper          upper:    nothing to add either, see `shift_maxima`
//   warp 3      lower      diagonal    upper                    (column form: element by element)
//
// Rows of shared memory are 8 elements longer than the head dim: then the eight rows that ldmatrix reads at a time lie in
// different banks, for every multiple of 16. Registers decide what is possible here: with 128 columns a lane holds 128 numbers of
// the output, and everything that can be computed again is (resources.txt has the compiler's count).
#pragma once

#include "device.cuh"
#include "params.h"

namespace soft_mask {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <int HEAD_DIM>
struct ForwardTile {
  static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 128, "tensor cores take 16 columns at a time; more than 128 don't fit");
  static constexpr int warps = 4;
  static constexpr int threads = 32 * warps;
  static constexpr int warp_rows = 32;  // two mma tiles: every fragment of k and v that is read serves two products
  static constexpr int rows = warps * warp_rows;
  static constexpr int keys = HEAD_DIM > 112 ? 48 : 64;  // 64 don't fit into the registers
  static constexpr int stride = HEAD_DIM + 8;  // of a row in shared memory, in elements
  static constexpr int chunks = HEAD_DIM / 8;  // pieces of 16 bytes in a row
  static constexpr int lanes = chunks > 8 ? 16 : 8;  // that copy a row; with 14 pieces two are idle, and no banks in conflict
  static constexpr int row_bytes = 2 * stride;
  static constexpr int rows_a_copy = threads / lanes;  // rows that the block's threads copy at a time
  static constexpr int shared_bytes = (rows + 2 * keys) * row_bytes;
};

// ForwardParams with strides in bytes, and multiples of them that would take registers if the kernel computed them.
struct KernelParams : ForwardParams {
  int64_t q_step, k_step, v_step;  // of the rows that are copied at a time
  int64_t k_tile, v_tile;          // of a tile
  int tiles;                       // of rows, for every head and sequence
};

// The head and the sequence of a block.
struct Place {
  int32_t head;
  int32_t sequence, start;  // padded: sequence and 0; packed: 0 and the first token
  int32_t length;           // l
  int32_t end;              // rows from `length` up to here belong to no sequence and get zeros
};

// Read again where it is needed: the registers are worth more than the divisions.
__device__ __forceinline__ Place find_place(const KernelParams& p) {
  const int job = block_index() / p.tiles;
  const int head = job % p.num_heads, sequence = job / p.num_heads;
  if (p.cu_seqlens == nullptr) {
    const int length = p.lengths == nullptr ? p.num_rows : min(max(p.lengths[sequence], 0), p.num_rows);
    return {head, sequence, 0, length, p.num_rows};
  }
  if (sequence > p.num_sequences) return {head, 0, 0, 0, min(p.cu_seqlens[0], p.num_rows)};  // what precedes the first
  const int start = min(max(p.cu_seqlens[sequence], 0), p.num_rows);
  if (sequence == p.num_sequences) return {head, 0, start, 0, p.num_rows - start};  // what follows the last
  const int length = min(max(p.cu_seqlens[sequence + 1], start), p.num_rows) - start;
  return {head, 0, start, length, length};
}

// Where a row of a head begins.
__device__ __forceinline__ const char* locate(const void* tensor, const Strides& bytes, const Place& at, int head, int row) {
  return static_cast<const char*>(tensor) + at.sequence * bytes.sequence + (at.start + row) * bytes.row + head * bytes.head;
}

// Begins copying ROWS rows to shared memory, of which there are `rows`; what is beyond becomes zeros. `row_bytes` is the stride
// of rows, and `step_bytes` that times the rows that are copied at a time.
template <int HEAD_DIM, int ROWS>
__device__ __forceinline__ void load_rows(SharedAddress to, const char* from, int64_t row_bytes, int64_t step_bytes,
                                          int rows) {
  using Tile = ForwardTile<HEAD_DIM>;
  constexpr int step = Tile::rows_a_copy;
  const int row = thread_index() / Tile::lanes, chunk = thread_index() % Tile::lanes;
  if (chunk >= Tile::chunks) return;
  from += row * row_bytes + 16 * chunk;
  to += row * Tile::row_bytes + 16 * chunk;
  rows -= row;
#pragma unroll
  for (int i = 0; i < ROWS; i += step) {
    copy_async_16(to + i * Tile::row_bytes, from, i < rows);
    from += step_bytes;
    forget_origin(from);
  }
}

// log2 of the weight above the diagonal: log2 min(alpha l / place, 1), where `place` is i (row form) or j (column form) counted
// from 1, and log2_opening is log2(alpha l).
__device__ __forceinline__ float log2_weight(float log2_opening, int place) {
  return min_or_nan(log2_opening - log2_fast(static_cast<float>(place)), 0.0f);
}

// What is known of one block's tile of rows while it goes over the keys.
struct Mask {
  Form form;
  int32_t length;
  float log2_opening;  // constant form: log2 alpha; else log2(alpha l)

  __device__ __forceinline__ float row_weight(int row) const {
    return form == Form::row ? log2_weight(log2_opening, row + 1) : log2_opening;
  }
};

// A lane's part of a warp's 32 rows: rows lane / 4 + 8 r for r = 0..3, in fragments of the tensor cores' output.
template <int HEAD_DIM>
struct WarpRows {
  using Tile = ForwardTile<HEAD_DIM>;
  static constexpr int mma_tiles = Tile::warp_rows / 16;
  static constexpr int rows = 2 * mma_tiles;
  static constexpr int key_blocks = Tile::keys / 8;
  static constexpr int column_blocks = HEAD_DIM / 8;
  using Scores = float[mma_tiles][key_blocks][4];

  float o[mma_tiles][column_blocks][4];
  float row_max[rows];  // in units of log2
  float row_sum[rows];  // over this lane's columns

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < rows; ++r) row_max[r] = -INFINITY, row_sum[r] = 0.0f;
#pragma unroll
    for (int t = 0; t < mma_tiles; ++t) {
#pragma unroll
      for (int c = 0; c < column_blocks; ++c) o[t][c][0] = o[t][c][1] = o[t][c][2] = o[t][c][3] = 0.0f;
    }
  }

  // s += q k^T.
  template <class T>
  static __device__ __forceinline__ void multiply_keys(Scores& s, SharedAddress q_shared, SharedAddress k_shared) {
    // What this lane addresses for ldmatrix: the two halves of 16 rows first (q), or the two halves of 16 columns (k).
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const SharedAddress q_lane = q_shared + (warp * Tile::warp_rows + lane % 16) * Tile::row_bytes + lane / 16 * 16;
    const SharedAddress k_lane = k_shared + (lane / 16 * 8 + lane % 8) * Tile::row_bytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d) {
      uint32_t a[mma_tiles][4];
#pragma unroll
      for (int t = 0; t < mma_tiles; ++t) load_matrix_x4(a[t], q_lane + 16 * t * Tile::row_bytes + 32 * d);
#pragma unroll
      for (int j = 0; j < key_blocks / 2; ++j) {
        uint32_t b[4];
        load_matrix_x4(b, k_lane + 16 * j * Tile::row_bytes + 32 * d);
#pragma unroll
        for (int t = 0; t < mma_tiles; ++t) {
          mma_16x8x16<T>(s[t][2 * j], a[t], b[0], b[1]);
          mma_16x8x16<T>(s[t][2 * j + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  // Above the diagonal a row has one weight for all tiles that are still to come. So log2 m isn't added to their scores: the
  // maximum that they are compared with is moved by it the other way, once. (Sum and output stay: they are relative to the
  // maximum of the weighted scores, which is the same as before.)
  __device__ __forceinline__ void shift_maxima(const Mask& mask, int lane_row) {
#pragma unroll
    for (int r = 0; r < rows; ++r) row_max[r] -= mask.row_weight(lane_row + 8 * r);
  }

  // Turns s into scores in units of log2 with log2 m added, element by element; `upper`: rows' weights are in the maxima.
  template <bool COLUMN>
  static __device__ __forceinline__ void weigh(Scores& s, const Mask& mask, float factor, int key, int lane_row, bool upper) {
    float weight[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) weight[r] = upper ? 0.0f : mask.row_weight(lane_row + 8 * r);
#pragma unroll
    for (int j = 0; j < key_blocks; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = key + 8 * j + thread_index() % 4 * 2 + e;
        const float column_weight = COLUMN ? log2_weight(mask.log2_opening, column + 1) : 0.0f;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          float& x = s[r / 2][j][r % 2 * 2 + e];
          x = x * factor + (column > lane_row + 8 * r ? (COLUMN ? column_weight : weight[r]) : 0.0f);
          if (column >= mask.length) x = -INFINITY;
        }
      }
    }
  }

  // One step of the online softmax: s becomes 2^(multiplier s - maximum), and all so far is made relative to the new maximum.
  __device__ __forceinline__ void exponentiate(Scores& s, float multiplier) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int t = r / 2, h = r % 2 * 2;
      float largest = s[t][0][h];
#pragma unroll
      for (int j = 0; j < key_blocks; ++j) largest = fmaxf(largest, fmaxf(s[t][j][h], s[t][j][h + 1]));
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float old_max = row_max[r];
      row_max[r] = fmaxf(old_max, largest * multiplier);  // finite: key 0 is open to every row
      const float correction = exp2_fast(old_max - row_max[r]);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < key_blocks; ++j) {
        s[t][j][h] = exp2_fast(s[t][j][h] * multiplier - row_max[r]);
        s[t][j][h + 1] = exp2_fast(s[t][j][h + 1] * multiplier - row_max[r]);
        sum += s[t][j][h] + s[t][j][h + 1];
      }
      row_sum[r] = row_sum[r] * correction + sum;
#pragma unroll
      for (int c = 0; c < column_blocks; ++c) {
        o[t][c][h] *= correction;
        o[t][c][h + 1] *= correction;
      }
    }
  }

  // o += s v. The output fragments of one product are the input fragments of the next, but for rounding to T.
  template <class T>
  __device__ __forceinline__ void multiply_values(const Scores& s, SharedAddress v_shared) {
    const int lane = thread_index() % 32;
    const SharedAddress v_lane = v_shared + lane % 16 * Tile::row_bytes + lane / 16 * 16;
#pragma unroll
    for (int j = 0; j < key_blocks / 2; ++j) {
      uint32_t a[mma_tiles][4];
#pragma unroll
      for (int t = 0; t < mma_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &s[t][2 * j + i / 2][i % 2 * 2];
          a[t][i] = pack_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int c = 0; c < column_blocks / 2; ++c) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, v_lane + 16 * j * Tile::row_bytes + 32 * c);
#pragma unroll
        for (int t = 0; t < mma_tiles; ++t) {
          mma_16x8x16<T>(o[t][2 * c], a[t], b[0], b[1]);
          mma_16x8x16<T>(o[t][2 * c + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  // Writes lse and output. The warp's rows of q are its own, and used up since the last barrier: the output goes through them, so
  // that it is stored 16 bytes at a time. `shifted`: the rows' weights are in the maxima.
  template <class T>
  __device__ __forceinline__ void store(const KernelParams& p, const Mask& mask, int warp_row, SharedAddress q_shared,
                                        bool shifted) {
    const Place at = find_place(p);
    const int lane = thread_index() % 32;
    const SharedAddress own = q_shared + thread_index() / 32 * Tile::warp_rows * Tile::row_bytes;
    float* lse = p.lse + at.sequence * p.lse_sequence_stride + at.start + at.head * p.lse_head_stride;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      float sum = row_sum[r];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = warp_row + lane / 4 + 8 * r;
      const bool inside = row < mask.length;
      const float inverse = 1.0f / sum;
      if (lane % 4 == 0 && row < at.end) {
        if (shifted) row_max[r] += mask.row_weight(row);
        lse[row] = inside ? (row_max[r] + log2_fast(sum)) * kLn2 : -INFINITY;
      }
      const SharedAddress to = own + (row - warp_row) * Tile::row_bytes + lane % 4 * 4;
#pragma unroll
      for (int c = 0; c < column_blocks; ++c) {
        const float* pair = &o[r / 2][c][r % 2 * 2];
        store_shared_4(to + 16 * c, inside ? pack_pair<T>(pair[0] * inverse, pair[1] * inverse) : 0u);
      }
    }
    warp_barrier();
    char* out = const_cast<char*>(locate(p.out, p.out_strides, at, at.head, 0));
#pragma unroll
    for (int i = 0; i < Tile::lanes; ++i) {
      const int row = (32 * i + lane) / Tile::lanes, chunk = lane % Tile::lanes;
      if (chunk >= Tile::chunks || warp_row + row >= at.end) continue;
      store_16(out + (warp_row + row) * p.out_strides.row + 16 * chunk, own + row * Tile::row_bytes + 16 * chunk);
    }
  }
};

template <class T, int HEAD_DIM, bool COLUMN>
__global__ void __launch_bounds__(ForwardTile<HEAD_DIM>::threads) forward_kernel(const KernelParams p) {
  using Tile = ForwardTile<HEAD_DIM>;
  using Rows = WarpRows<HEAD_DIM>;
  const SharedAddress q_shared = shared_address(shared_memory());
  const SharedAddress k_shared = q_shared + Tile::rows * Tile::row_bytes;
  const SharedAddress v_shared = k_shared + Tile::keys * Tile::row_bytes;

  // Long rows first: with alpha = 0 they have the most tiles of keys. More than one round only if `max_length` was too small.
  for (int tile = p.tiles - 1 - block_index() % p.tiles; tile * Tile::rows < find_place(p).end; tile += p.tiles) {
    const Place at = find_place(p);
    const int length = at.length;
    const int warp_row = tile * Tile::rows + thread_index() / 32 * Tile::warp_rows;  // the warp's first row
    const float alpha = p.alpha[at.head * p.alpha_stride];
    const Mask mask{p.form, length, log2_fast(p.form == Form::constant ? alpha : alpha * static_cast<float>(length))};
    const bool open = !(alpha <= 0.0f);  // with alpha = 0 tiles above the diagonal are left out; one that is NaN shows
    const int keys_end = tile * Tile::rows >= length ? 0 : open ? length : min(length, (tile + 1) * Tile::rows);
    Rows rows;
    rows.clear();

    const char* k = locate(p.k, p.k_strides, at, at.head / p.heads_per_group, 0);
    const char* v = locate(p.v, p.v_strides, at, at.head / p.heads_per_group, 0);
    if (keys_end > 0) {
      const int row = tile * Tile::rows;
      const char* q = locate(p.q, p.q_strides, at, at.head, row);
      load_rows<HEAD_DIM, Tile::rows>(q_shared, q, p.q_strides.row, p.q_step, length - row);
      load_rows<HEAD_DIM, Tile::keys>(k_shared, k, p.k_strides.row, p.k_step, length);
      copy_commit();
    }
    for (int key = 0; key < keys_end; key += Tile::keys) {
      copy_wait<0>();
      block_barrier();  // this tile's keys are here, and all warps are done with the values of the one before
      load_rows<HEAD_DIM, Tile::keys>(v_shared, v, p.v_strides.row, p.v_step, length - key);
      v += p.v_tile;
      copy_commit();

      const bool upper = key >= warp_row + Tile::warp_rows;
      const bool active = warp_row < length && (open || !upper);
      typename Rows::Scores s = {};
      if (active) Rows::template multiply_keys<T>(s, q_shared, k_shared);
      copy_wait<0>();
      block_barrier();  // this tile's values are here, and all warps are done with its keys
      if (key + Tile::keys < keys_end) {
        k += p.k_tile;
        load_rows<HEAD_DIM, Tile::keys>(k_shared, k, p.k_strides.row, p.k_step, length - key - Tile::keys);
        copy_commit();
      }
      if (!active) continue;

      const int lane_row = warp_row + thread_index() % 32 / 4;
      if (!COLUMN && upper && key - Tile::keys < warp_row + Tile::warp_rows) rows.shift_maxima(mask, lane_row);
      const float factor = p.scale * kLog2E;  // from s to units of log2
      const bool lower = key + Tile::keys - 1 <= warp_row;
      const bool plain = key + Tile::keys <= length && (lower || (upper && !COLUMN));
      if (!plain) Rows::template weigh<COLUMN>(s, mask, factor, key, lane_row, upper);
      rows.exponentiate(s, plain ? factor : 1.0f);
      rows.template multiply_values<T>(s, v_shared);
    }
    const int first_upper = (warp_row + Tile::warp_rows + Tile::keys - 1) / Tile::keys * Tile::keys;
    rows.template store<T>(p, mask, warp_row, q_shared, !COLUMN && open && first_upper < keys_end);
    block_barrier();  // the next round writes q
  }
}

inline Strides in_bytes(const Strides& elements) {
  return {2 * elements.sequence, 2 * elements.row, 2 * elements.head};
}

// Launches one instance; returns a cudaError_t.
template <class T, int HEAD_DIM>
int launch_forward_instance(const ForwardParams& params, void* stream) {
  using Tile = ForwardTile<HEAD_DIM>;
  KernelParams p{params};
  p.q_strides = in_bytes(params.q_strides), p.k_strides = in_bytes(params.k_strides);
  p.v_strides = in_bytes(params.v_strides), p.out_strides = in_bytes(params.out_strides);
  p.q_step = Tile::rows_a_copy * p.q_strides.row;
  p.k_step = Tile::rows_a_copy * p.k_strides.row, p.v_step = Tile::rows_a_copy * p.v_strides.row;
  p.k_tile = Tile::keys * p.k_strides.row, p.v_tile = Tile::keys * p.v_strides.row;
  const int64_t longest = p.max_length < p.num_rows ? p.max_length : p.num_rows;  // 64 bits: rounding up must not overflow
  p.tiles = longest > Tile::rows ? static_cast<int>((longest + Tile::rows - 1) / Tile::rows) : 1;
  const int sequences = p.num_sequences + (p.cu_seqlens != nullptr ? 2 : 0);  // and what follows the last, precedes the first
  const int64_t blocks = static_cast<int64_t>(p.tiles) * p.num_heads * sequences;
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return 9;  // cudaErrorInvalidConfiguration
  const auto kernel = p.form == Form::column ? forward_kernel<T, HEAD_DIM, true> : forward_kernel<T, HEAD_DIM, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), Tile::threads, static_cast<size_t>(Tile::shared_bytes), stream, p);
}

}  // namespace soft_mask
