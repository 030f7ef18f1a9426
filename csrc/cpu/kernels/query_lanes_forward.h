// Forward of attention for rows of many queries, a tile of queries in lanes at a time (query_lanes.h): scores = K Q',
// probs = P(scores), attn_out = probs' V, then gate and residual.
#pragma once

#include "cpu/kernels/attention_row.h"
#include "cpu/kernels/query_lanes.h"
#include "cpu/kernels/score_lanes.h"

INTERFORMER_ISA_BEGIN

// A thread's memory. Strides are those of `Sizes`.
template <typename T>
struct QueryLanesWorkspace {
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;
    static constexpr int64_t kQueries = kPanel<A>;  // of a tile
    static constexpr int64_t kKeys = 128;           // of a block

    S* keys;         // [max_keys, head_stride]
    S* values;       // [max_keys, value_stride]; the keys where v is k
    X* value_rows;   // [operands of max_keys, value_stride]; pairs only
    S* query_rows;   // [kQueries, head_stride]
    X* queries;      // [operands of head_stride, kQueries], transposed
    A* scores;       // [kKeys, kQueries]
    A* inv_row_sum;  // [kQueries], and likewise lse
    A* lse;
    A* attn_out;  // [kQueries, value_stride]
    A* scratch;   // the channels of one token
    LaneBias<A> bias;
    int64_t padded_queries;  // under a key/value head, of shared queries
    int64_t bytes;

    // Whether the rows' queries are the same, and few enough to be kept transposed.
    static bool shares_queries(const AttentionProblem& p, const Sizes<T>& sizes) {
        constexpr int64_t kMaxNumbers = 1 << 14;
        if (p.queries * sizes.q_per_kv <= kFewQueries) return false;
        return !p.q.begins && p.q.row == 0 && !p.rope.cos && p.queries * p.heads * sizes.head_stride <= kMaxNumbers;
    }

    QueryLanesWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, void* memory)
        : QueryLanesWorkspace(p, sizes, Arena(memory)) {}
    QueryLanesWorkspace(const AttentionProblem& p, const Sizes<T>& sizes, Arena arena) : bias(p, kKeys, arena) {
        keys = arena.allocate<S>(p.max_keys * sizes.head_stride);
        values = p.v_is_k ? keys : arena.allocate<S>(p.max_keys * sizes.value_stride);
        value_rows = kNumbers<X> == 1 ? nullptr : arena.allocate<X>(operands<X>(p.max_keys) * sizes.value_stride);
        query_rows = arena.allocate<S>(kQueries * sizes.head_stride);
        padded_queries = shares_queries(p, sizes) ? round_up(p.queries * sizes.q_per_kv, kQueries) : 0;
        queries = arena.allocate<X>(operands<X>(sizes.head_stride) * max(kQueries, padded_queries * p.kv_heads));
        scores = arena.allocate<A>(kKeys * kQueries);
        inv_row_sum = arena.allocate<A>(kQueries);
        lse = arena.allocate<A>(kQueries);
        attn_out = arena.allocate<A>(kQueries * sizes.value_stride);
        scratch = arena.allocate<A>(max(sizes.head_stride, sizes.value_stride));
        bytes = arena.bytes();
    }
};

// The addresses of successive queries of a row under one key/value head, without a division for each.
template <typename E>
class QueryWalk {
  public:
    // `first` is the address of query `r`.
    QueryWalk(E* first, const RowTensor& x, int64_t q_per_kv, int64_t r)
        : at_(first),
          head_(x.head),
          next_token_(x.token - (q_per_kv - 1) * x.head),
          heads_(q_per_kv),
          left_(q_per_kv == 1 ? 1 : q_per_kv - r % q_per_kv) {}

    INTERFORMER_INLINE E* at() const { return at_; }
    INTERFORMER_INLINE void advance() {
        const bool last_head = --left_ == 0;
        at_ += last_head ? next_token_ : head_;
        left_ = last_head ? heads_ : left_;
    }

  private:
    E* at_;
    int64_t head_, next_token_, heads_, left_;
};

