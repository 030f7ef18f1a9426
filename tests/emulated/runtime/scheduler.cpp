#include "scheduler.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulation's fibers are switched by x86-64 instructions"
#endif

// Saves the callee-saved registers, stores the stack pointer in `*from`, and resumes the stack `to`.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

Options options;
Index thread_index{0, 0, 0}, block_index{0, 0, 0}, block_size{1, 1, 1}, grid_size{1, 1, 1};

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxResident = 8;      // blocks at once; each has many stacks
constexpr size_t kShared = 101376;        // bytes of a block on every device from compute capability 8.0 on
constexpr size_t kSharedUnasked = 49152;  // bytes without cudaFuncSetAttribute

struct Copy {
    void* to;
    const void* from;
    int size, bytes;
};

// A barrier. Threads that wait at it go on when `round` changes.
struct Barrier {
    const char* name = nullptr;
    unsigned waiting = 0;
    uint64_t round = 0;
    const void* sent[32] = {};
    void* received[32] = {};
};

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    bool finished = true;
    const Barrier* waits_at = nullptr;
    uint64_t waits_since = 0;
    std::vector<std::vector<Copy>> groups;  // committed groups, oldest first
    std::vector<Copy> started;              // copies that are not committed
    void* sanitizer_state = nullptr;

    bool can_go_on() const { return !finished && (waits_at == nullptr || waits_at->round != waits_since); }
};

// A place for a resident block; one of the grid's blocks after another takes it.
struct Block {
    unsigned index = 0;
    unsigned running = 0;  // threads that have not returned
    Barrier barrier;
    Barrier warp_barriers[kMaxThreads / 32];
    WarpAccesses accesses[kMaxThreads / 32];
    std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
    std::vector<unsigned> order;
    alignas(128) char shared[kShared + 1024];
};

// State of the grid that runs; one at a time.
struct Running {
    Grid grid{};
    const std::function<void()>* body = nullptr;
    void* stack_pointer = nullptr;  // the scheduler's
    std::string failure;
    std::vector<std::unique_ptr<Block>> blocks;  // as many as have ever been resident at once
    Block* block = nullptr;                      // the block that runs now
    std::mt19937_64 random;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    void* sanitizer_state = nullptr;
    bool counts_accesses = false;  // a thread runs, and not an instruction that it executes for all lanes
    char* host_stack = nullptr;    // of the caller, whose frames hold the kernel's arguments
    size_t host_stack_size = 0;
} running;

std::mutex one_grid_at_a_time;
std::map<const void*, size_t> allowed;

// ---------------------------------------------------------------- fibers

Fiber& current() {
    return running.block->fibers[thread_index.x];
}

// AddressSanitizer must be told of every change of stacks.
void before_switch([[maybe_unused]] void** state, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(state, stack, size);
#endif
}
void after_switch([[maybe_unused]] void* state, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(state, stack, size);
#endif
}

void to_scheduler() {
    Fiber& fiber = current();
    before_switch(fiber.finished ? nullptr : &fiber.sanitizer_state, running.scheduler_stack,
                  running.scheduler_stack_size);
    emulation_switch(&fiber.stack_pointer, running.stack_pointer);
    after_switch(fiber.sanitizer_state, &running.scheduler_stack, &running.scheduler_stack_size);
}

void fiber_main() {
    after_switch(nullptr, &running.scheduler_stack, &running.scheduler_stack_size);
    (*running.body)();
    current().finished = true;
    to_scheduler();
    __builtin_unreachable();
}

void to_fiber(unsigned thread) {
    Fiber& fiber = running.block->fibers[thread];
    thread_index.x = thread;
    fiber.waits_at = nullptr;
    before_switch(&running.sanitizer_state, fiber.stack, kStack);
    running.counts_accesses = true;
    emulation_switch(&running.stack_pointer, fiber.stack_pointer);
    running.counts_accesses = false;
    after_switch(running.sanitizer_state, nullptr, nullptr);
}

void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) {
        const size_t guard = 4096;
        void* memory = mmap(nullptr, kStack + guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
        fiber.stack = static_cast<char*>(memory) + guard;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, kStack);  // clears the frames of the previous thread
#endif
    // Six registers, the entry, and an unused return address: at its entry the function's stack is aligned.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(&fiber_main);
    fiber.stack_pointer = top;
    fiber.finished = false;
    fiber.waits_at = nullptr;
    fiber.groups.clear();
    fiber.started.clear();
    fiber.sanitizer_state = nullptr;
}

