// Runs a grid on the CPU: a few blocks at once, in turns, the others when one of them is done; the threads of a block
// as fibers that pass control on where they wait for one another, and nowhere else. A kernel that does not order what
// its threads share shows it by wrong results under some order of the fibers.
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
};

struct Options {
    uint64_t seed = 0;         // 0: fibers run in the order of their threads, else in an order drawn anew at every turn
    bool lazy_copies = true;   // copies land when they are waited for, else when they are started
    unsigned last_blocks = 0;  // of a grid only so many run, its last ones; 0: all
    unsigned resident = 2;     // blocks that the device says it holds at once; more than 8 run in turns of 8
    bool noise = false;        // exponentials err by as much as a GPU's may
};
extern Options options;

// Whether the grid is one that a device accepts, given what shared memory was allowed to the kernel.
bool allow_shared(const void* kernel, int bytes);
bool fits(const void* kernel, const Grid& grid);
// Runs every thread of the grid; throws std::runtime_error where threads wait for one another in vain.
void run(const Grid& grid, const std::function<void()>& thread);

// ---------------------------------------------------------------- called by the threads

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

// What all lanes of a warp do at once. Each brings `sent`; when the last has come, `execute` makes what each receives
// from what all sent. Lanes that bring different names, or not all lanes, are an error.
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

// Copies to shared memory that do not wait, of the thread that asks.
void start_copy(void* to, const void* from, int size, int bytes);
void close_copies();
void wait_copies(int open);

}  // namespace emulation
