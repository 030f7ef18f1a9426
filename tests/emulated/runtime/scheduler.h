// Runs a grid on the CPU: a few blocks at a time, interleaved, and the next block whenever one of them ends. The
// threads of a block are fibers, which pass control on where threads wait for one another, and nowhere else. A kernel
// that does not order its accesses to shared memory gives wrong results under some order of the fibers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulation {

constexpr unsigned kEveryLane = 0xffffffffu;

struct Grid {
    unsigned blocks, threads;
    size_t shared;
    const void* kernel = nullptr;  // by which memory traffic is counted
};

struct Options {
    uint64_t seed = 0;        // 0: fibers run in the order of their threads; else in an order drawn anew in every round
    bool lazy_copies = true;  // copies land when a thread waits for them; else when they start
    unsigned last_blocks = 0;  // only the last so many blocks of a grid run; 0: all
    unsigned resident = 2;     // blocks that the device reports to hold at once; at most 8 are interleaved
    bool noise = false;        // exponentials have the errors that a GPU's may have
};
extern Options options;

// Whether a device accepts the grid, given the shared memory that was allowed to the kernel.
bool allow_shared(const void* kernel, int bytes);
bool fits(const void* kernel, const Grid& grid);
// Runs every thread of the grid; throws std::runtime_error on a deadlock.
void run(const Grid& grid, const std::function<void()>& thread);

// ---------------------------------------------------------------- called by threads

struct Index {
    unsigned x, y, z;
};
extern Index thread_index, block_index, block_size, grid_size;

inline int lane() {
    return static_cast<int>(thread_index.x % 32);
}
char* shared_memory();

void block_barrier();
void warp_barrier(unsigned lanes);

// An instruction that all lanes of a warp execute together. Each lane passes `sent`; when the last lane has arrived,
// `execute` makes the `received` of every lane from all that was sent. It is an error if lanes pass different names, or
// if not all lanes take part.
using Execute = void (*)(const void* const* sent, void* const* received);
void collective(const char* name, unsigned lanes, const void* sent, void* received, Execute execute);

template <typename Sent, typename Received>
Received together(const char* name, unsigned lanes, const Sent& sent,
                  void (*execute)(const Sent* const* sent, Received* const* received)) {
    struct Both {
        Sent sent;
        void (*execute)(const Sent* const*, Received* const*);
    };
    Both mine{sent, execute};
    Received received;
    collective(name, lanes, &mine, &received, [](const void* const* all, void* const* to) {
        const Sent* from[32];
        Received* into[32];
        for (int i = 0; i < 32; ++i) {
            from[i] = &static_cast<const Both*>(all[i])->sent;
            into[i] = static_cast<Received*>(to[i]);
        }
        static_cast<const Both*>(all[0])->execute(from, into);
    });
    return received;
}

template <typename T>
T shuffle(const char* name, unsigned lanes, T x, int from) {
    struct Sent {
        T x;
        int from;
    };
    return together<Sent, T>(name, lanes, {x, from}, [](const Sent* const* sent, T* const* received) {
        for (int i = 0; i < 32; ++i) *received[i] = sent[sent[i]->from]->x;
    });
}

inline unsigned ballot(const char* name, unsigned lanes, bool vote) {
    return together<bool, unsigned>(name, lanes, vote, [](const bool* const* sent, unsigned* const* received) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(*sent[i]) << i;
        for (int i = 0; i < 32; ++i) *received[i] = votes;
    });
}

// Rows of 16 bytes that the lanes of a warp send to `ldmatrix`.
void matrix_load(const void* row);

// Asynchronous copies of the calling thread to shared memory.
void cp_async(void* to, const void* from, int size, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

}  // namespace emulation