[[noreturn]] void fail(const std::string& reason) {
    running.failure =
        reason + " (block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread_index.x) + ")";
    to_scheduler();
    __builtin_unreachable();
}

// ---------------------------------------------------------------- barriers

void wait_at(const Barrier& barrier) {
    Fiber& fiber = current();
    fiber.waits_at = &barrier;
    fiber.waits_since = barrier.round;
    to_scheduler();
}

// Arrives at a barrier; the last of `count` threads runs `last`. That thread gives way, too, so that all threads go on
// in the scheduler's order.
template <typename Last>
void arrive(Barrier& barrier, const char* name, unsigned count, Last&& last) {
    if (barrier.waiting > 0 && std::strcmp(barrier.name, name) != 0)
        fail(std::string(name) + " reached where other threads reached " + barrier.name);
    barrier.name = name;
    if (++barrier.waiting < count) return wait_at(barrier);
    running.counts_accesses = false;
    last();
    barrier.waiting = 0;
    ++barrier.round;
    to_scheduler();
}

// Lanes that have waited for one another make new requests of memory from here on.
void close_accesses(unsigned first_warp, unsigned last_warp) {
    if (!counting_memory) return;
    for (unsigned warp = first_warp; warp < last_warp; ++warp) running.block->accesses[warp].close(running.grid.kernel);
}

std::string waiting_threads() {
    std::string text;
    const auto add = [&](const Barrier& barrier, const std::string& where) {
        if (barrier.waiting > 0) text += ", " + std::to_string(barrier.waiting) + " threads at " + barrier.name + where;
    };
    add(running.block->barrier, "");
    for (unsigned warp = 0; warp < running.grid.threads / 32; ++warp)
        add(running.block->warp_barriers[warp], " of warp " + std::to_string(warp));
    return text;
}

// Fills shared memory with NaN, so that reads before a write show; bytes beyond the launch's are out of bounds.
void fresh_shared_memory(Block& block) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block.shared, sizeof block.shared);
#endif
    std::memset(block.shared, 0xff, running.grid.shared);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(block.shared + running.grid.shared, sizeof block.shared - running.grid.shared);
#endif
}

void begin_block(Block& block, unsigned index) {
    const unsigned threads = running.grid.threads;
    block.index = index;
    block.running = threads;
    fresh_shared_memory(block);
    block.barrier = {};
    std::fill_n(block.warp_barriers, threads / 32, Barrier{});
    for (unsigned i = 0; i < threads; ++i) prepare(block.fibers[i]);
    block.order.resize(threads);
    std::iota(block.order.begin(), block.order.end(), 0u);
}

// Runs every thread that can go on up to its next barrier. Blocks do not wait for one another.
void run_block(Block& block) {
    running.block = &block;
    block_index.x = block.index;
    if (options.seed != 0) std::shuffle(block.order.begin(), block.order.end(), running.random);
    bool moved = false;
    for (const unsigned thread : block.order) {
        if (!block.fibers[thread].can_go_on()) continue;
        moved = true;
        to_fiber(thread);
        if (!running.failure.empty()) throw std::runtime_error("emulation: " + running.failure);
        block.running -= block.fibers[thread].finished;
    }
    if (block.running == 0) close_accesses(0, running.grid.threads / 32);
    if (!moved)
        throw std::runtime_error("emulation: block " + std::to_string(block.index) +
                                 " waits in vain: " + std::to_string(running.grid.threads - block.running) +
                                 " threads have returned" + waiting_threads());
}

void find_host_stack() {
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) throw std::runtime_error("emulation: no stack");
    void* stack = nullptr;
    pthread_attr_getstack(&attributes, &stack, &running.host_stack_size);
    running.host_stack = static_cast<char*>(stack);
    pthread_attr_destroy(&attributes);
}

bool within(const void* address, const char* first, size_t size) {
    return address >= first && address < first + size;
}

// Counts an access to tensors or shared memory; a thread's own variables and arguments would be in registers.
void count_access(Access global, Access shared, const void* address, int bytes, const void* code) {
    const bool is_shared = within(address, running.block->shared, sizeof running.block->shared);
    if (!is_shared && (within(address, current().stack, kStack) || in_module(address) ||
                       within(address, running.host_stack, running.host_stack_size)))
        return;
    const LaneAccess mine{lane(), reinterpret_cast<uintptr_t>(address), bytes};
    running.block->accesses[thread_index.x / 32].add(is_shared ? shared : global, code, mine);
}

}  // namespace