// Prefetches the next row to the second level of cache, a part of it with each tile of this row. Read head by head when
// it is due, short rows would arrive at a third of the memory's rate.
template <typename T>
class RowAhead {
  public:
    // `steps` parts.
    void begin(const AttentionProblem& p, int64_t row, int64_t steps) {
        const int64_t queries = p.query_counts ? p.query_counts[row] : p.queries, keys = p.key_counts[row];
        const bool shared = !p.q.begins && p.q.row == 0;
        set(0, p.q, row, shared ? 0 : queries, p.heads * p.head_size, steps);
        set(1, p.k, row, keys, p.kv_heads * p.head_size, steps);
        set(2, p.v, row, p.v_is_k ? 0 : keys, p.kv_heads * p.value_size, steps);
        set(3, p.out, row, queries, p.heads * p.value_size, steps);
    }
    void stop() {
        for (Tokens& tokens : tokens_) tokens = {};
    }

    // The next part of q (0), k (1), v (2) or the output (3).
    INTERFORMER_INLINE void prefetch(int tensor) {
        Tokens& tokens = tokens_[tensor];
        tokens.all.fetch(tokens.next, tokens.next + tokens.part);
        tokens.next += tokens.part;
    }

  private:
    struct Tokens {
        RangeAhead all;
        int64_t part = 0, next = 0;
    };

    void set(int tensor, const RowTensor& x, int64_t row, int64_t count, int64_t numbers, int64_t steps) {
        constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
        const int64_t bytes = numbers * kSize;
        if (count * bytes > kShortRowBytes) count = 0;  // long rows are fetched as they are read
        const int64_t part = static_cast<int32_t>(count + steps - 1) / static_cast<int32_t>(steps);
        const char* first = reinterpret_cast<const char*>(address<T>(x, row, 0, 0));
        tokens_[tensor] = {{{first, x.token * kSize, bytes}, count}, part, 0};
    }

    Tokens tokens_[4];
};

template <typename T>
class QueryLanesForward {
  public:
    using A = Acc<T>;
    using S = Stored<T>;
    using X = Operand<T>;

    QueryLanesForward(const AttentionProblem& problem, void* memory)
        : p_(problem),
          sizes_(problem),
          value_stride_(round_up(problem.value_size, kLanes<A>)),
          work_(problem, sizes_, memory),
          epilogue_(problem, work_.scratch),
          shared_queries_(Workspace::shares_queries(problem, sizes_)),
          plain_(!problem.gate.given && !problem.residual.given && !problem.attn_out.given && !problem.dropout.some &&
                 problem.out.channel == 1 && problem.value_size % kLanes<A> == 0) {}

    int64_t bytes() const { return work_.bytes; }

    // All queries of the row, or one shard of them. Tiles begin anew with each shard.
    void run_row(const AttentionTask& task, int64_t batch_row, int64_t kv_head) {
        const Row row(p_, sizes_, batch_row, kv_head, work_.scratch);
        const int64_t shard = task.shard;
        if (row.queries() == 0) return;
        if (shared_queries_ && batch_row == task.first_row && kv_head == task.first_head) transpose_shared(task);
        if (kv_head == task.first_head) look_ahead(task, batch_row, row.queries());
        const int64_t first = shard < 0 ? 0 : shard * row.shard();
        const Operands operands = fetching(read(row, row.shard_columns(shard)), row, task, first);
        const int64_t last = min(shard < 0 ? row.queries() : first + row.shard(), row.queries());
        if (work_.bias.given()) work_.bias.begin_row(row.variant().row(), row.shards() == 1);
        for (int64_t r = first; r < last; r += row.shard()) run_shard(row, r, min(row.shard(), last - r), operands);
    }

  private:
    using Row = AttentionRow<T>;
    using Workspace = QueryLanesWorkspace<T>;

    static constexpr int64_t kMaxTiles = 64;  // of a row, up to which the next one is prefetched

    // Transposes queries that all rows share, once for a task.
    void transpose_shared(const AttentionTask& task) const {
        for (int64_t head = task.first_head; head < task.last_head; ++head) {
            const Row row(p_, sizes_, task.first_row, head, work_.scratch);
            for (int64_t r = 0; r < row.queries(); r += kPanel<A>) {
                const int64_t count = min(kPanel<A>, row.queries() - r);
                if (count > kLanes<A>)
                    load_queries<2>(row, r, count, shared_tile(head, r));
                else
                    load_queries<1>(row, r, count, shared_tile(head, r));
            }
        }
    }

    static void run(const AttentionProblem& p, const AttentionTask& task, void* memory) {
        QueryLanesForward forward(p, memory);
        forward.begin(task);
        for_each_row(task, [&](int64_t row, int64_t kv_head) { forward.run_row(task, row, kv_head); });
    }

    struct Operands {
        KeyScalars<X> keys;
        Matrix<const X> values;
        RangeAhead keys_ahead{}, values_ahead{};
        int64_t fetching = -1;  // the query whose tile fetches them
    };

