// Additive bias of scores by position and by time (docs/ops.md), and the gradients of its tables.
//
// A bias by position depends on the distance of a query from a key, so all of a row's are one line of numbers under a
// head: the table, whose ends are repeated. A query's part of the line is read as it lies. Bins of times are the same
// under all heads: they are found once for a row, if its queries and keys are not too many to be kept.
#pragma once

#include "cpu/kernels/bias_tables.h"
#include "cpu/kernels/key_range.h"
#include "cpu/kernels/memory.h"

INTERFORMER_ISA_BEGIN

inline bool has_bias(const AttentionProblem& p) {
    return p.position_bias.table || p.time_bias.table;
}

// The lines and bins of one row under one key/value head.
template <typename A>
class BiasRow {
  public:
    static constexpr int64_t kMaxBins = 1 << 20;  // kept for a row, at most

    // `block_bins`: those of the scores that are computed at once, for longer rows. `backward`: lines run with the
    // keys, and there is memory for sums of gradients.
    BiasRow(const AttentionProblem& p, int64_t block_bins, bool backward, Arena& arena) : p_(p), backward_(backward) {
        const int64_t q_per_kv = p.heads / p.kv_heads;
        stride_ = round_up(p.max_queries + p.max_keys, kPanel<A>) + 2 * kPanel<A>;
        entries_ = p.time_bias.entries;
        lines_ = arena.allocate<A>(p.position_bias.table ? q_per_kv * stride_ : 0);
        line_grads_ = arena.allocate<A>(p.position_bias.table && backward ? q_per_kv * stride_ : 0);
        bin_grads_ = arena.allocate<A>(p.time_bias.table && backward ? q_per_kv * entries_ * W : 0);
        const int64_t row_bins = (p.max_queries * q_per_kv + kPanel<A>)*round_up(p.max_keys, kPanel<A>);
        bins_ = arena.allocate<int32_t>(p.time_bias.table ? max(min(row_bins, kMaxBins), block_bins) : 0);
    }

    bool given() const { return has_bias(p_); }

    // `whole`: its queries are computed together. Else it keeps no bins.
    void begin_row(const RowOfHead& row, bool whole = true) {
        whole_ = whole;
        known_ = row_.index == row.index && row_.q_per_kv > 0;  // under an earlier head
        row_ = row;
        // Distances p - j of the queries' places and keys; of two ends, one is the line's first.
        const int64_t least = p_.variant.queries_at_end ? row.keys : row.keys - row.query_tokens;
        const int64_t most = p_.variant.queries_at_end ? row.keys : row.history();
        origin_ = backward_ ? most : row.keys - 1 - least;
        length_ = most - least + row.keys;
        for (int64_t h = 0; h < row.q_per_kv; ++h) {
            if (p_.position_bias.table) make_line(h);
            if (backward_ && p_.position_bias.table) fill(line_grads_ + h * stride_, stride_, A(0));
            if (backward_ && p_.time_bias.table) fill(bin_grads_ + h * entries_ * W, entries_ * W, A(0));
        }
    }

  protected:
    static constexpr int64_t W = kLanes<A>, L = TimeBins::L;

    int64_t place(int64_t token) const { return p_.variant.queries_at_end ? row_.keys : row_.place(token); }
    // The heads of the row's queries among those of a table's gradient, and of a table.
    int64_t head(int64_t h) const { return row_.kv_head * row_.q_per_kv + h; }
    const A* table(const BiasTable& x, int64_t h) const { return static_cast<const A*>(x.table) + head(h) * x.head; }
    int64_t most_distance() const { return p_.position_bias.entries / 2; }

    // The table's entry at a place of the line.
    int64_t entry_at(int64_t place) const {
        const int64_t distance = backward_ ? origin_ - place : place - origin_, most = most_distance();
        return min(max(distance, -most), most) + most;
    }
    void make_line(int64_t h) {
        const A* from = table(p_.position_bias, h);
        A* line = lines_ + h * stride_;
        for (int64_t place = 0; place < length_; ++place) line[place] = from[entry_at(place)];
        fill(line + length_, 2 * kPanel<A>, A(0));
    }

    // The times of as many lanes as a vector of scores has.
    struct Times {
        Vector<int64_t> x[W / L];
    };
    template <typename TimeAt>
    static Times times_of(TimeAt&& time_at) {
        Times times{};
        for (int64_t lane = 0; lane < W; ++lane) times.x[lane / L][lane % L] = time_at(lane);
        return times;
    }
    const int64_t* times_q() const {
        return p_.times_q + (p_.query_begins ? p_.query_begins[row_.index] : row_.index * p_.queries);
    }
    const int64_t* times_k() const { return p_.times_k + p_.key_begins[row_.index]; }

