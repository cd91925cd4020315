"""The C++ of bucketed attention, as text: it is compiled on the machine where it runs (``tasks.attention.kernel``), and
being a Python module it joins the keys of the steps that use it."""

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

FORWARD = r"""
// Running softmax of the rows of one piece of work.
struct State {
  int Ep;
  Floats acc;
  std::vector<float> most, sum;
  State(int64_t rows, int Ep) : Ep(Ep), acc(rows * Ep), most(rows, -INFINITY), sum(rows, 0.f) {
    std::memset(acc.data(), 0, sizeof(float) * rows * Ep);
  }
};

// Merges scores s [R][lds] and values v [n][Ep] into the rows `at`; columns from n on are ignored.
static void merge(State& state, const int32_t* at, int rows, float* s, int lds, const float* v, int n) {
  float alpha[R];
  float* acc[R];
  float spare[R * 512];
  int wide = (n + 7) / 8 * 8;
  for (int r = 0; r < R; r++) {
    float* y = s + r * lds;
    if (r >= rows) {
      std::memset(y, 0, sizeof(float) * wide);
      acc[r] = spare + r * 512;
      std::memset(acc[r], 0, sizeof(float) * state.Ep);
      alpha[r] = 1.f;
      continue;
    }
    for (int j = n; j < wide; j++) y[j] = -INFINITY;
    v8 m = load(y);
    for (int j = 8; j < wide; j += 8) { v8 x = load(y + j); m = x > m ? x : m; }
    float before = state.most[at[r]], most = before;
    for (int i = 0; i < 8; i++) most = std::max(most, m[i]);
    float base = most == -INFINITY ? 0.f : most;
    v8 total = all(0.f);
    for (int j = 0; j < wide; j += 8) { v8 p = vexp(load(y + j) - all(base)); store(y + j, p); total += p; }
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += total[i];
    alpha[r] = before == -INFINITY ? 0.f : std::exp(before - most);
    if (most == -INFINITY) alpha[r] = 1.f;
    state.sum[at[r]] = state.sum[at[r]] * alpha[r] + sum;
    state.most[at[r]] = most;
    acc[r] = state.acc.data() + (size_t)at[r] * state.Ep;
  }
  add_values(s, lds, v, n, state.Ep, acc, alpha);
}

// One (batch, group) and the rows of some spans; row (h, i) has the number (h - first head) * rows + i - first.
struct Piece {
  const Job& job;
  const Sorted& sorted;
  int64_t b, g, first, rows, per;
  int D, Dq, E, Ep, C, Cp;
  const int32_t* code;
  Piece(const Job& job, const Sorted& sorted, int64_t b, int64_t g, int64_t first, int64_t rows)
      : job(job), sorted(sorted), b(b), g(g), first(first), rows(rows), per(job.heads / job.groups), D(job.width),
        Dq(job.width), E(job.out_width), Ep(up(E)), C(job.buckets), Cp(up(C)),
        code(job.code + (b * job.groups + g) * job.keys) {}
  int64_t head(int32_t at) const { return g * per + at / rows; }
  int64_t position(int32_t at) const { return first + at % rows; }
  int32_t* probes(int32_t at) const {
    return job.probe + ((b * job.heads + head(at)) * job.rows + position(at)) * job.probes;
  }
  // Scaled queries [R][D] and their squared lengths; rows behind the end repeat the last.
  void queries(const int32_t* at, int n, float* q, float* squares) const {
    for (int r = 0; r < R; r++) {
      const float* from = row(job.q, job.qs, b, head(at[std::min(r, n - 1)]), position(at[std::min(r, n - 1)]));
      float square = 0.f;
      for (int d = 0; d < D; d++) { q[r * D + d] = from[d] * job.scale; square += q[r * D + d] * q[r * D + d]; }
      if (squares) squares[r] = square;
    }
  }
  // Estimated logarithms of each bucket's mass, [R][Cp], -inf for a bucket without keys.
  void masses(const float* q, const float* squares, const float* packed, const float* logs, float* s) const {
    scores(q, D, packed, C, D, s, Cp);
    const float* spread = job.spread + g * C;
    for (int r = 0; r < R; r++) {
      float half = 0.5f * squares[r];
      for (int c = 0; c < C; c++) s[r * Cp + c] += logs[c] + half * spread[c];
      for (int c = C; c < Cp; c++) s[r * Cp + c] = -INFINITY;
    }
  }
};

// The `count` buckets of most mass, in falling order; -1 where fewer have keys.
static void choose(const float* s, int C, int count, int32_t* found) {
  std::vector<std::pair<float, int32_t>> best;
  best.reserve(count + 1);
  for (int c = 0; c < C; c++) {
    if (s[c] == -INFINITY || ((int)best.size() == count && s[c] <= best.back().first)) continue;
    auto place = best.end();
    while (place != best.begin() && (place - 1)->first < s[c]) --place;
    best.insert(place, {s[c], c});
    if ((int)best.size() > count) best.pop_back();
  }
  for (int p = 0; p < count; p++) found[p] = p < (int)best.size() ? best[p].second : -1;
}

static void probe(Piece& piece, State& state, const std::vector<Span>& spans, size_t from, size_t to) {
  const Job& job = piece.job;
  int D = piece.D, C = piece.C, Cp = piece.Cp;
  Sums sums(job);
  std::vector<float> k((size_t)C * D), v((size_t)C * piece.Ep), logs(C), packed((size_t)Cp * D), s(R * Cp), q(R * D);
  float squares[R];
  int64_t done = 0;
  if (!job.causal) sums.add(piece.sorted, piece.code, 0, job.keys, 1.f);
  for (size_t index = from; index < to; index++) {
    const Span& span = spans[index];
    if (job.causal) {
      sums.add(piece.sorted, piece.code, done, span.low, 1.f);
      done = span.low;
    } else {
      sums.add(piece.sorted, piece.code, span.low, span.high, -1.f);
    }
    sums.means(k, v, logs);
    pack(k.data(), D, C, D, packed.data());
    std::vector<int32_t> all_rows;
    for (int64_t h = 0; h < piece.per; h++)
      for (int64_t i = span.first; i < span.last; i++) all_rows.push_back(h * piece.rows + i - piece.first);
    for (size_t t = 0; t < all_rows.size(); t += R) {
      int n = std::min<size_t>(R, all_rows.size() - t);
      piece.queries(&all_rows[t], n, q.data(), squares);
      piece.masses(q.data(), squares, packed.data(), logs.data(), s.data());
      for (int r = 0; r < n; r++) {
        int32_t* found = piece.probes(all_rows[t + r]);
        choose(&s[r * Cp], C, job.probes, found);
        for (int p = 0; p < job.probes; p++) if (found[p] >= 0) s[r * Cp + found[p]] = -INFINITY;
      }
      if (job.residual) merge(state, &all_rows[t], n, s.data(), Cp, v.data(), C);
    }
    if (!job.causal) sums.add(piece.sorted, piece.code, span.low, span.high, 1.f);
  }
}

// Whether query i does not see key j of its local window.
static bool hides(const Job& job, int64_t b, int64_t i, int64_t j) {
  int64_t far = i + job.offset - j;
  if (job.seen && !job.seen[b * job.keys + j]) return true;
  return (job.causal && far < 0) || (job.band && std::abs(far) >= job.band);
}

static void local(Piece& piece, State& state, const std::vector<Span>& spans, size_t from, size_t to) {
  const Job& job = piece.job;
  int D = piece.D, Ep = piece.Ep;
  std::vector<float> packed, values, q(R * D), s(R * BLOCK);
  for (size_t index = from; index < to; index++) {
    const Span& span = spans[index];
    int64_t low = span.low, high = std::min(job.keys, job.causal ? span.last + job.offset : span.high);
    if (high <= low) continue;
    int64_t n = high - low;
    packed.resize((size_t)up(n) * D);
    values.resize((size_t)n * Ep);
    pack(row(job.k, job.ks, piece.b, piece.g, low), job.ks[2], n, D, packed.data());
    for (int64_t j = 0; j < n; j++)
      std::memcpy(&values[j * Ep], row(job.v, job.vs, piece.b, piece.g, low + j), piece.E * 4);
    for (int64_t h = 0; h < piece.per; h++) {
      for (int64_t i = span.first; i < span.last; i += R) {
        int32_t at[R];
        int m = std::min<int64_t>(R, span.last - i);
        for (int r = 0; r < m; r++) at[r] = h * piece.rows + i - piece.first + r;
        piece.queries(at, m, q.data(), nullptr);
        for (int64_t j = 0; j < n; j += BLOCK) {
          if (job.causal && low + j > i + m - 1 + job.offset) break;
          int count = std::min<int64_t>(BLOCK, n - j);
          scores(q.data(), D, &packed[(size_t)j * D], count, D, s.data(), BLOCK);
          for (int r = 0; r < m; r++)
            for (int c = 0; c < count; c++)
              if (hides(job, piece.b, i + r, low + j + c)) s[r * BLOCK + c] = -INFINITY;
          merge(state, at, m, s.data(), BLOCK, &values[(size_t)j * Ep], count);
        }
      }
    }
  }
}

// Which rows look into which bucket, sorted by bucket and then by row.
static void visits(const Piece& piece, std::vector<int32_t>& start, std::vector<int32_t>& who) {
  int P = piece.job.probes;
  int64_t all = piece.per * piece.rows;
  start.assign(piece.C + 1, 0);
  for (int64_t at = 0; at < all; at++)
    for (int p = 0; p < P; p++) if (piece.probes(at)[p] >= 0) start[piece.probes(at)[p] + 1]++;
  for (int c = 0; c < piece.C; c++) start[c + 1] += start[c];
  who.resize(start[piece.C]);
  std::vector<int32_t> next(start.begin(), start.end() - 1);
  for (int64_t at = 0; at < all; at++)
    for (int p = 0; p < P; p++) if (piece.probes(at)[p] >= 0) who[next[piece.probes(at)[p]]++] = at;
}

// Of the n keys of a bucket those before `low` and from `high` on, as places among them, are met by the span.
static void edges(const int32_t* order, int n, const Span& span, int32_t& low, int32_t& high) {
  low = std::lower_bound(order, order + n, span.low) - order;
  high = std::lower_bound(order, order + n, span.high) - order;
}

static void buckets(Piece& piece, State& state, const std::vector<Span>& spans, const std::vector<int32_t>& span_of) {
  const Job& job = piece.job;
  int D = piece.D, Ep = piece.Ep;
  std::vector<int32_t> start, who;
  visits(piece, start, who);
  std::vector<float> packed, q(R * D), s(R * BLOCK);
  std::vector<int32_t> lows(spans.size()), highs(spans.size());
  for (int c = 0; c < piece.C; c++) {
    int n = piece.sorted.start[c + 1] - piece.sorted.start[c];
    if (!n || start[c] == start[c + 1]) continue;
    const int32_t* order = &piece.sorted.order[piece.sorted.start[c]];
    const float* keys = piece.sorted.keys.data() + (size_t)piece.sorted.start[c] * D;
    const float* values = piece.sorted.values.data() + (size_t)piece.sorted.start[c] * Ep;
    packed.resize((size_t)up(n) * D);
    pack(keys, D, n, D, packed.data());
    for (size_t i = 0; i < spans.size(); i++) edges(order, n, spans[i], lows[i], highs[i]);
    for (int32_t t = start[c]; t < start[c + 1]; t += R) {
      int m = std::min(R, start[c + 1] - t);
      piece.queries(&who[t], m, q.data(), nullptr);
      int32_t low[R], high[R], end = 0;
      for (int r = 0; r < m; r++) {
        int32_t span = span_of[piece.position(who[t + r])];
        low[r] = lows[span];
        high[r] = highs[span];
        end = std::max(end, high[r] < n ? n : low[r]);
      }
      for (int j = 0; j < end; j += BLOCK) {
        int count = std::min(BLOCK, end - j);
        scores(q.data(), D, &packed[(size_t)j * D], count, D, s.data(), BLOCK);
        for (int r = 0; r < m; r++)
          for (int x = std::max(0, low[r] - j); x < std::min(count, high[r] - j); x++) s[r * BLOCK + x] = -INFINITY;
        merge(state, &who[t], m, s.data(), BLOCK, values + (size_t)j * Ep, count);
      }
    }
  }
}

static void write(const Piece& piece, const State& state) {
  const Job& job = piece.job;
  for (int64_t at = 0; at < piece.per * piece.rows; at++) {
    int64_t h = piece.head(at), i = piece.position(at);
    float* out = job.out + ((piece.b * job.rows + i) * job.heads + h) * piece.E;
    float f = state.sum[at] > 0 ? 1.f / state.sum[at] : 0.f;
    for (int e = 0; e < piece.E; e++) out[e] = f * state.acc.data()[(size_t)at * piece.Ep + e];
    job.lse[(piece.b * job.heads + h) * job.rows + i] =
        state.sum[at] > 0 ? state.most[at] + std::log(state.sum[at]) : -INFINITY;
  }
}

static std::vector<Sorted> prepare(const Job& job, bool code) {
  int64_t G = job.batch * job.groups, part = 512, parts = (job.keys + part - 1) / part;
  if (code)
    parallel(G * parts, job.threads, [&](int64_t n) {
      int64_t at = n / parts, from = n % parts * part;
      code_keys(job, at / job.groups, at % job.groups, from, std::min(job.keys, from + part));
    });
  std::vector<Sorted> sorted(G);
  parallel(G, job.threads, [&](int64_t n) { sort_keys(job, n / job.groups, n % job.groups, sorted[n]); });
  return sorted;
}

static std::vector<int32_t> spans_of_rows(const Job& job, const std::vector<Span>& found) {
  std::vector<int32_t> of(job.rows);
  for (size_t n = 0; n < found.size(); n++)
    for (int64_t i = found[n].first; i < found[n].last; i++) of[i] = n;
  return of;
}

extern "C" void lathe_forward(const Job* given) {
  const Job& job = *given;
  std::vector<Sorted> sorted = prepare(job, true);
  std::vector<Span> found = spans(job);
  std::vector<int32_t> span_of = spans_of_rows(job, found);
  int64_t G = job.batch * job.groups, parts = G < 2 * job.threads && found.size() > 1 ? 2 * job.threads : 1;
  parts = std::min<int64_t>(parts, found.size());
  parallel(G * parts, job.threads, [&](int64_t n) {
    int64_t at = n / parts, part = n % parts;
    size_t from = found.size() * part / parts, to = found.size() * (part + 1) / parts;
    int64_t first = found[from].first, rows = found[to - 1].last - first;
    Piece piece(job, sorted[at], at / job.groups, at % job.groups, first, rows);
    State state(piece.per * rows, piece.Ep);
    probe(piece, state, found, from, to);
    if (job.window) local(piece, state, found, from, to);
    if (job.probes) buckets(piece, state, found, span_of);
    write(piece, state);
  });
}
"""
