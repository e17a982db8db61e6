// BF16 matrix products of an output head with FP32 results, for CPUs with matrix instructions (AMX).
//
// PyTorch's CPU library exports oneDNN's block product (brgemm: BF16 blocks in, FP32 block out or added to), and no
// operator of it returns FP32 from BF16. What is left to do here is to bring operands into the order that the
// instructions want, to keep in cache what is multiplied, and to write large results past the caches: a plain store
// reads each line of memory first, which takes as long again.
//
// Tried and slower: summing the loss's statistics over each block of logits while it is in cache (two packed heads at a
// time do not fit), and fetching blocks ahead in software.
//
// Where blocks are independent, threads take them as they get done: a core is often somebody else's too.
//
// Compiled on first use by products.py with PyTorch's own headers, called through ctypes. All matrices are row-major.

#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../vectors.h"

namespace {

namespace blas = at::native::cpublas;
using bf16 = at::BFloat16;

// Columns of a packed operand that lie together: for 64 the product is fastest.
constexpr int64_t kPanel = 64;
// Rows and columns of a result that are made at a time, and the depth of the sum over the vocabulary: two operands and
// a result stay in a second-level cache of 2 MiB. Measured among 64 to 256, 64 to 512, and 128 to 1536.
constexpr int64_t kRows = 128;
constexpr int64_t kColumns = 256;
constexpr int64_t kDepth = 256;
// Rows of a result that grows with that sum: with fewer the head is packed more often, with more the cache overflows.
// And columns of the slope that threads copy together before they wait for each other.
constexpr int64_t kSummedRows = 1024;
constexpr int64_t kCopied = 4 * kDepth;

constexpr int64_t kTile = 16;
static_assert(kTile == kLanes, "where there is AMX there is AVX-512");

// 16 x 16 words
inline void transpose_tile(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  Words x[kTile], y[kTile];
  for (int i = 0; i < kTile; ++i) std::memcpy(&x[i], from + i * from_stride, sizeof x[i]);
  for (int step = 0; step < 4; ++step) {  // four perfect shuffles of the 256 words
    for (int i = 0; i < kTile / 2; ++i) {
      y[2 * i] = first_half(x[i], x[i + kTile / 2]);
      y[2 * i + 1] = second_half(x[i], x[i + kTile / 2]);
    }
    std::memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < kTile; ++i) std::memcpy(to + i * to_stride, &x[i], sizeof x[i]);
}

// to [columns, rows] = from [rows, columns]^T
void transpose(const uint32_t* from, int64_t from_stride, int64_t rows, int64_t columns, uint32_t* to,
               int64_t to_stride) {
  const int64_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
  for (int64_t column = 0; column < whole_columns; column += kTile)
    for (int64_t row = 0; row < whole_rows; row += kTile)
      transpose_tile(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
      to[column * to_stride + row] = from[row * from_stride + column];
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

// Distance of rows of K columns in a copied operand: an odd number of cache lines, because rows a power of two apart
// would share few sets of the cache.
int64_t apart(int64_t K) { return ((K + 31) / 32 | 1) * 32; }

// from [start, start + size) of `total`, cut into panels
template <typename Action>
void for_panels(int64_t total, const Action& action) {
  for (int64_t start = 0; start < total; start += kPanel) action(start, std::min(kPanel, total - start));
}

// c [m, columns] = a [m, K] b [K, columns], or += that. b lies in panels of kPanel columns, each [K / 2, columns, 2]; K
// is even.
void multiply(const bf16* a, int64_t a_stride, const uint32_t* b, int64_t m, int64_t columns, int64_t K, float* c,
              int64_t c_stride, bool add) {
  for_panels(columns, [&](int64_t start, int64_t size) {
    blas::brgemm(m, size, K, a_stride, size, c_stride, add, a, halves(b + start * (K / 2)), c + start);
  });
}

// to [columns] = from, or, with `add`, += from, past the caches where `to` begins a cache line. `from` does.
void write(float* to, const float* from, int64_t columns, bool add) {
  int64_t column = 0;
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
    for (; column + kTile <= columns; column += kTile) {
      __m512 values = _mm512_load_ps(from + column);
      _mm512_stream_ps(to + column, add ? values + _mm512_load_ps(to + column) : values);
    }
  for (; column < columns; ++column) to[column] = add ? to[column] + from[column] : from[column];
}

}  // namespace

extern "C" {

// Whether this processor has the instructions, and this PyTorch the code for them.
int megaqad_can_multiply() { return blas::could_pack(at::kBFloat16); }

// out [n, V] = hidden [n, H] head [V, H]^T; H and the strides of both are even
void megaqad_logits(const bf16* hidden, int64_t hidden_stride, const bf16* head, int64_t head_stride, float* out,
                    int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
  const int64_t stride = apart(H);
  Scratch<bf16> rows(n * stride);
  for (int64_t row = 0; row < n; ++row) std::copy_n(hidden + row * hidden_stride, H, rows.get() + row * stride);
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> packed(kColumns * H / 2);
    Scratch<float> product(kRows * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t v = 0; v < V; v += kColumns) {
      const int64_t columns = std::min(kColumns, V - v);
      for_panels(columns, [&](int64_t start, int64_t size) {  // two neighbours of a row are a word: they stay together
        transpose(reinterpret_cast<const uint32_t*>(head + (v + start) * head_stride), head_stride / 2, size, H / 2,
                  packed.get() + start * (H / 2), size);
      });
      for (int64_t first = 0; first < n; first += kRows) {
        const int64_t count = std::min(kRows, n - first);
        multiply(rows.get() + first * stride, stride, packed.get(), count, columns, H, product.get(), kColumns, false);
        for (int64_t row = 0; row < count; ++row)
          write(out + (first + row) * out_stride + v, product.get() + row * kColumns, columns, false);
      }
    }
    _mm_sfence();  // what was written past the caches is there for all threads
    blas::brgemm_release();
  }
}

// out [n, H] = slope [n, V] head [V, H]
void megaqad_hidden_gradient(const bf16* slope, int64_t slope_stride, const bf16* head, int64_t head_stride, float* out,
                             int64_t out_stride, int64_t n, int64_t V, int64_t H, int threads) {
  const int64_t rows = std::min(n, kSummedRows);
  const int64_t stride = apart(kCopied);
  const int64_t panels = (H + kPanel - 1) / kPanel;
  Scratch<float> sums(panels * rows * kPanel);
  // some columns of the slope, copied together: all columns of the result read them, far apart they cost a page each
  Scratch<bf16> block(rows * stride);
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> packed(kDepth / 2 * kPanel);
    for (int64_t first = 0; first < n; first += rows) {
      const int64_t count = std::min(rows, n - first);
      for (int64_t copied = 0; copied < V; copied += kCopied) {
        const int64_t width = std::min(kCopied, V - copied);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; ++row) {
          bf16* end = std::copy_n(slope + (first + row) * slope_stride + copied, width, block.get() + row * stride);
          if (width % 2) *end = bf16(0);  // products take columns in pairs
        }
#pragma omp for schedule(static)
        for (int64_t share = 0; share < threads; ++share)
          for (int64_t v = 0; v < width; v += kDepth)
            for (int64_t panel = panels * share / threads; panel < panels * (share + 1) / threads; ++panel) {
              const int64_t h = panel * kPanel, columns = std::min(kPanel, H - h), depth = std::min(kDepth, width - v);
              interleave(head + (copied + v) * head_stride + h, head_stride, depth, columns, packed.get());
              for (int64_t row = 0; row < count; row += kRows)
                multiply(block.get() + row * stride + v, stride, packed.get(), std::min(kRows, count - row), columns,
                         even(depth), sums.get() + (panel * rows + row) * kPanel, kPanel, copied + v > 0);
            }
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < count; ++row)
        for_panels(H, [&](int64_t start, int64_t size) {
          std::copy_n(sums.get() + start * rows + row * kPanel, size, out + (first + row) * out_stride + start);
        });
    }
    blas::brgemm_release();
  }
}