void plain_access(bool writes, const void* address, int bytes, const void* code) {
    if (!running.counts_accesses) return;
    if (writes)
        count_access(Access::global_store, Access::shared_store, address, bytes, code);
    else
        count_access(Access::global_load, Access::shared_load, address, bytes, code);
}

void matrix_load(const void* row) {
    if (counting_memory) count_access(Access::global_load, Access::matrix_load, row, 16, __builtin_return_address(0));
}

// ---------------------------------------------------------------- grids

bool allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > kShared) return false;
    allowed[kernel] = static_cast<size_t>(bytes);
    return true;
}

bool fits(const void* kernel, const Grid& grid) {
    const auto entry = allowed.find(kernel);
    const size_t max_shared = entry == allowed.end() ? kSharedUnasked : std::max(kSharedUnasked, entry->second);
    return grid.blocks > 0 && grid.threads > 0 && grid.threads <= kMaxThreads && grid.threads % 32 == 0 &&
           grid.shared <= max_shared;
}

void run(const Grid& grid, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(one_grid_at_a_time);
    running.grid = grid;
    find_host_stack();
    block_size.x = grid.threads;
    grid_size.x = grid.blocks;
    running.body = &thread;
    running.failure.clear();
    running.random.seed(options.seed);
    unsigned next =
        options.last_blocks > 0 && options.last_blocks < grid.blocks ? grid.blocks - options.last_blocks : 0;
    const size_t max_resident = std::min(options.resident, kMaxResident);
    while (running.blocks.size() < max_resident) running.blocks.push_back(std::make_unique<Block>());
    std::vector<Block*> resident;
    for (; resident.size() < max_resident && next < grid.blocks; ++next) {
        resident.push_back(running.blocks[resident.size()].get());
        begin_block(*resident.back(), next);
    }
    while (!resident.empty()) {
        for (size_t i = 0; i < resident.size();) {
            run_block(*resident[i]);
            if (resident[i]->running > 0)
                ++i;
            else if (next < grid.blocks)
                begin_block(*resident[i], next++);
            else
                resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }
}

// ---------------------------------------------------------------- called by threads

char* shared_memory() {
    return running.block->shared;
}

void block_barrier() {
    arrive(running.block->barrier, "__syncthreads", running.grid.threads,
           [] { close_accesses(0, running.grid.threads / 32); });
}

void collective(const char* name, unsigned lanes, const void* sent, void* received, Execute execute) {
    if (lanes != kEveryLane) fail(std::string(name) + " for some lanes of a warp, which is not emulated");
    Barrier& barrier = running.block->warp_barriers[thread_index.x / 32];
    barrier.sent[lane()] = sent;
    barrier.received[lane()] = received;
    arrive(barrier, name, 32, [&] {
        const unsigned warp = thread_index.x / 32;
        close_accesses(warp, warp + 1);
        execute(barrier.sent, barrier.received);
    });
}

void warp_barrier(unsigned lanes) {
    collective("__syncwarp", lanes, nullptr, nullptr, [](const void* const*, void* const*) {});
}

namespace {

void land(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, static_cast<size_t>(copy.size - copy.bytes));
    }
}

bool aligned(const void* pointer, int size) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(size) == 0;
}

}  // namespace

void cp_async(void* to, const void* from, int size, int bytes) {
    if (!aligned(to, size) || !aligned(from, size)) fail("a copy of " + std::to_string(size) + " bytes is not aligned");
    if (bytes < 0 || bytes > size) fail("a copy of " + std::to_string(bytes) + " bytes of " + std::to_string(size));
    if (counting_memory) {
        const void* code = __builtin_return_address(0);
        if (bytes > 0) count_access(Access::copy, Access::shared_load, from, bytes, code);
        count_access(Access::global_store, Access::copy_store, to, size, code);
    }
    current().started.push_back({to, from, size, bytes});
    if (!options.lazy_copies) land({current().started.back()});
}

void cp_async_commit() {
    Fiber& fiber = current();
    fiber.groups.push_back(std::move(fiber.started));
    fiber.started.clear();
}

void cp_async_wait(int pending) {
    Fiber& fiber = current();
    while (fiber.groups.size() > static_cast<size_t>(pending)) {
        if (options.lazy_copies) land(fiber.groups.front());
        fiber.groups.erase(fiber.groups.begin());
    }
}

}  // namespace emulation