    const AttentionProblem& p_;
    const bool backward_;
    RowOfHead row_{-1, 0, 0, 0, 0};
    int64_t stride_, entries_, origin_ = 0, length_ = 0;
    A *lines_, *line_grads_, *bin_grads_;
    int32_t* bins_;
    bool known_ = false;  // whether bins that are kept are there
    bool whole_ = true;
};

// Bias of scores with queries in lanes, [key, N vectors of queries].
template <typename A>
class LaneBias : public BiasRow<A> {
  public:
    LaneBias(const AttentionProblem& p, int64_t block_keys, Arena& arena)
        : BiasRow<A>(p, kPanel<A> * block_keys, false, arena) {}

    // Adds to the scores of the queries [r, r + count), of which the last one is repeated, and keys [j, j + keys).
    template <int N>
    void add(int64_t r, int64_t count, int64_t j, int64_t keys, A* scores) const {
        if (p_.position_bias.table) add_by_position<N>(r, count, j, keys, scores);
        if (p_.time_bias.table) add_by_time<N>(r, count, j, keys, scores);
    }

  private:
    using BiasRow<A>::W, BiasRow<A>::p_, BiasRow<A>::row_;
    using Index = typename IndexOf<A>::type;

    template <int N>
    void add_by_position(int64_t r, int64_t count, int64_t j, int64_t keys, A* scores) const {
        const int64_t first = this->place(row_.token(r)) + this->origin_ - j;
        if (row_.q_per_kv == 1 && p_.variant.queries_at_end) {
            for (int64_t k = 0; k < keys; ++k)
                for (int n = 0; n < N; ++n) add(Vector<A>{} + this->lines_[first - k], scores + (k * N + n) * W);
        } else if (row_.q_per_kv == 1 && !row_.is_target(r + count - 1)) {
            for (int64_t k = 0; k < keys; ++k)
                for (int n = 0; n < N; ++n)
                    add(load_vector(this->lines_ + first - k + n * W), scores + (k * N + n) * W);
        } else {
            for (int n = 0; n < N; ++n) {
                Vector<Index> places{};
                for (int64_t lane = 0; lane < W; ++lane) {
                    const int64_t query = r + min(n * W + lane, count - 1), token = row_.token(query);
                    const int64_t line = (query - token * row_.q_per_kv) * this->stride_;
                    places[lane] = static_cast<Index>(line + this->place(token) + this->origin_ - j);
                }
                for (int64_t k = 0; k < keys; ++k) add(gathered<A>(this->lines_ - k, places), scores + (k * N + n) * W);
            }
        }
    }
    static INTERFORMER_INLINE void add(Vector<A> bias, A* scores) { store_vector(scores, load_vector(scores) + bias); }

    template <int N>
    void add_by_time(int64_t r, int64_t count, int64_t j, int64_t keys, A* scores) const {
        constexpr int64_t kQueries = N * W;
        // A tile's lanes beyond the last query lie where another tile would; they are the last one's.
        const bool kept = row_.queries() + kPanel<A> <= BiasRow<A>::kMaxBins / max(row_.keys, 1) && this->whole_;
        int32_t* bins = kept ? this->bins_ + r * row_.keys + j * kQueries : this->bins_;
        if (!kept || !this->known_) find_bins<N>(r, count, j, keys, bins);
        if (row_.q_per_kv == 1 || p_.time_bias.head == 0)
            return TableValues<A>(this->table(p_.time_bias, 0), this->entries_).add(bins, keys * kQueries, scores);
        for (int n = 0; n < N; ++n) {
            Vector<Index> tables{};
            for (int64_t lane = 0; lane < W; ++lane) {
                const int64_t query = r + min(n * W + lane, count - 1);
                tables[lane] = static_cast<Index>((query - row_.token(query) * row_.q_per_kv) * p_.time_bias.head);
            }
            for (int64_t k = 0; k < keys; ++k)
                add(gathered<A>(this->table(p_.time_bias, 0), load_bins<A>(bins + k * kQueries + n * W) + tables),
                    scores + k * kQueries + n * W);
        }
    }

    template <int N>
    void find_bins(int64_t r, int64_t count, int64_t j, int64_t keys, int32_t* to) const {
        const TimeBins time_bins(p_.time_edges, this->entries_);
        for (int64_t lane = 0; lane < N * W; lane += W)
            time_bins.find(
                this->times_of([&](int64_t i) { return this->times_q()[row_.token(r + min(lane + i, count - 1))]; }).x,
                this->times_k() + j, keys, to + lane, N * W);
    }
};

