// Are the Triton kernels' quotients right? (triton_numbers: reciprocal, quotient)
//
// division BITS: for every mantissa of a divisor in [1, 2), every dividend of BITS significant bits in [1, 2), and every
// estimate of the reciprocal within a unit in the last place, how many quotients are not those of the division.
// Scaling by powers of two changes no bit of any step, so these are all divisions that stay among normal numbers.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

static float number(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static float reciprocal(float b, float estimate) {
  uint32_t bits = bits_of(std::fmaf(std::fmaf(-b, estimate, 1.0f), estimate, estimate));
  bool ones = (bits_of(b) & 0x7FFFFF) == 0x7FFFFF;
  return number(ones ? bits | 1 : bits);
}

static float quotient(float a, float b, float r) {
  float q = a * r;
  return std::fmaf(std::fmaf(-b, q, a), r, q);
}

int main(int, char** arguments) {
  const int kept = std::atoi(arguments[1]) - 1;
  const uint32_t one = 0x3F800000, divisors = 1u << 23;
  std::vector<float> dividends;
  for (uint32_t i = 0; i < 1u << kept; i++) dividends.push_back(number(one | i << (23 - kept)));
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<long> wrong(threads);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; thread++)
    running.emplace_back([&, thread] {
      long count = 0;
      for (uint32_t mantissa = thread; mantissa < divisors; mantissa += threads) {
        float b = number(one | mantissa), nearest = 1.0f / b;
        for (int off = -1; off <= 1; off++) {
          float r = reciprocal(b, number(bits_of(nearest) + off));
          int found = 0;
          for (float a : dividends) found += quotient(a, b, r) != a / b;
          count += found;
        }
      }
      wrong[thread] = count;
    });
  long total = 0;
  for (unsigned thread = 0; thread < threads; thread++) running[thread].join(), total += wrong[thread];
  std::printf("%ld wrong of %ld\n", total, 3l * divisors * (long)dividends.size());
}
