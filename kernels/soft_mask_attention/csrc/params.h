// What a launch of the forward kernel needs. Plain C++: included by the kernel, the torch op and the host emulation.
#pragma once

#include <cstdint>

namespace soft_mask {

// Strides in elements; the head dim is contiguous. In a packed row (cu_seqlens given) `sequence` is unused, and `row` counts tokens.
struct Strides {
  int64_t sequence, row, head;
};

enum class Form : int32_t { constant = 0, row = 1, column = 2 };
enum class Element : int32_t { bf16 = 0, fp16 = 1 };

struct ForwardParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;                 // natural log of sum_j m_ij exp(scale q_i.k_j); -inf at rows of no sequence
  const float* alpha;         // [1] or [num_heads]
  const int32_t* lengths;     // padded: [num_sequences], or null where all have num_rows
  const int32_t* cu_seqlens;  // packed: [num_sequences + 1], else null
  Strides q_strides, k_strides, v_strides, out_strides;
  int64_t lse_sequence_stride, lse_head_stride;  // rows are contiguous
  int32_t num_sequences;
  int32_t num_rows;    // padded: rows a sequence; packed: tokens, with what follows the last sequence
  int32_t max_length;  // longest sequence: sizes the grid; longer ones are still computed whole
  int32_t num_heads;
  int32_t heads_per_group;  // query heads a key/value head
  int32_t alpha_stride;     // 0: one for all heads; 1: one a head
  Form form;
  float scale;  // > 0
};

// Launches on `stream` (cudaStream_t). Returns a cudaError_t, 0 for success; cudaErrorInvalidValue for a head dim that isn't built.
int launch_forward(const ForwardParams& params, Element element, int head_dim, void* stream);

}  // namespace soft_mask
