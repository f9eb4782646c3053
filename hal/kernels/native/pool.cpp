#include "pool.h"

#include <condition_variable>
#include <mutex>
#include <thread>

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace halyard {
namespace {

// A ticket holds all that a thread needs to claim a piece in one exchange:
//   job number (20 bits) | threads allowed (8) | pieces (18) | next piece (18)
// Job and function are read after a claim: they stay until the last claimed piece is done.
constexpr int NEXT = 18, COUNT = 18, THREADS = 8;
constexpr int64_t MAX_COUNT = (1 << COUNT) - 1, MAX_THREADS = (1 << THREADS) - 1;
constexpr int SPINS = 20000;  // looks for work before a thread sleeps: some hundred microseconds

inline int64_t next_of(uint64_t t) { return int64_t(t & ((1u << NEXT) - 1)); }
inline int64_t count_of(uint64_t t) { return int64_t((t >> NEXT) & ((1u << COUNT) - 1)); }
inline int64_t threads_of(uint64_t t) { return int64_t((t >> (NEXT + COUNT)) & MAX_THREADS); }

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::atomic<bool> forked{false};  // this process is a copy: the threads stayed with the original

struct Pool {
    alignas(64) std::atomic<uint64_t> ticket{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> sleeping{0};
    Piece piece = nullptr;
    const void* job = nullptr;
    std::mutex busy;  // held by the caller whose job runs
    std::mutex mutex;
    std::condition_variable wake;
    int64_t workers = 0;
    uint64_t number = 0;

    // Runs pieces while there are some. False if there were none.
    bool work(int64_t self) {
        bool worked = false;
        uint64_t seen = ticket.load(std::memory_order_acquire);
        while (next_of(seen) < count_of(seen) && self < threads_of(seen)) {
            if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            piece(job, next_of(seen));
            done.fetch_add(1, std::memory_order_release);
            worked = true;
            seen = ticket.load(std::memory_order_acquire);
        }
        return worked;
    }

    void loop(int64_t self) {
        int idle = 0;
        for (;;) {
            if (work(self)) idle = 0;
            else if (++idle < SPINS) pause();
            else {
                std::unique_lock<std::mutex> lock(mutex);
                sleeping.fetch_add(1);
                wake.wait(lock, [&] {
                    const uint64_t t = ticket.load();
                    return next_of(t) < count_of(t) && self < threads_of(t);
                });
                sleeping.fetch_sub(1);
                idle = 0;
            }
        }
    }

    void grow(int64_t threads) {
        // Never joined: they end with the process.
        for (; workers < threads - 1; workers++) std::thread([this, self = workers + 1] { loop(self); }).detach();
    }
};

Pool& pool() {
    static Pool* const one = [] {
        pthread_atfork(nullptr, nullptr, [] { forked = true; });
        return new Pool;  // never destroyed: its threads may outlive static objects
    }();
    return *one;
}

}  // namespace

void run_pieces(Piece piece, const void* job, int64_t count, int64_t threads) {
    Pool& p = pool();
    std::unique_lock<std::mutex> own(p.busy, std::try_to_lock);
    if (forked || !own.owns_lock() || count > MAX_COUNT) {  // nobody helps: go alone
        for (int64_t i = 0; i < count; i++) piece(job, i);
        return;
    }
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    p.grow(threads);
    p.piece = piece;
    p.job = job;
    p.done.store(0, std::memory_order_relaxed);
    p.number++;
    const uint64_t ticket = ((p.number << THREADS | uint64_t(threads)) << COUNT | uint64_t(count)) << NEXT;
    p.ticket.store(ticket);
    if (p.sleeping.load() > 0) {
        { std::lock_guard<std::mutex> lock(p.mutex); }
        p.wake.notify_all();
    }
    p.work(0);
    for (int spins = 0; p.done.load(std::memory_order_acquire) < count; spins++) {
        if (spins < SPINS) pause();
        else std::this_thread::yield();
    }
}

}  // namespace halyard