// Bias of scores with keys in lanes, [query, key], in the backward.
template <typename A>
class KeyBias : public BiasRow<A> {
  public:
    KeyBias(const AttentionProblem& p, int64_t block_scores, Arena& arena)
        : BiasRow<A>(p, block_scores + 2 * round_up(p.max_keys, kPanel<A>), true, arena) {}

    // Finds the bins of the queries [r, r + count) and of the keys in the ranges.
    void begin_block(int64_t r, int64_t count, const ColumnRanges& ranges) {
        if (!p_.time_bias.table) return;
        const int64_t first = row_.token(r), tokens = row_.token(r + count - 1) + 1 - first;
        const int64_t stride = round_up(row_.keys, kPanel<A>);
        const bool kept = row_.query_tokens <= BiasRow<A>::kMaxBins / max(stride, 1);
        first_token_ = kept ? 0 : first;
        if (kept && this->known_) return;
        const TimeBins time_bins(p_.time_edges, this->entries_);
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += W)
                time_bins.find(
                    this->times_of([&](int64_t lane) { return this->times_k()[min(j + lane, row_.keys - 1)]; }).x,
                    this->times_q() + first, tokens, bins_of(first) + j, stride);
    }

    void add(int64_t r, const ColumnRanges& ranges, A* scores) const {
        const int64_t token = row_.token(r), h = r - token * row_.q_per_kv;
        if (p_.position_bias.table) {
            const A* line = this->lines_ + h * this->stride_ + this->origin_ - this->place(token);
            for (int i = 0; i < ranges.n; ++i)
                for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; ++j) scores[j] += line[j];
        }
        if (!p_.time_bias.table) return;
        const TableValues<A> values(this->table(p_.time_bias, h), this->entries_);
        for (int i = 0; i < ranges.n; ++i) {
            const int64_t j = ranges.r[i].begin;
            values.add(bins_of(token) + j, ranges.r[i].end - j, scores + j);
        }
    }

    void add_gradients(int64_t r, const ColumnRanges& ranges, const A* d_scores) const {
        const int64_t token = row_.token(r), h = r - token * row_.q_per_kv;
        if (p_.position_bias.table) {
            A* line = this->line_grads_ + h * this->stride_ + this->origin_ - this->place(token);
            for (int i = 0; i < ranges.n; ++i)
                for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += W)
                    store_vector(line + j, load_vector(line + j) + load_vector(d_scores + j));
        }
        if (!p_.time_bias.table) return;
        A* grads = this->bin_grads_ + h * this->entries_ * W;
        const int32_t* bins = bins_of(token);
        for (int i = 0; i < ranges.n; ++i)
            for (int64_t j = ranges.r[i].begin; j < ranges.r[i].end; j += W) add_to_bins(bins + j, d_scores + j, grads);
    }

    // After the last block of the row under its head: adds to the sums of the tables' gradients.
    void finish_row() const {
        const int64_t group = p_.row_groups[row_.index];
        for (int64_t h = 0; h < row_.q_per_kv; ++h) {
            const auto sums = [&](const BiasTable& x) {
                return x.grads + (group * p_.heads + this->head(h)) * x.entries;
            };
            if (p_.position_bias.table) {
                double* to = sums(p_.position_bias);
                const A* line = this->line_grads_ + h * this->stride_;
                for (int64_t place = 0; place < this->length_; ++place) to[this->entry_at(place)] += line[place];
            }
            if (!p_.time_bias.table) continue;
            double* to = sums(p_.time_bias);
            const A* grads = this->bin_grads_ + h * this->entries_ * W;
            for (int64_t bin = 0; bin < this->entries_; ++bin)
                to[bin] += reduce_lanes<A>(load_vector(grads + bin * W), Plus{});
        }
    }

  private:
    using BiasRow<A>::W, BiasRow<A>::p_, BiasRow<A>::row_;

    int32_t* bins_of(int64_t token) const {
        return this->bins_ + (token - first_token_) * round_up(row_.keys, kPanel<A>);
    }

    // Sums by bin and lane: neighbours, which often share a bin, do not wait for each other.
    static INTERFORMER_INLINE void add_to_bins(const int32_t* bins, const A* d_scores, A* grads) {
        using Index = typename IndexOf<A>::type;
        const Vector<Index> places = load_bins<A>(bins);
        if (!any<A>(places != bins[0])) {
            A* to = grads + bins[0] * W;
            return store_vector(to, load_vector(to) + load_vector(d_scores));
        }
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < W; ++lane) grads[bins[lane] * W + lane] += d_scores[lane];
    }

    int64_t first_token_ = 0;
};

INTERFORMER_ISA_END