// total [V, H] = slope [n, V]^T hidden [n, H], or, with `add`, += that
void megaqad_head_gradient(const bf16* slope, int64_t slope_stride, const bf16* hidden, int64_t hidden_stride,
                           float* total, int64_t total_stride, int64_t n, int64_t V, int64_t H, int threads, int add) {
  const int64_t depth = even(n), stride = apart(n);
  Scratch<uint32_t> packed(depth / 2 * H);
  for_panels(H, [&](int64_t start, int64_t size) {
    interleave(hidden + start, hidden_stride, n, size, packed.get() + start * (depth / 2));
  });
#pragma omp parallel num_threads(threads)
  {
    Scratch<uint32_t> pairs(depth / 2 * kColumns), turned(stride / 2 * kColumns);
    Scratch<float> product(kColumns * kColumns);
#pragma omp for schedule(dynamic)
    for (int64_t v = 0; v < V; v += kColumns) {
      const int64_t rows = std::min(kColumns, V - v);
      interleave(slope + v, slope_stride, n, rows, pairs.get());  // two tokens are a word: turned, they are neighbours
      transpose(pairs.get(), rows, depth / 2, rows, turned.get(), stride / 2);
      for (int64_t h = 0; h < H; h += kColumns) {
        const int64_t columns = std::min(kColumns, H - h);
        multiply(halves(turned.get()), stride, packed.get() + h * (depth / 2), rows, columns, depth, product.get(),
                 kColumns, false);
        for (int64_t row = 0; row < rows; ++row)
          write(total + (v + row) * total_stride + h, product.get() + row * kColumns, columns, add);
      }
    }
    _mm_sfence();
    blas::brgemm_release();
  }
}
}
