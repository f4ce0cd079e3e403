// What CUDA source of kernels needs of CUDA, on one thread of a CPU.
//
// Instructions are functions named by PTX's words; the layouts are those of the PTX ISA, sections
// "Matrix Fragments for mma.m16n8k16", "... mma.m16n8k8" and "ldmatrix". A copy that may come later
// comes as late as it may: when it is waited for.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

using std::max;
using std::min;
typedef _Float16 half;
struct half2 { half x, y; };
struct alignas(8) half4 { half x, y, z, w; };
struct float2 { float x, y; };
// The upper half of a float, rounded to nearest, ties to even.
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float value) {
    uint32_t all;
    memcpy(&all, &value, 4);
    bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t all = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &all, 4);
    return value;
  }
};
struct nv_bfloat162 { nv_bfloat16 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { int x, y; };
static float2 make_float2(float x, float y) { return {x, y}; }

#define __device__
#define __global__
#define __forceinline__ static inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(threads)

// The line of a rule that was broken.
static int fault;
static void require(bool is_so, int line) { if (!is_so) fault = line; }

static Index blockIdx, threadIdx;
static ucontext_t scheduler, begins[1024];
static jmp_buf scheduler_place, places[1024];
static bool has_begun[1024], waits_for_block[1024], has_ended[1024];
static const std::function<void()>* kernel_call;

struct Copy { void* to; const void* from; };
static std::vector<Copy> copies[1024];

// What lanes show each other; used in turns, so that nothing is overwritten that is still read.
union Word { unsigned bits; float number; const void* place; half pair[2]; };
static Word shown[2][1024][8];
static int turn[1024];

// Contexts are for beginnings only: to change between them asks the system each time.
static void wait_for_warp() {
  int t = threadIdx.x;
  if (!_setjmp(places[t])) _longjmp(scheduler_place, 1);
}

static void __syncthreads() {
  waits_for_block[threadIdx.x] = true;
  wait_for_warp();
}

static void run_thread() {
  (*kernel_call)();
  require(copies[threadIdx.x].empty(), __LINE__);  // those that began were waited for
  has_ended[threadIdx.x] = true;
  _longjmp(scheduler_place, 1);
}

static void go_on(int t) {
  threadIdx = {t, 0};
  if (_setjmp(scheduler_place)) return;
  if (has_begun[t]) _longjmp(places[t], 1);
  has_begun[t] = true;
  swapcontext(&scheduler, &begins[t]);
}

// A warp goes as far as it can without the others.
static void run_warp(int first) {
  for (bool is_stopped = false; !is_stopped;) {
    is_stopped = true;
    for (int t = first; t < first + 32; ++t) {
      if (has_ended[t] || waits_for_block[t]) continue;
      go_on(t);
      is_stopped = false;
    }
  }
}

static int run_blocks(int blocks_x, int blocks_y, int threads, const std::function<void()>& call) {
  const size_t stack_bytes = 65536;
  std::vector<char> stacks(stack_bytes * threads);
  kernel_call = &call;
  for (int block = 0; block < blocks_x * blocks_y; ++block) {
    blockIdx = {block % blocks_x, block / blocks_x};
    for (int t = 0; t < threads; ++t) {
      getcontext(&begins[t]);
      begins[t].uc_stack = {&stacks[stack_bytes * t], 0, stack_bytes};
      begins[t].uc_link = nullptr;
      makecontext(&begins[t], run_thread, 0);
      has_begun[t] = waits_for_block[t] = has_ended[t] = false;
      turn[t] = 0;
    }
    // Between barriers of the block its warps come in one order and then in the other.
    for (int round = 0; !std::all_of(has_ended, has_ended + threads, [](bool b) { return b; });
         ++round) {
      std::fill(waits_for_block, waits_for_block + threads, false);
      for (int i = 0; i < threads; i += 32) run_warp(round % 2 ? threads - 32 - i : i);
    }
  }
  return fault;
}

// Show words to all lanes of the warp; returns those of its first lane.
template <typename... Words>
static Word (*show(Words... words))[8] {
  Word given[] = {words...};
  int side = turn[threadIdx.x]++ % 2;
  std::copy(given, given + sizeof...(words), shown[side][threadIdx.x]);
  wait_for_warp();
  return &shown[side][threadIdx.x / 32 * 32];
}

static Word bits_of(unsigned bits) { Word word; word.bits = bits; return word; }
static Word number_of(float number) { Word word; word.number = number; return word; }
static Word place_of(const void* place) { Word word; word.place = place; return word; }

static float __shfl_xor_sync(unsigned, float value, int other) {
  return show(number_of(value))[(threadIdx.x % 32) ^ other][0].number;
}

static char shared_base;
static size_t __cvta_generic_to_shared(const void* place) {
  return (const char*)place - &shared_base;
}
static const void* __cvta_generic_to_global(const void* place) { return place; }
static char* shared_place(unsigned place) { return &shared_base + (int)place; }

static void cp_async_cg_shared_global(unsigned to, const void* from, int bytes) {
  require(bytes == 16 && (size_t)shared_place(to) % 16 == 0 && (size_t)from % 16 == 0, __LINE__);
  copies[threadIdx.x].push_back({shared_place(to), from});
}

static void cp_async_wait_all() {
  for (auto& copy : copies[threadIdx.x]) memcpy(copy.to, copy.from, 16);
  copies[threadIdx.x].clear();
}

// Matrix i has its eight rows, of 8 items each, where lanes 8i to 8i + 7 say.
static void load_matrices(unsigned** to, unsigned row, bool is_transposed) {
  require((size_t)shared_place(row) % 16 == 0, __LINE__);
  int lane = threadIdx.x % 32;
  auto* lanes = show(place_of(shared_place(row)));
  for (int i = 0; i < 4; ++i) {
    half pair[2];
    for (int j = 0; j < 2; ++j) {
      int r = lane / 4, c = lane % 4 * 2 + j;
      if (is_transposed) std::swap(r, c);
      pair[j] = ((const half*)lanes[8 * i + r][0].place)[c];
    }
    memcpy(to[i], pair, 4);
  }
}

static void ldmatrix_sync_aligned_m8n8_x4_shared_b16(
    unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned row) {
  unsigned* to[] = {&a, &b, &c, &d};
  load_matrices(to, row, false);
}

static void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(
    unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned row) {
  unsigned* to[] = {&a, &b, &c, &d};
  load_matrices(to, row, true);
}

static void sub_rn_f16x2(unsigned& d, unsigned a, unsigned b) {
  Word result;
  for (int i = 0; i < 2; ++i) result.pair[i] = bits_of(a).pair[i] - bits_of(b).pair[i];
  d = result.bits;
}

static void mul_rn_f16x2(unsigned& d, unsigned a, unsigned b) {
  Word result;
  for (int i = 0; i < 2; ++i) result.pair[i] = bits_of(a).pair[i] * bits_of(b).pair[i];
  d = result.bits;
}

// Sums of products of a row of A (16 x columns) and a column of B, added in float.
static void multiply(float* d, Word (*lanes)[8], int columns) {
  int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4, a_words = columns / 4;
  for (int i = 0; i < 4; ++i) {
    int row = i < 2 ? group : group + 8, column = place * 2 + (i & 1);
    for (int k = 0; k < columns; ++k) {
      // Of a: item k & 1 of a word, words for rows 0-7 and 8-15 of columns 0-7, then of 8-15.
      half a = lanes[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8].pair[k & 1];
      half b = lanes[column * 4 + k % 8 / 2][a_words + k / 8].pair[k & 1];
      d[i] += (float)a * (float)b;
    }
  }
}

static void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {
  float d[] = {c0, c1, c2, c3};
  multiply(d, show(bits_of(a0), bits_of(a1), bits_of(a2), bits_of(a3), bits_of(b0), bits_of(b1)),
           16);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

static void mma_sync_aligned_m16n8k8_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned b0, float c0,
    float c1, float c2, float c3) {
  float d[] = {c0, c1, c2, c3};
  multiply(d, show(bits_of(a0), bits_of(a1), bits_of(b0)), 8);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}