    // Keys and values are read in place where they are neither widened nor rotated, and whole operands.
    Operands read(const Row& row, const ColumnRanges& ranges) const {
        if constexpr (kNumbers<X> > 1) {
            const Matrix<const T> values{row.key_at(p_.v, 0), p_.v.token};
            const bool in_place =
                !p_.rope.cos && p_.head_size % 2 == 0 && p_.k.token % 2 == 0 && row.reads_in_place(p_.k, p_.head_size);
            const Matrix<const T> keys = in_place ? Matrix<const T>{row.key_at(p_.k, 0), p_.k.token}
                                                  : row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
            return {{reinterpret_cast<const X*>(keys.data), keys.stride / 2},
                    row.tokens_along_rows(values, ranges, p_.value_size, work_.value_rows)};
        } else {
            const Matrix<const X> keys = row.tokens(p_.k, ranges, p_.head_size, p_.rope.cos, work_.keys);
            return {{keys.data, keys.stride},
                    p_.v_is_k ? keys : row.tokens(p_.v, ranges, p_.value_size, false, work_.values)};
        }
    }

    // The operands with what the first tile fetches of a long row, beside the scores of as many keys: of tokens that
    // are read in place the keys of the next block and the values of this one, and the next head's of those that are
    // copied.
    Operands fetching(Operands operands, const Row& row, const AttentionTask& task, int64_t first) const {
        const int64_t index = row.index(), head = row.kv_head(), keys = row.keys();
        if (!is_long_row<T>(p_, index)) return operands;
        const NextHead next = NextHead::of<T>(p_, task, index, head);
        const auto lie_in = [&](const X* data, const RowTensor& x) {
            return static_cast<const void*>(data) == row.key_at(x, 0);
        };
        operands.keys_ahead = lie_in(operands.keys.data, p_.k)
                                  ? head_ahead<T>(p_.k, index, head, keys, p_.head_size).from(Workspace::kKeys)
                                  : next.keys;
        operands.values_ahead = lie_in(operands.values.data, p_.v)
                                    ? head_ahead<T>(p_.v, index, head, p_.v_is_k ? 0 : keys, p_.value_size)
                                    : next.values;
        operands.fetching = first;
        return operands;
    }

    void look_ahead(const AttentionTask& task, int64_t row, int64_t queries) {
        const int64_t tiles = (queries + kPanel<A> - 1) / kPanel<A>;
        if (row + 1 < task.last_row && task.last_head - task.first_head == p_.kv_heads && tiles < kMaxTiles)
            ahead_.begin(p_, row + 1, tiles * p_.kv_heads);
        else
            ahead_.stop();
    }

    void run_shard(const Row& row, int64_t first, int64_t count, const Operands& operands) {
        int64_t r = first;
        for (const int64_t last = first + count; r < last; r += kPanel<A>)
            if (last - r > kLanes<A>)
                run_tile<2>(row, r, min(kPanel<A>, last - r), operands);
            else
                run_tile<1>(row, r, last - r, operands);
    }

