// 8- and 4-bit weights times activations in 16-bit steps: exact integer sums, on AVX2 and up.
//
// Each row (token) of activations is rounded to integers of at most `max_step`, chosen so that no sum of products can
// leave int32. Integer sums do not depend on their order, and whatever follows in floating point is done row by row in
// one order: a row's result depends neither on the batch it is in, nor on the number of threads, nor on the tier.
//
// A vector holds pairs of input channels for 8 (AVX2) or 16 (AVX-512) output channels, as vpmaddwd and vpdpwssd want
// them. A tile is R rows by P panels of 16 output channels; its sums stay in registers for all of K. Weights are
// widened to int16 on the way from memory, once for each R rows: a twelfth or less of the arithmetic of a full tile.
//
// Compiled once for each tier, with that tier's instructions and no others; nothing of torch is included here.

#include "int16_linear.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace morphserve {
namespace {

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#ifdef __AVX512F__
using Ints = __m512i;
using Floats = __m512;
constexpr int kMaxRows = 12;
constexpr int kMaxPanels = 2;

INLINE Ints zeros() { return _mm512_setzero_si512(); }
INLINE Ints load(const void* p) { return _mm512_loadu_si512(p); }
INLINE Ints widen_int8(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE Ints widen_uint8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE Ints all(int32_t value) { return _mm512_set1_epi32(value); }
INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
INLINE Ints pairs(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
template <int Position>
INLINE Ints nibble(Ints words) {
  if constexpr (Position == 0) return _mm512_and_si512(words, _mm512_set1_epi16(15));
  if constexpr (Position == 3) return _mm512_srli_epi16(words, 12);
  return _mm512_and_si512(_mm512_srli_epi16(words, 4 * Position), _mm512_set1_epi16(15));
}
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
INLINE Floats all_floats(float value) { return _mm512_set1_ps(value); }
INLINE Floats no_floats() { return _mm512_setzero_ps(); }
INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
template <int Octet>
INLINE __m256 octet(Floats a) {
  return _mm512_extractf32x8_ps(a, Octet);
}
#else
using Ints = __m256i;
using Floats = __m256;
constexpr int kMaxRows = 6;
constexpr int kMaxPanels = 1;

INLINE Ints zeros() { return _mm256_setzero_si256(); }
INLINE Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Ints widen_int8(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE Ints widen_uint8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
INLINE Ints all(int32_t value) { return _mm256_set1_epi32(value); }
INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
INLINE Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
INLINE Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
INLINE Ints pairs(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
template <int Position>
INLINE Ints nibble(Ints words) {
  if constexpr (Position == 0) return _mm256_and_si256(words, _mm256_set1_epi16(15));
  if constexpr (Position == 3) return _mm256_srli_epi16(words, 12);
  return _mm256_and_si256(_mm256_srli_epi16(words, 4 * Position), _mm256_set1_epi16(15));
}
INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
INLINE Floats all_floats(float value) { return _mm256_set1_ps(value); }
INLINE Floats no_floats() { return _mm256_setzero_ps(); }
INLINE Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
template <int Octet>
INLINE __m256 octet(Floats a) {
  return a;
}
#endif

constexpr int kLanes = sizeof(Ints) / 4;              // output channels in a vector
constexpr int kPerPanel = static_cast<int>(kPanel) / kLanes;  // vectors across a panel
constexpr int kMinChains = 8;  // sums in flight that keep the multipliers busy

// The sum is complete here, in this order: compilers would otherwise load all rows first, and have no registers left.
INLINE Ints pinned(Ints sum) {
  asm volatile("" : "+v"(sum));
  return sum;
}

// vpdpwssd adds in the same instruction, but its result is late: with few sums in flight the pair is faster.
template <int Chains>
INLINE Ints accumulate(Ints sum, Ints a, Ints b) {
#ifdef __AVX512VNNI__
  if constexpr (Chains >= kMinChains) return pinned(_mm512_dpwssd_epi32(sum, a, b));
#endif
  return pinned(add(sum, pairs(a, b)));
}

template <typename F, int... I>
INLINE void unroll_all(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(Count - 1) as constants: every vector named through them stays in a register.
template <int Count, typename F>
INLINE void unroll(F&& f) {
  unroll_all(f, std::make_integer_sequence<int, Count>{});
}

// ---- activations ---------------------------------------------------------------------------------------------------

INLINE __m256 read(const float* p) { return _mm256_loadu_ps(p); }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE __m256 read(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

INLINE __m256 read(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

INLINE void write(float* p, __m256 values) { _mm256_storeu_ps(p, values); }

INLINE void write(BFloat16* p, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

INLINE void write(Float16* p, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

INLINE int32_t largest(__m256i a) {
  __m128i b = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_max_epi32(b, _mm_shuffle_epi32(b, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(b, _mm_shuffle_epi32(b, 0b10110001)));
}

INLINE int32_t total(__m256i a) {
  __m128i b = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  b = _mm_add_epi32(b, _mm_shuffle_epi32(b, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(b, _mm_shuffle_epi32(b, 0b10110001)));
}

// Steps of one row, and the size of a step. The largest magnitude becomes +-max_step. NaN and infinities make the
// size NaN, and so all outputs of the row.
template <typename T>
float round_row(const T* x, int64_t num_inputs, int32_t max_step, int16_t* steps) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  // Magnitudes order like their bit patterns, NaN above all.
  for (int64_t k = 0; k < num_inputs; k += 8) {
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(read(x + k)), magnitude));
  }
  const int32_t bits = largest(top);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  if (!(peak >= 1e-30f && bits < 0x7f800000)) {  // below: its inverse would overflow
    std::memset(steps, 0, num_inputs * sizeof *steps);
    return bits < 0x7f800000 ? 0.0f : __builtin_nanf("");
  }
  const __m256 inverse = _mm256_set1_ps(static_cast<float>(max_step) / peak);
  for (int64_t k = 0; k < num_inputs; k += 16) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(read(x + k), inverse));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(read(x + k + 8), inverse));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(steps + k), both);
  }
  return peak / static_cast<float>(max_step);
}

void sum_groups(const int16_t* steps, int64_t num_groups, int64_t group_size, int32_t* sums) {
  for (int64_t g = 0; g < num_groups; ++g) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = 0; k < group_size; k += 16) {
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(steps + g * group_size + k));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(some, _mm256_set1_epi16(1)));
    }
    sums[g] = total(sum);
  }
}

// So many steps that K products with weights of at most 127 fit into int32. A group of 4-bit weights always fits.
int32_t max_step(const Linear& linear) {
  const int64_t fits = linear.group_size ? 32767 : INT32_MAX / (127 * linear.num_inputs);
  return static_cast<int32_t>(std::min<int64_t>(32767, fits));
}

template <typename T>
void round_rows(const Linear& linear, int64_t first, int64_t end) {
  const int64_t stride = step_stride(linear.num_inputs);
  for (int64_t row = first; row < end; ++row) {
    int16_t* steps = linear.steps + row * stride;
    const T* x = static_cast<const T*>(linear.x) + row * linear.num_inputs;
    linear.row_scale[row] = round_row(x, linear.num_inputs, max_step(linear), steps);
    if (linear.group_size) {
      const int64_t groups = linear.num_inputs / linear.group_size;
      sum_groups(steps, groups, linear.group_size, linear.group_sums + row * groups);
    }
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

struct Tile {
  int64_t row, panel;
};

INLINE int32_t pair_at(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}

INLINE void write(const Linear& linear, int64_t index, __m256 values) {
  switch (linear.dtype) {
    case Float::kFloat32: return write(static_cast<float*>(linear.out) + index, values);
    case Float::kBFloat16: return write(static_cast<BFloat16*>(linear.out) + index, values);
    case Float::kFloat16: return write(static_cast<Float16*>(linear.out) + index, values);
  }
}

template <int R, int P>
INLINE void finish(const Linear& linear, Tile at, const Floats (&sums)[R][P * kPerPanel]) {
  unroll<R>([&](auto r) INLINE_LAMBDA {
    const Floats size = all_floats(linear.row_scale[at.row + r]);
    unroll<P * kPerPanel>([&](auto v) INLINE_LAMBDA {
      const int64_t column = at.panel * kPanel + v * kLanes;
      const Floats bias = linear.bias ? load_floats(linear.bias + column) : no_floats();
      const Floats values = fused(sums[r][v], size, bias);
      const int64_t index = (at.row + r) * linear.num_panels * kPanel + column;
      unroll<kLanes / 8>([&](auto i) INLINE_LAMBDA { write(linear, index + 8 * i, octet<i>(values)); });
    });
  });
}

template <int R, int P>
INLINE void tile_w8(const Linear& linear, Tile at, Floats (&sums)[R][P * kPerPanel]) {
  constexpr int V = P * kPerPanel;
  constexpr int U = R * V >= kMinChains ? 1 : R * V >= kMinChains / 2 ? 2 : 4;  // K is a multiple of 2 U
  const int64_t k = linear.num_inputs, stride = step_stride(k);
  const int8_t* weight = linear.weight + at.panel * kPanel * k;
  const int16_t* x = linear.steps + at.row * stride;
  Ints acc[U][R][V];
  unroll<U>([&](auto u) INLINE_LAMBDA { unroll<R>([&](auto r) INLINE_LAMBDA { unroll<V>([&](auto v) INLINE_LAMBDA { acc[u][r][v] = zeros(); }); }); });
  for (int64_t pair = 0; pair < k / 2; pair += U) {
    unroll<U>([&](auto u) INLINE_LAMBDA {
      Ints w[V];
      unroll<V>([&](auto v) INLINE_LAMBDA {
        const int64_t panel = v / kPerPanel, part = v % kPerPanel;
        w[v] = widen_int8(weight + panel * kPanel * k + (pair + u) * 2 * kPanel + part * 2 * kLanes);
      });
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const Ints both = all(pair_at(x + r * stride + 2 * (pair + u)));
        unroll<V>([&](auto v) INLINE_LAMBDA { acc[u][r][v] = accumulate<R * V>(acc[u][r][v], w[v], both); });
      });
    });
  }
  unroll<R>([&](auto r) INLINE_LAMBDA {
    unroll<V>([&](auto v) INLINE_LAMBDA {
      unroll<U - 1>([&](auto u) INLINE_LAMBDA { acc[0][r][v] = add(acc[0][r][v], acc[u + 1][r][v]); });
      const float* scale = linear.scale + at.panel * kPanel + v * kLanes;
      sums[r][v] = times(to_floats(acc[0][r][v]), load_floats(scale));
    });
  });
}

template <int R, int P>
INLINE void tile_w4(const Linear& linear, Tile at, Floats (&sums)[R][P * kPerPanel]) {
  constexpr int V = P * kPerPanel;
  const int64_t k = linear.num_inputs, stride = step_stride(k), groups = k / linear.group_size;
  const int8_t* weight = linear.weight + at.panel * kPanel * k / 2;
  const int16_t* x = linear.steps + at.row * stride;
  unroll<R>([&](auto r) INLINE_LAMBDA { unroll<V>([&](auto v) INLINE_LAMBDA { sums[r][v] = no_floats(); }); });
  for (int64_t g = 0; g < groups; ++g) {
    Ints acc[R][V];
    unroll<R>([&](auto r) INLINE_LAMBDA { unroll<V>([&](auto v) INLINE_LAMBDA { acc[r][v] = zeros(); }); });
    for (int64_t i = g * linear.group_size; i < (g + 1) * linear.group_size; i += 8) {
      Ints words[V];
      unroll<V>([&](auto v) INLINE_LAMBDA {
        const int64_t panel = v / kPerPanel, part = v % kPerPanel;
        words[v] = load(weight + panel * kPanel * k / 2 + i * kPanel / 2 + part * 4 * kLanes);
      });
      unroll<4>([&](auto j) INLINE_LAMBDA {
        Ints w[V];
        unroll<V>([&](auto v) INLINE_LAMBDA { w[v] = nibble<j>(words[v]); });
        unroll<R>([&](auto r) INLINE_LAMBDA {
          const Ints both = all(pair_at(x + r * stride + i + 2 * j));
          unroll<V>([&](auto v) INLINE_LAMBDA { acc[r][v] = accumulate<R * V>(acc[r][v], w[v], both); });
        });
      });
    }
    unroll<V>([&](auto v) INLINE_LAMBDA {
      const int64_t panel = at.panel + v / kPerPanel, part = v % kPerPanel;
      const int64_t where = (panel * groups + g) * kPanel + part * kLanes;
      const Ints zero = widen_uint8(linear.zero + where);
      const Floats scale = load_floats(linear.scale + where);
      unroll<R>([&](auto r) INLINE_LAMBDA {
        const Ints sum = all(linear.group_sums[(at.row + r) * groups + g]);
        const Ints centred = subtract(acc[r][v], multiply(zero, sum));
        sums[r][v] = fused(to_floats(centred), scale, sums[r][v]);
      });
    });
  }
}

template <bool kFour, int R, int P>
void tile(const Linear& linear, Tile at) {
  Floats sums[R][P * kPerPanel];
  if constexpr (kFour) {
    tile_w4<R, P>(linear, at, sums);
  } else {
    tile_w8<R, P>(linear, at, sums);
  }
  finish<R, P>(linear, at, sums);
}

// ---- the whole linear ----------------------------------------------------------------------------------------------

using TileFunction = void (*)(const Linear&, Tile);

struct Tiles {
  int64_t max_rows;
  const TileFunction* of_rows;  // [rows - 1]
};

template <bool kFour, int P, int... R>
Tiles tiles_of(std::integer_sequence<int, R...>) {
  static constexpr TileFunction functions[] = {tile<kFour, R + 1, P>...};
  return {sizeof...(R), functions};
}

template <bool kFour>
Tiles tiles_across(int64_t panels) {
  if (panels == kMaxPanels) {
    return tiles_of<kFour, kMaxPanels>(std::make_integer_sequence<int, kMaxRows>{});
  }
  return tiles_of<kFour, 1>(std::make_integer_sequence<int, 4>{});  // the odd last panel; not worth compiling more
}

constexpr int64_t kBlockBytes = 1 << 18;   // activations that stay in the second-level cache while weights pass
constexpr int64_t kMinWork = 1 << 17;      // products that are worth waking a thread for
constexpr int64_t kMaxAlone = 1 << 14;     // activations that one thread rounds sooner than threads wait for each other

struct Share {
  int64_t first, end;
};

INLINE Share share_of(int64_t count, int64_t index, int64_t parts) {
  return {count * index / parts, count * (index + 1) / parts};
}

// All rows of a block against some panels. Tiles of nearly equal height: the last is never much smaller.
void run_block(const Linear& linear, Share rows, int64_t panel, int64_t num_panels) {
  const Tiles tiles = linear.group_size ? tiles_across<true>(num_panels) : tiles_across<false>(num_panels);
  const int64_t count = rows.end - rows.first, parts = (count + tiles.max_rows - 1) / tiles.max_rows;
  for (int64_t i = 0; i < parts; ++i) {
    const Share some = share_of(count, i, parts);
    tiles.of_rows[some.end - some.first - 1](linear, {rows.first + some.first, panel});
  }
}

void round_some(const Linear& linear, Share rows) {
  switch (linear.dtype) {
    case Float::kFloat32: return round_rows<float>(linear, rows.first, rows.end);
    case Float::kBFloat16: return round_rows<BFloat16>(linear, rows.first, rows.end);
    case Float::kFloat16: return round_rows<Float16>(linear, rows.first, rows.end);
  }
}

}  // namespace

