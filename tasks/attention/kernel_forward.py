"""The C++ of the forward pass of bucketed attention; it stands behind ``tasks.attention.kernel_source``."""

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