    template <int N>
    void run_tile(const Row& row, int64_t r, int64_t count, const Operands& operands) {
        constexpr int64_t kQueries = N * kLanes<A>;
        const Matrix<A> attn_out{work_.attn_out, value_stride_};
        const X* queries = shared_queries_ ? shared_tile(row.kv_head(), r) : work_.queries;
        if (!shared_queries_) load_queries<N>(row, r, count, work_.queries);
        ahead_.prefetch(0);
        ScoreLanes<T, N> lanes(row.variant(), r, count, work_.bias.given() ? &work_.bias : nullptr);
        const ColumnRanges ranges = lanes.columns();
        bool add = false;
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin, end = min(ranges.r[i].end, row.keys()); j < end;
                 j += Workspace::kKeys) {
                const int64_t keys = min(Workspace::kKeys, end - j);
                scores<N>(operands, queries, j, keys, r == operands.fetching);
                ahead_.prefetch(1);
                if (lanes.scores_to_probs(j, keys, work_.scores) && add) rescale(lanes.rescale(), count);
                ahead_.prefetch(2);
                lane_sums<X, N>(operands_in<X>(work_.scores), operands.values.from(j / kNumbers<X>), count,
                                value_stride_, operands_of(keys), attn_out, add);
                ahead_.prefetch(3);
                add = true;
            }
        static_assert(Workspace::kKeys % kNumbers<X> == 0 && kQueries <= Workspace::kQueries);
        if (!add) fill(work_.attn_out, count * value_stride_, A(0));
        lanes.inv_row_sums(work_.inv_row_sum);
        if (p_.lse.given) {
            lanes.lse(work_.lse);
            QueryWalk<A> walk = walk_from<A>(row, p_.lse, r);
            for (int64_t i = 0; i < count; ++i, walk.advance()) *walk.at() = work_.lse[i];
        }
        if (plain_) return write_plain(row, r, count);
        for (int64_t i = 0; i < count; ++i) {
            A* sums = attn_out.from(i).data;
            if (p_.variant.score.softmax) normalise<T>(sums, p_.value_size, work_.inv_row_sum[i], p_.weight_scale);
            epilogue_.finish(row.query(r + i), sums, p_.value_size);
        }
    }

    // The scores of keys [j, j + count), in portions where tokens are fetched beside them.
    template <int N>
    void scores(const Operands& operands, const X* queries, int64_t j, int64_t count, bool fetches) const {
        const int64_t step = fetches ? kLaneRows<N> : count;
        for (int64_t i = 0; i < count; i += step) {
            const int64_t keys = min(step, count - i);
            if (fetches) {
                operands.keys_ahead.fetch(j + i, j + i + keys);
                operands.values_ahead.fetch(j + i, j + i + keys);
            }
            lane_scores<X, N>(operands.keys.from(j + i, 0), queries, keys, operands_of(p_.head_size),
                              work_.scores + i * N * kLanes<A>);
        }
    }

    X* shared_tile(int64_t kv_head, int64_t r) const {
        return work_.queries + (kv_head * work_.padded_queries + r) * operands_of(sizes_.head_stride);
    }

    static int64_t operands_of(int64_t count) { return operands<X>(count); }

    template <typename E>
    QueryWalk<E> walk_from(const Row& row, const RowTensor& x, int64_t r) const {
        return {row.query(r).template at<E>(x), x, sizes_.q_per_kv, r};
    }

    // Further lanes repeat the last query.
    template <int N>
    void load_queries(const Row& row, int64_t r, int64_t count, X* to) const {
        constexpr int64_t W = kLanes<A>;
        const bool whole = kNumbers<X> == 1 ? p_.head_size % W == 0 : p_.head_size % 2 == 0;
        if (whole && p_.q.channel == 1 && !p_.rope.cos && p_.variant.scale > 0) {
            const T* lanes[N * W];
            QueryWalk<T> walk = walk_from<T>(row, p_.q, r);
            for (int64_t i = 0; i < N * W; ++i) {
                lanes[i] = walk.at();
                if (i + 1 < count) walk.advance();
            }
            for (int n = 0; n < N; ++n)
                transpose_queries<X>(lanes + n * W, operands_of(p_.head_size), to + n * W, N * W);
            return;
        }
        const Matrix<const S> rows = row.query_rows(r, count, work_.query_rows);
        const S* lanes[N * W];
        for (int64_t i = 0; i < N * W; ++i) lanes[i] = rows.from(min(i, count - 1)).data;
        for (int n = 0; n < N; ++n)
            transpose_queries<X>(lanes + n * W, operands_of(sizes_.head_stride), to + n * W, N * W);
    }

    void rescale(const A* factors, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            A* sums = work_.attn_out + i * value_stride_;
            for (int64_t c = 0; c < value_stride_; c += kLanes<A>)
                store_vector(sums + c, load_vector(sums + c) * factors[i]);
        }
    }

    // Outputs of whole vectors without gate and residual.
    void write_plain(const Row& row, int64_t r, int64_t count) const {
        const bool softmax = p_.variant.score.softmax;
        QueryWalk<T> walk = walk_from<T>(row, p_.out, r);
        for (int64_t i = 0; i < count; ++i, walk.advance()) {
            const A* sums = work_.attn_out + i * value_stride_;
            const Vector<A> factor = Vector<A>{} + work_.inv_row_sum[i];
            T* to = walk.at();
            for (int64_t c = 0; c < p_.value_size; c += kLanes<A>) {
                const Vector<A> sum = load_vector(sums + c);
                store_wide(to + c, softmax ? mean_of<T>(sum, factor) : sum);
            }
        }
    }

    const AttentionProblem& p_;
    const Sizes<T> sizes_;
    const int64_t value_stride_;  // numbers between queries' sums of values: whole vectors
    Workspace work_;
    const Epilogue<T> epilogue_;
    const bool shared_queries_, plain_;
    RowAhead<T> ahead_;
};

INTERFORMER_ISA_END
