"""The C++ of the gradient of bucketed attention; it stands behind ``tasks.attention.kernel_forward``."""

BACKWARD = r"""
// Gradients of one (batch, group); keys and values in the order of buckets.
struct Gradients {
  std::vector<float> q, k, v, delta;
};

// What a tile of rows brings along: scaled queries, gradients of the output, log-sum-exp and delta.
struct Tile {
  int m = 0;
  int32_t at[R];
  std::vector<float> q, grad;
  float lse[R], delta[R];
};

static void fill(Tile& tile, const Piece& piece, const Gradients& made, const int32_t* at, int m) {
  const Job& job = piece.job;
  int E = piece.E, Ep = piece.Ep;
  tile.m = m;
  tile.q.resize(R * piece.D);
  tile.grad.assign(R * Ep, 0.f);
  piece.queries(at, m, tile.q.data(), nullptr);
  for (int r = 0; r < m; r++) {
    int64_t h = piece.head(at[r]), i = piece.position(at[r]);
    tile.at[r] = at[r];
    tile.lse[r] = job.lse[(piece.b * job.heads + h) * job.rows + i];
    tile.delta[r] = made.delta[at[r]];
    std::memcpy(&tile.grad[r * Ep], job.grad + ((piece.b * job.rows + i) * job.heads + h) * E, E * 4);
  }
}

// From scores s [R][lds] of n keys to the gradients; s becomes that of the scores.
static void backward(Tile& tile, const Piece& piece, Gradients& made, float* s, float* dp, int lds, const float* keys,
                     const float* values, const float* packed_values, int n, float* __restrict dk,
                     float* __restrict dv) {
  int D = piece.D, Ep = piece.Ep;
  scores(tile.grad.data(), Ep, packed_values, n, Ep, dp, lds);
  for (int r = 0; r < tile.m; r++) {
    const float* __restrict q = &tile.q[r * D];
    const float* __restrict grad = &tile.grad[r * Ep];
    float* __restrict dq = &made.q[(size_t)tile.at[r] * D];
    bool alive = tile.lse[r] != -INFINITY;
    for (int j = 0; j < n; j++) {
      float score = s[r * lds + j];
      float p = alive && score != -INFINITY ? std::exp(score - tile.lse[r]) : 0.f;
      float a = p * (dp[r * lds + j] - tile.delta[r]);
      s[r * lds + j] = a;
      if (p == 0.f) continue;
      const float* __restrict key = keys + (size_t)j * D;
      float* __restrict k = dk + (size_t)j * D;
      float* __restrict v = dv + (size_t)j * Ep;
      for (int d = 0; d < D; d++) { dq[d] += a * key[d]; k[d] += a * q[d]; }
      for (int e = 0; e < Ep; e++) v[e] += p * grad[e];
    }
  }
}

static void backward_buckets(Piece& piece, Gradients& made, const std::vector<Span>& spans,
                             const std::vector<int32_t>& span_of) {
  int D = piece.D, Ep = piece.Ep;
  std::vector<int32_t> start, who, lows(spans.size()), highs(spans.size());
  visits(piece, start, who);
  std::vector<float> packed, packed_values, s, dp;
  Tile tile;
  for (int c = 0; c < piece.C; c++) {
    int from = piece.sorted.start[c], n = piece.sorted.start[c + 1] - from, lds = up(n);
    if (!n || start[c] == start[c + 1]) continue;
    const float* keys = piece.sorted.keys.data() + (size_t)from * D;
    const float* values = piece.sorted.values.data() + (size_t)from * Ep;
    packed.resize((size_t)lds * D);
    packed_values.resize((size_t)lds * Ep);
    s.resize(R * lds);
    dp.resize(R * lds);
    pack(keys, D, n, D, packed.data());
    pack(values, Ep, n, Ep, packed_values.data());
    for (size_t i = 0; i < spans.size(); i++) edges(&piece.sorted.order[from], n, spans[i], lows[i], highs[i]);
    for (int32_t t = start[c]; t < start[c + 1]; t += R) {
      fill(tile, piece, made, &who[t], std::min(R, start[c + 1] - t));
      scores(tile.q.data(), D, packed.data(), n, D, s.data(), lds);
      for (int r = 0; r < tile.m; r++) {
        int32_t span = span_of[piece.position(who[t + r])];
        for (int x = lows[span]; x < highs[span]; x++) s[r * lds + x] = -INFINITY;
      }
      backward(tile, piece, made, s.data(), dp.data(), lds, keys, values, packed_values.data(), n,
               &made.k[(size_t)from * D], &made.v[(size_t)from * Ep]);
    }
  }
}

static void backward_local(Piece& piece, Gradients& made, const std::vector<Span>& spans) {
  const Job& job = piece.job;
  int D = piece.D, E = piece.E, Ep = piece.Ep;
  std::vector<float> packed, packed_values, keys, values, s, dp, dk, dv;
  Tile tile;
  for (const Span& span : spans) {
    int64_t low = span.low, high = std::min(job.keys, job.causal ? span.last + job.offset : span.high);
    if (high <= low) continue;
    int n = high - low, lds = up(n);
    keys.assign((size_t)n * D, 0.f);
    values.assign((size_t)n * Ep, 0.f);
    dk.assign((size_t)n * D, 0.f);
    dv.assign((size_t)n * Ep, 0.f);
    packed.resize((size_t)lds * D);
    packed_values.resize((size_t)lds * Ep);
    s.resize(R * lds);
    dp.resize(R * lds);
    for (int j = 0; j < n; j++) {
      std::memcpy(&keys[(size_t)j * D], row(job.k, job.ks, piece.b, piece.g, low + j), D * 4);
      std::memcpy(&values[(size_t)j * Ep], row(job.v, job.vs, piece.b, piece.g, low + j), E * 4);
    }
    pack(keys.data(), D, n, D, packed.data());
    pack(values.data(), Ep, n, Ep, packed_values.data());
    for (int64_t h = 0; h < piece.per; h++)
      for (int64_t i = span.first; i < span.last; i += R) {
        int32_t at[R];
        int m = std::min<int64_t>(R, span.last - i);
        for (int r = 0; r < m; r++) at[r] = h * piece.rows + i + r;
        fill(tile, piece, made, at, m);
        scores(tile.q.data(), D, packed.data(), n, D, s.data(), lds);
        for (int r = 0; r < m; r++)
          for (int c = 0; c < n; c++)
            if (hides(job, piece.b, i + r, low + c)) s[r * lds + c] = -INFINITY;
        backward(tile, piece, made, s.data(), dp.data(), lds, keys.data(), values.data(), packed_values.data(), n,
                 dk.data(), dv.data());
      }
    for (int j = 0; j < n; j++) {
      int32_t at = piece.sorted.place[low + j];
      if (at < 0) continue;
      for (int d = 0; d < D; d++) made.k[(size_t)at * D + d] += dk[(size_t)j * D + d];
      for (int e = 0; e < Ep; e++) made.v[(size_t)at * Ep + e] += dv[(size_t)j * Ep + e];
    }
  }
}

// Adds sign * shares [C][D + Ep] of their buckets to the keys of these positions.
static void share(const Piece& piece, Gradients& made, const std::vector<float>& shares, int64_t from, int64_t to,
                  float sign) {
  int D = piece.D, Ep = piece.Ep;
  for (int64_t j = from; j < to; j++) {
    if (piece.code[j] < 0) continue;
    const float* s = &shares[(size_t)piece.code[j] * (D + Ep)];
    size_t at = piece.sorted.place[j];
    for (int d = 0; d < D; d++) made.k[at * D + d] += sign * s[d];
    for (int e = 0; e < Ep; e++) made.v[at * Ep + e] += sign * s[D + e];
  }
}

static void backward_means(Piece& piece, Gradients& made, const std::vector<Span>& spans) {
  const Job& job = piece.job;
  int D = piece.D, Ep = piece.Ep, C = piece.C, Cp = piece.Cp;
  Sums sums(job);
  std::vector<float> k((size_t)C * D), v((size_t)C * Ep), logs(C);
  std::vector<float> packed((size_t)Cp * D), packed_values((size_t)Cp * Ep);
  std::vector<float> s(R * Cp), dp(R * Cp), dk((size_t)C * D), dv((size_t)C * Ep), q(R * D);
  std::vector<float> total((size_t)C * (D + Ep), 0.f), part((size_t)C * (D + Ep));
  const float* spread = job.spread + piece.g * C;
  sums.add(piece.sorted, piece.code, 0, job.causal ? spans.back().low : job.keys, 1.f);
  Tile tile;
  for (size_t index = spans.size(); index-- > 0;) {
    const Span& span = spans[index];
    if (!job.causal) sums.add(piece.sorted, piece.code, span.low, span.high, -1.f);
    sums.means(k, v, logs);
    pack(k.data(), D, C, D, packed.data());
    pack(v.data(), Ep, C, Ep, packed_values.data());
    std::fill(dk.begin(), dk.end(), 0.f);
    std::fill(dv.begin(), dv.end(), 0.f);
    for (int64_t h = 0; h < piece.per; h++)
      for (int64_t i = span.first; i < span.last; i += R) {
        int32_t at[R];
        float squares[R];
        int m = std::min<int64_t>(R, span.last - i);
        for (int r = 0; r < m; r++) at[r] = h * piece.rows + i + r;
        fill(tile, piece, made, at, m);
        piece.queries(at, m, q.data(), squares);
        piece.masses(q.data(), squares, packed.data(), logs.data(), s.data());
        for (int r = 0; r < m; r++)
          for (int p = 0; p < job.probes; p++)
            if (piece.probes(at[r])[p] >= 0) s[r * Cp + piece.probes(at[r])[p]] = -INFINITY;
        backward(tile, piece, made, s.data(), dp.data(), Cp, k.data(), v.data(), packed_values.data(), C, dk.data(),
                 dv.data());
        for (int r = 0; r < m; r++) {
          float f = 0.f;
          for (int c = 0; c < C; c++) f += s[r * Cp + c] * spread[c];
          for (int d = 0; d < D; d++) made.q[(size_t)at[r] * D + d] += f * tile.q[r * D + d];
        }
      }
    for (int c = 0; c < C; c++) {
      float f = sums.count[c] > 0 ? 1.f / sums.count[c] : 0.f;
      float* to = &part[(size_t)c * (D + Ep)];
      for (int d = 0; d < D; d++) to[d] = f * dk[(size_t)c * D + d];
      for (int e = 0; e < Ep; e++) to[D + e] = f * dv[(size_t)c * Ep + e];
    }
    for (size_t x = 0; x < part.size(); x++) total[x] += part[x];
    if (job.causal) {
      int64_t before = index ? spans[index - 1].low : 0;
      share(piece, made, total, before, span.low, 1.f);
      sums.add(piece.sorted, piece.code, before, span.low, -1.f);
    } else {
      share(piece, made, part, span.low, span.high, -1.f);
      sums.add(piece.sorted, piece.code, span.low, span.high, 1.f);
    }
  }
  if (!job.causal) share(piece, made, total, 0, job.keys, 1.f);
}

extern "C" void lathe_backward(const Job* given) {
  const Job& job = *given;
  std::vector<Sorted> sorted = prepare(job, false);
  std::vector<Span> found = spans(job);
  std::vector<int32_t> span_of = spans_of_rows(job, found);
  int D = job.width, E = job.out_width, Ep = up(E);
  parallel(job.batch * job.groups, job.threads, [&](int64_t n) {
    Piece piece(job, sorted[n], n / job.groups, n % job.groups, 0, job.rows);
    int64_t rows = piece.per * job.rows;
    size_t keys = sorted[n].order.size();
    Gradients made;
    made.q.assign(rows * D, 0.f);
    made.k.assign(keys * D, 0.f);
    made.v.assign(keys * Ep, 0.f);
    made.delta.resize(rows);
    for (int64_t at = 0; at < rows; at++) {
      int64_t place = ((piece.b * job.rows + piece.position(at)) * job.heads + piece.head(at)) * E;
      float delta = 0.f;
      for (int e = 0; e < E; e++) delta += job.grad[place + e] * job.out[place + e];
      made.delta[at] = delta;
    }
    if (job.residual) backward_means(piece, made, found);
    if (job.window) backward_local(piece, made, found);
    if (job.probes) backward_buckets(piece, made, found, span_of);
    for (int64_t at = 0; at < rows; at++) {
      float* dq = job.dq + ((piece.b * job.heads + piece.head(at)) * job.rows + piece.position(at)) * D;
      for (int d = 0; d < D; d++) dq[d] = job.scale * made.q[at * D + d];
    }
    for (size_t x = 0; x < keys; x++) {
      int64_t j = n * job.keys + sorted[n].order[x];
      std::memcpy(job.dk + j * D, &made.k[x * D], D * 4);
      std::memcpy(job.dv + j * E, &made.v[x * Ep], E * 4);
    }
  });
}
"""
