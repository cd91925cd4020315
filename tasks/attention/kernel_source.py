"""The C++ that bucketed attention rests on, as text: it is compiled on the machine where it runs
(``tasks.attention.kernel``), and being a Python module it joins the keys of the steps that use it."""

COMMON = r"""
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

typedef float v8 __attribute__((vector_size(32)));
typedef float u8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32)));

static const int R = 6;       // rows of a tile: 12 accumulators of 8 floats fill the registers of AVX2
static const int BLOCK = 128; // keys between two rescalings
static inline v8 load(const float* p) { return *(const u8*)p; }
static inline void store(float* p, v8 x) { *(u8*)p = x; }
static inline v8 all(float x) { return v8{x, x, x, x, x, x, x, x}; }
static inline int up(int n) { return (n + 15) / 16 * 16; }

// exp for x <= 0, relative error 2e-7, 0 below -87.
static inline v8 vexp(v8 x) {
  v8 n = (x * all(1.44269504f) + all(12582912.f)) - all(12582912.f);
  v8 r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
  v8 y = all(1.9875691500e-4f);
  y = y * r + all(1.3981999507e-3f);
  y = y * r + all(8.3334519073e-3f);
  y = y * r + all(4.1665795894e-2f);
  y = y * r + all(1.6666665459e-1f);
  y = y * r + all(5.0000001201e-1f);
  y = y * r * r + r + all(1.f);
  i8 e = (__builtin_convertvector(n, i8) + 127) << 23;
  v8 two;
  std::memcpy(&two, &e, 32);
  return x > all(-87.f) ? y * two : all(0.f);
}

struct Job {
  int64_t batch, heads, groups, rows, keys, width, out_width, buckets, features, probes, window, band, offset;
  int64_t causal, residual, threads;
  float scale;
  const float *q, *k, *v, *x;                       // x: what of a key is hashed, [batch, groups, keys, features]
  int64_t qs[3], ks[3], vs[3], xs[3];               // strides of batch, head and position; the last is 1
  const uint8_t* seen;                              // [batch, keys] or null
  const float *table, *bias, *spread;               // [groups, buckets, features], [groups, buckets] twice
  int32_t *code, *probe;                            // [batch, groups, keys], [batch, heads, rows, probes]
  float *out, *lse;                                 // [batch, rows, heads, out_width], [batch, heads, rows]
  const float* grad;                                // as out
  float *dq, *dk, *dv;                              // contiguous, as q, k and v
};

template <class F> static void parallel(int64_t n, int64_t threads, F f) {
  std::atomic<int64_t> next(0);
  auto work = [&] { for (int64_t i; (i = next++) < n;) f(i); };
  std::vector<std::thread> others;
  for (int64_t t = 1; t < std::min(threads, n); t++) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}

// Memory that is written before it is read; a vector would clear it first.
struct Floats {
  std::unique_ptr<float[]> at;
  Floats() {}
  explicit Floats(size_t n) : at(new float[n]) {}
  float* data() const { return at.get(); }
};

// s[r][0..16) = q[r] . panel, for a panel [width][16].
template <int N> static void score_panel(const float* q, int ld, const float* panel, int width, float* s, int lds) {
  v8 a[N][2];
  for (int r = 0; r < N; r++) a[r][0] = a[r][1] = all(0.f);
  for (int d = 0; d < width; d++) {
    v8 x = load(panel + 16 * d), y = load(panel + 16 * d + 8);
#pragma GCC unroll 8
    for (int r = 0; r < N; r++) {
      v8 f = all(q[r * ld + d]);
      a[r][0] += f * x;
      a[r][1] += f * y;
    }
  }
  for (int r = 0; r < N; r++) { store(s + r * lds, a[r][0]); store(s + r * lds + 8, a[r][1]); }
}

// s[R][0..up(n)) for packed keys.
static void scores(const float* q, int ld, const float* packed, int n, int width, float* s, int lds) {
  for (int j = 0; j < n; j += 16) score_panel<R>(q, ld, packed + (size_t)j * width, width, s + j, lds);
}

// Rows [n][ld] to panels [up(n)/16][width][16], zeros behind the end.
static void pack(const float* rows, int64_t ld, int n, int width, float* packed) {
  for (int j = 0; j < n; j += 16) {
    float* panel = packed + (size_t)j * width;
    int m = std::min(16, n - j);
    if (m < 16) std::memset(panel, 0, sizeof(float) * 16 * width);
    for (int i = 0; i < m; i++)
      for (int d = 0; d < width; d++) panel[d * 16 + i] = rows[(j + i) * ld + d];
  }
}

// acc[r] = acc[r] * alpha[r] + sum_j p[r][j] * v[j], for width a multiple of 16.
static void add_values(const float* p, int ldp, const float* v, int n, int width, float* const* acc,
                       const float* alpha) {
  for (int e = 0; e < width; e += 16) {
    v8 a[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      a[r][0] = load(acc[r] + e) * all(alpha[r]);
      a[r][1] = load(acc[r] + e + 8) * all(alpha[r]);
    }
    for (int j = 0; j < n; j++) {
      v8 x = load(v + (size_t)j * width + e), y = load(v + (size_t)j * width + e + 8);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        v8 f = all(p[r * ldp + j]);
        a[r][0] += f * x;
        a[r][1] += f * y;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) { store(acc[r] + e, a[r][0]); store(acc[r] + e + 8, a[r][1]); }
  }
}

// What one (batch, group) knows of its keys: hidden in the order of buckets, within a bucket of positions.
struct Sorted {
  std::vector<int32_t> start, order, place; // place: of a key in the order, -1 where it is hidden
  Floats keys, values;                      // [n][width], [n][up(out_width)]
};

static const float* row(const float* p, const int64_t* s, int64_t b, int64_t h, int64_t i) {
  return p + b * s[0] + h * s[1] + i * s[2];
}

static void code_keys(const Job& job, int64_t b, int64_t g, int64_t from, int64_t to) {
  int F = job.features, C = job.buckets, Cp = up(C);
  std::vector<float> packed((size_t)Cp * F), x(R * F), s(R * Cp);
  pack(job.table + g * C * F, F, C, F, packed.data());
  const float* bias = job.bias + g * C;
  for (int64_t i = from; i < to; i += R) {
    int n = std::min<int64_t>(R, to - i);
    for (int r = 0; r < R; r++) std::memcpy(&x[r * F], row(job.x, job.xs, b, g, i + std::min(r, n - 1)), F * 4);
    scores(x.data(), F, packed.data(), C, F, s.data(), Cp);
    for (int r = 0; r < n; r++) {
      int best = 0;
      float most = s[r * Cp] + bias[0];
      for (int c = 1; c < C; c++) {
        float y = s[r * Cp + c] + bias[c];
        if (y > most) { most = y; best = c; }
      }
      bool hidden = job.seen && !job.seen[b * job.keys + i + r];
      job.code[(b * job.groups + g) * job.keys + i + r] = hidden ? -1 : best;
    }
  }
}

static void sort_keys(const Job& job, int64_t b, int64_t g, Sorted& sorted) {
  int64_t L = job.keys;
  int C = job.buckets, D = job.width, E = job.out_width, Ep = up(E);
  const int32_t* code = job.code + (b * job.groups + g) * L;
  sorted.start.assign(C + 1, 0);
  for (int64_t j = 0; j < L; j++) if (code[j] >= 0) sorted.start[code[j] + 1]++;
  for (int c = 0; c < C; c++) sorted.start[c + 1] += sorted.start[c];
  std::vector<int32_t> next(sorted.start.begin(), sorted.start.end() - 1);
  int64_t n = sorted.start[C];
  sorted.order.resize(n);
  sorted.place.assign(L, -1);
  sorted.keys = Floats(n * D + 16);
  sorted.values = Floats(n * Ep + 16);
  for (int64_t j = 0; j < L; j++) {
    if (code[j] < 0) continue;
    int64_t at = next[code[j]]++;
    sorted.order[at] = j;
    sorted.place[j] = at;
    std::memcpy(sorted.keys.data() + at * D, row(job.k, job.ks, b, g, j), D * 4);
    float* value = sorted.values.data() + at * Ep;
    std::memcpy(value, row(job.v, job.vs, b, g, j), E * 4);
    std::memset(value + E, 0, (Ep - E) * 4);
  }
}

// The positions of queries that share a local window, and which keys they meet there.
struct Span {
  int64_t first, last;  // rows of queries
  int64_t low, high;    // local keys; buckets hold those below low and, without causality, those from high on
};

static std::vector<Span> spans(const Job& job) {
  std::vector<Span> found;
  int64_t W = job.window;
  if (!W) {
    int64_t part = std::max<int64_t>(1024, (job.rows + 2 * job.threads - 1) / (2 * job.threads));
    for (int64_t i = 0; i < job.rows; i += part)
      found.push_back({i, std::min(job.rows, i + part), job.keys, job.keys});
    return found;
  }
  for (int64_t i = 0; i < job.rows;) {
    int64_t block = (i + job.offset) / W, end = std::min(job.rows, (block + 1) * W - job.offset);
    int64_t low = std::min(job.keys, std::max<int64_t>(0, (block - 1) * W));
    int64_t high = job.causal ? job.keys : std::min(job.keys, (block + 2) * W);
    found.push_back({i, end, low, high});
    i = end;
  }
  return found;
}

// Sums over the keys of each bucket that a span may see: [C][D + Ep], counts [C].
struct Sums {
  int D, Ep, C;
  std::vector<float> sum;
  std::vector<int64_t> count;
  Sums(const Job& job)
      : D(job.width), Ep(up(job.out_width)), C(job.buckets), sum((size_t)C * (D + Ep)), count(C) {}
  void add(const Sorted& sorted, const int32_t* code, int64_t from, int64_t to, float sign) {
    for (int64_t j = from; j < to; j++) {
      int c = code[j];
      if (c < 0) continue;
      float* s = &sum[(size_t)c * (D + Ep)];
      const float *k = sorted.keys.data() + (size_t)sorted.place[j] * D;
      const float *v = sorted.values.data() + (size_t)sorted.place[j] * Ep;
      for (int d = 0; d < D; d++) s[d] += sign * k[d];
      for (int e = 0; e < Ep; e++) s[D + e] += sign * v[e];
      count[c] += sign > 0 ? 1 : -1;
    }
  }
  // Means [C][D], [C][Ep] and logarithms of the counts, -inf for a bucket of none.
  void means(std::vector<float>& k, std::vector<float>& v, std::vector<float>& logs) const {
    for (int c = 0; c < C; c++) {
      float f = count[c] > 0 ? 1.f / count[c] : 0.f;
      for (int d = 0; d < D; d++) k[(size_t)c * D + d] = f * sum[(size_t)c * (D + Ep) + d];
      for (int e = 0; e < Ep; e++) v[(size_t)c * Ep + e] = f * sum[(size_t)c * (D + Ep) + D + e];
      logs[c] = count[c] > 0 ? std::log((float)count[c]) : -INFINITY;
    }
  }
};
"""
