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
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace {

namespace blas = at::native::cpublas;
using bf16 = at::BFloat16;

// What is multiplied at a time stays in cache: the first operand in 1 MiB, a packed block of the second in 512 KiB.
// Measured among 64 to 256 columns and a depth of 256 to 1024 rows.
constexpr int64_t kFirst = 1 << 19;
constexpr int64_t kColumns = 256;
constexpr int64_t kDepth = 1024;

constexpr int64_t kTile = 16;
typedef uint32_t Words __attribute__((vector_size(4 * kTile)));

// The first or the last halves of a and b, lane by lane in turn.
inline Words low(Words a, Words b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, Words{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

inline Words high(Words a, Words b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_shuffle(a, b, Words{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// 16 x 16 words
inline void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Words x[kTile], y[kTile];
  for (int i = 0; i < kTile; ++i) std::memcpy(&x[i], from + i * from_stride, sizeof x[i]);
  for (int step = 0; step < 4; ++step) {  // four perfect shuffles of the 256 words
    for (int i = 0; i < kTile / 2; ++i) {
      y[2 * i] = low(x[i], x[i + kTile / 2]);
      y[2 * i + 1] = high(x[i], x[i + kTile / 2]);
    }
    std::memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < kTile; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

// to [columns, rows] = from [rows, columns]^T, dense
void transpose(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to) {
  const int64_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
  for (int64_t column = 0; column < whole_columns; column += kTile)
    for (int64_t row = 0; row < whole_rows; row += kTile)
      transpose_tile(from + row * from_stride + column, from_stride, to + column * rows + row, rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      to[column * rows + row] = from[row * from_stride + column];
}

// Pairs of rows side by side: to [rows / 2, columns] words, with a row of zeros after an odd number of rows.
void interleave(const bf16* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to) {
  const uint16_t* source = reinterpret_cast<const uint16_t*>(from);
  for (int64_t row = 0; row < rows; row += 2, to += columns) {
    const uint16_t *first = source + row * from_stride, *second = first + from_stride;
    if (row + 1 == rows) {
      std::copy(first, first + columns, to);
      return;
    }
    for (int64_t column = 0; column < columns; ++column) to[column] = first[column] | uint32_t(second[column]) << 16;
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that begins with a cache line: the product's loads are 64 bytes long, and would else touch two lines each.
template <typename T>
struct Scratch : std::unique_ptr<T, Free> {
  explicit Scratch(int64_t count)
      : std::unique_ptr<T, Free>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (!this->get()) throw std::bad_alloc();
  }
};

const bf16* halves(const uint32_t* pairs) { return reinterpret_cast<const bf16*>(pairs); }

int64_t even(int64_t count) { return count + count % 2; }

}  // namespace

extern "C" {

// Whether this processor has the instructions, and this PyTorch the code for them.
int megaqad_can_multiply() { return blas::could_pack(at::kBFloat16); }

// out [n, V] = hidden [n, H] head [V, H]^T; H and the strides of both are even
void megaqad_logits(const bf16* hidden, int64_t hidden_stride, const bf16* head, int64_t head_stride, float* out,
                    int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
  const int64_t rows = std::max(kTile, kFirst / H);
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> packed(kColumns * H / 2);
#pragma omp for schedule(static)
    for (int64_t v = 0; v < V; v += kColumns) {
      const int64_t columns = std::min(kColumns, V - v);
      // two neighbours of a row are a word: they stay together
      transpose(reinterpret_cast<const uint32_t*>(head + v * head_stride), head_stride / 2, columns, H / 2,
                packed.get());
      for (int64_t row = 0; row < n; row += rows)
        blas::brgemm(std::min(rows, n - row), columns, H, hidden_stride, columns, out_stride, false,
                     hidden + row * hidden_stride, halves(packed.get()), out + row * out_stride + v);
    }
    blas::brgemm_release();
  }
}

// out [n, H] = slope [n, V] head [V, H]
void megaqad_hidden_gradient(const bf16* slope, int64_t slope_stride, const bf16* head, int64_t head_stride, float* out,
                             int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
  const int64_t rows = std::min(n, kFirst / kDepth);
  const int64_t share = (H / threads + 63) / 64 * 64;  // of a thread: all have something to do
  const int64_t width = std::min(kColumns, std::max<int64_t>(64, share));
  // one block of the slope at a time, copied together: all columns of the result read it, far apart it costs a page each
  Scratch<bf16> block(rows * kDepth);
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> packed(kDepth / 2 * kColumns);
    for (int64_t first = 0; first < n; first += rows) {
      const int64_t count = std::min(rows, n - first);
      for (int64_t v = 0; v < V; v += kDepth) {
        const int64_t depth = std::min(kDepth, V - v);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; ++row) {
          bf16* end = std::copy_n(slope + (first + row) * slope_stride + v, depth, block.get() + row * even(depth));
          if (depth % 2) *end = bf16(0);  // products take columns in pairs
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < H; h += width) {
          const int64_t columns = std::min(width, H - h);
          interleave(head + v * head_stride + h, head_stride, depth, columns, packed.get());
          blas::brgemm(count, columns, even(depth), even(depth), columns, out_stride, v > 0, block.get(),
                       halves(packed.get()), out + first * out_stride + h);
        }
      }
    }
    blas::brgemm_release();
  }
}

// total [V, H] = slope [n, V]^T hidden [n, H], or, with `add`, += that
void megaqad_head_gradient(const bf16* slope, int64_t slope_stride, const bf16* hidden, int64_t hidden_stride,
                           float* total, int64_t total_stride, int64_t n, int64_t V, int64_t H, int threads, int add) {
  const int64_t depth = even(n);
  Scratch<uint32_t> packed(depth / 2 * H);
  for (int64_t h = 0; h < H; h += kColumns)
    interleave(hidden + h, hidden_stride, n, std::min(kColumns, H - h), packed.get() + depth / 2 * h);
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> pairs(depth / 2 * kColumns), turned(depth / 2 * kColumns);
#pragma omp for schedule(static)
    for (int64_t v = 0; v < V; v += kColumns) {
      const int64_t rows = std::min(kColumns, V - v);
      interleave(slope + v, slope_stride, n, rows, pairs.get());  // two tokens are a word: turned, they are neighbours
      transpose(pairs.get(), rows, depth / 2, rows, turned.get());
      for (int64_t h = 0; h < H; h += kColumns)
        blas::brgemm(rows, std::min(kColumns, H - h), depth, depth, std::min(kColumns, H - h), total_stride, add,
                     halves(turned.get()), halves(packed.get() + depth / 2 * h),
                     total + v * total_stride + h);
    }
    blas::brgemm_release();
  }
}
}
