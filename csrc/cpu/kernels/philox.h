// Dropout of weights (docs/ops.md): the random words are Philox4x32 of 7 rounds (Salmon et al., 2011). A counter gives
// the words of four neighbouring keys of one query. Words lie in the low halves of lanes of 64 bits, since products of
// two words have as many; the high halves have no meaning.
#pragma once

#include <type_traits>

#include "cpu/attention_problem.h"
#include "cpu/kernels/isa.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

INTERFORMER_ISA_BEGIN

using Words = Vector<uint64_t>;

// The products of the low halves with a word.
INTERFORMER_INLINE Words word_products(Words x, uint32_t factor) {
#if defined(__AVX512F__)
    return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)(Words{} + factor));
#elif defined(__AVX2__) && !defined(INTERFORMER_WIDE)
    return (Words)_mm256_mul_epu32((__m256i)x, (__m256i)(Words{} + factor));
#elif defined(__SSE2__) && !defined(INTERFORMER_WIDE)
    return (Words)_mm_mul_epu32((__m128i)x, (__m128i)(Words{} + factor));
#else
    return (x & 0xffffffffu) * factor;
#endif
}

// Counters, or their words.
struct Counters {
    Words c[4];
};

class Philox {
  public:
    explicit Philox(const Dropout& dropout) {
        for (int round = 0; round < kRounds; ++round)
            for (int i = 0; i < 2; ++i)
                keys_[round][i] = dropout.seed[i] + static_cast<uint32_t>(round) * (i == 0 ? 0x9E3779B9u : 0xBB67AE85u);
    }

    // A query's part of a counter after two rounds, which is the same for all keys.
    struct Query {
        Words second, fourth, product;
    };
    INTERFORMER_INLINE Query query(Words head, Words low, Words high) const {
        const Words product = word_products(low, kFactors[1]);
        return {product, high ^ keys_[0][1], word_products((product >> 32) ^ head ^ keys_[0][0], kFactors[0])};
    }

    // The words of a query and four keys from key `4 * block` on; `block_products` are those of the block's number.
    static INTERFORMER_INLINE Words block_products(Words block) { return word_products(block, kFactors[0]); }
    INTERFORMER_INLINE Counters words(const Query& query, Words block_products) const {
        const Words third = word_products((block_products >> 32) ^ query.fourth, kFactors[1]);
        Counters x{{(third >> 32) ^ query.second ^ keys_[1][0], third,
                    (query.product >> 32) ^ block_products ^ keys_[1][1], query.product}};
#pragma GCC unroll 8
        for (int round = 2; round < kRounds; ++round) {
            const Words first = word_products(x.c[0], kFactors[0]), other = word_products(x.c[2], kFactors[1]);
            x = {{(other >> 32) ^ x.c[1] ^ keys_[round][0], other, (first >> 32) ^ x.c[3] ^ keys_[round][1], first}};
        }
        return x;
    }

  private:
    static constexpr int kRounds = 7;
    static constexpr uint32_t kFactors[2] = {0xD2511F53u, 0xCD9E8D57u};
    uint64_t keys_[kRounds][2];
};

// Words as unsigned lanes of the width of A.
template <typename A>
using WordsOf = Vector<std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>>;

// Vectors of 64-bit lanes for a vector of A.
template <typename A>
constexpr int kWordParts = 8 / sizeof(A);

template <typename A>
INTERFORMER_INLINE WordsOf<A> joined_words(const Words* parts) {
    if constexpr (sizeof(A) == 8) {
        return parts[0] & 0xffffffffu;
    } else {
        Vector<int32_t> low;
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<float>; ++lane) low[lane] = 2 * lane;
        return __builtin_shuffle((Vector<uint32_t>)parts[0], (Vector<uint32_t>)parts[1], low);
    }
}

// Dropout with queries in lanes: a vector of queries of one row.
template <typename A>
class QueryDropout {
  public:
    static constexpr int64_t W = kLanes<A>;