void run(const Linear& linear) {
  const int64_t across = (linear.num_panels + kMaxPanels - 1) / kMaxPanels;
  const int64_t fitting = std::max<int64_t>(kBlockBytes / (2 * linear.num_inputs), 4 * kMaxRows);
  const int64_t blocks = (linear.num_rows + fitting - 1) / fitting;
  const int64_t work = linear.num_rows * linear.num_panels * kPanel * linear.num_inputs;
  const int64_t wanted = std::min(std::max<int64_t>(work / kMinWork, 1), across * blocks);
  const int threads = omp_in_parallel() ? 1 : static_cast<int>(std::min<int64_t>(omp_get_max_threads(), wanted));
  const bool alone = linear.num_rows * linear.num_inputs <= kMaxAlone;
  if (alone) {
    round_some(linear, {0, linear.num_rows});
  }
// No num_threads: libgomp ends the threads that a smaller team leaves over, and the next larger one starts them again.
#pragma omp parallel if (threads > 1)
  {
    const int64_t parts = std::min(omp_get_num_threads(), threads);
    const int64_t self = std::min<int64_t>(omp_get_thread_num(), parts);  // `parts`: nothing to do but meet the others
    if (!alone) {
      if (self < parts) {
        round_some(linear, share_of(linear.num_rows, self, parts));
      }
#pragma omp barrier
    }
    const Share units = self < parts ? share_of(across * blocks, self, parts) : Share{};
    for (int64_t unit = units.first; unit < units.end; ++unit) {
      const int64_t panel = unit % across * kMaxPanels;
      const int64_t width = std::min<int64_t>(kMaxPanels, linear.num_panels - panel);
      run_block(linear, share_of(linear.num_rows, unit / across, blocks), panel, width);
    }
  }
}

}  // namespace morphserve
