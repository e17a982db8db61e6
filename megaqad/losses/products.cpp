// BF16 matrix products of an output head with FP32 results, for CPUs with matrix instructions (AMX).
//
// PyTorch's CPU library exports oneDNN's block product (brgemm: BF16 blocks in, FP32 block out or added to), and no
// operator of it returns FP32 from BF16. What is left to do here is to bring the second operand of each block into the
// order that the instructions want: pairs of rows side by side, [K / 2, columns, 2].
//
// Compiled on first use by products.py with PyTorch's own headers, called through ctypes. All matrices are row-major.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

namespace blas = at::native::cpublas;
using bf16 = at::BFloat16;

// A packed block of 256 KiB stays in cache. Measured among 64 to 256 columns and 256 to 1024 rows.
constexpr int64_t kColumns = 128;
constexpr int64_t kDepth = 1024;

typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));

inline void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Words x[4], y[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&x[i], from + i * from_stride, sizeof x[i]);
  for (int step = 0; step < 2; ++step) {  // two perfect shuffles of the 16 words
    for (int i = 0; i < 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + 2], Words{0, 4, 1, 5});
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 2], Words{2, 6, 3, 7});
    }
    std::memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

inline void transpose_tile(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  Halves x[8], y[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&x[i], from + i * from_stride, sizeof x[i]);
  for (int step = 0; step < 3; ++step) {  // three perfect shuffles of the 64 halves
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + 4], Halves{0, 8, 1, 9, 2, 10, 3, 11});
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 4], Halves{4, 12, 5, 13, 6, 14, 7, 15});
    }
    std::memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

// to [columns, rows] = from [rows, columns]^T; words go in tiles of four, halves in tiles of eight
template <typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t kTile = 16 / sizeof(T);
  const int64_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
  for (int64_t column = 0; column < whole_columns; column += kTile)
    for (int64_t row = 0; row < whole_rows; row += kTile)
      transpose_tile(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      to[column * to_stride + row] = from[row * from_stride + column];
}

// Pairs of rows side by side: to [rows / 2, columns, 2], with a row of zeros after an odd number of rows.
void interleave(const bf16* from, int64_t from_stride, int64_t rows, int64_t columns, bf16* to) {
  const uint16_t* source = reinterpret_cast<const uint16_t*>(from);
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  for (int64_t row = 0; row < rows; row += 2, words += columns) {
    const uint16_t *first = source + row * from_stride, *second = first + from_stride;
    if (row + 1 == rows) {
      std::copy(first, first + columns, words);
      return;
    }
    for (int64_t column = 0; column < columns; ++column) words[column] = first[column] | uint32_t(second[column]) << 16;
  }
}

int64_t even(int64_t count) { return count + count % 2; }

}  // namespace

extern "C" {

// Whether this processor has the instructions, and this PyTorch the code for them.
int megaqad_can_multiply() { return blas::could_pack(at::kBFloat16); }

// out [n, V] = hidden [n, H] head [V, H]^T; H and the strides of both are even
void megaqad_logits(const bf16* hidden, int64_t hidden_stride, const bf16* head, int64_t head_stride, float* out,
                    int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> packed(kColumns * H);
#pragma omp for schedule(static)
    for (int64_t v = 0; v < V; v += kColumns) {
      int64_t columns = std::min(kColumns, V - v);
      transpose(reinterpret_cast<const uint32_t*>(head + v * head_stride), head_stride / 2, columns, H / 2,
                reinterpret_cast<uint32_t*>(packed.data()), columns);
      blas::brgemm(n, columns, H, hidden_stride, columns, out_stride, false, hidden, packed.data(), out + v);
    }
    blas::brgemm_release();
  }
}

// out [n, H] = slope [n, V] head [V, H]
void megaqad_hidden_gradient(const bf16* slope, int64_t slope_stride, const bf16* head, int64_t head_stride, float* out,
                             int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
  // one block of the slope at a time, copied together: all columns of the result read it, far apart it costs a page each
  std::vector<bf16> block(n * kDepth);
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> packed(kDepth * kColumns);
    for (int64_t v = 0; v < V; v += kDepth) {
      const int64_t depth = std::min(kDepth, V - v);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < n; ++row) {
        bf16* to = std::copy_n(slope + row * slope_stride + v, depth, block.data() + row * even(depth));
        if (depth % 2) *to = bf16(0);  // products take columns in pairs
      }
#pragma omp for schedule(static)
      for (int64_t h = 0; h < H; h += kColumns) {
        int64_t columns = std::min(kColumns, H - h);
        interleave(head + v * head_stride + h, head_stride, depth, columns, packed.data());
        blas::brgemm(n, columns, even(depth), even(depth), columns, out_stride, v > 0, block.data(), packed.data(),
                     out + h);
      }
    }
    blas::brgemm_release();
  }
}

// total [V, H] += slope [n, V]^T hidden [n, H]
void megaqad_head_gradient(const bf16* slope, int64_t slope_stride, const bf16* hidden, int64_t hidden_stride,
                           float* total, int64_t total_stride, int64_t n, int64_t V, int64_t H, int threads) {
  const int64_t depth = even(n);
  std::vector<bf16> packed(depth * H);
  for (int64_t h = 0; h < H; h += kColumns)
    interleave(hidden + h, hidden_stride, n, std::min(kColumns, H - h), packed.data() + depth * h);
#pragma omp parallel num_threads(threads)
  {
    std::vector<bf16> turned(kColumns * depth, bf16(0));
#pragma omp for schedule(static)
    for (int64_t v = 0; v < V; v += kColumns) {
      int64_t rows = std::min(kColumns, V - v);
      transpose(reinterpret_cast<const uint16_t*>(slope + v), slope_stride, n, rows,
                reinterpret_cast<uint16_t*>(turned.data()), depth);
      for (int64_t h = 0; h < H; h += kColumns) {
        int64_t columns = std::min(kColumns, H - h);
        blas::brgemm(rows, columns, depth, depth, columns, total_stride, true, turned.data(),
                     packed.data() + depth * h, total + v * total_stride + h);
      }
    }
    blas::brgemm_release();
  }
}
}