    // `query_of(lane)` and `head_of(lane)` are a lane's query, by its number in the call, and head.
    template <typename QueryOf, typename HeadOf>
    void set(const Philox& philox, QueryOf&& query_of, HeadOf&& head_of) {
        constexpr int64_t kPart = W / kWordParts<A>;
        for (int part = 0; part < kWordParts<A>; ++part) {
            Words head{}, low{}, high{};
            for (int64_t lane = 0; lane < kPart; ++lane) {
                const auto number = static_cast<uint64_t>(query_of(part * kPart + lane));
                head[lane] = static_cast<uint64_t>(head_of(part * kPart + lane));
                low[lane] = number & 0xffffffffu;
                high[lane] = number >> 32;
            }
            queries_[part] = philox.query(head, low, high);
        }
    }

    // The words of the keys `4 * block`, ... under each query.
    INTERFORMER_INLINE void words(const Philox& philox, int64_t block, WordsOf<A>* to) const {
        const Words products = Philox::block_products(Words{} + (static_cast<uint64_t>(block) & 0xffffffffu));
        Counters parts[kWordParts<A>];
#pragma GCC unroll 2
        for (int part = 0; part < kWordParts<A>; ++part) parts[part] = philox.words(queries_[part], products);
#pragma GCC unroll 4
        for (int word = 0; word < 4; ++word) {
            Words of_parts[kWordParts<A>];
#pragma GCC unroll 2
            for (int part = 0; part < kWordParts<A>; ++part) of_parts[part] = parts[part].c[word];
            to[word] = joined_words<A>(of_parts);
        }
    }

  private:
    Philox::Query queries_[kWordParts<A>];
};

// Dropout with keys in lanes: the words of one query and the keys [first, first + count), in memory for `kMaxKeys` of
// them and some more.
class KeyDropout {
  public:
    static constexpr int64_t kMaxKeys = 128;

    KeyDropout(const Philox& philox, int64_t query, int64_t head)
        : philox_(philox),
          query_(philox.query(Words{} + static_cast<uint64_t>(head),
                              Words{} + (static_cast<uint64_t>(query) & 0xffffffffu),
                              Words{} + (static_cast<uint64_t>(query) >> 32))) {}

    // Returns the first key's word.
    const uint32_t* words(int64_t first, int64_t count) {
        Words lanes{}, low{}, high{};
#pragma GCC unroll 8
        for (int lane = 0; lane < L; ++lane) {
            lanes[lane] = static_cast<uint64_t>(lane);
            low[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * L);
            high[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * L + L / 2);
        }
        uint32_t* to = words_;
        for (int64_t block = first / 4; 4 * block < first + count; block += L, to += 4 * L) {
            const Words blocks = lanes + (static_cast<uint64_t>(block) & 0xffffffffu);
            const Counters x = philox_.words(query_, Philox::block_products(blocks));
            const Words even = (x.c[0] & 0xffffffffu) | x.c[1] << 32, odd = (x.c[2] & 0xffffffffu) | x.c[3] << 32;
            const Words before = __builtin_shuffle(even, odd, low), after = __builtin_shuffle(even, odd, high);
            std::memcpy(to, &before, sizeof before);
            std::memcpy(to + 2 * L, &after, sizeof after);
        }
        return words_ + first % 4;
    }

  private:
    static constexpr int64_t L = kLanes<uint64_t>;

    const Philox& philox_;
    const Philox::Query query_;
    uint32_t words_[kMaxKeys + 8 * L];
};

// A vector of words as unsigned lanes of the width of A.
template <typename A>
INTERFORMER_INLINE WordsOf<A> load_words(const uint32_t* from) {
    if constexpr (sizeof(A) == 4) {
        return load_vector(from);
    } else {
        WordsOf<A> x;
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) x[lane] = from[lane];
        return x;
    }
}

INTERFORMER_ISA_END
